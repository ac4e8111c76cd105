"""One connection of a pull, in its thread: keeps its slots full until the plan is empty, comes back when it is lost.

What was in flight when a connection is lost goes back to the plan: a READ is asked again, and so is the TRIM of what
the target has already. Nothing is trimmed before the target has it, so no answer that got lost can lose data.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from threading import Condition, Event
from typing import Final, Protocol

from fleecing.client.request import Request
from fleecing.errors import ProtocolError, RequestError
from fleecing.nbd.client_handshake import ExportRefused
from fleecing.nbd.constants import Cmd, NbdError
from fleecing.pull.any_source import AnyConnection, AnySource
from fleecing.pull.connecting import connect_unless
from fleecing.pull.journal import NO_CHECK
from fleecing.pull.limiter import Bandwidth
from fleecing.pull.need import Depth
from fleecing.pull.plan import Piece, Plan
from fleecing.pull.target import Target
from fleecing.units import MiB

log = logging.getLogger(__name__)

_FIRST_DELAY, _LAST_DELAY = 0.05, 2.0
"""Seconds between attempts to connect again; each is twice the one before."""


MOST_SHARED: Final = 8 * MiB
"""Bytes of memory that a connection shares with its server, which are taken at once. The way to it is short: it is busy
with two requests, and what is asked beyond the buffers that are there comes through the socket."""

CheckCall = Callable[[memoryview], bytes]
"""The checksum of a piece's bytes."""


class Shared(Protocol):
    """What the workers of a pull have in common."""

    @property
    def source(self) -> AnySource: ...

    target: Target
    plan: Plan
    trims: bool
    depth: int
    most_depth: int
    piece: int
    reconnect: float
    bandwidth: Bandwidth | None
    check: CheckCall | None
    changed: Condition
    stopped: Event

    def room(self, wanted: int) -> int:
        """For how many more buffers there is memory, at most `wanted`; they are the caller's from now on."""

    def leave(self) -> bool:
        """A worker that has nothing in hand may go, for others do the rest. False: it is the last one."""

    def adopt(self, old: AnyConnection, new: AnyConnection) -> None:
        """`new` takes the place of `old`."""

    def kept(self, piece: Piece, check: bytes) -> None:
        """The target has the piece."""

    def trimmed(self, piece: Piece) -> None:
        """The server does not need it any more."""


