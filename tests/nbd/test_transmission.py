"""Replies and requests, read back with the construct layouts."""

from __future__ import annotations

import errno
from struct import Struct

import pytest
from construct import Construct
from hypothesis import given
from hypothesis import strategies as st

from fleecing.errors import RequestError
from fleecing.nbd import constants as c
from fleecing.nbd import layouts, transmission
from fleecing.nbd.constants import Cmd, CmdFlag, NbdError, ReplyMode, ReplyType
from fleecing.nbd.transmission import (
    block_status_reply,
    data_chunk_header,
    data_header,
    data_header_writer,
    done_reply,
    error_reply,
    hole_chunk,
    nbd_error,
    payload_length,
    request,
    shared_read_payload,
    status_payload,
    wire_text,
)

COOKIE = 0xFEEDFACECAFEBEEF
OFFSET = (1 << 40) + 5
CHUNKED = [ReplyMode.STRUCTURED, ReplyMode.EXTENDED]
LAYOUT: dict[ReplyMode, Construct] = {
    ReplyMode.SIMPLE: layouts.SIMPLE_REPLY,
    ReplyMode.STRUCTURED: layouts.CHUNK,
    ReplyMode.EXTENDED: layouts.EXTENDED_CHUNK,
}


def chunks(mode: ReplyMode, data: bytes) -> list[Construct]:
    """All chunks in the bytes; their cookie and, where it is told, the request's offset are right."""
    found = []
    while data:
        chunk = LAYOUT[mode].parse(data)
        assert chunk.cookie == COOKIE
        assert mode is ReplyMode.STRUCTURED or chunk.offset == OFFSET
        found.append(chunk)
        data = data[len(LAYOUT[mode].build(chunk)) :]
    assert [chunk.flags for chunk in found] == [0] * (len(found) - 1) + [1]
    return found


# Errors and plain success


def test_simple_error_is_the_number_alone() -> None:
    reply = layouts.SIMPLE_REPLY.parse(error_reply(ReplyMode.SIMPLE, COOKIE, OFFSET, NbdError.EIO, "why"))
    assert (reply.error, reply.cookie) == (5, COOKIE)
    assert len(error_reply(ReplyMode.SIMPLE, COOKIE, OFFSET, NbdError.EIO, "why")) == 16


@pytest.mark.parametrize("mode", CHUNKED)
def test_structured_error_carries_its_text(mode: ReplyMode) -> None:
    (chunk,) = chunks(mode, error_reply(mode, COOKIE, OFFSET, NbdError.EINVAL, "cluster: trimmed"))
    assert chunk.type == ReplyType.ERROR
    assert (chunk.payload.error, chunk.payload.text) == (22, b"cluster: trimmed")


@pytest.mark.parametrize("mode", CHUNKED)
def test_structured_error_may_tell_where_it_happened(mode: ReplyMode) -> None:
    (chunk,) = chunks(mode, error_reply(mode, COOKIE, OFFSET, NbdError.EIO, "bad sector", at=OFFSET + 512))
    assert chunk.type == ReplyType.ERROR_OFFSET
    assert (chunk.payload.text, chunk.payload.offset) == (b"bad sector", OFFSET + 512)


@pytest.mark.parametrize("mode", CHUNKED)
def test_success_without_data_is_an_empty_last_chunk(mode: ReplyMode) -> None:
    (chunk,) = chunks(mode, done_reply(mode, COOKIE, OFFSET))
    assert chunk.type == ReplyType.NONE


def test_simple_success_has_error_0() -> None:
    assert layouts.SIMPLE_REPLY.parse(done_reply(ReplyMode.SIMPLE, COOKIE, OFFSET)).error == 0


@pytest.mark.parametrize(
    "text, wire",
    [
        ("", b""),
        ("plain", b"plain"),
        ("with\0nul", b"with nul"),
        ("lone \udc80 surrogate", b"lone ? surrogate"),
        ("x" * 4097, b"x" * 4096),
        ("é" * 2049, "é".encode() * 2048),
        ("x" + "é" * 2048, b"x" + "é".encode() * 2047),
    ],
)
def test_texts_are_made_fit_for_the_wire(text: str, wire: bytes) -> None:
    assert wire_text(text) == wire


# READ


@pytest.mark.parametrize("mode", CHUNKED)
def test_data_in_one_piece_is_one_chunk(mode: ReplyMode) -> None:
    (chunk,) = chunks(mode, data_header(mode, COOKIE, OFFSET, 5) + b"hello")
    assert chunk.type == ReplyType.OFFSET_DATA
    assert (chunk.payload.offset, chunk.payload.data) == (OFFSET, b"hello")


