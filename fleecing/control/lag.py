"""How late the event loop is: it accepts clients, answers the control API and keeps time, so it must never be busy."""

from __future__ import annotations

import asyncio
import time
from typing import Final

from fleecing.block.latency import Latency

INTERVAL: Final = 0.5
"""Seconds between two looks. A loop that hangs is seen by the watchdog (notify.py), and by a scrape that fails."""


class LoopLag:
    """`latency` is of each look: how much later than asked for it was. Read by any thread."""

    def __init__(self) -> None:
        self.latency = Latency()

    async def run(self) -> None:
        """Look until it is cancelled."""
        while True:
            due = time.monotonic() + INTERVAL
            await asyncio.sleep(INTERVAL)
            self.latency.record(max(0.0, time.monotonic() - due))
