"""Temp runs full and has room again at any moment, while guests write, a backup reads and trims, and signals come.

Each byte is held to a model, under both policies. What must hold: the guest's disk has what was answered, and the
snapshot is what it was, or broken with its reason.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from random import Random

import pytest

from fleecing.errors import ControlError
from fleecing.units import KiB, MiB
from tests.block.rig import Running, in_thread
from tests.crash.ledger import SECTOR, Instant, Ledger, stamp, stamps
from tests.images import IS_ROOT, tmpfs
from tests.peers import run
from tests.raw_client import EINVAL, EIO, ENOSPC, FLUSH, READ, TRIM, WRITE, WRITE_ZEROES, RawClient
from tests.serving import Serve, Server

SIZE = 2 * MiB + 7 * SECTOR
SECTORS = SIZE // SECTOR
CLUSTER = 16 * KiB
SPACE = MiB
"""Bytes of temp, about half of what it could come to."""
CHANGES = 400
"""Of the guests together, between two looks at all of it."""


class Refused(Exception):
    """The guest's change was answered with an error: nobody knows what is there."""


class Wrong(Exception):
    """The server gave what it must never give, whether it is ending or not."""


class Load:
    """Two guests on a disk of sectors that tell which write they are of, and a filler that never lets temp alone."""

    def __init__(self, server: Server, fill: Callable[[Random], None], seed: int) -> None:
        self.server = server
        self.ledger = Ledger(SECTORS)
        self.changes = self.refused = 0
        self.fill = fill
        self._seed = seed
        self._over = threading.Event()
        self._threads: list[Running] = []

    @contextmanager
    def running(self, *, may_refuse: bool) -> Iterator[None]:
        """Everybody is at work in the block; whoever met something wrong raises it behind it."""
        self._over.clear()
        half = SECTORS // 2
        self._threads = [
            in_thread(lambda: self._guest(0, half, may_refuse=may_refuse)),
            in_thread(lambda: self._guest(half, SECTORS, may_refuse=may_refuse)),
            in_thread(self._filler),
        ]
        try:
            yield
        finally:
            self._over.set()
            for thread in self._threads:
                thread.wait()

    def wait_for(self, changes: int) -> bool:
        """Whether there are fewer changes yet; raises what ended somebody early."""
        for thread in self._threads:
            if thread.over.is_set():
                thread.wait()
                raise Wrong("somebody ended before he was told to")
        return self.changes < changes

    def _filler(self) -> None:
        random = Random(self._seed)
        while not self._over.wait(0.005):
            self.fill(random)
            if random.random() < 0.1:
                self.server.child.signal(signal.SIGHUP)

    def _guest(self, first: int, end: int, *, may_refuse: bool) -> None:
        self._seed += 1
        random = Random(self._seed)
        with RawClient(self.server.unix, "vda") as client:
            while not self._over.is_set():
                at = random.randrange(first, end)
                count = min(random.choice([1, 3, 8, 40, 200]), end - at)
                try:
                    self._change(client, random, at, count)
                except Refused as e:
                    if not may_refuse:
                        raise Wrong("a guest write failed") from e
                    self.refused += 1
                if random.random() < 0.2:
                    self._look(client, at, count)
                self.changes += 1

    def _change(self, client: RawClient, random: Random, at: int, count: int) -> None:
        kind = random.choices([WRITE, WRITE_ZEROES, TRIM, FLUSH], [80, 8, 8, 4])[0]
        if kind == FLUSH:
            if client.request(FLUSH, 0, 0, 0).error:
                raise Wrong("a flush failed")
            return
        number = self.ledger.new_number() if kind == WRITE else 0
        with self.ledger.write(at, count, number):
            payload = stamp(number) * count if kind == WRITE else b""
            reply = client.request(kind, 0, at * SECTOR, count * SECTOR, payload)
            if reply.error:
                raise Refused if reply.error in (ENOSPC, EIO) else Wrong(reply)

    def _look(self, client: RawClient, at: int, count: int) -> None:
        found = stamps(client.read(at * SECTOR, count * SECTOR))
        for sector, number in enumerate(found, at):
            if number not in {self.ledger.has[sector], *self.ledger.writing[sector]}:
                raise Wrong(f"sector {sector} is of write {number}")

    def check_disk(self) -> None:
        """All of it, with no guest at work."""
        with RawClient(self.server.unix, "vda") as client:
            self.ledger.restart(client.read(0, SIZE))


