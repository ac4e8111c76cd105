"""A thread that calls something now and then."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

log = logging.getLogger(__name__)


class Ticker:
    """Calls `call` every `seconds`, and soon after `hurry`, until it is closed. An error of it is logged."""

    def __init__(self, call: Callable[[], None], seconds: float, *, name: str) -> None:
        self._call = call
        self._seconds = seconds
        self._wake = threading.Event()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def hurry(self) -> None:
        """Do not wait for the next time; returns at once."""
        self._wake.set()

    def close(self) -> None:
        """End the thread; returns when no call is under way."""
        self._closed = True
        self._wake.set()
        self._thread.join()

    def _run(self) -> None:
        while True:
            self._wake.wait(self._seconds)
            self._wake.clear()
            if self._closed:
                return
            try:
                self._call()
            except Exception:
                log.exception("%s ended in an error that nobody expected", self._thread.name)
