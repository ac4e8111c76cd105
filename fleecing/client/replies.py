"""Cuts the bytes of a server into replies and enters them into the requests that they answer. No I/O.

    connection                          ReplyReader                           Request
    recvmsg_into(reader.targets()) -> received(n) -> _cut: magic, header --> part(), fail(), status
                                                           payload  -------> straight into its buffer
    next_finished <------------------ finished  <------------------------- finish()

Nothing that a server sends is believed: each cookie must be in flight, each length is checked before a byte of the
payload is received, content must lie inside the request, once. What a server can make this end hold is bounded: the
buffers that the callers gave, HEAD_SIZE, and MAX_STATUS_PAYLOAD for the one chunk that is being received.
The parser is one straight generator that yields where bytes lack; ProtocolError ends it for good.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from struct import Struct
from typing import Final

from fleecing.client.request import Extents, Request
from fleecing.errors import ProtocolError
from fleecing.nbd.constants import (
    EXTENDED_REPLY_MAGIC,
    MAX_STATUS_EXTENTS,
    MAX_STRING,
    REPLY_TYPE_ERROR_BIT,
    SIMPLE_REPLY_MAGIC,
    STRUCTURED_REPLY_MAGIC,
    Cmd,
    ReplyFlag,
    ReplyMode,
    ReplyType,
)
from fleecing.nbd.transmission import (
    CHUNK,
    DATA_CHUNK,
    ERROR,
    EXTENDED_CHUNK,
    EXTENDED_DATA_CHUNK,
    OFFSET_DATA,
    OFFSET_HOLE,
    SIMPLE_REPLY,
    STATUS,
    STATUS_EXT,
)

HEAD_SIZE: Final = 1 << 14
"""Bytes received at a time while the next thing expected is a header; larger than any header with a small payload.

What comes in of a large payload with it is copied once more: with 64 KiB that was a quarter of a full pull's data."""

MAX_EXTENTS: Final = 1 << 16
"""Extents that are kept of one context's reply; what comes behind is dropped, as if the server had answered shorter."""

MAX_STATUS_PAYLOAD: Final = STATUS_EXT.size + 16 * MAX_STATUS_EXTENTS
"""The longest payload of a block status chunk: 2^20 extents of 16 bytes."""

_AHEAD: Final = 512
"""Bytes of what follows that are received with the end of a payload: the next header, and little of its payload."""

_CHUNK_MAGICS: Final = {ReplyMode.STRUCTURED: STRUCTURED_REPLY_MAGIC, ReplyMode.EXTENDED: EXTENDED_REPLY_MAGIC}
_MAGIC: Final = Struct(">I")
_EXTENT: Final = Struct(">II")
_EXTENT_EXT: Final = Struct(">QQ")
_DONE: Final = int(ReplyFlag.DONE)
_DATA: Final = int(ReplyType.OFFSET_DATA)
_MAX_ERROR_PAYLOAD: Final = ERROR.size + MAX_STRING + OFFSET_DATA.size


