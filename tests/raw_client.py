"""A client that sends any request, however wrong, and shows each reply as it came.

The handshake is our own client's; the transmission phase is written here once more from the NBD document, so that it
neither refuses to send what is illegal nor shares a misreading with the server.

    with RawClient(server.unix, "vda@s", ReplyMode.STRUCTURED) as client:
        reply = client.request(READ, 0, 0, 4096)
        assert reply.error == EINVAL and "trimmed" in reply.text
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

from fleecing.nbd.client_handshake import ClientHandshake
from fleecing.nbd.constants import ReplyMode
from tests.peers import DEADLINE

READ, WRITE, DISC, FLUSH, TRIM, CACHE, WRITE_ZEROES, BLOCK_STATUS = range(8)
FUA, NO_HOLE, DF, REQ_ONE, FAST_ZERO, PAYLOAD_LEN = (1 << bit for bit in range(6))
EPERM, EIO, ENOMEM, EINVAL, ENOSPC, EOVERFLOW, ENOTSUP, ESHUTDOWN = 1, 5, 12, 22, 28, 75, 95, 108

_DONE = 1
_NONE, _OFFSET_DATA, _OFFSET_HOLE, _STATUS, _STATUS_EXT, _ERROR, _ERROR_OFFSET = 0, 1, 2, 5, 6, 0x8001, 0x8002


@dataclass
class Reply:
    """All that a request was answered with. `data` is (offset, bytes) of each content chunk, in their order."""

    error: int = 0
    text: str = ""
    error_offset: int | None = None
    data: list[tuple[int, bytes]] = field(default_factory=list)
    extents: dict[int, list[tuple[int, int]]] = field(default_factory=dict)
    chunks: int = 0


class RawClient:
    """One connection over a Unix socket. Everything that is received is checked for its form."""

    def __init__(
        self, path: Path, export: str, mode: ReplyMode = ReplyMode.STRUCTURED, contexts: Sequence[str] = ()
    ) -> None:
        self.mode = mode
        handshake = ClientHandshake(
            export,
            structured=mode is not ReplyMode.SIMPLE,
            extended=mode is ReplyMode.EXTENDED,
            contexts=contexts,
        )
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(DEADLINE)
        self._cookie = 0x1122334455660000
        try:
            self.socket.connect(str(path))
            while handshake.agreement is None:
                self.socket.sendall(handshake.data_to_send())
                data = self.socket.recv(65536)
                assert data, "the server hung up in the handshake"
                handshake.receive(data)
        except BaseException:
            self.socket.close()
            raise
        assert not handshake.leftover
        assert handshake.agreement.mode is mode
        self.size = handshake.agreement.size
        self.contexts = dict(handshake.agreement.contexts)

    def request(
        self, command: int, flags: int, offset: int, length: int, payload: bytes = b"", *, told: int | None = None
    ) -> Reply:
        """Send one request, whatever is in it, and take its whole reply. `told` is the length in the header."""
        return self.reply(self.send(command, flags, offset, length, payload, told=told))

    def send(
        self, command: int, flags: int, offset: int, length: int, payload: bytes = b"", *, told: int | None = None
    ) -> int:
        """Send one request; its cookie."""
        self._cookie += 1
        if told is None:
            told = len(payload) if payload else length
        if self.mode is ReplyMode.EXTENDED:
            if command == WRITE:
                flags |= PAYLOAD_LEN
            head = struct.pack(">IHHQQQ", 0x21E41C71, flags, command, self._cookie, offset, told)
        else:
            head = struct.pack(">IHHQQI", 0x25609513, flags, command, self._cookie, offset, told)
        self.socket.sendall(head + payload)
        return self._cookie

    def reply(self, cookie: int) -> Reply:
        """The next reply, which must be that of the request with this cookie."""
        reply = Reply()
        if self.mode is ReplyMode.SIMPLE:
            magic, reply.error, answered = struct.unpack(">IIQ", self._take(16))
            assert (magic, answered) == (0x67446698, cookie)
            return reply
        done = False
        while not done:
            reply.chunks += 1
            done = self._chunk(cookie, reply)
        return reply

    def read(self, offset: int, length: int) -> bytes:
        """A READ that must succeed; its bytes."""
        reply = self.request(READ, 0, offset, length)
        assert reply.error == 0, reply
        if self.mode is ReplyMode.SIMPLE:
            return self._take(length)
        result = bytearray(length)
        for position, piece in reply.data:
            result[position - offset : position - offset + len(piece)] = piece
        assert sum(len(piece) for _, piece in reply.data) == length
        return bytes(result)

    def _chunk(self, cookie: int, reply: Reply) -> bool:
        if self.mode is ReplyMode.EXTENDED:
            magic, flags, kind, answered, _, length = struct.unpack(">IHHQQQ", self._take(32))
            assert magic == 0x6E8A278C
        else:
            magic, flags, kind, answered, length = struct.unpack(">IHHQI", self._take(20))
            assert magic == 0x668E33EF
        assert answered == cookie
        assert flags in (0, _DONE)
        self._payload(kind, self._take(length), reply)
        return bool(flags)

    @staticmethod
    def _payload(kind: int, payload: bytes, reply: Reply) -> None:
        if kind == _OFFSET_DATA:
            reply.data.append((struct.unpack_from(">Q", payload)[0], payload[8:]))
        elif kind == _OFFSET_HOLE:
            offset, length = struct.unpack(">QI", payload)
            reply.data.append((offset, bytes(length)))
        elif kind == _STATUS:
            reply.extents[struct.unpack_from(">I", payload)[0]] = list(struct.iter_unpack(">II", payload[4:]))
        elif kind == _STATUS_EXT:
            context, count = struct.unpack_from(">II", payload)
            reply.extents[context] = list(struct.iter_unpack(">QQ", payload[8:]))
            assert len(reply.extents[context]) == count
        elif kind in (_ERROR, _ERROR_OFFSET):
            assert not reply.error, "two error chunks in one reply"
            reply.error, length = struct.unpack_from(">IH", payload)
            reply.text = payload[6 : 6 + length].decode()
            assert reply.error
            if kind == _ERROR_OFFSET:
                (reply.error_offset,) = struct.unpack(">Q", payload[6 + length :])
            else:
                assert len(payload) == 6 + length
        else:
            assert (kind, payload) == (_NONE, b"")

    def _take(self, count: int) -> bytes:
        data = bytearray()
        while len(data) < count:
            piece = self.socket.recv(min(count - len(data), 1 << 20))
            assert piece, f"the server hung up after {len(data)} of {count} bytes"
            data += piece
        return bytes(data)

    def hung_up(self) -> bool:
        """Wait for what the server does next: whether it is the end of the connection."""
        try:
            return not self.socket.recv(1)
        except ConnectionError:
            return True

    def close(self) -> None:
        """Hang up without a DISC."""
        self.socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
