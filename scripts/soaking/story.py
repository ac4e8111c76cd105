"""One soak: two disks, guests that never stop but for a look at the resources, and backups in rounds.

A round: both disks are frozen at one instant, with a checkpoint, and changes only are pulled onto the backup of the
round before, trimmed behind the read head. Now and then the server is stopped or killed meanwhile. The backup must be
the disk of the instant, sector by sector. Then all is deleted, the guests rest, and the resources are looked at.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from random import Random

from fleecing.units import MiB
from scripts.soaking.gauges import Sample, grown, look
from scripts.soaking.load import Guest, Wrong, compare, strangers
from tests.crash.ledger import SECTOR, Instant, Ledger
from tests.peers import DEADLINE, Child
from tests.raw_client import READ, RawClient
from tests.serving import ROOT, Server

SIZES = {"vda": 48 * MiB + 7 * SECTOR, "vdb": 12 * MiB}
GUESTS = 2
WARM_UP = 2
"""Rounds after each start of the server; its resources then are the level that later rounds are held to."""


class Story:
    """Everything of one soak, in `folder`; `tell` gets a line now and then."""

    def __init__(self, folder: Path, seed: int, every: float, tell: Callable[[str], None]) -> None:
        """`every`: seconds that the guests have for themselves in each round, at most."""
        self.rounds = self.kills = self.stops = self.compared = self.pulled = 0
        self.worst: Sample | None = None
        self._random = Random(seed)
        self._every = every
        self._tell = tell
        self._folder = folder
        images = {name: folder / f"{name}.raw" for name in SIZES}
        for name, path in images.items():
            for file in (path, folder / f"{name}.backup"):
                with file.open("wb") as image:
                    image.truncate(SIZES[name])
        self._ledgers = {name: Ledger(size // SECTOR) for name, size in SIZES.items()}
        self.server = Server(folder / "server", images)
        self._age = 0  # rounds of this process
        self._first: Sample | None = None  # of this process
        self.guests = [
            Guest(self.server.unix, name, ledger, share * sectors // GUESTS, (share + 1) * sectors // GUESTS, seed + n)
            for n, (name, ledger) in enumerate(self._ledgers.items())
            for sectors in [len(ledger.has)]
            for share in range(GUESTS)
        ]
        self._go()

    def run(self, seconds: float) -> None:
        """Rounds until the time is over, one at least beyond the warm-up. Raises Wrong, and what a test fails with."""
        end = time.monotonic() + seconds
        while time.monotonic() < end or not self.compared:
            self._round()
        self._rest()
        self._check_disks()
        self.server.stop()

    def close(self) -> None:
        """End whatever still runs."""
        for guest in self.guests:
            guest.end()
        self.server.kill()

    def _round(self) -> None:
        self.rounds += 1
        self._age += 1
        new, old = f"c{self.rounds}", f"c{self.rounds - 1}" if self.rounds > 1 else None
        time.sleep(self._every * self._random.random())
        instants = self._freeze(f"r{self.rounds}", checkpoint=new, since=old)
        extra = self._freeze_one(f"x{self.rounds}")
        strangers(self.server.unix, self._random, 10)
        # A process that is still warming up stays, or there would never be two looks to compare.
        restart = self._age > WARM_UP and self._random.random() < 0.1
        self._pull(f"r{self.rounds}", instants, restart=restart)
        self._read(f"vda@x{self.rounds}", extra)
        self._check_guests()
        exports = [f"vda@r{self.rounds}", f"vdb@r{self.rounds}", f"vda@x{self.rounds}"]
        self._random.shuffle(exports)
        for export in exports:
            self.server.delete(export)
        if old is not None:
            for name in SIZES:
                self.server.delete_checkpoint(f"{name}@{old}")
        self._rest()
        self._look()
        self._go()

    # Snapshots.

    def _freeze(self, name: str, *, checkpoint: str, since: str | None) -> dict[str, Instant]:
        with ExitStack() as stack:
            for ledger in self._ledgers.values():
                stack.enter_context(ledger.freeze(name, None, may_break=False))
            self.server.freeze(*SIZES, name=name, checkpoint=checkpoint, since=since)
        return {disk: ledger.snapshots.pop(name).instant for disk, ledger in self._ledgers.items()}

    def _freeze_one(self, name: str) -> Instant:
        """One more snapshot, of a kind that the others are not, and nothing trims it."""
        ledger = self._ledgers["vda"]
        policy = self._random.choice(["break-snapshot", "break-guest-write"])
        # The threads that syncs take are there from the first round of a process on.
        durable = self._age == 1 or self._random.random() < 0.3
        with ledger.freeze(name, None, may_break=False):
            self.server.freeze("vda", name=name, durable=durable, on_cbw_error=policy)
        return ledger.snapshots.pop(name).instant

    def _read(self, export: str, instant: Instant) -> None:
        """Pieces of a snapshot, here and there."""
        with RawClient(self.server.unix, export) as client:
            for _ in range(20):
                at = self._random.randrange(len(instant.may))
                count = min(self._random.choice([1, 100, 2000]), len(instant.may) - at)
                reply = client.request(READ, 0, at * SECTOR, count * SECTOR)
                if reply.error:
                    raise Wrong(f"{export}: a read failed: {reply}")
                compare(export, b"".join(piece for _, piece in sorted(reply.data)), at, instant)

    def _pull(self, name: str, instants: dict[str, Instant], *, restart: bool) -> None:
        """Onto the backups of the round before; they are the disks of the instant then."""
        pulls = [self._start_pull(disk, name, slowly=restart) for disk in SIZES]
        if restart:
            for pull in pulls:
                _wait(lambda pull=pull: bool(pull.stdout) or pull.returncode is not None)  # type: ignore[misc]
            self._restart()
        for pull in pulls:
            code = pull.wait(10 * DEADLINE)
            if code:
                raise Wrong(f"{pull.name} ended with {code}: {pull.stderr}")
        for disk, instant in instants.items():
            compare(f"{disk}@{name}, pulled", (self._folder / f"{disk}.backup").read_bytes(), 0, instant)
            self.pulled += SIZES[disk]
            clusters = self.server.show(f"{disk}@{name}")["clusters"]
            if clusters["untouched"] or clusters["copied"]:
                raise Wrong(f"{disk}@{name}: not everything that was pulled is trimmed: {clusters}")

    def _start_pull(self, disk: str, name: str, *, slowly: bool) -> Child:
        command = [sys.executable, "-m", "fleecing", "pull", f"{disk}@{name}", str(self._folder / f"{disk}.backup")]
        command += ["--existing", "--json", "--control", str(self.server.control_path), "--reconnect", "300"]
        if slowly:
            command += ["--bandwidth", "8M"]
        return Child(command, self._folder, name=f"pull-{disk}", env={"PYTHONPATH": str(ROOT)})

    # The server's ends and beginnings.

    def _restart(self) -> None:
        """SIGTERM or SIGKILL while everybody works."""
        if self._random.random() < 0.5:
            self.kills += 1
            self.server.kill()
        else:
            self.stops += 1
            self.server.stop()
        for guest in self.guests:
            guest.rest()
            if isinstance(guest.error, Wrong):
                raise guest.error
        self.server.start()
        self._first, self._age = None, 0
        self._check_disks()
        self._go()

    def _check_disks(self) -> None:
        """No guest is connected; the disks have what was answered."""
        for disk, ledger in self._ledgers.items():
            size, step = SIZES[disk], 16 * MiB
            with RawClient(self.server.unix, disk) as client:
                ledger.restart(b"".join(client.read(at, min(step, size - at)) for at in range(0, size, step)))

    def _check_guests(self) -> None:
        for guest in self.guests:
            if guest.error is not None:
                raise guest.error

    def _go(self) -> None:
        for guest in self.guests:
            guest.go()

    def _rest(self) -> None:
        for guest in self.guests:
            guest.rest()
        self._check_guests()

    def _look(self) -> None:
        """Compare the resources with those of this process's first rest after the warm-up."""
        _wait(lambda: not self.server.status()["clients"])
        if self._age < WARM_UP:
            return
        pid, state = self.server.child.pid, self.server.state_dir
        now = look(pid, state)
        if self._first is None:
            self._first = now
            self._tell(f"round {self.rounds}: {now} (the level of process {pid})")
            return
        end = time.monotonic() + DEADLINE
        while (problems := grown(self._first, now)) and time.monotonic() < end:
            time.sleep(0.2)  # threads end a little after their clients
            now = look(pid, state)
        if problems:
            raise Wrong(f"round {self.rounds}: {'; '.join(problems)}")
        self.compared += 1
        if self.worst is None or now.memory > self.worst.memory:
            self.worst = now
        if self.rounds % 10 == 0:
            self._tell(f"round {self.rounds}: {now}")


def _wait(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + DEADLINE
    while not holds():
        if time.monotonic() > end:
            raise Wrong(f"what must come within {DEADLINE:g} s did not come")
        time.sleep(0.02)
