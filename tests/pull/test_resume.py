"""What a later run goes on with: only what the target's disk has, of the same pull, and for one run at a time."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fleecing.errors import ImageError, RequestError
from fleecing.nbd.uri import NbdUri
from fleecing.pull.destination import Destination, Format
from fleecing.pull.engine import pull
from fleecing.pull.limiter import Bandwidth
from fleecing.pull.options import Check, Progress, PullOptions, PullReport
from fleecing.pull.target import PART
from fleecing.units import KiB, MiB
from tests.client.servers import nbdkit
from tests.faulty import CAN_FAIL, Faults, faulty_folder, forget
from tests.images import make_sparse, random_bytes
from tests.peers import run

SIZE = 60 * MiB

needs_disk = pytest.mark.skipif(not CAN_FAIL, reason="takes root")
forms = pytest.mark.parametrize("form", list(Format))


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Faults]:
    """A folder on an ext4 of its own, on a disk that may fail."""
    with faulty_folder(tmp_path / "faulty", 160 * MiB) as folder:
        yield folder


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.raw"
    path.write_bytes(random_bytes(SIZE))
    return path


@pytest.fixture
def source(tmp_path: Path, image: Path) -> Iterator[NbdUri]:
    (tmp_path / "source").mkdir()
    with nbdkit(tmp_path / "source", "-r", "file", str(image)) as uri:
        yield uri


class Cut(Exception):
    """Why a run of these tests ends."""


def at(done: int, act: Callable[[], None]) -> Callable[[Progress], None]:
    """What to do, once, when so many bytes are pulled."""
    acted = False

    def progress(progress: Progress) -> None:
        nonlocal acted
        if progress.data >= done and not acted:
            acted = True
            act()

    return progress


def cut() -> None:
    raise Cut


def go(
    uri: NbdUri, target: Destination, progress: Callable[[Progress], None] | None = None, rate: int | None = None
) -> PullReport:
    """As the command does."""
    journal = target.prepare()
    bandwidth = None if rate is None else Bandwidth(rate)
    options = PullOptions(check=Check.CRC32, piece=256 * KiB, bandwidth=bandwidth)
    try:
        report = pull(uri, target.open, options, journal=journal, progress=progress, interval=0.02)
        if journal is not None:
            journal.remove(durably=True)
    finally:
        if journal is not None:
            journal.close()
    return report


def assert_on_disk(path: Path, image: Path, form: Format) -> None:
    """Right although nothing of it is in memory any more."""
    forget(path)
    if form is Format.QCOW2:
        run("qemu-img", "check", "-f", "qcow2", str(path))
        forget(path)
    run("qemu-img", "compare", "-T", "none", "-f", "raw", "-F", form.value, str(image), str(path))


@needs_disk
@forms
@pytest.mark.parametrize("is_told", [True, False])
def test_what_the_disk_did_not_take_is_not_gone_on_with(
    disk: Faults, source: NbdUri, image: Path, form: Format, is_told: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It can be read, and compares equal, until it leaves the memory. `is_told`: by a sync on the way."""
    monkeypatch.setattr("fleecing.pull.engine.SYNC_SECONDS", 0.2 if is_told else 1000)
    copy = disk.path / "copy"

    def lose() -> None:
        disk.fail_writes()
        if not is_told:
            raise Cut

    with pytest.raises(OSError, match="Input/output error") if is_told else pytest.raises(Cut):
        go(source, Destination(str(copy), form), at(20 * MiB, lose), rate=40 * MiB)
    disk.heal()
    left = ["copy.journal", "copy.part"] if is_told else []  # it had synced before
    assert sorted(path.name for path in disk.path.iterdir() if path.is_file()) == left
    try:
        report = go(source, Destination(str(copy), form, resume=True))
    except OSError:  # the file system, without a journal, had lost something of its own: that is told once, too
        report = go(source, Destination(str(copy), form, resume=True))
    assert report.data + report.resumed == SIZE
    assert bool(report.resumed) is is_told
    assert_on_disk(copy, image, form)


@needs_disk
@forms
def test_who_does_not_wait_for_the_disk_learns_of_a_loss_when_it_ends(
    disk: Faults, source: NbdUri, form: Format
) -> None:
    """What was kept would be believed by the next run."""

    def lose() -> None:
        disk.fail_writes()
        run("sync", "--file-system", str(disk.path), expect=None)
        raise Cut

    with pytest.raises(Cut):
        go(source, Destination(str(disk.path / "copy"), form, waits=False), at(20 * MiB, lose), rate=40 * MiB)
    assert [path.name for path in disk.path.iterdir() if path.is_file()] == []