class ReplyReader:
    """The receiving half of a connection: bytes in, finished requests out.

    `contexts` maps the ids that the handshake gave to the names of the meta contexts.
    """

    def __init__(self, mode: ReplyMode, contexts: Mapping[int, str]) -> None:
        self.in_flight: dict[int, Request] = {}
        self.finished: dict[int, Request] = {}
        self._extended = mode is ReplyMode.EXTENDED
        self._simple_reads = mode is ReplyMode.SIMPLE
        self._chunk_magic = _CHUNK_MAGICS.get(mode)
        self._data_chunk = EXTENDED_DATA_CHUNK if self._extended else DATA_CHUNK
        self._contexts = contexts
        self._head = memoryview(bytearray(HEAD_SIZE))
        self._ahead = self._head[:_AHEAD]
        self._start = 0
        self._end = 0
        self._direct = self._head[:0]
        self._parser = self._cut()
        next(self._parser)

    def targets(self) -> list[memoryview]:
        """Where the next bytes of the server go, one after the other; the first is not empty. Valid until `received`.

        Behind a payload there is room for what follows it, which saves a receive for each header.
        """
        if self._direct:
            return [self._direct, self._ahead]
        if self._start == self._end:
            self._start = self._end = 0
        elif self._end > HEAD_SIZE // 2:
            rest = bytes(self._head[self._start : self._end])
            self._start, self._end = 0, len(rest)
            self._head[: len(rest)] = rest
        return [self._head[self._end :]]

    def received(self, count: int) -> None:
        """`count` bytes have been put into `targets()`. Raises ProtocolError; the reader is done for then."""
        if self._direct:
            ahead = count - len(self._direct)
            self._direct = self._direct[count:]
            if ahead > 0:
                self._end = ahead
        else:
            self._end += count
        next(self._parser)

    # The parser

    def _need(self, count: int) -> Iterator[None]:
        while self._end - self._start < count:
            yield

    def _fill(self, view: memoryview) -> Iterator[None]:
        """The next bytes go into `view`: what is there already by copying, the rest by receiving into it."""
        ready = min(len(view), self._end - self._start)
        view[:ready] = self._head[self._start : self._start + ready]
        self._start += ready
        if ready == len(view):
            return
        self._start = self._end = 0  # the head is empty: what comes ahead goes to its start
        self._direct = view[ready:]
        while self._direct:
            yield

    def _unpack(self, layout: Struct) -> tuple[int, ...]:
        """The fields at the head, which are there; moves behind them."""
        fields = layout.unpack_from(self._head, self._start)
        self._start += layout.size
        return fields

    def _cut(self) -> Iterator[None]:
        while True:
            yield from self._need(_MAGIC.size)
            if (data := self._data()) is not None:
                request, view, flags = data
                yield from self._fill(view)
                if flags & _DONE:
                    self._finish(request)
                continue
            (magic,) = _MAGIC.unpack_from(self._head, self._start)
            if magic == self._chunk_magic:
                yield from self._structured()
            elif magic == SIMPLE_REPLY_MAGIC and not self._extended:
                yield from self._simple()
            else:
                raise ProtocolError(f"the server sent 0x{magic:08x} where a reply should begin")

    def _data(self) -> tuple[Request, memoryview, int] | None:
        """The head of the commonest reply, a chunk of data, if all of it is there: where its data goes, and its flags.

        None for anything else, and for whatever is wrong with it, which is left for `_structured`.
        """
        if self._end - self._start < self._data_chunk.size:
            return None
        magic, flags, kind, cookie, *rest = self._data_chunk.unpack_from(self._head, self._start)
        if magic != self._chunk_magic or kind != _DATA or flags & ~_DONE:
            return None
        request = self.in_flight.get(cookie)
        length, offset = rest[-2:]
        if request is None or length <= OFFSET_DATA.size or (self._extended and rest[0] != request.offset):
            return None
        view = request.part(offset, length - OFFSET_DATA.size)
        self._start += self._data_chunk.size
        return request, view, flags

    def _request(self, cookie: int) -> Request:
        request = self.in_flight.get(cookie)
        if request is None:
            raise ProtocolError(f"the server answered a request that is not in flight (cookie {cookie})")
        return request

    def _finish(self, request: Request) -> None:
        request.finish(len(self._contexts))
        del self.in_flight[request.cookie]
        self.finished[request.cookie] = request

    def _simple(self) -> Iterator[None]:
        yield from self._need(SIMPLE_REPLY.size)
        _, error, cookie = self._unpack(SIMPLE_REPLY)
        request = self._request(cookie)
        if request.command is Cmd.READ and not self._simple_reads:
            # "If structured replies have been negotiated, a server MUST use a structured reply for any response with a
            # payload, and MUST NOT use a simple reply for NBD_CMD_READ (even for the case of an early EINVAL)"
            raise ProtocolError(f"the server sent a simple reply to {request!r} although structured ones were agreed")
        if error:
            request.fail(error, "")
        elif request.command is Cmd.READ:
            yield from self._fill(request.part(request.offset, request.length))
        self._finish(request)

    def _structured(self) -> Iterator[None]:
        layout = EXTENDED_CHUNK if self._extended else CHUNK
        yield from self._need(layout.size)
        _, flags, kind, cookie, *rest = self._unpack(layout)
        request = self._request(cookie)
        length = rest[-1]
        if self._extended and rest[0] != request.offset:
            raise ProtocolError(f"the server sent a chunk with offset {rest[0]} in answer to {request!r}")
        if flags & ~_DONE:
            raise ProtocolError(f"the server sent a chunk with the unknown flags 0x{flags & ~_DONE:x}")
        yield from self._payload(request, kind, flags, length)
        if flags & _DONE:
            self._finish(request)

    def _payload(self, request: Request, kind: int, flags: int, length: int) -> Iterator[None]:
        if kind == ReplyType.OFFSET_DATA and length > OFFSET_DATA.size:
            yield from self._need(OFFSET_DATA.size)
            (offset,) = self._unpack(OFFSET_DATA)
            yield from self._fill(request.part(offset, length - OFFSET_DATA.size))
        elif kind == ReplyType.OFFSET_HOLE and length == OFFSET_HOLE.size:
            yield from self._need(length)
            offset, size = self._unpack(OFFSET_HOLE)
            if not size:
                raise ProtocolError(f"the server sent a hole of no bytes in answer to {request!r}")
            request.part(offset, size)[:] = bytes(size)
        elif kind == ReplyType.NONE and not length and flags & _DONE:
            pass
        elif kind == (ReplyType.BLOCK_STATUS_EXT if self._extended else ReplyType.BLOCK_STATUS):
            yield from self._status(request, length)
        elif kind & REPLY_TYPE_ERROR_BIT and ERROR.size <= length <= _MAX_ERROR_PAYLOAD:
            yield from self._error(request, kind, length)
        else:
            raise ProtocolError(f"the server sent a chunk of type {kind} with {length} bytes in answer to {request!r}")

    def _error(self, request: Request, kind: int, length: int) -> Iterator[None]:
        """An error chunk; one of an unknown type counts as an error too, as the document asks of clients."""
        yield from self._need(length)
        payload = bytes(self._head[self._start : self._start + length])
        self._start += length
        error, size = ERROR.unpack_from(payload)
        behind = OFFSET_DATA.size if kind == ReplyType.ERROR_OFFSET else 0
        if not error or size > min(MAX_STRING, length - ERROR.size - behind):
            raise ProtocolError(f"the server sent an error chunk that makes no sense in answer to {request!r}")
        request.fail(error, payload[ERROR.size : ERROR.size + size].decode("utf-8", "replace"))

    def _status(self, request: Request, length: int) -> Iterator[None]:
        head, extent = (STATUS_EXT, _EXTENT_EXT) if self._extended else (STATUS, _EXTENT)
        count, odd = divmod(length - head.size, extent.size)
        if count < 1 or odd or length > MAX_STATUS_PAYLOAD or request.command is not Cmd.BLOCK_STATUS:
            raise ProtocolError(f"the server sent a block status of {length} bytes in answer to {request!r}")
        payload = memoryview(bytearray(length))
        yield from self._fill(payload)
        context, *told = head.unpack_from(payload)
        name = self._contexts.get(context)
        if name is None or name in request.status or (told and told[0] != count):
            raise ProtocolError(f"the server sent a block status that nobody asked for in answer to {request!r}")
        request.status[name] = _extents(request, extent, payload[head.size :])


def _extents(request: Request, layout: Struct, payload: memoryview) -> Extents:
    """The extents of one context, cut at the end of the request. Raises ProtocolError.

    "the sum of all extents except the last one MUST be less than the requested length", and none may be empty.
    """
    extents: Extents = []
    left = request.length
    for length, status in islice(layout.iter_unpack(payload), MAX_EXTENTS):
        if not length or left <= 0:
            raise ProtocolError(f"the server sent extents that are empty or reach too far in answer to {request!r}")
        extents.append((min(length, left), status))
        left -= length
    return extents
