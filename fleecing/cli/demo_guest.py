"""The demo's guest: threads that overwrite the active disk at random, and know what it held at any instant.

Each writer has a part of the disk for itself and one write in flight, so its writes happen one after the other. While
the snapshot is being created nobody stops; each writer keeps a journal:

    base: versions of its part      journal: writes since                      journal ends
    --------|------------------------|w7---|w8------|w9------|w10----|---------|-------------> time
                                     create is called   ^      create returns
                                                     the instant

A snapshot that is right holds, for every writer, base and the journal up to some write, whole: the cut. What was
answered before the call must be in it, and what was sent after the return cannot be. The cut is found by the last
journal version that the copy shows; then every byte is compared. One instant for all writers exists if and only if each
write inside the cuts was sent before each write outside was answered.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

from fleecing.cli.demo_contents import SECTOR, Contents, Versions, new_versions, version_of
from fleecing.client.dial import connect
from fleecing.errors import FleecingError
from fleecing.nbd.uri import NbdUri
from fleecing.units import div_up

_LENGTHS: Final = (1, 8, 8, 8, 13, 32, 128, 200)
"""Sectors that a write has: mostly 4 KiB, some that begin and end inside clusters, some larger than one."""

NOT_YET: Final = 1 << 63
"""When a write that is in flight was answered: later than anything."""


@dataclass
class Write:
    """A guest's write of whole sectors; times in ns of the monotonic clock."""

    version: int
    first: int
    count: int
    sent: int
    answered: int = NOT_YET


@dataclass
class Journal:
    """What one writer did around the creation of the snapshot."""

    first: int
    base: Versions
    writes: list[Write] = field(default_factory=list)

    def cut(self, read: Callable[[int], bytes]) -> int:
        """The version of the last write that the snapshot holds, 0 for none. `read` gives a sector of the copy."""
        known = {write.version for write in self.writes}
        shown = {version_of(read(sector)) for write in self.writes for sector in _sectors(write)}
        return max(known & shown, default=0)

    def frozen(self, cut: int) -> Versions:
        """The versions of the writer's part in a snapshot with this cut."""
        versions = self.base[:]
        for write in self.writes:
            if write.version <= cut:
                _enter(versions, self.first, write)
        return versions


def one_instant(journals: Sequence[Journal], cuts: Sequence[int]) -> bool:
    """Whether some instant comes after the sending of every write inside, and before the answer to any outside."""
    inside = [w.sent for j, cut in zip(journals, cuts, strict=True) for w in j.writes if w.version <= cut]
    outside = [w.answered for j, cut in zip(journals, cuts, strict=True) for w in j.writes if w.version > cut]
    return max(inside, default=0) <= min(outside, default=NOT_YET)


class Writer(threading.Thread):
    """Overwrites the sectors [first, end) at random until it is stopped. `error` is what ended it before that.

    The lock guards what the demo asks for while the writer runs: `versions`, the journal and the write in flight.
    """

    def __init__(self, uri: NbdUri, contents: Contents, first: int, end: int, *, cluster: int, seed: str) -> None:
        super().__init__(name=f"writer of {first}-{end}", daemon=True)
        self.first = first
        self.versions = new_versions(end - first)
        self.writes = 0
        self.bytes_written = 0
        self.error: FleecingError | OSError | None = None
        self.touched: set[int] = set()
        """Clusters of the writes behind the journal."""
        self._uri = uri
        self._contents = contents
        self._end = end
        self._cluster = cluster
        self._chance = random.Random(seed)
        self._lock = threading.Lock()
        self._stop_asked = threading.Event()
        self._journal: Journal | None = None
        self._in_flight: Write | None = None
        self._counted_from = NOT_YET
        self._warm = threading.Event()

    def run(self) -> None:
        try:
            with connect(self._uri) as connection:
                while not self._stop_asked.is_set():
                    write = self._begin()
                    data = self._contents.written(write.first, write.count, write.version)
                    connection.write(write.first * SECTOR, data)
                    self._answered(write, len(data))
                connection.flush()
        except (FleecingError, OSError) as e:
            self.error = e
        self._warm.set()

    def _begin(self) -> Write:
        count = min(self._chance.choice(_LENGTHS), self._end - self.first)
        first = self._chance.randrange(self.first, self._end - count + 1)
        with self._lock:
            write = Write(self.writes + 1, first, count, time.monotonic_ns())
            self._in_flight = write
        return write

    def _answered(self, write: Write, length: int) -> None:
        with self._lock:
            write.answered = time.monotonic_ns()
            self._in_flight = None
            self.writes += 1
            self.bytes_written += length
            _enter(self.versions, self.first, write)
            if self._journal is not None:
                self._journal.writes.append(write)
            if write.version >= self._counted_from:
                self.touched.update(_clusters(write, self._cluster))
        self._warm.set()

    # For the demo's thread

    def wait_until_it_writes(self) -> None:
        """The first write is answered, or the writer has ended with an error."""
        self._warm.wait()

    def begin_journal(self) -> None:
        """From now on keep every write."""
        with self._lock:
            self._journal = Journal(self.first, self.versions[:])

    def end_journal(self) -> Journal:
        """What was kept, and the write in flight. Later writes count as `touched`."""
        with self._lock:
            journal, self._journal = self._journal, None
            assert journal is not None
            if self._in_flight is not None:
                journal.writes.append(self._in_flight)
            self._counted_from = self.writes + 1 + (self._in_flight is not None)
            return journal

    def stop(self) -> None:
        """Ends after the write in flight."""
        self._stop_asked.set()


def touched_clusters(writers: Sequence[Writer], journals: Sequence[Journal], cuts: Sequence[int], cluster: int) -> int:
    """How many clusters (bytes each) the guest has changed since the instant. The writers have ended."""
    touched: set[int] = set().union(*(writer.touched for writer in writers))
    for journal, cut in zip(journals, cuts, strict=True):
        for write in journal.writes:
            if write.version > cut:
                touched.update(_clusters(write, cluster))
    return len(touched)


def _clusters(write: Write, cluster: int) -> range:
    return range(write.first * SECTOR // cluster, div_up((write.first + write.count) * SECTOR, cluster))


def _sectors(write: Write) -> range:
    return range(write.first, write.first + write.count)


def _enter(versions: Versions, first: int, write: Write) -> None:
    """The write's sectors have its version; `first` is the sector of versions[0]."""
    at = write.first - first
    for index in range(at, at + write.count):
        versions[index] = write.version
