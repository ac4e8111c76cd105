"""Host clusters of a temp image: who has them, in memory, and their counts, in the file.

A cluster is free, or placed (somebody may write to it; its count in the file is still 0), or counted (1). Data is
placed, written, counted, then linked; on the way back it is unlinked, no longer counted, and only then free. So the
worst that a crash leaves behind is a count too high.

Nothing here is for several threads at once: TempImage holds its lock around every call.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import suppress

from fleecing.block.hostfile import HostFile
from fleecing.block.qcow2 import layout
from fleecing.block.qcow2.free_runs import FreeRuns
from fleecing.block.qcow2.geometry import Geometry
from fleecing.errors import TempLimitReached
from fleecing.units import div_up

ClusterRuns = list[tuple[int, int]]
"""(first host cluster, clusters), clusters above 0."""

WATERMARK = 80
"""Percent of the limit: the use from which on its owner should hear of it, if it is not told otherwise.

Below seven eighths of that the next time counts as new; a use that sways around the watermark is told once."""


class Refcounts:
    """`blocks`: offsets of the refcount blocks in the file, by range. `frontier`: all clusters from there on are new.

    `used`: clusters that are not free, with those kept for refcount blocks that are not written yet. `limit`: bytes.
    """

    def __init__(
        self, file: HostFile, geometry: Geometry, blocks: dict[int, int], frontier: int, used: int, limit: int | None
    ) -> None:
        self.used = self.peak = used
        self._file = file
        self._cluster_size = geometry.cluster_size
        self._per_block = geometry.block_entries
        self._table_offset = geometry.table_offset
        self._blocks = blocks
        self._frontier = frontier
        self._capacity = geometry.capacity
        self.alarm = False  # `used` has come up to the watermark: to be told, and unset, by whoever holds the lock
        self._watermark = WATERMARK
        self.set_limit(limit)
        self._free = FreeRuns()
        # Clusters that an L2 entry in the file may still name since neither linking nor undoing it worked. They stay
        # counted and are never reused.
        self._doubtful: set[int] = set()

    def set_limit(self, limit: int | None) -> None:
        """From now on. A limit below what is in use takes nothing away; there is no more to be had, then."""
        self._quota = limit
        self._limit_bytes = self._capacity * self._cluster_size if limit is None else limit
        self._limit = self._limit_bytes // self._cluster_size
        self._high, self._low = self._capacity + 1, 0  # no limit, no watermark
        if limit is not None:
            self._high = div_up(self._limit * self._watermark, 100)
            self._low = self._high * 7 // 8
        self.alarm = self._told = False
        self._watch()

    def set_watermark(self, percent: int) -> None:
        """1 to 100, of the limit."""
        self._watermark = percent
        self.set_limit(self._quota)

    def need(self, count: int) -> None:
        """Raise TempLimitReached where `count` more clusters are not to be had."""
        if self.used + count > self._limit:
            raise TempLimitReached(self._limit_bytes)
        rest = count - self._free.total
        if rest > 0:
            _, blocks, frontier = self._beyond(rest)
            if not self._fits(count, blocks, frontier):
                raise TempLimitReached(self._limit_bytes)

    def take(self, count: int) -> ClusterRuns:
        """Place `count` clusters: freed ones if one run is long enough, else new ones, else whatever there is.

        Raises TempLimitReached before anything changes.
        """
        if self.used + count > self._limit:
            raise TempLimitReached(self._limit_bytes)
        start = self._free.take(count)
        if start is not None:
            self._use(count)
            return [(start, count)]
        beyond, blocks, frontier = self._beyond(count)
        if not self._fits(count, blocks, frontier):
            self.need(count)
        runs: ClusterRuns = []
        while count and not self._fits(count, blocks, frontier):
            run = self._free.take_longest(count)
            runs.append(run)
            self._use(run[1])
            count -= run[1]
            beyond, blocks, frontier = self._beyond(count)
        self._frontier = frontier
        self._use(count + len(blocks))
        return runs + beyond

    def give_back(self, runs: Iterable[tuple[int, int]]) -> None:
        """Placed clusters, or such as are no longer counted, become free. The doubtful stay."""
        for start, count in runs:
            self._free.add(start, count)
            self.used -= count
        if self.used < self._low:
            self.alarm = self._told = False

    def add_free(self, runs: Iterable[tuple[int, int]]) -> None:
        """Clusters before the frontier that were found free."""
        for start, count in runs:
            self._free.add(start, count)

    def split_doubtful(self, start: int, count: int) -> ClusterRuns:
        """The run without the clusters that must not be reused."""
        if not self._doubtful:
            return [(start, count)]
        good = [cluster for cluster in range(start, start + count) if cluster not in self._doubtful]
        return merge((cluster, 1) for cluster in good)

    def up(self, start: int, count: int) -> None:
        """Count placed clusters as used in the file. On OSError they are not counted (a leak where that fails, too)."""
        try:
            self._write(start, count, layout.ones(count))
        except OSError:
            with suppress(OSError):
                self.down(start, count)
            raise
        if self._doubtful:
            self._doubtful.difference_update(range(start, start + count))

    def down(self, start: int, count: int) -> None:
        """Set the counts of unlinked clusters to 0 in the file; may be repeated after an OSError."""
        self._write(start, count, bytes(count * layout.REFCOUNT_BYTES))

    def doubt(self, start: int, count: int) -> None:
        """The file may still link these clusters: never reuse them."""
        self._doubtful.update(range(start, start + count))

    def _use(self, count: int) -> None:
        self.used += count
        if self.used > self.peak:
            self.peak = self.used
        if self.used >= self._high:
            self._watch()

    def _watch(self) -> None:
        if self.used >= self._high and not self._told:
            self.alarm = self._told = True

    def _fits(self, count: int, blocks: list[int], frontier: int) -> bool:
        """Whether there is room for clusters of which `_beyond` tells the rest."""
        return frontier <= self._capacity and self.used + count + len(blocks) <= self._limit

    def _beyond(self, count: int) -> tuple[ClusterRuns, list[int], int]:
        """`count` clusters from the frontier on, the ranges whose blocks take their place there, the new frontier."""
        at = self._frontier
        runs: ClusterRuns = []
        blocks = []
        while count:
            number, within = divmod(at, self._per_block)
            if not within and number not in self._blocks:
                blocks.append(number)
                at += 1
                within = 1
            n = min(count, self._per_block - within)
            if runs and sum(runs[-1]) == at:
                runs[-1] = (runs[-1][0], runs[-1][1] + n)
            else:
                runs.append((at, n))
            at += n
            count -= n
        return runs, blocks, at

    def _write(self, start: int, count: int, counts: bytes) -> None:
        done = 0
        for offset, n in self._pieces(start, count):
            size = n * layout.REFCOUNT_BYTES
            self._file.write(offset, counts if n == count else counts[done : done + size])
            done += size

    def _pieces(self, start: int, count: int) -> Iterator[tuple[int, int]]:
        """(offset in the file, entries) of the counts of a run, cut at block boundaries."""
        while count:
            number, within = divmod(start, self._per_block)
            block = self._blocks.get(number)
            if block is None:
                block = self._add_block(number)
            n = min(count, self._per_block - within)
            yield block + within * layout.REFCOUNT_BYTES, n
            start += n
            count -= n

    def _add_block(self, number: int) -> int:
        """Write the block of a range to the range's first cluster, then enter it in the table."""
        offset = number * self._per_block * self._cluster_size
        self._file.write(offset, layout.ones(1) + bytes(self._cluster_size - layout.REFCOUNT_BYTES))
        self._file.write(self._table_offset + number * layout.ENTRY_BYTES, layout.ENTRY.pack(offset))
        self._blocks[number] = offset
        return offset


def merge(runs: Iterable[tuple[int, int]]) -> ClusterRuns:
    """The same clusters in as few runs as possible; the runs come in order and do not overlap."""
    merged: ClusterRuns = []
    for start, count in runs:
        if merged and sum(merged[-1]) == start:
            merged[-1] = (merged[-1][0], merged[-1][1] + count)
        else:
            merged.append((start, count))
    return merged