class Backup:
    """A reader of one snapshot, which trims some of what it has read; knows when it is broken."""

    def __init__(self, server: Server, instant: Instant, random: Random) -> None:
        self.broken = False
        self._client = RawClient(server.unix, "vda@s")
        self._instant = instant
        self._random = random
        self._trimmed: set[int] = set()

    def step(self) -> None:
        """Read somewhere, maybe trim there."""
        cluster = self._random.randrange(SIZE // CLUSTER)
        self.read(cluster * CLUSTER, min(3 * CLUSTER, SIZE - cluster * CLUSTER))
        if self._random.random() < 0.05 and not self.broken:
            reply = self._client.request(TRIM, 0, cluster * CLUSTER, CLUSTER)
            self._judge(reply.error, reply.text)
            self._trimmed.add(cluster)

    def read(self, offset: int, length: int) -> None:
        reply = self._client.request(READ, 0, offset, length)
        clusters = range(offset // CLUSTER, (offset + length - 1) // CLUSTER + 1)
        if reply.error and "trimmed" in reply.text and self._trimmed.intersection(clusters):
            return
        self._judge(reply.error, reply.text)
        for at, piece in reply.data if not reply.error else ():
            for sector, number in enumerate(stamps(piece), at // SECTOR):
                assert number in self._instant.may[sector], f"sector {sector} is of {number}"
                self._instant.may[sector] = {number}

    def _judge(self, error: int, text: str) -> None:
        if error:
            assert (error, text.startswith("snapshot broken: ")) == (EINVAL, True), text
            self.broken = True
        assert bool(error) is self.broken

    def finish(self) -> None:
        """Look at every cluster, and hang up."""
        for offset in range(0, SIZE, CLUSTER):
            self.read(offset, min(CLUSTER, SIZE - offset))
        self._client.close()


def freeze(load: Load, policy: str) -> bool:
    """Whether there was room for a temp file at all."""
    try:
        with load.ledger.freeze("s", None, may_break=True):
            load.server.freeze("vda", name="s", on_cbw_error=policy)
    except ControlError as e:
        if e.status != 507:
            raise
        return False
    return True


def run_round(load: Load, policy: str, seed: int) -> bool:
    """A snapshot's life under load; whether it came to its end whole."""
    server, random = load.server, Random(seed)
    with load.running(may_refuse=policy == "break-guest-write"):
        while not freeze(load, policy):
            load.wait_for(0)
        backup = Backup(server, load.ledger.snapshots.pop("s").instant, random)
        end = load.changes + CHANGES
        while load.wait_for(end):
            backup.step()
    backup.finish()
    load.check_disk()
    shown = server.show("vda@s")
    assert (shown["state"] == "broken") is backup.broken
    assert backup.broken is bool(shown["broken"])
    assert policy == "break-snapshot" or not backup.broken
    return not backup.broken


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "vda.img"
    path.write_bytes(bytes(SIZE))
    return path


POLICIES = pytest.mark.parametrize("policy", ["break-snapshot", "break-guest-write"])


@pytest.mark.skipif(not IS_ROOT, reason="mounting takes root; the limit below is the same without")
@POLICIES
def test_a_file_system_that_fills_at_random(serve: Serve, image: Path, tmp_path: Path, policy: str) -> None:
    with tmpfs(tmp_path / "temp", SPACE) as folder:
        (folder / "temp").mkdir()
        server = serve(image, "--temp-dir", str(folder / "temp"), "--cluster-size", str(CLUSTER))
        ballast = folder / "ballast"

        def fill(random: Random) -> None:
            if random.random() < 0.3:
                ballast.unlink(missing_ok=True)
            else:
                with suppress(OSError), ballast.open("ab", buffering=0) as file:
                    file.write(bytes(random.choice([4 * KiB, 64 * KiB, SPACE])))

        def make_room() -> None:
            ballast.unlink(missing_ok=True)
            run("mount", "-o", f"remount,size={4 * SIZE}", str(folder))

        both_ends(Load(server, fill, seed=1), policy, make_room)
        server.stop()


@POLICIES
def test_a_limit_that_goes_up_and_down(serve: Serve, image: Path, policy: str) -> None:
    server = serve(image, "--cluster-size", str(CLUSTER))

    def limit(value: int | None) -> None:
        with suppress(ControlError):  # there is no snapshot yet, it is broken, or more is in use
            server.control.request("PATCH", "/v1/snapshots/vda@s", {"temp_limit": value})

    both_ends(
        Load(server, lambda random: limit(random.randrange(128 * KiB, SPACE)), seed=2), policy, lambda: limit(None)
    )


def both_ends(load: Load, policy: str, make_room: Callable[[], None]) -> None:
    """Rounds under pressure until temp did not suffice, then one where it does, whatever is at work."""
    suffices, rounds = True, 0
    while suffices:
        rounds += 1
        assert rounds < 30, "temp always sufficed"
        before = load.refused
        whole = run_round(load, policy, seed=rounds)
        suffices = whole and load.refused == before
        load.server.delete("vda@s")
    make_room()
    load.fill = lambda random: None
    refused = load.refused
    assert run_round(load, policy, seed=0)
    assert load.refused == refused
    end_under_load(load)


def end_under_load(load: Load) -> None:
    """SIGTERM while everybody works; the next server has all that was answered."""
    server = load.server
    with suppress(OSError, AssertionError), load.running(may_refuse=True):
        end = load.changes + 20
        while load.wait_for(end):
            server.status()
        server.stop()
    server.start()
    load.check_disk()
    assert server.show("vda@s")["state"] == "ready"
