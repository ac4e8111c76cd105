"""One connection to one export of an NBD server, for one thread.

    submit_*  ->  wait / next_finished        several requests in flight, answered in any order
    read, write, ... block_status             the same, one at a time

Every call returns, or raises, within `timeout` seconds, whatever the server does. While a call sends it also receives,
so the two sides can never wait for each other's buffers. A connection that has failed once (ProtocolError, OSError) is
closed and stays so: where a reply would begin is not known any more. A RequestError concerns its request alone.
"""

from __future__ import annotations

import logging
import select
import socket
import time
from collections.abc import Mapping
from typing import Final, Self

from fleecing.client.replies import ReplyReader
from fleecing.client.request import Extents, MakeBuffer, Request
from fleecing.client.shared_memory import SharedMemory
from fleecing.client.tls import TlsSocket
from fleecing.errors import FleecingError, RequestError
from fleecing.nbd.client_handshake import ClientAgreement
from fleecing.nbd.constants import READ_ONCE, SHARED_MEMORY, Cmd, CmdFlag, NbdError, ReplyMode, TransmissionFlag
from fleecing.nbd.transmission import SHARED_READ
from fleecing.nbd.transmission import request as request_header

Buffer = bytes | bytearray | memoryview

log = logging.getLogger(__name__)

MAX_COMPACT_LENGTH: Final = (1 << 32) - 1
"""The longest request without extended headers, in bytes."""

_FUA: Final = int(CmdFlag.FUA)
_NO_HOLE: Final = int(CmdFlag.NO_HOLE)
_FAST_ZERO: Final = int(CmdFlag.FAST_ZERO)
_READ_ONCE: Final = int(CmdFlag.READ_ONCE)
_NEEDED: Final = {
    Cmd.FLUSH: TransmissionFlag.SEND_FLUSH,
    Cmd.TRIM: TransmissionFlag.SEND_TRIM,
    Cmd.WRITE_ZEROES: TransmissionFlag.SEND_WRITE_ZEROES,
}
_NEEDED_BY_FLAG: Final = {
    _FUA: TransmissionFlag.SEND_FUA,
    _FAST_ZERO: TransmissionFlag.SEND_FAST_ZERO,
}


