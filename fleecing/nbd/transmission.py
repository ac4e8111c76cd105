"""The transmission phase: its messages, and which requests are right (NBD document, "Transmission", "Request types").

What is made or cut once per request is plain `struct`; `layouts.py` says the same in words and a test proves both
agree. A request goes through four steps: cut (`REQUEST` or `EXTENDED_REQUEST`, then `payload_length` more bytes),
validate (`check_request`), serve, answer (the functions `*_reply` and `data_header`). Offsets, lengths: bytes.
"""

from __future__ import annotations

import errno
import sys
from array import array
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from struct import Struct
from typing import Final

from fleecing.errors import RequestError
from fleecing.nbd.constants import (
    DEFAULT_MINIMUM_BLOCK,
    EXTENDED_REPLY_MAGIC,
    EXTENDED_REQUEST_MAGIC,
    MAX_STRING,
    REQUEST_MAGIC,
    SIMPLE_REPLY_MAGIC,
    STRUCTURED_REPLY_MAGIC,
    Cmd,
    CmdFlag,
    NbdError,
    ReplyFlag,
    ReplyMode,
    ReplyType,
    TransmissionFlag,
)

REQUEST: Final = Struct(">IHHQQI")
"""magic, command flags, type, cookie, offset, length."""
EXTENDED_REQUEST: Final = Struct(">IHHQQQ")
"""The same; `length` is that of the payload if PAYLOAD_LEN is set, of the effect if not."""
SIMPLE_REPLY: Final = Struct(">IIQ")
"""magic, error, cookie."""
CHUNK: Final = Struct(">IHHQI")
"""magic, reply flags, type, cookie, length of the payload."""
EXTENDED_CHUNK: Final = Struct(">IHHQQQ")
"""magic, reply flags, type, cookie, offset of the request, length of the payload."""

OFFSET_DATA: Final = Struct(">Q")
"""The payload's head in front of the data: offset."""
OFFSET_HOLE: Final = Struct(">QI")
"""offset, length."""
ERROR: Final = Struct(">IH")
"""error, length of the text; the text and, in ERROR_OFFSET, a u64 offset follow."""
STATUS: Final = Struct(">I")
"""context id; then (u32 length, u32 status) for each extent."""
STATUS_EXT: Final = Struct(">II")
"""context id, number of extents; then (u64 length, u64 status) for each extent."""
STATUS_PAYLOAD: Final = Struct(">Q")
"""The payload of a BLOCK_STATUS with PAYLOAD_LEN: effect length; then u32 context ids."""
SHARED_READ: Final = Struct(">QQ")
"""The payload of a READ with PAYLOAD_LEN (docs/shared-memory.md): effect length, position in the shared memory."""

DATA_CHUNK: Final = Struct(">IHHQIQ")
EXTENDED_DATA_CHUNK: Final = Struct(">IHHQQQQ")
"""A chunk's header, and OFFSET_DATA."""

_WRITE: Final = int(Cmd.WRITE)
_LAST_COMMAND: Final = int(max(Cmd))
_PAYLOAD_LEN: Final = int(CmdFlag.PAYLOAD_LEN)
_DONE: Final = int(ReplyFlag.DONE)
_DATA: Final = int(ReplyType.OFFSET_DATA)

_NEEDED_FLAG: Final = {
    Cmd.FLUSH: TransmissionFlag.SEND_FLUSH,
    Cmd.TRIM: TransmissionFlag.SEND_TRIM,
    Cmd.WRITE_ZEROES: TransmissionFlag.SEND_WRITE_ZEROES,
}
"""CACHE is not here: it changes nothing, and clients may send it to a server that does not advertise it."""

_ERRNO_TO_NBD: Final = {
    errno.EPERM: NbdError.EPERM,
    errno.EACCES: NbdError.EPERM,
    errno.EROFS: NbdError.EPERM,
    errno.ENOMEM: NbdError.ENOMEM,
    errno.EINVAL: NbdError.EINVAL,
    errno.ENOSPC: NbdError.ENOSPC,
    errno.EDQUOT: NbdError.ENOSPC,
    errno.EFBIG: NbdError.ENOSPC,
    errno.EOPNOTSUPP: NbdError.ENOTSUP,
    errno.ESHUTDOWN: NbdError.ESHUTDOWN,
}