def test_simple_data_follows_a_bare_header() -> None:
    header = data_header(ReplyMode.SIMPLE, COOKIE, OFFSET, 5)
    assert len(header) == 16 and layouts.SIMPLE_REPLY.parse(header).error == 0


@pytest.mark.parametrize("mode", ReplyMode)
def test_a_read_of_nothing_is_a_success_without_data(mode: ReplyMode) -> None:
    assert data_header(mode, COOKIE, OFFSET, 0) == done_reply(mode, COOKIE, OFFSET)


@pytest.mark.parametrize("mode", CHUNKED)
def test_data_in_pieces_may_hold_holes(mode: ReplyMode) -> None:
    stream = (
        data_chunk_header(mode, COOKIE, OFFSET, OFFSET, 3, done=False)
        + b"abc"
        + hole_chunk(mode, COOKIE, OFFSET, OFFSET + 3, 4096, done=False)
        + data_chunk_header(mode, COOKIE, OFFSET, OFFSET + 4099, 2, done=True)
        + b"de"
    )
    first, hole, last = chunks(mode, stream)
    assert (first.payload.offset, first.payload.data) == (OFFSET, b"abc")
    assert (hole.type, hole.payload.offset, hole.payload.size) == (ReplyType.OFFSET_HOLE, OFFSET + 3, 4096)
    assert (last.payload.offset, last.payload.data) == (OFFSET + 4099, b"de")


# BLOCK_STATUS


@pytest.mark.parametrize("mode", CHUNKED)
def test_block_status_is_one_chunk_a_context(mode: ReplyMode) -> None:
    answer = [(7, [(65536, 0), (4096, 3)]), (9, [(69632, 1)])]
    first, second = chunks(mode, block_status_reply(mode, COOKIE, OFFSET, answer))
    kind = ReplyType.BLOCK_STATUS_EXT if mode is ReplyMode.EXTENDED else ReplyType.BLOCK_STATUS
    assert first.type == second.type == kind
    assert (first.payload.id, second.payload.id) == (7, 9)
    assert [(run.length, run.status) for run in first.payload.extents] == [(65536, 0), (4096, 3)]
    assert [(run.length, run.status) for run in second.payload.extents] == [(69632, 1)]


def test_extended_block_status_holds_lengths_of_64_bits() -> None:
    (chunk,) = chunks(
        ReplyMode.EXTENDED, block_status_reply(ReplyMode.EXTENDED, COOKIE, OFFSET, [(1, iter([(1 << 40, 3)]))])
    )
    assert chunk.payload.count == 1 and chunk.payload.extents[0].length == 1 << 40


def test_compact_block_status_refuses_lengths_above_32_bits() -> None:
    with pytest.raises(OverflowError):
        block_status_reply(ReplyMode.STRUCTURED, COOKIE, OFFSET, [(1, [(1 << 32, 0)])])


# Requests


@given(
    flags=st.integers(0, 0xFFFF),
    command=st.integers(0, 0xFFFF).filter(lambda number: number != Cmd.WRITE),
    cookie=st.integers(0, 2**64 - 1),
    offset=st.integers(0, 2**64 - 1),
    length=st.integers(0, 2**32 - 1),
)
def test_requests_are_made_as_laid_out(flags: int, command: int, cookie: int, offset: int, length: int) -> None:
    compact = layouts.REQUEST.parse(request(ReplyMode.STRUCTURED, flags, command, cookie, offset, length))
    extended = layouts.EXTENDED_REQUEST.parse(
        request(ReplyMode.EXTENDED, flags & ~CmdFlag.PAYLOAD_LEN, command, cookie, offset, length << 32)
    )
    assert (compact.flags, compact.type, compact.cookie) == (flags, command, cookie)
    assert (compact.offset, compact.length) == (offset, length)
    assert (extended.cookie, extended.offset, extended.length) == (cookie, offset, length << 32)


@pytest.mark.parametrize("mode", [ReplyMode.SIMPLE, ReplyMode.STRUCTURED])
def test_compact_requests_have_a_payload_if_they_write(mode: ReplyMode) -> None:
    assert payload_length(mode, 0, Cmd.WRITE, 512) == 512
    assert payload_length(mode, 0xFFFF, Cmd.READ, 512) == 0
    assert payload_length(mode, 0, 77, 512) == 0


def test_extended_requests_have_a_payload_if_they_say_so() -> None:
    for command in (*Cmd, 77):
        assert payload_length(ReplyMode.EXTENDED, CmdFlag.PAYLOAD_LEN, command, 512) == 512
        assert payload_length(ReplyMode.EXTENDED, 0, command, 512) == 0


