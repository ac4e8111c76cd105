"""What is to be done with each part of a disk: read it, know that it is zero, or leave it alone.

Block status is asked a window at a time, as the read head moves, so that a disk of any size takes little memory and
the first read starts at once. Everything is made coarser to clusters: one with any data in it is data as a whole. So
each piece consists of whole clusters (the last one ends with the disk), and a TRIM of just that piece frees all of it.

    block status   |--data--|-----zero-----|-data-|--------zero--------|---not dirty---|
    clusters       |      |      |      |      |      |      |      |      |      |    |
    runs           |----data-----|-zero-|---data------|-------zero---------|

What an earlier run has done is left out, and its block status is never asked: it may be trimmed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from threading import Lock
from typing import Final, NamedTuple

from fleecing.nbd.constants import AllocationStatus
from fleecing.units import GiB, align_down

StatusCall = Callable[[int, int], list[tuple[int, int]]]
"""(offset, length) -> base:allocation extents from there on, with `CLEAN`; they may cover less, but something."""

CLEAN: Final = 1 << 16
"""A bit beside those of base:allocation: the dirty bitmap says that nothing changed here."""

ZERO_PIECE: Final = GiB
"""The longest piece of zeroes: a TRIM of it fits a compact request, and progress is seen."""

WINDOW_CLUSTERS: Final = 1 << 14
"""Clusters that one look covers at most (1 GiB at 64 KiB): this bounds the runs that are held."""

_ZERO: Final = int(AllocationStatus.ZERO)
_ALL: Final = CLEAN | _ZERO


class Piece(NamedTuple):
    """One part of the disk, in bytes, dealt with in one go. `is_kept`: the target has it, only its TRIM is missing."""

    offset: int
    length: int
    is_zero: bool
    is_kept: bool = False


class _Run(NamedTuple):
    offset: int
    length: int
    is_zero: bool


class Plan:
    """Hands out the pieces of a disk of `size` bytes, in order, to any number of threads.

    `data_piece`, rounded to clusters, is the longest piece of data. `done` are the (start, end) that need nothing any
    more, in order, apart from each other, and whole clusters.
    """

    def __init__(self, size: int, *, cluster: int, data_piece: int, done: Iterable[tuple[int, int]] = ()) -> None:
        self.size = size
        self._cluster = cluster
        self.data_piece = max(cluster, align_down(data_piece, cluster))
        self._zero_piece = max(cluster, align_down(ZERO_PIECE, cluster))
        self._window = cluster * WINDOW_CLUSTERS
        self._lock = Lock()
        self._gaps = deque(_gaps(size, done))
        self._runs: deque[_Run] = deque()
        self._returned: deque[Piece] = deque()
        self._out = 0  # pieces that are being dealt with
        self.clean = 0
        """Bytes found until now that have not changed."""

    def take(self, ask: StatusCall | None, *, before: int | None = None) -> Piece | None:
        """The next piece; None when all are taken. `ask` None: nothing is known, all is data.

        A piece at or behind `before` is not handed out yet: None too, and `exhausted` tells which it was. Raises
        whatever `ask` does, and is as it was then; other threads wait meanwhile, so it has to come back in bounded
        time.
        """
        with self._lock:
            if self._returned:
                self._out += 1
                return self._returned.popleft()
            while not self._runs:
                if not self._gaps:
                    return None
                self._look(ask)
            run = self._runs[0]
            if before is not None and run.offset >= before:
                return None
            length = min(run.length, self._zero_piece if run.is_zero else self.data_piece)
            if length == run.length:
                self._runs.popleft()
            else:
                self._runs[0] = _Run(run.offset + length, run.length - length, run.is_zero)
            self._out += 1
            return Piece(run.offset, length, run.is_zero)

    def done(self) -> bool:
        """A piece that was taken needs nothing any more. True where that was all, see `is_over`."""
        with self._lock:
            self._out -= 1
            return self._is_over()

    def add(self, piece: Piece) -> None:
        """One more, which comes first."""
        with self._lock:
            self._returned.append(piece)

    def put_back(self, piece: Piece) -> None:
        """The piece could not be dealt with, or its TRIM is missing: it comes first again."""
        with self._lock:
            self._out -= 1
            self._returned.append(piece)

    @property
    def exhausted(self) -> bool:
        """Nothing is left to take, unless something is put back. Never waits, not even for who asks."""
        return not (self._returned or self._runs or self._gaps)

    @property
    def is_over(self) -> bool:
        """Nothing is left to take, and nothing can be put back any more."""
        with self._lock:
            return self._is_over()

    def _is_over(self) -> bool:
        return not (self._out or self._returned or self._runs or self._gaps)

    def next_offset(self) -> int:
        """No piece before this offset is left; -1 where there is none at all, or one that was put back."""
        with self._lock:
            if self._returned or not (self._runs or self._gaps):
                return -1
            return self._runs[0].offset if self._runs else self._gaps[0][0]

    def _look(self, ask: StatusCall | None) -> None:
        """Fill `_runs` with the next window; it may turn out to be clean as a whole."""
        start, gap_end = self._gaps[0]
        end = min(start + self._window, gap_end)
        if ask is None:
            self._runs.append(_Run(start, end - start, False))
        else:
            coarse = _Coarse(start, self._cluster)
            while coarse.position < end:
                for length, status in ask(coarse.position, end - coarse.position):
                    coarse.add(length, status & _ALL)
            coarse.finish()
            for offset, length, status in coarse.runs:
                if status & CLEAN:
                    self.clean += length
                else:
                    self._runs.append(_Run(offset, length, bool(status & _ZERO)))
        if end == gap_end:
            self._gaps.popleft()
        else:
            self._gaps[0] = end, gap_end


def _gaps(size: int, done: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """The (start, end) between those."""
    position = 0
    for start, end in done:
        if position < start:
            yield position, start
        position = end
    if position < size:
        yield position, size


class _Coarse:
    """Turns extents into runs of whole clusters: (offset, length, status), equal neighbours merged.

    A cluster has those bits of the status that all of its parts have.
    """

    def __init__(self, start: int, cluster: int) -> None:
        self.position = start
        self.runs: list[tuple[int, int, int]] = []
        self._cluster = cluster
        self._so_far = _ALL

    def add(self, length: int, status: int) -> None:
        """The next `length` bytes."""
        while length:
            inside = self.position % self._cluster
            if not inside and length >= self._cluster:
                step = align_down(length, self._cluster)
                self._emit(self.position, step, status)
            else:
                step = min(length, self._cluster - inside)
                self._so_far &= status
                if inside + step == self._cluster:
                    self._end_cluster(self.position - inside, self._cluster)
            self.position += step
            length -= step

    def finish(self) -> None:
        """No more comes: a cluster that has only begun is the disk's last."""
        if inside := self.position % self._cluster:
            self._end_cluster(self.position - inside, inside)

    def _end_cluster(self, offset: int, length: int) -> None:
        self._emit(offset, length, self._so_far)
        self._so_far = _ALL

    def _emit(self, offset: int, length: int, status: int) -> None:
        if status & CLEAN:
            status = CLEAN
        if self.runs and self.runs[-1][2] == status:
            offset, before, _ = self.runs.pop()
            length += before
        self.runs.append((offset, length, status))