def nbd_error(host_errno: int | None) -> NbdError:
    """The one map from a host's errno to "Error values"; EIO for whatever has no word there.

    EOVERFLOW is not in the map: the document keeps it for DF reads and over-long commands. "SHOULD NOT return
    NBD_ENOTSUP except [...] in response to NBD_CMD_WRITE_ZEROES when NBD_CMD_FLAG_FAST_ZERO is supported": only that
    call of the block layer may raise EOPNOTSUPP.
    """
    return _ERRNO_TO_NBD.get(host_errno or 0, NbdError.EIO)


# Requests


def request(mode: ReplyMode, flags: int, command: int, cookie: int, offset: int, length: int) -> bytes:
    """The header of a request; the caller sends a payload behind it and, in EXTENDED, has set PAYLOAD_LEN for it."""
    if mode is ReplyMode.EXTENDED:
        return EXTENDED_REQUEST.pack(EXTENDED_REQUEST_MAGIC, flags, command, cookie, offset, length)
    return REQUEST.pack(REQUEST_MAGIC, flags, command, cookie, offset, length)


def payload_length(mode: ReplyMode, flags: int, command: int, length: int) -> int:
    """How many bytes of payload follow a request's header; they must be consumed even if the request is refused.

    In extended mode that is `length` if PAYLOAD_LEN is set, "if the flag is absent there is no payload" [X]; a compact
    request has a payload if it is a WRITE.
    """
    if mode is ReplyMode.EXTENDED:
        return length if flags & _PAYLOAD_LEN else 0
    return length if command == _WRITE else 0


# Replies


def error_reply(
    mode: ReplyMode, cookie: int, offset: int, error: int, text: str = "", *, at: int | None = None
) -> bytes:
    """The end of a request that failed. `offset` is the request's; `at` is where in the disk it failed, if known.

    A simple reply has no room for the text. An error chunk "SHOULD NOT be used more than once in a structured reply".
    """
    if mode is ReplyMode.SIMPLE:
        return SIMPLE_REPLY.pack(SIMPLE_REPLY_MAGIC, error, cookie)
    message = wire_text(text)
    payload = ERROR.pack(error, len(message)) + message
    if at is None:
        return _chunk(mode, _DONE, ReplyType.ERROR, cookie, offset, payload)
    return _chunk(mode, _DONE, ReplyType.ERROR_OFFSET, cookie, offset, payload + OFFSET_DATA.pack(at))


def done_reply(mode: ReplyMode, cookie: int, offset: int) -> bytes:
    """The success of a request that has nothing to send back (or, when structured, has sent it all in chunks)."""
    if mode is ReplyMode.STRUCTURED:
        return CHUNK.pack(STRUCTURED_REPLY_MAGIC, 1, 0, cookie, 0)
    if mode is ReplyMode.SIMPLE:
        return SIMPLE_REPLY.pack(SIMPLE_REPLY_MAGIC, 0, cookie)
    return EXTENDED_CHUNK.pack(EXTENDED_REPLY_MAGIC, 1, 0, cookie, offset, 0)


def data_header(mode: ReplyMode, cookie: int, offset: int, length: int) -> bytes:
    """What goes in front of the data of a READ that is answered in one piece; nothing may fail afterwards.

    A READ of length 0 gets the reply without data: "each chunk MUST describe at least one byte".
    """
    if length == 0:
        return done_reply(mode, cookie, offset)
    if mode is ReplyMode.STRUCTURED:
        return DATA_CHUNK.pack(STRUCTURED_REPLY_MAGIC, 1, 1, cookie, length + 8, offset)
    if mode is ReplyMode.SIMPLE:
        return SIMPLE_REPLY.pack(SIMPLE_REPLY_MAGIC, 0, cookie)
    return EXTENDED_DATA_CHUNK.pack(EXTENDED_REPLY_MAGIC, 1, 1, cookie, offset, length + 8, offset)


def data_header_writer(mode: ReplyMode) -> Callable[[memoryview, int, int, int, int], None]:
    """What writes `data_header` of a READ that is not empty into a buffer: (buffer, at, cookie, offset, length).

    0.1 us less a request than making bytes and copying them.
    """
    if mode is ReplyMode.STRUCTURED:
        pack = DATA_CHUNK.pack_into

        def structured(buffer: memoryview, at: int, cookie: int, offset: int, length: int) -> None:
            pack(buffer, at, STRUCTURED_REPLY_MAGIC, 1, 1, cookie, length + 8, offset)

        return structured
    if mode is ReplyMode.SIMPLE:
        pack_simple = SIMPLE_REPLY.pack_into

        def simple(buffer: memoryview, at: int, cookie: int, offset: int, length: int) -> None:
            pack_simple(buffer, at, SIMPLE_REPLY_MAGIC, 0, cookie)

        return simple
    pack_extended = EXTENDED_DATA_CHUNK.pack_into

    def extended(buffer: memoryview, at: int, cookie: int, offset: int, length: int) -> None:
        pack_extended(buffer, at, EXTENDED_REPLY_MAGIC, 1, 1, cookie, offset, length + 8, offset)

    return extended


