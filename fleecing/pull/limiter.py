"""A limit in bytes a second, over all threads of a copy, which can be changed while they wait.

Whoever wants bytes books them, in order, and goes when all that was booked before has been paid for by time:

    booked   |---first---|---second---|---third---|     third goes when `allowed` has reached its start
    allowed  |===============>                          grows by the rate; never beyond what is booked: idle time
                                                        is no credit for a burst
"""

from __future__ import annotations

import time
from collections.abc import Callable
from threading import Condition

Pause = Callable[[Condition, float], None]
"""Waits until that time, or until the condition, which is held, is notified."""


_LONGEST_PAUSE = 3600.0
"""Seconds, after which `wait` looks again: a lock takes no time-out of centuries."""


def _pause(changed: Condition, until: float) -> None:
    changed.wait(min(max(0.0, until - time.monotonic()), _LONGEST_PAUSE))


class Bandwidth:
    """`rate` in bytes a second, 0 = no limit. Tests bring a clock of their own."""

    def __init__(self, rate: int = 0, *, clock: Callable[[], float] = time.monotonic, pause: Pause = _pause) -> None:
        self._rate = rate
        self._clock = clock
        self._pause = pause
        self._changed = Condition()
        self._looked_at = clock()
        self._booked = 0
        self._allowed = 0.0
        self._stopped = False

    @property
    def rate(self) -> int:
        """Bytes a second, 0 = no limit."""
        return self._rate

    def set(self, rate: int) -> None:
        """From now on; who waits now is told."""
        with self._changed:
            self._look()
            self._rate = rate
            self._changed.notify_all()

    def stop(self) -> None:
        """Nobody waits any more."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def book(self, count: int) -> int:
        """A turn for the next `count` bytes, for `is_due` and `wait`."""
        with self._changed:
            self._look()
            turn = self._booked
            self._booked += count
            return turn

    def is_due(self, turn: int) -> bool:
        """`wait` would return at once."""
        with self._changed:
            return self._left(turn) <= 0

    def wait(self, turn: int) -> None:
        """Until its time has come, or `stop`."""
        with self._changed:
            while (seconds := self._left(turn)) > 0:
                self._pause(self._changed, self._looked_at + seconds)

    def _left(self, turn: int) -> float:
        """Seconds."""
        self._look()
        return 0.0 if self._stopped or not self._rate else (turn - self._allowed) / self._rate

    def _look(self) -> None:
        now = self._clock()
        grown = self._allowed + self._rate * (now - self._looked_at)
        self._allowed = min(float(self._booked), grown) if self._rate else float(self._booked)
        self._looked_at = now
