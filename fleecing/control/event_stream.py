"""`GET /v1/events`: what happens in the server's life, told as it happens (HTML standard, "Server-sent events").

    id: 5f0c-17                     the run of the server, and a number that grows by one each time
    event: snapshot-broken          its name (fleecing/events.py)
    data: {"time": ..., "level": "error", "message": ..., "event": "snapshot-broken", "disk": "vda", ...}

The last events are kept in a ring, and every listener is a place in it. One that takes nothing for long, or reads
slower than they come, so that the ring has passed over its place, is dropped; it costs no more memory than the ring.

`Last-Event-ID` goes on behind the event of that id. Where the ring does not have all since then, or the id is of an
earlier run, an event `events-lost` comes first, and then what there is.
"""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
from collections import deque
from dataclasses import dataclass

from aiohttp import web

from fleecing.control.logs import values_of
from fleecing.errors import ControlError
from fleecing.events import event_of

log = logging.getLogger(__name__)

KEPT = 1024
"""Events in the ring."""

LISTENERS = 64
"""At a time."""

ALIVE_SECONDS = 15.0
"""After so long without an event a comment is sent: proxies and clients see that the server is there."""

SEND_SECONDS = 30.0
"""A listener that takes nothing for so long is dropped."""

LOST = "events-lost"


@dataclass(frozen=True)
class _Told:
    number: int
    event: str
    data: str

    def frame(self, run: str) -> bytes:
        return f"id: {run}-{self.number}\nevent: {self.event}\ndata: {self.data}\n\n".encode()


class EventRing(logging.Handler):
    """Takes the events out of all that is logged, from any thread; read by the loop's thread.

    No line of the log may take long for it, whoever listens.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, kept: int = KEPT) -> None:
        super().__init__(logging.INFO)
        self.run = secrets.token_hex(4)
        self.closed = False
        self.bell = asyncio.Event()  # rung, and a new one hung up, when there is more; for the loop's thread
        self._loop = loop
        self._told: deque[_Told] = deque(maxlen=kept)  # under the handler's lock
        self._last = 0

    def emit(self, record: logging.LogRecord) -> None:
        event = event_of(record)
        if event is None:
            return
        try:
            self._last += 1
            self._told.append(_Told(self._last, str(event), json.dumps(values_of(record))))
            self._loop.call_soon_threadsafe(self._ring)
        except RuntimeError:
            pass  # the loop is closed: nobody listens any more
        except Exception:
            self.handleError(record)

    def _ring(self) -> None:
        bell, self.bell = self.bell, asyncio.Event()
        bell.set()

    @property
    def last(self) -> int:
        """The number of the last event, 0 = there was none."""
        return self._last

    def since(self, number: int) -> list[_Told] | None:
        """What came after that number; None where the ring does not have all of it."""
        self.acquire()
        try:
            if number > self._last or (self._told and number < self._told[0].number - 1):
                return None
            return [told for told in self._told if told.number > number]
        finally:
            self.release()

    def kept(self) -> list[_Told]:
        """All that the ring has."""
        self.acquire()
        try:
            return list(self._told)
        finally:
            self.release()

    def close(self) -> None:
        """No more events come; for the loop's thread."""
        self.closed = True
        self._ring()
        super().close()


class EventStream:
    """Serves a ring to its listeners. For the loop's thread."""

    def __init__(self, ring: EventRing, *, alive_seconds: float = ALIVE_SECONDS, send_seconds: float = SEND_SECONDS):
        self._ring = ring
        self._alive_seconds = alive_seconds
        self._send_seconds = send_seconds
        self.listeners = 0

    async def serve(self, request: web.Request) -> web.StreamResponse:
        """Until the listener hangs up, is dropped, or the server stops."""
        if self.listeners >= LISTENERS:
            raise ControlError(503, f"{LISTENERS} listen to the events already: let one of them go")
        self.listeners += 1
        try:
            return await self._serve(request)
        finally:
            self.listeners -= 1

    async def _serve(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-store"})
        await response.prepare(request)
        position, first = self._place(request.headers.get("Last-Event-ID"))
        try:
            await self._send(response, b": events of fleecing\n\n" + first)
            while True:
                bell = self._ring.bell
                told = self._ring.since(position)
                if told is None:
                    raise TimeoutError
                if told:
                    position = told[-1].number
                    await self._send(response, b"".join(one.frame(self._ring.run) for one in told))
                elif self._ring.closed:
                    return response
                else:
                    await self._wait(bell, response)
        except ConnectionError:
            return response  # it has hung up
        except TimeoutError:
            log.warning("a listener to the events was dropped: it does not read what is sent to it")
            if request.transport is not None:
                request.transport.abort()
            return response

    def _place(self, last_id: str | None) -> tuple[int, bytes]:
        """Where the listener begins, and what it is sent first."""
        if last_id is None:
            return self._ring.last, b""
        run, _, number = last_id.rpartition("-")
        known = run == self._ring.run and number.isascii() and number.isdecimal() and len(number) < 20
        if known and self._ring.since(int(number)) is not None:
            return int(number), b""
        kept = self._ring.kept()
        text = "the events since then are not kept: look at the state of everything, then listen on"
        data = json.dumps({"event": LOST, "message": text, "last_event_id": last_id[:100]})
        # No id: one that comes back with it would miss the same events without being told.
        return (kept[0].number - 1 if kept else self._ring.last), f"event: {LOST}\ndata: {data}\n\n".encode()

    async def _wait(self, bell: asyncio.Event, response: web.StreamResponse) -> None:
        try:
            async with asyncio.timeout(self._alive_seconds):
                await bell.wait()
        except TimeoutError:
            await self._send(response, b": alive\n\n")

    async def _send(self, response: web.StreamResponse, data: bytes) -> None:
        """Raises TimeoutError where the listener does not take it, ConnectionError where it is gone."""
        async with asyncio.timeout(self._send_seconds):
            await response.write(data)