class Worker:
    """Works until nothing is left to do; raises the first error that another connection does not mend."""

    def __init__(self, shared: Shared, connection: AnyConnection) -> None:
        self._shared = shared
        self._connection = connection
        self._ask = shared.source.status_call(connection)
        self._buffers: list[memoryview] = []
        self._on_the_way: dict[int, tuple[Piece, float]] = {}
        self._depth = Depth(shared.depth, shared.most_depth)
        self._waited_before = 0.0
        """By connections that are lost."""
        self._lost_at: float | None = None
        self._delay = _FIRST_DELAY
        self._at_target = False
        """The target, or the journal, is at work: what fails now is no matter of the source's connection."""

    def run(self) -> None:
        while True:
            try:
                self._work()
                return
            except (OSError, ProtocolError, RequestError) as e:
                if self._at_target or self._shared.stopped.is_set() or not self._may_come_back(e):
                    raise
                log.info("%s, connecting again", e)
                self._put_all_back()
                if not self._connect_again(e):
                    self._connection.close()
                    return

    def _work(self) -> None:
        length = self._shared.piece
        self._connection.share_memory(max(1, min(self._depth.now, MOST_SHARED // length)), length)
        while True:
            while len(self._on_the_way) < self._depth.now:
                piece = self._shared.plan.take(self._ask, before=self._shared.target.limit())
                if piece is None:
                    self._depth.paused()
                    break
                self._start(piece)
            if self._on_the_way:
                self._take_answer()
            elif self._shared.plan.is_over:
                return
            else:
                self._wait_for_more()

    def _take_answer(self) -> None:
        """Whichever comes first. Raises its error."""
        request = self._connection.next_finished()
        now = time.monotonic()
        if request.error is not None:
            raise request.error
        self._is_back()
        self._measure(request, now)
        self._answered(request)

    def _measure(self, request: Request, now: float) -> None:
        """Have as many requests in flight as the way to the server needs, and there is memory for."""
        more = self._depth.answered(request.command, self._on_the_way[request.cookie][1], now)
        if more:
            self._depth.grow(self._shared.room(more))
            log.debug("%s: %d requests in flight", self._connection.peer, self.depth)

    @property
    def depth(self) -> int:
        """Requests that may be in flight."""
        return self._depth.now

    @property
    def waited(self) -> float:
        """Seconds in which there was nothing to do but wait for the server."""
        return self._waited_before + self._connection.waited

    def _wait_for_more(self) -> None:
        """Others have the rest in hand, and may lose it; or the target takes nothing further on before it has that."""
        self._is_back()  # as far as can be told: nothing is asked
        shared = self._shared
        with shared.changed:
            shared.changed.wait_for(lambda: shared.stopped.is_set() or self._may_go_on(), timeout=1.0)
        if shared.stopped.is_set():
            raise ConnectionError("the pull was stopped")

    def _may_go_on(self) -> bool:
        plan = self._shared.plan
        if plan.exhausted:
            return plan.is_over
        limit = self._shared.target.limit()
        return limit is None or plan.next_offset() < limit

    def _done(self) -> None:
        """A piece needs nothing any more."""
        if self._shared.plan.done():
            self._tell_others()

    def _tell_others(self) -> None:
        with self._shared.changed:
            self._shared.changed.notify_all()

    def _start(self, piece: Piece) -> None:
        shared = self._shared
        if piece.is_zero and not piece.is_kept:
            self._at_target = True
            shared.target.zero(piece.offset, piece.length)
            self._kept(piece, NO_CHECK)
            return
        if shared.bandwidth is not None and not piece.is_kept:
            try:
                self._wait_for_turn(shared.bandwidth, piece.length)
            except BaseException:
                shared.plan.put_back(piece)
                raise
        self._send(piece)

    def _wait_for_turn(self, bandwidth: Bandwidth, length: int) -> None:
        """What is on its way is taken first: a server drops who leaves its answers unread for long."""
        turn = bandwidth.book(length)
        while self._on_the_way and not bandwidth.is_due(turn):
            self._take_answer()
        bandwidth.wait(turn)

    def _send(self, piece: Piece) -> None:
        """Ask for the piece, or to trim it."""
        now = time.monotonic()
        try:
            if piece.is_kept:
                request = self._connection.submit_trim(piece.offset, piece.length)
            else:
                request = self._connection.submit_late_read(piece.offset, piece.length, self._buffer)
        except BaseException:
            self._shared.plan.put_back(piece)
            raise
        self._on_the_way[request.cookie] = piece, now

    def _buffer(self, length: int) -> memoryview:
        """One that was just emptied is still in the CPU's cache."""
        buffer = self._buffers.pop() if self._buffers else memoryview(bytearray(self._shared.piece))
        return buffer[:length]

    def _answered(self, request: Request) -> None:
        piece, _ = self._on_the_way.pop(request.cookie)
        if request.command is Cmd.TRIM:
            self._shared.trimmed(piece)
            self._done()
            return
        data = request.buffer
        assert data is not None, "a READ does not succeed without its data"
        self._at_target = True
        self._shared.target.write(piece.offset, data)
        check = NO_CHECK if self._shared.check is None else self._shared.check(data)
        if request.position is None:
            self._buffers.append(memoryview(data.obj))
        else:
            self._connection.release(request)
        self._kept(piece, check)

    def _kept(self, piece: Piece, check: bytes) -> None:
        """The target has the piece: trim it, or be done with it."""
        self._shared.kept(piece, check)
        self._at_target = False
        if self._shared.trims:
            self._send(piece._replace(is_kept=True))
        else:
            self._done()

    # After a loss

    def _may_come_back(self, error: Exception) -> bool:
        if isinstance(error, RequestError):
            # "ESHUTDOWN: Server is in the process of being shut down"
            return self._shared.reconnect > 0 and error.error == NbdError.ESHUTDOWN
        return self._shared.reconnect > 0 and self._connection.is_lost

    def _put_all_back(self) -> None:
        self._depth.paused()
        for piece, _ in self._on_the_way.values():
            self._shared.plan.put_back(piece)
        self._on_the_way.clear()
        self._tell_others()

    def _is_back(self) -> None:
        self._lost_at = None
        self._delay = _FIRST_DELAY

    def _connect_again(self, cause: Exception) -> bool:
        """A new connection, within `reconnect` seconds since the last answer. False: it is not needed.

        Raises `cause` where there is none, and no other worker.
        """
        shared = self._shared
        now = time.monotonic()
        if self._lost_at is None:
            self._lost_at = now
        deadline = self._lost_at + shared.reconnect
        connection: AnyConnection | None = None
        while connection is None:
            left = deadline - time.monotonic()
            if left < 0 and not shared.plan.is_over:
                if not shared.leave():
                    raise cause
                log.info("%s; the other connections go on", cause)
                return False
            if shared.stopped.wait(min(self._delay, max(0.0, left))):
                raise cause
            self._delay = min(2 * self._delay, _LAST_DELAY)
            if shared.plan.is_over:
                return False
            try:
                connection = connect_unless(self._is_over, shared.source.connect)
            except ExportRefused as e:
                if e.reply is not None:
                    raise
                log.debug("! %s", e)
            except (OSError, ProtocolError) as e:
                log.debug("! %s", e)
        old, self._connection = self._connection, connection
        self._waited_before += old.waited
        shared.adopt(old, connection)
        self._ask = shared.source.status_call(connection)
        return True

    def _is_over(self) -> bool:
        return self._shared.stopped.is_set() or self._shared.plan.is_over
