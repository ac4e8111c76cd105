"""Requests under way in other threads: how many a client may have, and all clients together.

    Shares    what all clients have together; one lock for all of it
    Share     what one client has of it; `take` before a request goes to another thread, `give_back` when it is over

Nobody waits for ever: who waits holds nothing that others wait for, for the requests under way end by themselves, and
as long as there are none, the next is let in, whatever it needs (limits are at least what one request needs).

Nobody takes it all: a client has no more under way than it leaves free, so one alone gets half of the whole, two get a
third each, and who comes next always finds some. A quarter is kept for the machines that write to active disks. Where
there is no room, machines come first, then who has the fewest requests under way, then who has waited longest; and
nobody overtakes them, also not with a request that would fit.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable


class Shares:
    """`requests` and `size` bytes of their payload for all clients."""

    def __init__(self, requests: int, size: int) -> None:
        self.lock = threading.Lock()
        self.requests = requests  # what is free, below 0 where `take_now` had to; under the lock, as all that follows
        self.size = size
        self._all = (requests, size)
        self._kept = (requests // 4, size // 4)  # for machines
        self._waiting: list[Share] = []
        self._tickets = itertools.count()

    @property
    def in_flight(self) -> tuple[int, int]:
        """Requests, and bytes of their payload, that are under way now."""
        with self.lock:
            return self._all[0] - self.requests, self._all[1] - self.size

    def share(self, requests: int, size: int, *, machine: bool) -> Share:
        """For one client, which may have so much; `machine`: it writes to an active disk."""
        return Share(self, requests, size, machine=machine)

    # Under the lock.

    def let_in(self, share: Share, count: int) -> bool:
        """Give it a request with `count` bytes now, unless there is no room or somebody comes first."""
        if not self._has_room(share, count) or (self._waiting and self._first().comes_before(share)):
            return False
        share.add(count)
        return True

    def queue(self, share: Share) -> None:
        share.ticket = next(self._tickets)
        self._waiting.append(share)

    def wake(self) -> None:
        """Something was given back."""
        while self._waiting:
            share = self._first()
            assert share.wanted is not None
            if not self._has_room(share, share.wanted):
                return
            self._waiting.remove(share)
            share.add(share.wanted)
            share.wanted = None
            share.changed.notify_all()

    @property
    def is_waited_for(self) -> bool:
        return bool(self._waiting)

    def _first(self) -> Share:
        return min(self._waiting, key=Share.turn)

    def _has_room(self, share: Share, count: int) -> bool:
        requests, size = (0, 0) if share.machine else self._kept
        return share.requests < self.requests - requests and share.size + count <= self.size - size


class Share:
    """What one client has under way. `take` is for its connection's thread alone."""

    def __init__(self, shares: Shares, requests: int, size: int, *, machine: bool) -> None:
        self._shares = shares
        self._most_requests, self._most_size = requests, size
        self.machine = machine
        self.requests = 0  # under the lock of all, as all that follows
        self.size = 0
        self.wanted: int | None = None
        """Bytes of the request that waits for others to give back."""
        self.ticket = 0
        self.changed = threading.Condition(shares.lock)
        self._watched = False  # somebody waits for this client's own requests to end

    def try_take(self, count: int) -> bool:
        """Take a request with `count` bytes of payload, where that is possible without waiting."""
        with self._shares.lock:
            return self._fits(count) and self._shares.let_in(self, count)

    def take(self, count: int) -> None:
        """The same, and wait for it."""
        with self._shares.lock:
            self._watch(lambda: self._fits(count))
            if not self._shares.let_in(self, count):
                self.wanted = count
                self._shares.queue(self)
                self.changed.wait_for(lambda: self.wanted is None)

    def take_now(self, count: int) -> None:
        """The same, above all limits: for a thread that may not wait."""
        with self._shares.lock:
            self.add(count)

    def give_back(self, count: int) -> None:
        """A request is over. From any thread."""
        with self._shares.lock:
            self.requests -= 1
            self.size -= count
            self._shares.requests += 1
            self._shares.size += count
            if self._watched:
                self.changed.notify_all()
            if self._shares.is_waited_for:
                self._shares.wake()

    def wait_idle(self) -> None:
        """Wait until this client has nothing under way."""
        with self._shares.lock:
            self._watch(lambda: not self.requests)

    # Under the lock.

    def add(self, count: int) -> None:
        self.requests += 1
        self.size += count
        self._shares.requests -= 1
        self._shares.size -= count

    def turn(self) -> tuple[bool, int, int]:
        return not self.machine, self.requests, self.ticket

    def comes_before(self, other: Share) -> bool:
        """Whether this one, which waits, is served before `other`, which comes now."""
        return self.turn()[:2] <= other.turn()[:2]

    def _fits(self, count: int) -> bool:
        return self.requests < self._most_requests and self.size + count <= self._most_size

    def _watch(self, reached: Callable[[], bool]) -> None:
        if not reached():
            self._watched = True
            self.changed.wait_for(reached)
            self._watched = False