class Connection:
    """The transmission phase over a socket whose handshake is done (see `dial.connect`); takes the socket over.

    `peer` names the server in errors. Requests that one call has finished stay here until `wait` or `next_finished`
    hands them out. Only `abort` may be called by another thread.
    """

    def __init__(
        self, sock: socket.socket | TlsSocket, agreement: ClientAgreement, *, peer: str, timeout: float
    ) -> None:
        self.peer = peer
        self.timeout = timeout
        self.size = agreement.size
        self.description = agreement.description
        self.flags = agreement.flags
        self.mode = agreement.mode
        self.contexts: Mapping[str, int] = agreement.contexts
        self.minimum_block = agreement.minimum_block
        self.preferred_block = agreement.preferred_block
        self.maximum_payload = agreement.maximum_payload
        self._reader = ReplyReader(self.mode, {number: name for name, number in agreement.contexts.items()})
        self.waited = 0.0
        """Seconds in which there was nothing to do but wait for the server, until now."""
        self._memory: SharedMemory | None = None
        self._next_cookie = 1
        self._sending = False
        self._failure: str | None = None
        sock.setblocking(False)
        self._socket = sock
        self._poll = select.poll()
        self._poll.register(sock, select.POLLIN)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def can(self, flag: TransmissionFlag) -> bool:
        """Whether the export said this of itself."""
        return bool(self.flags & flag)

    @property
    def is_lost(self) -> bool:
        """It failed, or was closed: every further call raises ConnectionError."""
        return self._failure is not None

    @property
    def in_flight(self) -> int:
        """Requests whose result has not been handed out."""
        return len(self._reader.in_flight) + len(self._reader.finished)

    # Requests; offsets and lengths in bytes, ValueError for what this export cannot be asked

    def submit_read(self, offset: int, buffer: bytearray | memoryview, *, once: bool = False) -> Request:
        """Ask for len(buffer) bytes, at most `maximum_payload`, received into `buffer`.

        `once`: the server gives the whole clusters of the range up when it has sent them, whether they arrive here or
        not (docs/read-once.md); the context READ_ONCE must have been selected.
        """
        return self._submit(Cmd.READ, offset, len(buffer), _READ_ONCE * once, buffer=memoryview(buffer))

    def submit_late_read(self, offset: int, length: int, make_buffer: MakeBuffer) -> Request:
        """The same, but the buffer is made when its first bytes come, and is found in the request once it is finished.

        Requests that wait for their turn at the server take no memory, and a buffer that was just emptied, and is in
        the CPU's cache, can be the next that is filled. Any call of this connection may call `make_buffer`.

        Where memory is shared (`share_memory`), and a buffer of it is free and long enough, the data comes there.
        `release` has to be called for the request then, when nobody uses its buffer any more.
        """
        memory = self._memory
        if memory is not None and length <= memory.length and (position := memory.take()) is not None:
            return self._submit_shared(memory, position, offset, length)
        return self._submit(Cmd.READ, offset, length, make_buffer=make_buffer)

    def _submit_shared(self, memory: SharedMemory, position: int, offset: int, length: int) -> Request:
        try:
            self._check(Cmd.READ, offset, length, 0)
        except Exception:
            memory.give_back(position)
            raise
        request = self._request(Cmd.READ, offset, length, memory.view(position, length), position=position)
        self._post(request, 0, SHARED_READ.pack(length, position))
        return request

    def release(self, request: Request) -> None:
        """Nobody uses the buffer of this late read any more, which is finished: another one may come there."""
        if request.position is not None and request.finished:
            assert self._memory is not None, "who has no memory has no positions in it"
            self._memory.give_back(request.position)
            request.position = request.buffer = None

    def share_memory(self, count: int, length: int) -> None:
        """Have late reads come into `count` buffers of `length` bytes that the server fills by itself, if it can.

        They must have SHARED_MEMORY among the contexts; once for a connection. Where it is not to be had, nothing
        changes. Raises what `wait` does for a connection that is lost.
        """
        self._check_there()
        can = self.mode is ReplyMode.EXTENDED and isinstance(self._socket, socket.socket) and self._memory is None
        if SHARED_MEMORY not in self.contexts or not can:
            return
        try:
            memory = SharedMemory(count, length)
        except OSError as e:
            log.info("%s: no memory to share: %s", self.peer, e)
            return
        try:
            request = self._request(Cmd.READ, 0, 0, position=0)
            self._post(request, 0, SHARED_READ.pack(0, 0), fd=memory.fd)
            self.wait(request)
            self._memory = memory
        except RequestError as e:
            log.info("%s takes no shared memory: %s", self.peer, e)
        finally:
            memory.close_fd()
            if self._memory is None:
                memory.close()

    def submit_write(self, offset: int, data: Buffer, *, fua: bool = False) -> Request:
        """Write `data`, at most `maximum_payload` bytes; it is sent when this returns and may be changed then."""
        return self._submit(Cmd.WRITE, offset, len(data), _FUA * fua, payload=data)

    def submit_write_zeroes(
        self, offset: int, length: int, *, fua: bool = False, no_hole: bool = False, fast_zero: bool = False
    ) -> Request:
        """Make the range read as zeroes; `fast_zero`: ENOTSUP rather than take as long as writing them."""
        flags = _FUA * fua | _NO_HOLE * no_hole | _FAST_ZERO * fast_zero
        return self._submit(Cmd.WRITE_ZEROES, offset, length, flags)

    def submit_trim(self, offset: int, length: int, *, fua: bool = False) -> Request:
        """Tell that the range is not needed any more."""
        return self._submit(Cmd.TRIM, offset, length, _FUA * fua)

    def submit_flush(self) -> Request:
        """Make durable whatever write was answered before."""
        return self._submit(Cmd.FLUSH, 0, 0)

    def submit_block_status(self, offset: int, length: int) -> Request:
        """Ask every context that the handshake agreed on; the server may answer for less than `length`."""
        return self._submit(Cmd.BLOCK_STATUS, offset, length)

    def wait(self, request: Request) -> Request:
        """The same request once it is finished. Raises RequestError with the server's text where it failed."""
        deadline = time.monotonic() + self.timeout
        while not request.finished:
            self._receive(deadline)
        self._reader.finished.pop(request.cookie, None)
        if request.error is not None:
            raise request.error
        return request

    def next_finished(self) -> Request:
        """Whichever request finishes first (LookupError if none is in flight); look at its `error`."""
        if not self.in_flight:
            raise LookupError("no request is in flight")
        deadline = time.monotonic() + self.timeout
        while not self._reader.finished:
            self._receive(deadline)
        return self._reader.finished.pop(next(iter(self._reader.finished)))

    def read(self, offset: int, length: int, *, once: bool = False) -> bytearray:
        """The bytes of the range, at most `maximum_payload`; see `submit_read`."""
        buffer = bytearray(length)
        self.wait(self.submit_read(offset, buffer, once=once))
        return buffer

    def write(self, offset: int, data: Buffer, *, fua: bool = False) -> None:
        self.wait(self.submit_write(offset, data, fua=fua))

    def write_zeroes(self, offset: int, length: int, *, fua: bool = False, no_hole: bool = False) -> None:
        self.wait(self.submit_write_zeroes(offset, length, fua=fua, no_hole=no_hole))

    def trim(self, offset: int, length: int) -> None:
        self.wait(self.submit_trim(offset, length))

    def flush(self) -> None:
        self.wait(self.submit_flush())

    def block_status(self, offset: int, length: int) -> dict[str, Extents]:
        """For each context the extents from `offset` on: at least one, maybe fewer bytes than asked, never more."""
        return self.wait(self.submit_block_status(offset, length)).status

    # The end

    def close(self) -> None:
        """Say goodbye and hang up; what is in flight is given up. Once is enough, twice does no harm."""
        if self._failure is not None:
            return
        if not self._sending:
            disc = request_header(self.mode, 0, Cmd.DISC, 0, 0, 0)
            try:
                # "there is no reply to an NBD_CMD_DISC"; a server that leaves no room for 32 bytes gets none
                self._socket.send(disc)
            except OSError as e:
                log.debug("x %s: no goodbye: %s", self.peer, e)
        self._give_up("it was closed")

    def abort(self) -> None:
        """Make whatever call is running, and all later ones, fail at once. For other threads."""
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError as e:
            log.debug("x %s: already down: %s", self.peer, e)

    def _give_up(self, cause: str) -> None:
        if self._failure is None:
            self._failure = cause
            log.debug("x %s: %s", self.peer, cause)
            self._socket.close()

    # Sending and receiving

    def _submit(
        self,
        command: Cmd,
        offset: int,
        length: int,
        flags: int = 0,
        *,
        buffer: memoryview | None = None,
        make_buffer: MakeBuffer | None = None,
        payload: Buffer | None = None,
    ) -> Request:
        self._check(command, offset, length, flags)
        request = self._request(command, offset, length, buffer, make_buffer)
        self._post(request, flags, payload)
        return request

    def _request(
        self,
        command: Cmd,
        offset: int,
        length: int,
        buffer: memoryview | None = None,
        make_buffer: MakeBuffer | None = None,
        position: int | None = None,
    ) -> Request:
        cookie = self._next_cookie
        self._next_cookie += 1
        return Request(command, cookie, offset, length, buffer, make_buffer, position)

    def _post(self, request: Request, flags: int, payload: Buffer | None, fd: int | None = None) -> None:
        """Send it; `fd` goes with it."""
        command, cookie, offset, length = request.command, request.cookie, request.offset, request.length
        log.debug("> %s: %r, cookie %d", self.peer, request, cookie)
        if payload is not None and self.mode is ReplyMode.EXTENDED:
            flags |= CmdFlag.PAYLOAD_LEN
            length = len(payload)
        header = request_header(self.mode, flags, command, cookie, offset, length)
        self._reader.in_flight[cookie] = request
        self._send([header] if payload is None else [header, payload], fd)

    def _check_there(self) -> None:
        if self._failure is not None:
            raise ConnectionError(f"the connection to {self.peer} is gone: {self._failure}")

    def _check(self, command: Cmd, offset: int, length: int, flags: int) -> None:
        """What the protocol forbids a client to send never leaves this end."""
        self._check_there()
        if command is not Cmd.FLUSH and not (offset >= 0 < length <= self.size - offset):
            raise ValueError(f"{command.name} of {length} bytes at offset {offset} is not within {self.size} bytes")
        if command in (Cmd.READ, Cmd.WRITE) and length > self.maximum_payload:
            raise ValueError(f"{command.name} of {length} bytes is above the server's {self.maximum_payload}")
        if length > MAX_COMPACT_LENGTH and self.mode is not ReplyMode.EXTENDED:
            raise ValueError(f"{command.name} of {length} bytes is above what a compact request can ask")
        if command is Cmd.BLOCK_STATUS and not self.contexts:
            raise RequestError(NbdError.ENOTSUP, f"{self.peer} offers no block status")
        if command in (Cmd.WRITE, Cmd.WRITE_ZEROES) and self.can(TransmissionFlag.READ_ONLY):
            raise RequestError(NbdError.EPERM, f"{self.peer} is read-only: no {command.name}")
        if command in _NEEDED and not self.can(_NEEDED[command]):
            raise RequestError(NbdError.ENOTSUP, f"{self.peer} offers no {command.name}")
        if flags:
            if flags & _READ_ONCE and READ_ONCE not in self.contexts:
                raise RequestError(NbdError.ENOTSUP, f"{self.peer} offers no READ_ONCE, or it was not selected")
            for flag, needed in _NEEDED_BY_FLAG.items():
                if flags & flag and not self.can(needed):
                    raise RequestError(NbdError.ENOTSUP, f"{self.peer} offers no {needed.name}")

    def _send(self, parts: list[Buffer], fd: int | None = None) -> None:
        deadline = time.monotonic() + self.timeout
        self._sending = True
        try:
            while parts:
                try:
                    sent = self._socket.sendmsg(parts) if fd is None else self._send_with(fd, parts)
                    fd = None
                except BlockingIOError:
                    if self._ready(select.POLLIN | select.POLLOUT, deadline) & ~select.POLLOUT:
                        self._take()
                    continue
                while parts and sent >= len(parts[0]):
                    sent -= len(parts.pop(0))
                if sent:
                    parts[0] = memoryview(parts[0])[sent:]
        except (BrokenPipeError, ConnectionResetError) as e:
            raise self._hung_up() from e
        except (OSError, FleecingError) as e:
            self._give_up(str(e))
            raise
        self._sending = False

    def _send_with(self, fd: int, parts: list[Buffer]) -> int:
        assert isinstance(self._socket, socket.socket), "nothing goes past TLS"
        return socket.send_fds(self._socket, parts, [fd])

    def _receive(self, deadline: float) -> None:
        """Wait for bytes, take what is there. Raises ProtocolError, or OSError (TimeoutError among them)."""
        self._check_there()
        try:
            if not self._take():
                self._ready(select.POLLIN, deadline)
            elif time.monotonic() > deadline:  # a server that never stops sending meets it too
                raise self._too_late()
        except ConnectionResetError as e:
            raise self._hung_up() from e
        except (OSError, FleecingError) as e:
            self._give_up(str(e))
            raise

    def _take(self) -> bool:
        """One receive; False where nothing is there yet."""
        try:
            count = self._socket.recvmsg_into(self._reader.targets())[0]
        except BlockingIOError:
            return False
        if not count:
            raise self._hung_up()
        self._reader.received(count)
        return True

    def _ready(self, events: int, deadline: float) -> int:
        """What of `events` the socket is ready for (errors and hang-ups too). Raises TimeoutError at the deadline."""
        self._poll.modify(self._socket, events)
        began = time.monotonic()
        left = deadline - began
        ready = self._poll.poll(left * 1000) if left > 0 else []
        self.waited += time.monotonic() - began
        if not ready:
            raise self._too_late()
        return ready[0][1]

    def _hung_up(self) -> ConnectionError:
        text = f"{self.peer} closed the connection with {len(self._reader.in_flight)} requests in flight"
        self._give_up(text)
        return ConnectionError(text)

    def _too_late(self) -> TimeoutError:
        return TimeoutError(f"{self.peer} did not answer within {self.timeout:g} s")
