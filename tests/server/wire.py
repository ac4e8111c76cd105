"""The client's end of the transmission phase: sends whatever a test wants, legal or not, and is strict with replies.

    wire = Wire(sock, ReplyMode.STRUCTURED)
    wire.send(wire.request(Cmd.READ, 0, 4096, cookie=7), wire.request(99, cookie=8))
    assert wire.reply().data == ...                 # whichever is answered first
    assert wire.reply().error == NbdError.EINVAL

Every rule of "Structured reply types" that a reply can break fails the test.
"""

from __future__ import annotations

import itertools
import socket
from dataclasses import dataclass, field

from fleecing.nbd.constants import (
    EXTENDED_REPLY_MAGIC,
    MAX_STRING,
    SIMPLE_REPLY_MAGIC,
    STRUCTURED_REPLY_MAGIC,
    Cmd,
    CmdFlag,
    NbdError,
    ReplyFlag,
    ReplyMode,
    ReplyType,
)
from fleecing.nbd.transmission import (
    CHUNK,
    ERROR,
    EXTENDED_CHUNK,
    OFFSET_DATA,
    OFFSET_HOLE,
    SHARED_READ,
    SIMPLE_REPLY,
    STATUS,
    STATUS_EXT,
    request,
)

Extents = list[tuple[int, int]]


@dataclass
class Reply:
    """A request and what came back for it; `done` when that is all."""

    cookie: int
    command: int
    offset: int
    length: int
    data: bytearray = field(default_factory=bytearray)
    pieces: list[tuple[int, int]] = field(default_factory=list)
    """(offset, length) of the content chunks."""
    status: dict[int, Extents] = field(default_factory=dict)
    error: int = 0
    text: str = ""
    at: int | None = None
    done: bool = False


class Gone(Exception):
    """The server hung up, which it may on whoever breaks a MUST."""


