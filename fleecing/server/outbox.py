"""What goes out to one client: replies gathered by its own thread, and late ones from other threads.

    the connection's thread   put, reserve ... send      blocks where the client does not read: its own loss
                              settle                     blocks until late replies are out, too
    any other thread          late                       never blocks

A thread of the pool must not wait for a client that does not read. Where the socket takes no more, or the connection's
thread is sending, a late reply is left in a queue: whoever holds the send lock looks at the queue again after giving it
back. A late reply that the socket takes in part only gets a thread of its own, which keeps the lock until it is out.

A send that fails, or that can take nothing for the socket's SO_SNDTIMEO (EAGAIN), may have left a part of a reply
behind. So whoever meets that shuts the socket down: nothing can follow, and the connection's thread learns it.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from collections import deque
from collections.abc import Callable

from fleecing.server.meter import Meter
from fleecing.server.tls import Stream
from fleecing.units import KiB

GATHER = 128 * KiB
"""Bytes of replies from which on they are sent, whatever else is to be served."""

LARGEST_PIECE = 256 * KiB
"""Bytes of data that one reserved piece has at most."""

BACKLOG = 64
"""Late replies unsent from which on the connection's thread should `settle` before it has more of them made."""

_SIZE = GATHER + LARGEST_PIECE + KiB


class Outbox:
    """The sending side of a connection. `view` up to `used` waits to go; only the connection's thread touches both."""

    def __init__(self, sock: Stream, meter: Meter, give_way: Callable[[], None] | None = None) -> None:
        """`give_way` is called before much is sent."""
        self._sock = sock
        self._meter = meter
        self._give_way = give_way
        self.view = memoryview(bytearray(_SIZE))
        self.used = 0
        self._sending = threading.Lock()
        self._late: deque[bytes] = deque()
        self.stuck = False
        """The client was given up because it did not read."""
        self.failed = False
        """A send failed: nothing can be told to the client any more."""

    def give_way(self) -> None:
        """What comes next takes a while: where somebody else goes first, wait for that."""
        if self._give_way is not None:
            self._give_way()

    def put(self, reply: bytes) -> None:
        """Add a whole reply; what does not fit beside the others goes out at once."""
        if self.used + len(reply) > _SIZE:
            self.send()
        if len(reply) > _SIZE:
            self.send_now([reply])
            return
        self.view[self.used : self.used + len(reply)] = reply
        self.used += len(reply)

    def send(self) -> None:
        """Send what was gathered, then late replies. Raises OSError where the client is gone."""
        if self.used:
            if self.used >= GATHER and self._give_way is not None:
                self._give_way()
            with self._sending:
                try:
                    self._sock.sendall(self.view[: self.used])
                except OSError as e:
                    self._give_up(e)
                    raise
            self.used = 0
            self._meter.sent()
        if self._late:
            self._send_late()

    def send_at_once(self) -> bool:
        """Send what was gathered if that takes no waiting; False where it is left to `send`. Raises OSError.

        What the socket takes in part only gets a thread of its own, as a late reply does.
        """
        if not self._sending.acquire(blocking=False):
            return False
        kept = False
        try:
            data = self.view[: self.used]
            try:
                sent = self._sock.send(data, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return False
            if sent < len(data):
                kept = self._leave_rest(bytes(data[sent:]))
        except OSError as e:
            self._give_up(e)
            raise
        finally:
            if not kept:
                self._sending.release()
        self.used = 0
        self._meter.sent()
        if self._late and not kept:
            self._send_late()
        return True

    def send_now(self, parts: list[bytes | memoryview]) -> None:
        """Send these without gathering, in one go as the peer sees it; what was gathered goes first."""
        self.send()
        if self._give_way is not None:
            self._give_way()
        with self._sending:
            try:
                for part in parts:
                    self._sock.sendall(part)
            except OSError as e:
                self._give_up(e)
                raise
        self._meter.sent()
        if self._late:
            self._send_late()

    @property
    def behind(self) -> bool:
        """Whether the client has left BACKLOG late replies or more unread."""
        return len(self._late) >= BACKLOG

    def settle(self) -> None:
        """Wait until all late replies are out or the client is gone."""
        with self._sending:
            try:
                while self._late:
                    self._sock.sendall(self._late.popleft())
            except OSError as e:
                self._give_up(e)
        if self._late:
            self._send_late()

    def late(self, reply: bytes) -> None:
        """Send a reply from a thread that must not block. A client that is gone loses it."""
        self._late.append(reply)
        self._send_late()

    def _send_late(self) -> None:
        # The holder of the lock looks at the queue after giving it back, so a reply put there is never forgotten.
        while self._late and self._sending.acquire(blocking=False):
            kept = False
            try:
                kept = self._send_queue()
            except OSError as e:
                self._give_up(e)
            finally:
                if not kept:
                    self._sending.release()
            if kept:
                return

    def _send_queue(self) -> bool:
        """Send the queue as far as the socket takes it; True where the rest, and the lock, went to another thread."""
        while self._late:
            reply = self._late.popleft()
            try:
                sent = self._sock.send(reply, socket.MSG_DONTWAIT)
            except BlockingIOError:
                sent = 0
            if sent < len(reply):
                return self._leave_rest(reply[sent:])
        return False

    def _leave_rest(self, rest: bytes) -> bool:
        """Have another thread send it, and give the lock back then: True. Raises ConnectionError."""
        thread = threading.Thread(target=self._send_rest, args=(rest,), name="late reply", daemon=True)
        try:
            thread.start()
        except RuntimeError as e:  # no thread to be had: this client is given up, the caller goes on
            self._sock.shutdown(socket.SHUT_RDWR)
            raise ConnectionError(f"the rest of a reply: {e}") from None
        return True

    def _give_up(self, error: OSError) -> None:
        self.failed = True
        self.stuck |= isinstance(error, BlockingIOError | TimeoutError)
        self._late.clear()
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    def _send_rest(self, rest: bytes) -> None:
        try:
            self._sock.sendall(rest)
        except OSError as e:
            self._give_up(e)
        finally:
            self._sending.release()
        self._send_late()


class TellingOutbox(Outbox):
    """An outbox that calls `sent`, in the connection's thread, when all that was gathered has left."""

    def __init__(
        self, sock: Stream, meter: Meter, sent: Callable[[], None], give_way: Callable[[], None] | None
    ) -> None:
        super().__init__(sock, meter, give_way)
        self._sent = sent

    def send(self) -> None:
        super().send()
        self._sent()
