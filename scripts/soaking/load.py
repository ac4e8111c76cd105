"""Those who keep the server busy: guests that write down what they wrote, readers who compare, and strangers."""

from __future__ import annotations

import socket
import threading
from pathlib import Path
from random import Random

from fleecing.errors import FleecingError
from tests.crash.ledger import SECTOR, Instant, Ledger, stamp, stamps
from tests.peers import DEADLINE
from tests.raw_client import FLUSH, FUA, READ, TRIM, WRITE, WRITE_ZEROES, RawClient

LOST = (OSError, AssertionError, FleecingError)
"""What a client gets when its server goes away."""


class Wrong(Exception):
    """The server gave what it must never give."""


class Guest:
    """One connection that changes the sectors [first, end) of a disk, which are its own, whenever it may."""

    def __init__(self, unix: Path, disk: str, ledger: Ledger, first: int, end: int, seed: int) -> None:
        self.error: Exception | None = None
        self.changes = 0
        self._unix, self._disk, self._ledger = unix, disk, ledger
        self._first, self._end = first, end
        self._random = Random(seed)
        self._may = threading.Event()
        self._resting = threading.Event()
        self._resting.set()
        self._called = threading.Condition()
        self._over = False
        self._thread = threading.Thread(target=self._run, name=f"guest of {disk}", daemon=True)
        self._thread.start()

    def go(self) -> None:
        """Connect, and change the disk until `rest`."""
        with self._called:
            self.error = None
            self._resting.clear()
            self._may.set()
            self._called.notify_all()

    def rest(self) -> None:
        """Hang up; returns when that is done."""
        with self._called:
            self._may.clear()
            self._called.notify_all()
        if not self._resting.wait(DEADLINE):
            raise Wrong(f"a request of the guest of {self._disk} is not answered within {DEADLINE:g} s")

    def end(self) -> None:
        """For good."""
        self._over = True
        self.go()
        self._thread.join(DEADLINE)

    def _run(self) -> None:
        while True:
            with self._called:
                self._called.wait_for(lambda: not self._resting.is_set())  # also where `rest` came right behind `go`
            if self._over:
                return
            try:
                with RawClient(self._unix, self._disk) as client:
                    while self._may.is_set() and not self._over:
                        self._change(client)
            except (*LOST, ValueError, Wrong) as e:
                self.error = e
            with self._called:
                self._called.wait_for(lambda: self._over or not self._may.is_set())
                self._resting.set()

    def _change(self, client: RawClient) -> None:
        random = self._random
        at = random.randrange(self._first, self._end)
        count = min(random.choice([1, 1, 3, 8, 8, 40, 128, 600]), self._end - at)
        kind = random.choices([WRITE, WRITE_ZEROES, TRIM, FLUSH, READ], [70, 8, 8, 4, 10])[0]
        if kind in (FLUSH, READ):
            self._look(client, kind, at, count)
            return
        number = self._ledger.new_number() if kind == WRITE else 0
        with self._ledger.write(at, count, number):
            payload = stamp(number) * count if kind == WRITE else b""
            flags = FUA if random.random() < 0.03 else 0
            reply = client.request(kind, flags, at * SECTOR, count * SECTOR, payload)
            if reply.error:
                raise Wrong(f"{self._disk}: a guest change failed: {reply}")
        self.changes += 1

    def _look(self, client: RawClient, kind: int, at: int, count: int) -> None:
        if kind == FLUSH:
            reply = client.request(FLUSH, 0, 0, 0)
            if reply.error:
                raise Wrong(f"{self._disk}: a flush failed: {reply}")
            return
        found = stamps(client.read(at * SECTOR, count * SECTOR))
        if found != self._ledger.has[at : at + count]:
            raise Wrong(f"{self._disk}: sectors from {at} on are not what the guest wrote last")


def compare(what: str, data: bytes, first: int, instant: Instant) -> None:
    """The data, from sector `first` on, is that of the instant; raises Wrong."""
    try:
        found = stamps(data)
    except ValueError as e:
        raise Wrong(f"{what}: {e}") from None
    for sector, number in enumerate(found, first):
        if number not in instant.may[sector]:
            raise Wrong(f"{what}: sector {sector} is of write {number}, and may be of {sorted(instant.may[sector])}")
        instant.may[sector] = {number}


def strangers(unix: Path, random: Random, count: int) -> None:
    """Clients that come, say something that is no NBD or only half of it, and go without a word."""
    hello = (3).to_bytes(4, "big")
    for _ in range(count):
        said = random.choice([b"", hello, hello + random.randbytes(random.randrange(1, 40)), b"GET / HTTP/1.1\r\n"])
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(DEADLINE)
            try:
                sock.connect(str(unix))
                sock.sendall(said)
                if random.random() < 0.5:
                    sock.recv(100)
            except OSError:
                pass  # dropped: its good right
