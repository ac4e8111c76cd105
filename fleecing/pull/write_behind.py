"""Data on its way to a target's disk: written in steps, sent to the disk soon after, and dropped from memory then.

A copy that the system keeps in memory for as long as it likes fills the host's memory with what nobody will read, is
held up, and with it whoever else writes to that file system, when a fifth of the memory waits for the disk, and has to
wait for all of the rest at its end.
"""

from __future__ import annotations

from collections import deque
from contextlib import suppress
from threading import Lock
from typing import Final

from fleecing.block.hostfile import HostFile
from fleecing.errors import ImageError
from fleecing.units import KiB, MiB

_STEP: Final = 256 * KiB
_RESERVED: Final = 256 * KiB
"""Bytes of a piece, at least, whose space is asked for at once."""
_GROUP: Final = 4 * MiB
"""Bytes that are sent to the disk together, so that neighbours become neighbours there."""
_GROUPS: Final = 16
"""That may be on their way to the disk: with the one that is being filled, what a copy takes of the host's memory."""

Ranges = list[tuple[int, int]]
"""(offset, end) in bytes, in order, neighbours as one."""


class WriteBehind:
    """The data of a file, which stays its owner's. `write` may be called from several threads; raises OSError."""

    def __init__(self, file: HostFile) -> None:
        self._file = file
        # The system tells each open file once that a write got lost. Who syncs `file` has to learn of it, not we here.
        self._same: HostFile | None = None
        with suppress(OSError, ImageError):  # no descriptor is left, or no /proc: then it goes without
            self._same = HostFile.open(f"/proc/self/fd/{file.fd}", writable=False)
        # ext4 finds space for data that comes unannounced block by block, twice: a copy of 2 GiB took 0.90 s of the
        # kernel's time without, and 0.70 with it. Others are quick at it, or pay for space that is reserved.
        self._reserves = file.is_on_ext4
        self._lock = Lock()
        self._fresh: Ranges = []
        self._fresh_bytes = 0
        self._on_the_way: deque[Ranges] = deque()
        self.has_lost = False
        """The disk did not take what the file had taken. It reads right until it leaves the memory."""

    def write(self, offset: int, data: memoryview, *, waits: bool) -> None:
        """Write all of it; with `waits`, wait until the disk has what was written GROUPS groups ago, or WritesLost.

        Not too much at once: the system lets one writer of a file in at a time, and the others keep a CPU busy until
        it is their turn. A copy of 2 GiB over two connections, on two CPUs, to ext4 took 2.2 s and 3.3 s of CPU with
        writes of 2 MiB, and 1.0 s and 1.1 with these.
        """
        if self._reserves and len(data) >= _RESERVED:
            self._reserves = self._file.reserve(offset, len(data))
        for start in range(0, len(data), _STEP):
            self._file.write(offset + start, data[start : start + _STEP])
        if self._same is None:
            return
        group, old = self._add(offset, len(data))
        for start, end in group:
            self._same.start_write_out(start, end - start)
        for start, end in old:
            if waits:
                self._wait(self._same, start, end)
            self._same.forget(start, end - start)

    def _wait(self, same: HostFile, start: int, end: int) -> None:
        """At once, not at the next `sync`: a run that is killed in between would leave what nobody learns of again."""
        try:
            same.wait_for_write_out(start, end - start)
        except OSError:
            self.has_lost = True
            raise

    def sync(self, *, waits: bool) -> None:
        """All of the file is durable; without `waits`, only raise WritesLost where the disk did not take something."""
        try:
            if waits:
                self._file.sync()
            else:
                self._file.check_written()
        except OSError:
            self.has_lost = True
            raise

    def _add(self, offset: int, length: int) -> tuple[Ranges, Ranges]:
        """The group that is full with this, and the one whose turn it is to be waited for and forgotten."""
        with self._lock:
            self._fresh.append((offset, offset + length))
            self._fresh_bytes += length
            if self._fresh_bytes < _GROUP:
                return [], []
            group, self._fresh, self._fresh_bytes = _merged(self._fresh), [], 0
            self._on_the_way.append(group)
            return group, self._on_the_way.popleft() if len(self._on_the_way) > _GROUPS else []

    def look_again(self, *, waits: bool) -> None:
        """What is read from now on comes from the disk, as far as it has it. Raises OSError, as `sync`."""
        self.sync(waits=waits)
        self._file.forget(0, 0)

    def close(self) -> None:
        """Once is enough, twice does no harm."""
        if self._same is not None:
            self._same.close()


def _merged(ranges: Ranges) -> Ranges:
    merged: Ranges = []
    for start, end in sorted(ranges):
        if merged and merged[-1][1] == start:
            merged[-1] = (merged[-1][0], end)
        else:
            merged.append((start, end))
    return merged
