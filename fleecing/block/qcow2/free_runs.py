"""Free host clusters as runs: neighbours merge, and a run that is long enough is found without a search."""

from __future__ import annotations

_LOOKS = 4
"""Runs of the nearest length class that are looked at before a longer run is cut."""


class FreeRuns:
    """A set of clusters. Not for several threads at once."""

    def __init__(self) -> None:
        self.total = 0
        self._end_of: dict[int, int] = {}
        self._start_of: dict[int, int] = {}
        # [k] holds the starts of runs with lengths from 2**(k-1) to 2**k - 1. The run freed last is taken first, by
        # popitem, which alone costs the same whatever was deleted from the dict before.
        self._classes: list[dict[int, None]] = [{} for _ in range(64)]

    def add(self, start: int, count: int) -> None:
        """Put in clusters that are not in yet."""
        self.total += count
        end = start + count
        if start in self._start_of:
            start = self._remove(self._start_of[start])
        if end in self._end_of:
            after = self._end_of[end]
            self._remove(end)
            end = after
        self._insert(start, end)

    def take(self, count: int) -> int | None:
        """Take a run of `count` clusters out and return its start; None where no run is long enough."""
        if self.total < count:
            return None
        start = self._find(count)
        if start is not None:
            self._cut(start, count)
        return start

    def take_longest(self, count: int) -> tuple[int, int]:
        """Take at most `count` clusters of one of the longest runs out: (start, clusters). Needs total > 0."""
        start = _last(next(starts for starts in reversed(self._classes) if starts))
        count = min(count, self._end_of[start] - start)
        self._cut(start, count)
        return start, count

    def runs(self) -> list[tuple[int, int]]:
        """(start, clusters) of every run, by start."""
        return sorted((start, end - start) for start, end in self._end_of.items())

    def _find(self, count: int) -> int | None:
        nearest = count.bit_length()
        starts = self._classes[nearest]
        looked_at: list[int] = []
        while starts and len(looked_at) < _LOOKS:
            start = starts.popitem()[0]
            looked_at.append(start)
            if self._end_of[start] - start >= count:
                break
        starts.update(dict.fromkeys(looked_at))
        if looked_at and self._end_of[looked_at[-1]] - looked_at[-1] >= count:
            return looked_at[-1]
        for starts in self._classes[nearest + 1 :]:
            if starts:
                return _last(starts)
        return None

    def _cut(self, start: int, count: int) -> None:
        end = self._end_of[start]
        self._remove(start)
        self.total -= count
        if start + count < end:
            self._insert(start + count, end)

    def _insert(self, start: int, end: int) -> None:
        self._end_of[start] = end
        self._start_of[end] = start
        self._classes[(end - start).bit_length()][start] = None

    def _remove(self, start: int) -> int:
        end = self._end_of.pop(start)
        del self._start_of[end]
        del self._classes[(end - start).bit_length()][start]
        return start


def _last(starts: dict[int, None]) -> int:
    start = starts.popitem()[0]
    starts[start] = None
    return start
