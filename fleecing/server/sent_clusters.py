"""Which clusters of a snapshot were sent, every byte of them, and which of these may still be asked for again.

    partly sent    the ranges of its bytes that were; when they are all, the cluster comes into
    the window     those that became complete last; a READ of one makes it the last again
    leaving        the first of the window where it has become too long: `add` returns them, to be trimmed

A window leaves alone what it has room for, and an eighth more: so its oldest go many at a time, for the price of one.

Byte for byte, whatever pieces clients read in, in whatever order and how often. Memory is bounded all the same: a
reader that goes through a disk has one cluster partly sent on each connection, with one range. Where all ranges
together become more than MOST_RANGES, what was longest without a READ is forgotten; such a cluster leaves only when all
of its bytes are sent once more.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import OrderedDict
from collections.abc import Iterable

from bitarray import bitarray

from fleecing.block.bitmap import clusters_within
from fleecing.units import div_up

MOST_RANGES = 1 << 16
"""Ranges of bytes of all partly sent clusters together: up to 20 MiB of memory."""

MOST_WINDOW = 1 << 16
"""Clusters in the largest window: up to 15 MiB of memory."""


class SentClusters:
    """Of one snapshot. `size` and `cluster_size` in bytes; callers take turns."""

    def __init__(
        self, size: int, cluster_size: int, window: int, access: bitarray, *, most_ranges: int = MOST_RANGES
    ) -> None:
        """The window keeps `window` bytes, rounded up to clusters. `access`: those that can be read still."""
        self._size = size
        self._cluster_size = cluster_size
        self._shift = cluster_size.bit_length() - 1
        self._room = div_up(window, cluster_size)
        self._most = self._room + self._room // 8
        self._access = access
        self._most_ranges = most_ranges
        # start, end, start, end ... in order, from the cluster's first byte on; the longest without a READ comes first
        self._partly: OrderedDict[int, list[int]] = OrderedDict()
        self._ranges = 0
        self._window: OrderedDict[int, None] = OrderedDict()

    def add(self, reads: Iterable[tuple[int, int]]) -> list[int]:
        """Bytes [start, end) of each of these were sent. Returns the clusters that leave, the oldest first."""
        start = end = 0
        for begin, stop in reads:
            if begin == end:  # the next in a row
                end = stop
            else:
                self._add(start, end)
                start, end = begin, stop
        self._add(start, end)
        if len(self._window) <= self._most:
            return []
        return [self._window.popitem(last=False)[0] for _ in range(len(self._window) - self._room)]

    def _add(self, start: int, end: int) -> None:
        size = self._cluster_size
        first, last = start >> self._shift, end >> self._shift
        head, tail = start - (first << self._shift), end - (last << self._shift)
        if head:
            self._add_part(first, head, size if last > first else tail)
        for cluster in range(*clusters_within(start, end - start, size, self._size)):
            self._complete(cluster)
        if tail and end < self._size and (last > first or not head):
            self._add_part(last, 0, tail)

    def _add_part(self, cluster: int, start: int, end: int) -> None:
        if cluster in self._window:
            self._window.move_to_end(cluster)
            return
        if not self._access[cluster]:  # trimmed since it was read
            return
        ranges = self._partly.pop(cluster, [])
        self._ranges -= len(ranges) // 2
        # Even places are starts. A new one counts where it lies in no range, and takes the place of all that it covers.
        at, behind = bisect_left(ranges, start), bisect_right(ranges, end)
        ranges[at:behind] = ([] if at % 2 else [start]) + ([] if behind % 2 else [end])
        if ranges == [0, min(self._cluster_size, self._size - (cluster << self._shift))]:
            self._complete(cluster)
            return
        self._partly[cluster] = ranges
        self._ranges += len(ranges) // 2
        while self._ranges > self._most_ranges:
            self._ranges -= len(self._partly.popitem(last=False)[1]) // 2

    def _complete(self, cluster: int) -> None:
        if not self._access[cluster]:
            return
        if cluster in self._partly:
            self._ranges -= len(self._partly.pop(cluster)) // 2
        self._window[cluster] = None
        self._window.move_to_end(cluster)