class Wire:
    """Requests out, replies in."""

    def __init__(self, sock: socket.socket, mode: ReplyMode) -> None:
        self.sock = sock
        self.mode = mode
        self.waiting: dict[int, Reply] = {}
        self._cookies = itertools.count(1 << 40)  # whole numbers that a test picks itself are smaller

    # Requests

    def request(
        self,
        command: int,
        offset: int = 0,
        length: int = 0,
        *,
        payload: bytes = b"",
        flags: int = 0,
        cookie: int | None = None,
    ) -> bytes:
        """The bytes of a request, whose reply is expected from now on. With a payload, its length is the request's."""
        if cookie is None:
            cookie = next(self._cookies)
        if payload:
            length = len(payload)
            if self.mode is ReplyMode.EXTENDED:
                flags |= CmdFlag.PAYLOAD_LEN
        if command != Cmd.DISC:
            self.waiting[cookie] = Reply(cookie, command, offset, length)
        return request(self.mode, flags, command, cookie, offset, length) + payload

    def shared_read(self, offset: int, length: int, position: int, *, flags: int = 0) -> bytes:
        """A READ into shared memory (docs/shared-memory.md): a success has nothing in its reply."""
        made = self.request(Cmd.READ, offset, payload=SHARED_READ.pack(length, position), flags=flags)
        next(reversed(self.waiting.values())).length = 0
        return made

    def send(self, *requests: bytes) -> None:
        self.sock.sendall(b"".join(requests))

    def ask(self, command: int, offset: int = 0, length: int = 0, *, payload: bytes = b"", flags: int = 0) -> Reply:
        """One request and its reply, which must be the next that comes."""
        self.send(self.request(command, offset, length, payload=payload, flags=flags))
        return self.reply()

    # Replies

    def replies(self, count: int) -> dict[int, Reply]:
        """The next `count` that are complete, by cookie, in the order of their ends."""
        found = [self.reply() for _ in range(count)]
        return {reply.cookie: reply for reply in found}

    def reply(self) -> Reply:
        """The next one that is complete. Raises Gone where the server hangs up."""
        while True:
            reply = self._simple() if self.mode is ReplyMode.SIMPLE else self._chunk()
            if reply.done:
                return reply

    def ended(self) -> bool:
        """Whether the server hangs up now, with nothing more to say."""
        try:
            return self.sock.recv(1) == b""
        except ConnectionResetError:
            return True

    def take(self, count: int) -> bytearray:
        data = bytearray(count)
        view, at = memoryview(data), 0
        while at < count:
            try:
                received = self.sock.recv_into(view[at:])
            except ConnectionResetError:
                received = 0
            if not received:
                raise Gone(f"after {at} of {count} bytes")
            at += received
        return data

    def _asked(self, cookie: int) -> Reply:
        assert cookie in self.waiting, f"a reply to cookie {cookie}, which is not in flight"
        return self.waiting[cookie]

    def _finish(self, reply: Reply) -> None:
        reply.done = True
        del self.waiting[reply.cookie]
        if reply.error:
            return
        if reply.command == Cmd.READ:
            covered = sorted(reply.pieces)
            assert sum(length for _, length in covered) == reply.length, "a READ that succeeds brings all of its data"
        if reply.command == Cmd.BLOCK_STATUS:
            assert reply.status

    def _simple(self) -> Reply:
        magic, error, cookie = SIMPLE_REPLY.unpack(self.take(SIMPLE_REPLY.size))
        assert magic == SIMPLE_REPLY_MAGIC
        reply = self._asked(cookie)
        reply.error = NbdError(error) if error else 0
        if reply.command == Cmd.READ and not error and reply.length:
            reply.data = self.take(reply.length)
            reply.pieces.append((reply.offset, reply.length))
        self._finish(reply)
        return reply

    def _chunk(self) -> Reply:
        extended = self.mode is ReplyMode.EXTENDED
        layout = EXTENDED_CHUNK if extended else CHUNK
        magic, flags, kind, cookie, *offset, length = layout.unpack(self.take(layout.size))
        assert magic == (EXTENDED_REPLY_MAGIC if extended else STRUCTURED_REPLY_MAGIC)
        assert not flags & ~ReplyFlag.DONE
        reply = self._asked(cookie)
        assert not extended or offset == [reply.offset]
        assert not reply.error, "a chunk behind an error chunk"
        payload = self.take(length)
        match ReplyType(kind):
            case ReplyType.NONE:
                assert not payload
                assert flags & ReplyFlag.DONE
            case ReplyType.OFFSET_DATA:
                (start,) = OFFSET_DATA.unpack_from(payload)
                self._content(reply, start, payload[OFFSET_DATA.size :])
            case ReplyType.OFFSET_HOLE:
                start, size = OFFSET_HOLE.unpack(payload)
                self._content(reply, start, bytearray(size))
            case ReplyType.BLOCK_STATUS | ReplyType.BLOCK_STATUS_EXT:
                assert extended == (kind == ReplyType.BLOCK_STATUS_EXT)
                self._status(reply, payload)
            case _:
                self._error(reply, kind, payload)
        if flags & ReplyFlag.DONE:
            self._finish(reply)
        return reply

    @staticmethod
    def _content(reply: Reply, start: int, data: bytearray) -> None:
        assert reply.command == Cmd.READ
        assert data
        assert reply.offset <= start
        assert start + len(data) <= reply.offset + reply.length
        assert all(start + len(data) <= at or at + length <= start for at, length in reply.pieces), "content twice"
        reply.pieces.append((start, len(data)))
        if not reply.data:
            reply.data = bytearray(reply.length)
        reply.data[start - reply.offset : start - reply.offset + len(data)] = data

    def _status(self, reply: Reply, payload: bytearray) -> None:
        assert reply.command == Cmd.BLOCK_STATUS
        extended = self.mode is ReplyMode.EXTENDED
        head, size = (STATUS_EXT, 8) if extended else (STATUS, 4)
        number, *count = head.unpack_from(payload)
        body = payload[head.size :]
        assert body
        assert len(body) % (2 * size) == 0
        assert not count or count == [len(body) // (2 * size)]
        assert number not in reply.status
        numbers = [int.from_bytes(body[at : at + size], "big") for at in range(0, len(body), size)]
        extents = list(zip(numbers[::2], numbers[1::2], strict=True))
        assert all(length for length, _ in extents)
        reply.status[number] = extents

    @staticmethod
    def _error(reply: Reply, kind: int, payload: bytearray) -> None:
        error, length = ERROR.unpack_from(payload)
        text = payload[ERROR.size : ERROR.size + length]
        rest = payload[ERROR.size + length :]
        assert length <= MAX_STRING
        reply.error, reply.text = NbdError(error), text.decode()
        if kind == ReplyType.ERROR_OFFSET:
            (reply.at,) = OFFSET_DATA.unpack(rest)
            assert reply.offset <= reply.at < reply.offset + reply.length
        else:
            assert not rest


def header_size(mode: ReplyMode) -> int:
    """Bytes of a request's header."""
    return 32 if mode is ReplyMode.EXTENDED else 28