def test_shared_read_payload_tells_length_and_position() -> None:
    payload = layouts.SHARED_READ.build({"effect_length": 1 << 20, "position": 1 << 33})
    assert shared_read_payload(payload) == (1 << 20, 1 << 33)
    for wrong in (b"", payload[:-1], payload + b"\0"):
        with pytest.raises(RequestError, match=f"a payload of {len(wrong)} bytes") as refused:
            shared_read_payload(wrong)
        assert refused.value.error == NbdError.EINVAL


def test_status_payload_tells_length_and_contexts() -> None:
    payload = layouts.STATUS_PAYLOAD.build({"effect_length": 1 << 33, "ids": [3, 1]})
    assert status_payload(payload, {1, 2, 3}) == (1 << 33, (3, 1))


@pytest.mark.parametrize(
    "payload, why",
    [
        (b"", "8 + 4n"),
        (bytes(4), "8 + 4n"),
        (bytes(13), "8 + 4n"),
        (bytes(8), "without a context id"),
        (bytes(8) + b"\0\0\0\1\0\0\0\1", "twice"),
        (bytes(8) + b"\0\0\0\1\0\0\0\2", "id 2 was not selected"),
    ],
)
def test_status_payload_that_makes_no_sense_is_einval(payload: bytes, why: str) -> None:
    with pytest.raises(RequestError, match=why.replace("+", r"\+")) as caught:
        status_payload(payload, (1,))
    assert caught.value.error == NbdError.EINVAL


# The host's errors


@pytest.mark.parametrize(
    "host, wire",
    [
        (errno.EPERM, NbdError.EPERM),
        (errno.EACCES, NbdError.EPERM),
        (errno.EROFS, NbdError.EPERM),
        (errno.EIO, NbdError.EIO),
        (errno.ENOMEM, NbdError.ENOMEM),
        (errno.EINVAL, NbdError.EINVAL),
        (errno.ENOSPC, NbdError.ENOSPC),
        (errno.EDQUOT, NbdError.ENOSPC),
        (errno.EFBIG, NbdError.ENOSPC),
        (errno.EOPNOTSUPP, NbdError.ENOTSUP),
        (errno.ESHUTDOWN, NbdError.ESHUTDOWN),
        (errno.EBADF, NbdError.EIO),
        (0, NbdError.EIO),
        (None, NbdError.EIO),
    ],
)
def test_errno_becomes_an_error_of_the_protocol(host: int | None, wire: NbdError) -> None:
    assert nbd_error(host) is wire


# struct and construct


@pytest.mark.parametrize(
    "packed, layout, has_payload, expected",
    [
        (transmission.REQUEST, layouts.REQUEST, False, [c.REQUEST_MAGIC, 1, 2, COOKIE, OFFSET, 512]),
        (
            transmission.EXTENDED_REQUEST,
            layouts.EXTENDED_REQUEST,
            False,
            [c.EXTENDED_REQUEST_MAGIC, 1, 2, COOKIE, OFFSET, 512],
        ),
        (transmission.SIMPLE_REPLY, layouts.SIMPLE_REPLY, False, [c.SIMPLE_REPLY_MAGIC, 77, COOKIE]),
        (transmission.CHUNK, layouts.CHUNK, True, [c.STRUCTURED_REPLY_MAGIC, 1, 2, COOKIE, 12]),
        (
            transmission.EXTENDED_CHUNK,
            layouts.EXTENDED_CHUNK,
            True,
            [c.EXTENDED_REPLY_MAGIC, 1, 2, COOKIE, OFFSET, 12],
        ),
    ],
)
def test_struct_and_construct_agree_on_headers(
    packed: Struct, layout: Construct, has_payload: bool, expected: list[int]
) -> None:
    hole = {"offset": 0, "size": 1} if has_payload else None
    fields = {"flags": 1, "type": 2, "cookie": COOKIE, "offset": OFFSET, "length": 512, "error": 77, "payload": hole}
    built = layout.build(fields)
    assert list(packed.unpack_from(built)) == expected
    assert len(built) == packed.size + (12 if has_payload else 0)


@pytest.mark.parametrize("mode", ReplyMode)
def test_a_header_written_into_a_buffer_is_the_same(mode: ReplyMode) -> None:
    for cookie, offset, length in [(0, 0, 1), (2**64 - 1, 2**63 - 1, 1 << 18), (7, 4096, 4096)]:
        header = data_header(mode, cookie, offset, length)
        buffer = bytearray(b"." * 99)
        data_header_writer(mode)(memoryview(buffer), 13, cookie, offset, length)
        assert buffer == b"." * 13 + header + b"." * (86 - len(header))
