"""`fleecing demo`: the whole job on a made-up disk, verified byte by byte.

    make a disk --> serve it --> snapshot --> pull with TRIM --> compare --> report
                    guest writes =====================>

The server is a process of its own, started as an operator would; the guest and the pull are clients in this one.
"""

from __future__ import annotations

import os
import random
import shlex
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from types import FrameType
from typing import Any, Final

import click

from fleecing.cli.control_client import ControlClient
from fleecing.cli.demo_contents import SECTOR, Contents, Versions, differing_sectors
from fleecing.cli.demo_guest import Journal, Writer, one_instant, touched_clusters
from fleecing.cli.demo_report import DemoReport, PullDisplay, say
from fleecing.cli.demo_server import DISK, DemoServer
from fleecing.cli.params import CLUSTER_SIZE, Checked
from fleecing.client.dial import connect
from fleecing.errors import ConfigError
from fleecing.nbd.uri import NbdUri
from fleecing.pull.engine import pull
from fleecing.pull.target import RawTarget
from fleecing.units import MiB, TiB, div_up, format_size, parse_size

_SNAPSHOT: Final = "frozen"
_WRITERS: Final = 4
_SLICE: Final = 0.25
"""Seconds the main thread sleeps at a time."""
_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

Read = Callable[[int, int], bytes | bytearray]
"""(offset, length) -> bytes, fewer at the end."""


def _demo_size(text: str) -> int:
    size = parse_size(text)
    if not MiB <= size <= TiB:
        raise ValueError(f"'{text}' is not between 1M and 1T")
    return size


@click.command(
    short_help="Show the whole job on a made-up disk.",
    epilog="\b\nExamples:\n  fleecing demo\n  fleecing demo --size 2G --seconds 10 --cluster-size 256K\n",
)
@click.option("--size", type=Checked("SIZE", _demo_size), default="256M", show_default=True, help="Size of the disk.")
@click.option(
    "--seconds",
    type=click.FloatRange(0, 3600),
    default=1.0,
    show_default=True,
    help="How long the guest writes before the snapshot, and again after the pull.",
)
@click.option("--cluster-size", type=CLUSTER_SIZE, default="64K", show_default=True, help="Unit of copying.")
@click.option("--keep", is_flag=True, help="Keep the scratch folder: the disk, the copy, the server's log.")
@click.option("--seed", type=int, help="Seed of the disk's contents and the guest's choices; else one by chance.")
def demo(*, size: int, seconds: float, cluster_size: int, keep: bool, seed: int | None) -> None:
    """Make a disk in a scratch folder, serve it, freeze it while a guest overwrites it, pull it, compare every byte.

    The report is printed on stdout. Exit code 1 when anything is not as it must be. $TMPDIR says where the scratch
    folder is made; it is removed at the end, also after Ctrl-C.
    """
    if seed is None:
        seed = random.randrange(1 << 32)
    with _signals_end_it(), _scratch(size, keep=keep) as folder:
        report = _Demo(folder, size, cluster_size, seconds, seed).run()
    click.echo(report.text())
    if not report.ok:
        raise SystemExit(1)


