"""How many requests and connections a copy needs: measured as it goes on. No I/O, no clock of its own.

    Depth (one per connection)      answers that take long although few wait     -> more requests in flight
    Crowd (one per copy)            connections that mostly wait for the server  -> one more, kept up while it helps

A long way to the server is filled by requests; a server that deals with one request of a connection at a time is kept
busy by connections. Where the copy itself, the server's disk or a limit is what takes the time, both stay as they are:
what more requests do then is take memory, and what more connections do is take each other's CPUs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable
from typing import Final

_FULL: Final = 0.7
"""Of the requests in flight, those that would be needed if each were answered as fast as the fastest one."""

_IDLE: Final = 0.4
"""The part of its time that a connection waits for the server, from which on another one is tried."""

_HELPS: Final = 1.1
"""The rate with another connection, of that before it, from which on it was worth it."""


class Depth:
    """The requests in flight of one connection; times in seconds.

    Each kind of request has its floor, the shortest time that an answer took. The sum of the floors of all answers in
    a while, by that while, is how many requests would be in flight if none had to queue (Little's law). Where that is
    nearly all there are, more of them get more done; where they queue it is less, and more would only queue longer.
    """

    def __init__(self, now: int, most: int) -> None:
        self.now = now
        self.most = most
        self._floors: dict[Hashable, float] = {}
        self._began: float | None = None
        self._answers: Counter[Hashable] = Counter()

    def answered(self, kind: Hashable, sent_at: float, at: float) -> int:
        """One of them was answered; how many more would be of use. `grow` tells how many there will be."""
        if self.now >= self.most:
            return 0
        self._floors[kind] = min(at - sent_at, self._floors.get(kind, at - sent_at))
        if self._began is None:
            self._began = at
            return 0
        self._answers[kind] += 1
        # Answers to a full house come in bursts: one round alone may show a burst or the lull behind it
        if self._answers.total() < 2 * self.now:
            return 0
        elapsed = at - self._began
        least = sum(self._floors[kind] * count for kind, count in self._answers.items())
        more = min(self.now, self.most - self.now) if least >= _FULL * self.now * elapsed else 0
        self._restart()
        return more

    def grow(self, more: int) -> None:
        """There are that many more from now on; 0: there is no room for any, now or later."""
        self.now += more
        if not more:
            self.most = self.now

    def paused(self) -> None:
        """Fewer requests than there may be were in flight: what was measured says nothing."""
        self._restart()

    def _restart(self) -> None:
        self._began = None
        self._answers.clear()


class Crowd:
    """The connections of a copy; looked at in even intervals."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._rate_before: float | None = None

    def wants_more(self, now: int, rate: float, idle: float) -> bool:
        """Whether one more should be tried, after a while with `now` of them.

        `rate`: bytes a second in that while; `idle`: the part of it, 0 to 1, that they waited for the server.
        """
        if now >= self.most:
            return False
        if self._rate_before is not None and rate < _HELPS * self._rate_before:
            self.most = now  # the last one was no help
            return False
        if idle < _IDLE:
            self._rate_before = None
            return False
        self._rate_before = rate
        return True
