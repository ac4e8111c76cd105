"""Who is let in: counts clients in all and by address, and says no without filling the log."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable

from fleecing.events import Event, tell
from fleecing.server.limits import Limits

log = logging.getLogger(__name__)

QUIET_SECONDS = 10.0
"""After a line about clients turned away: the next ones are counted, and told in one line with the first later one."""


class Door:
    """For the loop's thread only. `address`: the IP address of a client, "" = one of a Unix socket."""

    def __init__(self, limits: Limits, clock: Callable[[], float] = time.monotonic) -> None:
        self._limits = limits
        self._clock = clock
        self._inside = 0
        self._by_address: Counter[str] = Counter()  # only those with an address, and only above 0
        self._quiet_until = -1.0
        self._untold = 0
        self.turned_away = 0
        """Ever."""

    def enter(self, peer: str, address: str) -> bool:
        """Count the client in; False where there are too many, which is logged."""
        most = self._limits.clients_per_address
        if self._inside >= self._limits.clients:
            return self._refuse(peer, f"{self._inside} clients are connected")
        if most and address and self._by_address[address] >= most:
            return self._refuse(peer, f"{most} clients of its address are connected")
        self._inside += 1
        if address:
            self._by_address[address] += 1
        return True

    def leave(self, address: str) -> None:
        """One that was let in is gone."""
        self._inside -= 1
        if address:
            self._by_address[address] -= 1
            if not self._by_address[address]:
                del self._by_address[address]

    def _refuse(self, peer: str, reason: str) -> bool:
        self.turned_away += 1
        now = self._clock()
        if now < self._quiet_until:
            self._untold += 1
            return False
        more = f", and {self._untold} others before it" if self._untold else ""
        text = "client %s turned away: %s%s"
        tell(log, logging.WARNING, Event.CLIENT_TURNED_AWAY, text, peer, reason, more, client=peer, reason=reason)
        self._quiet_until, self._untold = now + QUIET_SECONDS, 0
        return False
