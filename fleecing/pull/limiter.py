"""A limit in bytes a second, over all threads of a pull."""

from __future__ import annotations

import time
from threading import Lock


class Bandwidth:
    """Spreads bytes over time: whoever wants some is told how long to wait first. `rate` in bytes a second."""

    def __init__(self, rate: int) -> None:
        self._rate = rate
        self._lock = Lock()
        self._free_at = time.monotonic()

    def delay(self, count: int) -> float:
        """Seconds to wait before the next `count` bytes may be asked for; they are booked now."""
        with self._lock:
            now = time.monotonic()
            start = max(self._free_at, now)
            self._free_at = start + count / self._rate
            return start - now
