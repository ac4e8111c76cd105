"""What a killed server must still have: kept by the clients, from what they asked for and what was answered.

Contents are known by sector. Each write has a number of its own, written all over it, so a sector tells which write it
comes from. Of a sector that is being written nobody knows which of the two it is.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

SECTOR = 512


def stamp(number: int) -> bytes:
    """The contents of a sector of this write; 0 = zeroes."""
    return number.to_bytes(8, "big") * (SECTOR // 8)


def stamps(data: bytes) -> list[int]:
    """The write that each sector comes from. Raises ValueError where one is of none, or of two."""
    numbers = []
    for at in range(0, len(data), SECTOR):
        number = int.from_bytes(data[at : at + 8], "big")
        if data[at : at + SECTOR] != stamp(number):
            raise ValueError(f"the sector at {at} is torn")
        numbers.append(number)
    return numbers


@dataclass
class Instant:
    """What the disk had when it was frozen: for each sector the writes that it may come from.

    `open`: the freeze is under way, so what is being written may be part of it.
    """

    may: list[set[int]]
    open: bool = True


@dataclass
class Snapshot:
    """`exists`: None while a creation or deletion is under way, or was when the server died."""

    name: str
    instant: Instant
    may_break: bool
    exists: bool | None = None
    trimmed: set[int] = field(default_factory=set)  # clusters; answered
    maybe: set[int] = field(default_factory=set)  # clusters; asked for
    deleting: bool = False


@dataclass
class Checkpoint:
    """As `Snapshot`."""

    name: str
    instant: Instant
    exists: bool | None = None


class Ledger:
    """The disk by sector, the snapshots and the checkpoints. Any thread may call."""

    def __init__(self, sectors: int) -> None:
        self.has = [0] * sectors  # the last write that was answered
        self.writing: list[set[int]] = [set() for _ in range(sectors)]
        self.snapshots: dict[str, Snapshot] = {}
        self.checkpoints: dict[str, Checkpoint] = {}
        self.lock = threading.RLock()
        self._number = 0
        self._open: list[Instant] = []

    def new_number(self) -> int:
        with self.lock:
            self._number += 1
            return self._number

    @contextmanager
    def write(self, first: int, count: int, number: int) -> Iterator[None]:
        """A write of sectors that nobody else writes meanwhile; it was answered where the block ends without error."""
        sectors = range(first, first + count)
        with self.lock:
            for sector in sectors:
                self.writing[sector].add(number)
            for instant in self._open:
                for sector in sectors:
                    instant.may[sector].add(number)
        yield
        with self.lock:
            for sector in sectors:
                self.writing[sector].clear()
                self.has[sector] = number

    @contextmanager
    def freeze(self, name: str, checkpoint: str | None, *, may_break: bool) -> Iterator[None]:
        """A creation; it was answered where the block ends without error."""
        with self.lock:
            instant = Instant([{has, *writing} for has, writing in zip(self.has, self.writing, strict=True)])
            self._open.append(instant)
            self.snapshots[name] = snapshot = Snapshot(name, instant, may_break)
            if checkpoint is not None:
                self.checkpoints[checkpoint] = Checkpoint(checkpoint, instant)
        yield
        with self.lock:
            self._open.remove(instant)
            instant.open = False
            snapshot.exists = True
            if checkpoint is not None:
                self.checkpoints[checkpoint].exists = True

    @contextmanager
    def delete(self, name: str) -> Iterator[None]:
        """A deletion; it was answered where the block ends without error."""
        snapshot = self.snapshots[name]
        snapshot.deleting, snapshot.exists = True, None
        yield
        del self.snapshots[name]

    @contextmanager
    def delete_checkpoint(self, name: str) -> Iterator[None]:
        """The same of a checkpoint."""
        self.checkpoints[name].exists = None
        yield
        del self.checkpoints[name]

    def restart(self, data: bytes) -> None:
        """The server died and is back; this is what the disk has. Raises AssertionError where it lost something."""
        found = stamps(data)
        with self.lock:
            for sector, number in enumerate(found):
                allowed = {self.has[sector], *self.writing[sector]}
                assert number in allowed, f"sector {sector} is of write {number}, and it may be of {sorted(allowed)}"
                self.writing[sector].clear()
            self.has = found
            self._open.clear()
