"""How long things took: a histogram that is cheap to write and fine enough to read percentiles from.

Ten buckets a decade, from 1 us to 80 s: a percentile is wrong by a quarter at most. Whoever has no call to spare
writes into `buckets` and `seconds` in line; `bisect_left(BOUNDS, seconds)` is the bucket.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate

_DECADE = (1.0, 1.25, 1.6, 2.0, 2.5, 3.15, 4.0, 5.0, 6.3, 8.0)  # ISO 3, R10

BOUNDS = tuple(float(f"{mantissa}e{exponent}") for exponent in range(-6, 2) for mantissa in _DECADE)
"""Seconds: the largest value of each bucket; one more bucket has all that is larger."""


class Latency:
    """`buckets[i]` events took up to `BOUNDS[i]` seconds and longer than the bound before; `seconds` is their sum.

    One thread, or one lock, changes it; any thread may read it. Nothing in it ever goes down.
    """

    __slots__ = ("buckets", "seconds")

    def __init__(self) -> None:
        self.buckets = [0] * (len(BOUNDS) + 1)
        self.seconds = 0.0

    def record(self, seconds: float, count: int = 1) -> None:
        """So many events took so long, each."""
        self.buckets[bisect_left(BOUNDS, seconds)] += count
        self.seconds += seconds * count

    def add(self, other: Latency) -> None:
        """All that the other has recorded, too."""
        self.buckets = [mine + its for mine, its in zip(self.buckets, other.buckets, strict=True)]
        self.seconds += other.seconds

    @property
    def count(self) -> int:
        """Events."""
        return sum(self.buckets)


def percentile(buckets: Sequence[int], share: float) -> float | None:
    """The time (s) that `share` (0 to 1) of the events did not exceed, None where there were none.

    Within a bucket the events are taken to lie evenly; what is above the last bound counts as that.
    """
    total = sum(buckets)
    if not total:
        return None
    rank = share * total
    below = 0
    for i, (count, reached) in enumerate(zip(buckets, accumulate(buckets), strict=True)):
        if count and reached >= rank:
            if i == len(BOUNDS):
                break
            floor = BOUNDS[i - 1] if i else 0.0
            return floor + (BOUNDS[i] - floor) * (rank - below) / count
        below = reached
    return BOUNDS[-1]