@needs_disk
@forms
def test_what_nobody_learns_of_any_more_is_read_from_the_disk(
    disk: Faults, source: NbdUri, image: Path, form: Format
) -> None:
    """The run that was told was killed a moment later."""
    copy = disk.path / "copy"
    with pytest.raises(Cut):
        go(source, Destination(str(copy), form), at(20 * MiB, cut), rate=40 * MiB)
    part = Path(f"{copy}{PART}")
    with part.open("r+b") as file:
        data = part.read_bytes()
        disk.fail_writes()
        for start in range(0, len(data), MiB):
            if start // MiB % 2:
                os.pwrite(file.fileno(), data[start : start + MiB], start)  # the same, and dirty
        file.truncate(len(data) + 1)
        file.truncate(len(data))
        with pytest.raises(OSError, match="Input/output error"):
            os.fsync(file.fileno())
        disk.heal()
    with pytest.raises(Cut):
        go(source, Destination(str(copy), form, resume=True), at(10 * MiB, cut), rate=40 * MiB)
    report = go(source, Destination(str(copy), form, resume=True))
    assert report.resumed
    assert_on_disk(copy, image, form)


@pytest.mark.parametrize("answer, is_kept", [("EIO", False), ("ENOSPC", False), ("ESHUTDOWN", True)])
def test_an_export_that_fails_to_flush_has_lost_data_or_is_only_going_down(
    tmp_path: Path, source: NbdUri, image: Path, answer: str, is_kept: bool
) -> None:
    image.write_bytes(image.read_bytes()[: 4 * MiB])
    (tmp_path / "target").mkdir()
    script = ["get_size=echo 64M", "can_write=exit 0", "can_flush=exit 0", "pread=exit 1", "pwrite=cat >/dev/null"]
    refused = pytest.raises(RequestError, match=f"answered {answer} to FLUSH")
    with nbdkit(tmp_path / "target", "eval", *script, f"flush=echo {answer} no >&2; exit 1") as target, refused:
        go(source, Destination(str(target), journal_path=str(tmp_path / "journal")))
    assert (tmp_path / "journal").exists() is is_kept


def test_zeroes_of_an_earlier_run_are_made_again(tmp_path: Path, source: NbdUri, image: Path) -> None:
    make_sparse(image, SIZE, {0: random_bytes(4 * MiB), 40 * MiB: random_bytes(20 * MiB)})
    disk = tmp_path / "old"
    disk.write_bytes(b"x" * SIZE)

    def destination() -> Destination:
        journal = str(tmp_path / "journal")
        return Destination(str(disk), existing=True, resume=True, journal_path=journal)

    with pytest.raises(Cut):
        go(source, destination(), at(10 * MiB, cut), rate=20 * MiB)
    with disk.open("r+b") as file:
        file.seek(20 * MiB)
        file.write(b"what was there before")
    assert go(source, destination()).resumed > 36 * MiB
    assert disk.read_bytes() == image.read_bytes()


def test_another_server_is_another_pull(tmp_path: Path, source: NbdUri, image: Path) -> None:
    """Whether its disk is another instant, nobody can tell but by the address."""
    copy = tmp_path / "copy"
    with pytest.raises(Cut):
        go(source, Destination(str(copy)), at(10 * MiB, cut), rate=40 * MiB)
    (tmp_path / "other").mkdir()
    refused = pytest.raises(ImageError, match=rf"belongs to another pull: its server is '{source.socket}'")
    with nbdkit(tmp_path / "other", "-r", "file", str(image)) as other, refused:
        go(other, Destination(str(copy), resume=True))
    go(source, Destination(str(copy), resume=True))
    assert copy.read_bytes() == image.read_bytes()


@forms
def test_two_runs_do_not_share_a_target(tmp_path: Path, source: NbdUri, image: Path, form: Format) -> None:
    copy = tmp_path / "copy"
    refused = []

    def another() -> None:
        with pytest.raises(ImageError, match="in use: another pull is at work on this target") as caught:
            go(source, Destination(str(copy), form, resume=True))
        refused.append(caught.value)

    go(source, Destination(str(copy), form), at(10 * MiB, another), rate=40 * MiB)
    assert refused
    assert_on_disk(copy, image, form)
    assert sorted(path.name for path in tmp_path.glob("copy*")) == ["copy"]


def test_a_run_that_has_not_made_its_target_yet_is_not_robbed_of_its_journal(tmp_path: Path, source: NbdUri) -> None:
    copy = tmp_path / "copy"
    first = Destination(str(copy)).prepare()
    assert first is not None
    first.begin({"export": "", "size": SIZE})
    with pytest.raises(ImageError, match="in use"):
        go(source, Destination(str(copy), resume=True))
    assert Path(first.path).exists()
    first.close()
