"""Tells systemd how the server is (sd_notify(3)): datagrams of "NAME=value" lines to the socket $NOTIFY_SOCKET.

Whatever goes wrong with them never disturbs the server: who listens there is systemd, and it notices what is missing.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager

log = logging.getLogger(__name__)

STATUS_SECONDS = 10.0
"""How often the status line is told, where no watchdog asks for more."""


class Notifier:
    """One server's line to systemd. Does nothing where nobody listens. For the loop's thread."""

    def __init__(self, environ: MutableMapping[str, str] = os.environ) -> None:
        """Takes its variables out of `environ`: what the server starts is not meant by them."""
        address = environ.pop("NOTIFY_SOCKET", "")
        microseconds = environ.pop("WATCHDOG_USEC", "")
        meant = environ.pop("WATCHDOG_PID", "")
        # "@" is the abstract namespace, whose names begin with a zero
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self.watchdog: float | None = None
        """Seconds between signs of life after which systemd takes the server for dead; None = it does not look."""
        if microseconds.isascii() and microseconds.isdecimal() and meant in ("", str(os.getpid())):
            self.watchdog = int(microseconds) / 1e6 or None
        self._socket: socket.socket | None = None
        if self._address.startswith(("/", "\0")):
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            self._socket.setblocking(False)

    def send(self, *lines: str) -> None:
        """One message. A newline in a line would begin another one: it becomes a space."""
        if self._socket is None:
            return
        text = "\n".join(" ".join(line.splitlines()) for line in lines)
        try:
            self._socket.sendto(text.encode("utf-8", "backslashreplace"), self._address)
        except OSError as e:
            log.debug("systemd was not told %s: %s", lines[0], e)

    def ready(self, status: str) -> None:
        """All listeners answer."""
        self.send("READY=1", f"STATUS={status}")

    def stopping(self) -> None:
        """The end has begun."""
        self.send("STOPPING=1", "STATUS=Stopping: requests in flight end first")

    @contextmanager
    def reloading(self, status: Callable[[], str]) -> Iterator[None]:
        """Around a reload, whatever comes of it; then the server is ready again."""
        self.send("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}", "STATUS=Reloading")
        try:
            yield
        finally:
            self.ready(status())

    async def run(self, status: Callable[[], str]) -> None:
        """Tell the status and, where it is wanted, that the loop lives; until cancelled.

        A loop that hangs says nothing, and systemd starts the server again.
        """
        if self._socket is None:
            return
        # sd_watchdog_enabled(3): "send [...] every half of the time"; a third leaves room for a late one.
        pause = STATUS_SECONDS if self.watchdog is None else min(STATUS_SECONDS, self.watchdog / 3)
        while True:
            self.send(*(["WATCHDOG=1"] if self.watchdog else []), f"STATUS={status()}")
            await asyncio.sleep(pause)

    def close(self) -> None:
        """Twice does no harm."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None
