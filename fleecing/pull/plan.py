"""What is to be done with each part of a disk: read it, or know that it is zero.

Block status is asked a window at a time, as the read head moves, so that a disk of any size takes little memory and
the first read starts at once. Everything is made coarser to clusters: one with any data in it is data as a whole. So
each piece consists of whole clusters (the last one ends with the disk), and a TRIM of just that piece frees all of it.

    block status   |--data--|-----zero-----|-data-|--------zero--------|
    clusters       |      |      |      |      |      |      |      |      |
    runs           |----data-----|-zero-|---data------|-------zero---------|
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from threading import Lock
from typing import Final, NamedTuple

from fleecing.nbd.constants import AllocationStatus
from fleecing.units import GiB, align_down

StatusCall = Callable[[int, int], list[tuple[int, int]]]
"""(offset, length) -> base:allocation extents from there on; they may cover less, but something."""

ZERO_PIECE: Final = GiB
"""The longest piece of zeroes: a TRIM of it fits a compact request, and progress is seen."""

WINDOW_CLUSTERS: Final = 1 << 14
"""Clusters that one look covers at most (1 GiB at 64 KiB): this bounds the runs that are held."""

_ZERO: Final = int(AllocationStatus.ZERO)


class Piece(NamedTuple):
    """One part of the disk, in bytes, dealt with in one go."""

    offset: int
    length: int
    is_zero: bool


class Plan:
    """Hands out the pieces of a disk of `size` bytes, in order, to any number of threads.

    `data_piece`, rounded to clusters, is the longest piece of data.
    """

    def __init__(self, size: int, *, cluster: int, data_piece: int) -> None:
        self.size = size
        self._cluster = cluster
        self.data_piece = max(cluster, align_down(data_piece, cluster))
        self._zero_piece = max(cluster, align_down(ZERO_PIECE, cluster))
        self._window = cluster * WINDOW_CLUSTERS
        self._lock = Lock()
        self._runs: deque[tuple[int, bool]] = deque()
        self._taken = 0
        self._looked = 0

    def take(self, ask: StatusCall | None) -> Piece | None:
        """The next piece; None when all are taken. `ask` None: nothing is known, all is data.

        Raises whatever `ask` does; other threads wait meanwhile, so it has to come back in bounded time.
        """
        with self._lock:
            if not self._runs:
                if self._looked == self.size:
                    return None
                self._look(ask)
            length, is_zero = self._runs.popleft()
            most = self._zero_piece if is_zero else self.data_piece
            if length > most:
                self._runs.appendleft((length - most, is_zero))
                length = most
            piece = Piece(self._taken, length, is_zero)
            self._taken += length
            return piece

    def _look(self, ask: StatusCall | None) -> None:
        """Fill `_runs` with the next window."""
        start = self._looked
        end = min(start + self._window, self.size)
        if ask is None:
            self._runs.append((end - start, False))
        else:
            coarse = _Coarse(start, self._cluster, self._runs)
            while coarse.position < end:
                for length, status in ask(coarse.position, end - coarse.position):
                    coarse.add(length, is_zero=bool(status & _ZERO))
            coarse.finish()
        self._looked = end


class _Coarse:
    """Turns extents into runs of whole clusters: (length, is zero), equal neighbours merged."""

    def __init__(self, start: int, cluster: int, runs: deque[tuple[int, bool]]) -> None:
        self.position = start
        self._cluster = cluster
        self._runs = runs
        self._zero_so_far = True

    def add(self, length: int, *, is_zero: bool) -> None:
        """The next `length` bytes are zero, or not known to be."""
        while length:
            inside = self.position % self._cluster
            if not inside and length >= self._cluster:
                step = align_down(length, self._cluster)
                self._emit(step, is_zero=is_zero)
            else:
                step = min(length, self._cluster - inside)
                self._zero_so_far = self._zero_so_far and is_zero
                if inside + step == self._cluster:
                    self._end_cluster(self._cluster)
            self.position += step
            length -= step

    def finish(self) -> None:
        """No more comes: a cluster that has only begun is the disk's last."""
        if inside := self.position % self._cluster:
            self._end_cluster(inside)

    def _end_cluster(self, length: int) -> None:
        self._emit(length, is_zero=self._zero_so_far)
        self._zero_so_far = True

    def _emit(self, length: int, *, is_zero: bool) -> None:
        if self._runs and self._runs[-1][1] == is_zero:
            length += self._runs.pop()[0]
        self._runs.append((length, is_zero))