def data_chunk_header(
    mode: ReplyMode, cookie: int, request_offset: int, offset: int, length: int, *, done: bool
) -> bytes:
    """What goes in front of one of several pieces of a READ's data. Not for SIMPLE, which has no pieces."""
    flags = _DONE if done else 0
    if mode is ReplyMode.STRUCTURED:
        return DATA_CHUNK.pack(STRUCTURED_REPLY_MAGIC, flags, _DATA, cookie, length + 8, offset)
    assert mode is ReplyMode.EXTENDED
    return EXTENDED_DATA_CHUNK.pack(EXTENDED_REPLY_MAGIC, flags, _DATA, cookie, request_offset, length + 8, offset)


def hole_chunk(mode: ReplyMode, cookie: int, request_offset: int, offset: int, length: int, *, done: bool) -> bytes:
    """A piece of a READ that is all zeroes: 0 < length < 2^32. Not for SIMPLE, and not for a READ with DF."""
    payload = OFFSET_HOLE.pack(offset, length)
    return _chunk(mode, _DONE if done else 0, ReplyType.OFFSET_HOLE, cookie, request_offset, payload)


def block_status_reply(
    mode: ReplyMode, cookie: int, offset: int, contexts: Sequence[tuple[int, Iterable[tuple[int, int]]]]
) -> bytes:
    """The success of a BLOCK_STATUS: for each (context id, extents) one chunk; an extent is (length, status).

    At least one context, at least one extent in each; lengths below 2^32 in STRUCTURED. "exactly one status chunk per
    negotiated metadata context ID"; DONE on the last. Not for SIMPLE, where no context can be selected.
    """
    last = len(contexts) - 1
    parts = []
    for index, (context, extents) in enumerate(contexts):
        done = _DONE if index == last else 0
        if mode is ReplyMode.EXTENDED:
            pairs = _big_endian("Q", extents)
            payload = STATUS_EXT.pack(context, len(pairs) // 16) + pairs
            parts.append(_chunk(mode, done, ReplyType.BLOCK_STATUS_EXT, cookie, offset, payload))
        else:
            payload = STATUS.pack(context) + _big_endian("I", extents)
            parts.append(_chunk(mode, done, ReplyType.BLOCK_STATUS, cookie, offset, payload))
    return b"".join(parts)


def wire_text(text: str) -> bytes:
    """The text as the wire takes it: UTF-8 without NUL and without half a character, at most MAX_STRING bytes."""
    raw = text.replace("\0", " ").encode("utf-8", "replace")
    if len(raw) <= MAX_STRING:
        return raw
    return raw[:MAX_STRING].decode("utf-8", "ignore").encode()


def _big_endian(code: str, extents: Iterable[tuple[int, int]]) -> bytes:
    numbers = array(code, chain.from_iterable(extents))
    if sys.byteorder == "little":
        numbers.byteswap()
    return numbers.tobytes()


def _chunk(mode: ReplyMode, flags: int, kind: ReplyType, cookie: int, offset: int, payload: bytes) -> bytes:
    if mode is ReplyMode.EXTENDED:
        return EXTENDED_CHUNK.pack(EXTENDED_REPLY_MAGIC, flags, kind, cookie, offset, len(payload)) + payload
    assert mode is ReplyMode.STRUCTURED
    return CHUNK.pack(STRUCTURED_REPLY_MAGIC, flags, kind, cookie, len(payload)) + payload


# Validation


@dataclass(frozen=True)
class RequestLimits:
    """What a connection's requests are held against; made once, when the transmission phase begins."""

    size: int
    flags: TransmissionFlag
    """As told to the client in this mode."""
    mode: ReplyMode
    maximum_payload: int
    contexts: bool
    """Whether meta contexts were selected."""
    minimum_block: int = DEFAULT_MINIMUM_BLOCK
    writable: bool = True
    """False answers as READ_ONLY does, without telling the client: clients send no TRIM to an export that tells it."""
    trimmable: bool = True
    """False: TRIM is EPERM, where it would be EINVAL without SEND_TRIM."""
    read_once: bool = False
    """Whether the meta context was selected that allows READ_ONCE."""
    shared_memory: bool = False
    """Whether the meta context was selected that allows READ with PAYLOAD_LEN."""

    # Tables by command, for the hot path: flag bits that are fixed, what they must be, and the longest request.
    fixed: tuple[int, ...] = field(init=False, repr=False)
    must: tuple[int, ...] = field(init=False, repr=False)
    longest: tuple[int, ...] = field(init=False, repr=False)
    misaligned: int = field(init=False, repr=False)

    def __post_init__(self) -> None:
        must = [int(CmdFlag.PAYLOAD_LEN) if _needs_payload(self, command) else 0 for command in Cmd]
        allowed = [int(_allowed_flags(self, command)) for command in Cmd]
        object.__setattr__(self, "must", tuple(must))
        object.__setattr__(self, "fixed", tuple(~bits | needed for bits, needed in zip(allowed, must, strict=True)))
        object.__setattr__(self, "longest", tuple(_longest(self, command) for command in Cmd))
        object.__setattr__(self, "misaligned", self.minimum_block - 1)


def check_request(limits: RequestLimits, command: int, flags: int, offset: int, length: int) -> None:
    """Whether a request may be served; raises RequestError with what to answer. Its payload is already consumed.

    `length` is the effect length: of a BLOCK_STATUS with PAYLOAD_LEN, what `status_payload` found in the payload.
    A request of length 0 that passes is to be answered with success and to do nothing (not so FLUSH: do it).
    """
    if (
        command <= _LAST_COMMAND
        and flags & limits.fixed[command] == limits.must[command]
        and 0 < length <= limits.longest[command]
        and offset + length <= limits.size
        and not (offset | length) & limits.misaligned
    ):
        return
    _check_one_by_one(limits, command, flags, offset, length)


def status_payload(payload: bytes, selected: Collection[int]) -> tuple[int, tuple[int, ...]]:
    """The (effect length, context ids) that a BLOCK_STATUS with PAYLOAD_LEN asks for [X]; raises RequestError."""
    if len(payload) < STATUS_PAYLOAD.size or len(payload) % 4:
        raise RequestError(NbdError.EINVAL, f"a block status payload of {len(payload)} bytes is not 8 + 4n")
    (length,) = STATUS_PAYLOAD.unpack_from(payload)
    ids = tuple(number for (number,) in STATUS.iter_unpack(payload[STATUS_PAYLOAD.size :]))
    if not ids:
        raise RequestError(NbdError.EINVAL, "a block status payload without a context id has no extent to answer")
    if len(set(ids)) != len(ids):
        raise RequestError(NbdError.EINVAL, "a context id appears twice in the block status payload")
    for number in ids:
        if number not in selected:
            raise RequestError(NbdError.EINVAL, f"context id {number} was not selected")
    return length, ids


def shared_read_payload(payload: bytes) -> tuple[int, int]:
    """The (effect length, position) of a READ with PAYLOAD_LEN [F], in bytes; raises RequestError."""
    if len(payload) != SHARED_READ.size:
        raise RequestError(
            NbdError.EINVAL, f"a payload of {len(payload)} bytes where a READ has one of {SHARED_READ.size}"
        )
    length, position = SHARED_READ.unpack(payload)
    return length, position


def _check_one_by_one(limits: RequestLimits, number: int, flags: int, offset: int, length: int) -> None:
    """The same question as `check_request`, asked in the order that gives the best answer."""
    if number > _LAST_COMMAND:
        raise RequestError(NbdError.EINVAL, f"unknown command {number}")
    command = Cmd(number)
    if command is Cmd.DISC:
        return  # "there is no reply to an NBD_CMD_DISC": nothing to refuse
    _check_permission(limits, command)
    _check_flags(limits, command, flags)
    if command is Cmd.FLUSH:
        return  # offset and length are reserved; QEMU tolerates them, some clients send them
    _check_range(limits, command, offset, length)


def _check_permission(limits: RequestLimits, command: Cmd) -> None:
    """The server "SHOULD return NBD_EPERM if it receives a write or trim request on a read-only export".

    A snapshot is read-only and yet takes TRIM: it drops what the client has read, and it says so by SEND_TRIM.
    """
    read_only = TransmissionFlag.READ_ONLY in limits.flags or not limits.writable
    if command in (Cmd.WRITE, Cmd.WRITE_ZEROES) and read_only:
        raise RequestError(NbdError.EPERM, f"{command.name} on a read-only export")
    if command is Cmd.TRIM and not limits.trimmable:
        raise RequestError(NbdError.EPERM, "TRIM is not allowed to this client")
    needed = _NEEDED_FLAG.get(command)
    if needed is not None and needed not in limits.flags:
        error = NbdError.EPERM if command is Cmd.TRIM and read_only else NbdError.EINVAL
        raise RequestError(error, f"{command.name} is not supported by this export: it does not set {needed.name}")
    if command is Cmd.BLOCK_STATUS and not limits.contexts:
        raise RequestError(NbdError.EINVAL, "BLOCK_STATUS without a meta context selected in the handshake")


def _check_flags(limits: RequestLimits, command: Cmd, flags: int) -> None:
    """EINVAL for "a flag not explicitly documented as applicable to the given request"."""
    wrong = flags & ~int(_allowed_flags(limits, command))
    if wrong:
        raise RequestError(NbdError.EINVAL, f"{command.name} does not take flags {_flag_names(wrong)} here")
    if _needs_payload(limits, command) and not flags & _PAYLOAD_LEN:
        raise RequestError(NbdError.EINVAL, f"{command.name} without PAYLOAD_LEN though extended headers are in use")


def _check_range(limits: RequestLimits, command: Cmd, offset: int, length: int) -> None:
    if length == 0 and command is Cmd.BLOCK_STATUS:
        raise RequestError(NbdError.EINVAL, "BLOCK_STATUS of length 0 has no extent to answer")
    if length > _longest(limits, command):
        raise RequestError(
            NbdError.EINVAL,
            f"{command.name} of {length} bytes is above the maximum payload of {limits.maximum_payload}",
        )
    if offset + length > limits.size:
        error = NbdError.ENOSPC if command in (Cmd.WRITE, Cmd.WRITE_ZEROES) else NbdError.EINVAL
        raise RequestError(
            error, f"{command.name} of {length} bytes at {offset} goes beyond the end of the export at {limits.size}"
        )
    if (offset | length) & limits.misaligned:
        raise RequestError(
            NbdError.EINVAL,
            f"{command.name} of {length} bytes at {offset} is not aligned to blocks of {limits.minimum_block}",
        )


def _allowed_flags(limits: RequestLimits, command: Cmd) -> CmdFlag:
    """Section "Command flags": which ones the command takes on this connection."""
    told = limits.flags
    allowed = CmdFlag(0)
    if TransmissionFlag.SEND_FUA in told:
        allowed |= CmdFlag.FUA  # "the server MUST accept all commands with this bit set"
    if command is Cmd.READ and TransmissionFlag.SEND_DF in told:
        allowed |= CmdFlag.DF
    if command is Cmd.READ and limits.read_once:
        allowed |= CmdFlag.READ_ONCE
    if command is Cmd.READ and limits.shared_memory and limits.mode is ReplyMode.EXTENDED:
        allowed |= CmdFlag.PAYLOAD_LEN
    if command is Cmd.WRITE_ZEROES:
        allowed |= CmdFlag.NO_HOLE
        if TransmissionFlag.SEND_FAST_ZERO in told:
            allowed |= CmdFlag.FAST_ZERO
    if command is Cmd.BLOCK_STATUS:
        allowed |= CmdFlag.REQ_ONE
        if TransmissionFlag.BLOCK_STATUS_PAYLOAD in told:
            allowed |= CmdFlag.PAYLOAD_LEN
    if _needs_payload(limits, command):
        allowed |= CmdFlag.PAYLOAD_LEN
    return allowed


def _needs_payload(limits: RequestLimits, command: Cmd) -> bool:
    """Whether PAYLOAD_LEN is a must: "With extended headers, the flag MUST be set for NBD_CMD_WRITE" [X]."""
    return limits.mode is ReplyMode.EXTENDED and command is Cmd.WRITE


def _longest(limits: RequestLimits, command: Cmd) -> int:
    """The longest request of this kind in bytes. 0 for what is not allowed or has no range: to be looked at closer."""
    if command in (Cmd.FLUSH, Cmd.DISC):
        return 0
    try:
        _check_permission(limits, command)
    except RequestError:
        return 0
    return limits.maximum_payload if command in (Cmd.READ, Cmd.WRITE) else limits.size


def _flag_names(bits: int) -> str:
    known = [flag.name or "" for flag in CmdFlag if flag & bits]
    unknown = bits & ~sum(CmdFlag)  # the bits between them have no name
    return ", ".join([*known, hex(unknown)] if unknown else known)
