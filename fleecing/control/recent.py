"""The guest's latency of the last minute: what a person wants to know, where Prometheus has it since the start."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from fleecing.block.latency import percentile
from fleecing.server.meter import KINDS, Tally

WINDOW_SECONDS = 60.0
"""How far back it reaches, about: to the last sample that is so old, or to the start."""

SAMPLE_SECONDS = 5.0
"""Between two samples."""


@dataclass(frozen=True)
class Recent:
    """Of requests of one kind, or of all. Seconds; None = there were none."""

    requests: int
    p50: float | None
    p99: float | None


class RecentLatency:
    """Looks at sums that only grow, and tells what came to them lately. For any thread."""

    def __init__(self, total: Callable[[], Tally], clock: Callable[[], float] = time.monotonic) -> None:
        self._total = total
        self._clock = clock
        self._lock = threading.Lock()
        self._samples = deque([(clock(), _buckets(total()))])  # the first one is as old as the window, or the start

    def sample(self) -> None:
        """Take note of what there is, for later; to be called every few seconds, by one thread."""
        now = self._clock()
        if now < self._samples[-1][0] + SAMPLE_SECONDS:
            return
        buckets = _buckets(self._total())
        with self._lock:
            self._samples.append((now, buckets))
            while len(self._samples) > 1 and self._samples[1][0] <= now - WINDOW_SECONDS:
                self._samples.popleft()

    def look(self) -> tuple[Recent, dict[str, Recent]]:
        """All requests of the window, and those of each kind that there were."""
        buckets = _buckets(self._total())
        with self._lock:
            _, before = self._samples[0]
        everything = [0] * len(next(iter(buckets.values()), []))
        kinds: dict[str, Recent] = {}
        for name, counts in buckets.items():
            new = [count - old for count, old in zip(counts, before.get(name) or [0] * len(counts), strict=True)]
            if any(new):
                kinds[name] = _recent(new)
                everything = [one + other for one, other in zip(everything, new, strict=True)]
        return _recent(everything), kinds


def _buckets(tally: Tally) -> dict[str, list[int]]:
    found = {}
    for kind, name in KINDS.items():
        latency = tally.latencies[kind]
        if latency is not None:
            found[name] = latency.buckets
    return found


def _recent(buckets: list[int]) -> Recent:
    return Recent(sum(buckets), percentile(buckets, 0.5), percentile(buckets, 0.99))