@contextmanager
def _signals_end_it() -> Iterator[None]:
    """The first of these signals ends the demo like Ctrl-C; further ones do not disturb the cleaning up."""

    def end(number: int, frame: FrameType | None) -> None:
        for other in _SIGNALS:
            signal.signal(other, signal.SIG_IGN)
        raise KeyboardInterrupt

    before = {number: signal.signal(number, end) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _scratch(size: int, *, keep: bool) -> Iterator[Path]:
    """A folder with room for the disk, the copy, and a temp that may become as large as the disk."""
    parent = tempfile.gettempdir()
    free = shutil.disk_usage(parent).free
    if free < 3 * size:
        raise ConfigError(
            f"the demo needs {format_size(3 * size)} in {parent}, where {format_size(free)} are free: "
            "give a smaller --size, or another folder in TMPDIR"
        )
    folder = Path(tempfile.mkdtemp(prefix="fleecing-demo-"))
    try:
        yield folder
    finally:
        if keep:
            say(f"Kept: {folder}")
        else:
            shutil.rmtree(folder)


class _Demo:
    """One run. The writers are this process's threads, the server is its child."""

    def __init__(self, folder: Path, size: int, cluster_size: int, seconds: float, seed: int) -> None:
        self._contents = Contents(size, seed)
        self._image = folder / "disk.img"
        self._copy = folder / "copy.img"
        self._server = DemoServer(self._image, folder, cluster_size=cluster_size)
        self._control = ControlClient(str(self._server.control))
        self._uri = NbdUri(export=DISK, socket=str(self._server.socket))
        self._cluster = cluster_size
        self._seconds = seconds
        self._seed = seed
        self._report = DemoReport(size, cluster_size)

    def run(self) -> DemoReport:
        say(f"Making a disk of {format_size(self._contents.size)}, {self._image}, with --seed {self._seed}")
        self._contents.make(str(self._image))
        with self._server:
            say(f"Serving it, process {self._server.pid}: {shlex.join(self._server.command)}")
            with self._guest() as writers:
                self._guest_time("writes to the active disk")
                journals = self._freeze(writers)
                self._pull(writers)
                self._guest_time("goes on")
            self._look_at_the_temp(writers, journals)
            self._compare_copy(writers, journals)
            self._compare_active(writers)
            self._control.request("DELETE", f"/v1/snapshots/{DISK}@{_SNAPSHOT}")
        if code := self._server.stop():
            self._report.faults.append(f"the server ended with exit code {code}")
        return self._report

    @contextmanager
    def _guest(self) -> Iterator[list[Writer]]:
        """Writers on connections of their own, each with its share of the clusters; they have ended afterwards."""
        contents = self._contents
        clusters = div_up(contents.size, self._cluster)
        count = min(_WRITERS, clusters)
        cuts = [min(clusters * i // count * self._cluster // SECTOR, contents.sectors) for i in range(count + 1)]
        cuts[-1] = contents.sectors
        writers = [
            Writer(self._uri, contents, first, end, cluster=self._cluster, seed=f"{self._seed} {first}")
            for first, end in pairwise(cuts)
        ]
        try:
            for writer in writers:
                writer.start()
            for writer in writers:
                writer.wait_until_it_writes()
            yield writers
        finally:
            for writer in writers:
                writer.stop()
            for writer in writers:
                if writer.ident is not None:
                    writer.join()
        self._report.writes_in_all = sum(writer.writes for writer in writers)
        self._report.faults += [f"a guest write failed: {writer.error}" for writer in writers if writer.error]

    def _guest_time(self, what: str) -> None:
        say(f"The guest {what}, {self._seconds:g} s")
        # In slices: a signal that comes just before the main thread falls asleep is seen when it wakes, not before.
        end = time.monotonic() + self._seconds
        while (left := end - time.monotonic()) > 0:
            time.sleep(min(left, _SLICE))

    def _freeze(self, writers: Sequence[Writer]) -> list[Journal]:
        """Create the snapshot while the guest writes."""
        for writer in writers:
            writer.begin_journal()
        started = time.monotonic()
        self._control.request("POST", "/v1/snapshots", {"disks": [DISK], "name": _SNAPSHOT})
        self._report.creation_seconds = time.monotonic() - started
        journals = [writer.end_journal() for writer in writers]
        self._report.writes_at_creation = sum(len(journal.writes) for journal in journals)
        say(f"Snapshot {DISK}@{_SNAPSHOT} is there; the guest did not stop for it")
        return journals

    def _snapshot(self) -> Any:
        return self._control.request("GET", f"/v1/snapshots/{DISK}@{_SNAPSHOT}")

    def _pull(self, writers: Sequence[Writer]) -> None:
        report = self._report
        writes, written = sum(w.writes for w in writers), sum(w.bytes_written for w in writers)
        uri = NbdUri.parse(self._snapshot()["uris"][0])
        with PullDisplay(report.size, lambda: int(self._snapshot()["temp"]["used"])) as display:
            done = pull(uri, lambda size: RawTarget.create(str(self._copy), size), progress=display, interval=0.1)
        report.writes_during_pull = sum(w.writes for w in writers) - writes
        report.bytes_during_pull = sum(w.bytes_written for w in writers) - written
        report.pull_seconds = done.seconds
        report.pull_data = done.data
        report.temp_peak = display.temp_seen
        if done.trimmed != report.size:
            report.faults.append(f"{done.trimmed} of {report.size} bytes were trimmed")

    def _look_at_the_temp(self, writers: Sequence[Writer], journals: Sequence[Journal]) -> None:
        """The guest has ended: what the snapshot cost."""
        snapshot = self._snapshot()
        report = self._report
        report.clusters_copied = snapshot["copied_total"]
        report.temp_peak = max(report.temp_peak, snapshot["temp"]["peak"])
        report.temp_end = snapshot["temp"]["used"]
        touched = touched_clusters(writers, journals, self._cuts(journals), self._cluster)
        report.clusters_never_copied = touched - report.clusters_copied
        if report.clusters_never_copied < 0:
            report.faults.append(f"{report.clusters_copied} clusters were copied, the guest changed {touched} only")

    def _cuts(self, journals: Sequence[Journal]) -> list[int]:
        with self._copy.open("rb") as copy:
            return [
                journal.cut(lambda sector: os.pread(copy.fileno(), SECTOR, sector * SECTOR)) for journal in journals
            ]

    def _compare_copy(self, writers: Sequence[Writer], journals: Sequence[Journal]) -> None:
        """Each byte of the copy against the instant of creation."""
        say("Comparing the copy with the instant of creation, the active disk with what the guest wrote")
        cuts = self._cuts(journals)
        versions = journals[0].frozen(cuts[0])
        for journal, cut in zip(journals[1:], cuts[1:], strict=True):
            versions += journal.frozen(cut)
        if not one_instant(journals, cuts):
            self._report.faults.append("the snapshot mixes two instants")
        with self._copy.open("rb") as copy:
            length = os.fstat(copy.fileno()).st_size
            if length != self._report.size:
                self._report.faults.append(f"the copy has {length} bytes instead of {self._report.size}")
            self._report.verified = self._compare(
                "the copy", versions, lambda offset, count: os.pread(copy.fileno(), count, offset)
            )

    def _compare_active(self, writers: Sequence[Writer]) -> None:
        """Each byte of the active disk against what the guest wrote and was told is written."""
        versions = writers[0].versions[:]
        for writer in writers[1:]:
            versions += writer.versions
        with connect(self._uri) as connection:
            self._compare("the active disk", versions, connection.read)

    def _compare(self, what: str, versions: Versions, read: Read) -> int:
        """How many bytes are right."""
        right = 0
        wrong: list[int] = []
        for offset, expected in self._contents.pieces(versions):
            differing = differing_sectors(expected, bytes(read(offset, len(expected))))
            right += max(0, len(expected) - SECTOR * len(differing))
            wrong += [offset + SECTOR * sector for sector in differing]
        if wrong:
            self._report.faults.append(f"{len(wrong)} sectors of {what} differ, the first at offset {wrong[0]}")
        return right
