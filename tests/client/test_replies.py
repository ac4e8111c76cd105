"""The receiving half of the client, bytes against bytes: fed whole, bytewise, and in uneven pieces."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from struct import pack

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleecing.client import replies
from fleecing.client.replies import ReplyReader
from fleecing.client.request import MAX_PIECES, Request
from fleecing.errors import ProtocolError, RequestError
from fleecing.nbd.constants import Cmd, NbdError, ReplyMode, ReplyType
from fleecing.nbd.transmission import (
    CHUNK,
    EXTENDED_CHUNK,
    block_status_reply,
    data_chunk_header,
    data_header,
    done_reply,
    error_reply,
    hole_chunk,
)

SIMPLE, STRUCTURED, EXTENDED = ReplyMode
CHUNKED = [STRUCTURED, EXTENDED]
CONTEXTS = {7: "base:allocation", 9: "qemu:allocation-depth"}
MIB = 1 << 20

Feed = Callable[[ReplyReader, bytes], None]


def feed_pieces(reader: ReplyReader, data: bytes, sizes: Iterable[int]) -> None:
    """Give `data` to the reader, at most so many bytes at a time."""
    for size in sizes:
        while data and size:
            count = 0
            for target in reader.targets():
                part = data[count : min(count + len(target), size)]
                target[: len(part)] = part
                count += len(part)
            reader.received(count)
            data = data[count:]
            size -= count


def whole(reader: ReplyReader, data: bytes) -> None:
    feed_pieces(reader, data, [len(data)])


def bytewise(reader: ReplyReader, data: bytes) -> None:
    feed_pieces(reader, data, [1] * len(data))


def in_sevens(reader: ReplyReader, data: bytes) -> None:
    feed_pieces(reader, data, [7] * (len(data) // 7 + 1))


@pytest.fixture(params=[whole, bytewise, in_sevens])
def feed(request: pytest.FixtureRequest) -> Feed:
    chosen: Feed = request.param
    return chosen


def reader_for(mode: ReplyMode, *requests: Request) -> ReplyReader:
    reader = ReplyReader(mode, CONTEXTS if mode is not SIMPLE else {})
    for request in requests:
        reader.in_flight[request.cookie] = request
    return reader


def read_of(length: int, *, cookie: int = 1, offset: int = 4096) -> Request:
    return Request(Cmd.READ, cookie, offset, length, memoryview(bytearray(b"?" * length)))


def content(request: Request) -> bytes:
    assert request.buffer is not None
    assert request.finished and request.error is None
    return bytes(request.buffer)


def error_of(request: Request) -> RequestError:
    assert request.finished and request.error is not None
    return request.error


def refused(mode: ReplyMode, request: Request, data: bytes) -> str:
    """What the reader says of bytes that it must not accept."""
    with pytest.raises(ProtocolError) as caught:
        whole(reader_for(mode, request), data)
    assert not request.finished
    return str(caught.value)


def chunk(
    mode: ReplyMode, kind: int, payload: bytes, *, done: bool = True, cookie: int = 1, offset: int = 4096
) -> bytes:
    if mode is STRUCTURED:
        return CHUNK.pack(0x668E33EF, int(done), kind, 1, len(payload)) + payload
    return EXTENDED_CHUNK.pack(0x6E8A278C, int(done), kind, 1, offset, len(payload)) + payload


# Reads


@pytest.mark.parametrize("mode", ReplyMode)
def test_data_goes_into_the_buffer_of_its_request(mode: ReplyMode, feed: Feed) -> None:
    first, second = read_of(6, cookie=1), read_of(5, cookie=2)
    data = data_header(mode, 2, 4096, 5) + b"SECON" + data_header(mode, 1, 4096, 6) + b"FIRST!"
    reader = reader_for(mode, first, second)
    feed(reader, data)
    assert (content(first), content(second)) == (b"FIRST!", b"SECON")
    assert list(reader.finished) == [2, 1] and not reader.in_flight


class Buffers:
    """Makes them, and takes them back."""

    def __init__(self) -> None:
        self.made = 0
        self.free: list[memoryview] = []

    def __call__(self, length: int) -> memoryview:
        if not self.free:
            self.made += 1
            return memoryview(bytearray(b"?" * length))
        return self.free.pop()[:length]


@pytest.mark.parametrize("mode", ReplyMode)
def test_a_late_buffer_is_made_when_its_first_byte_comes(mode: ReplyMode, feed: Feed) -> None:
    """So the answers to many requests, one after the other, all come in the same one."""
    buffers = Buffers()
    requests = [Request(Cmd.READ, cookie, 4096, 6, None, buffers) for cookie in range(8)]
    reader = reader_for(mode, *requests)
    for request in reversed(requests):
        feed(reader, data_header(mode, request.cookie, 4096, 6) + b"DATA %d" % request.cookie)
        assert content(request) == b"DATA %d" % request.cookie
        assert request.buffer is not None
        buffers.free.append(request.buffer)
    assert buffers.made == 1


@pytest.mark.parametrize("mode", CHUNKED)
def test_a_late_buffer_is_the_same_for_all_parts_of_a_read(mode: ReplyMode, feed: Feed) -> None:
    buffers = Buffers()
    requests = [Request(Cmd.READ, cookie, 4096, 6, None, buffers) for cookie in (1, 2)]
    reader = reader_for(mode, *requests)
    for cookie, data in ((1, b"ST!"), (2, b"OND")):
        feed(reader, data_chunk_header(mode, cookie, 4096, 4099, 3, done=False) + data)
    for cookie, data in ((1, b"FIR"), (2, b"SEC")):
        feed(reader, data_header(mode, cookie, 4096, 3) + data)
    assert [content(request) for request in requests] == [b"FIRST!", b"SECOND"]
    assert buffers.made == 2


@pytest.mark.parametrize("mode", CHUNKED)
def test_no_late_buffer_for_what_is_refused(mode: ReplyMode) -> None:
    buffers = Buffers()
    request = Request(Cmd.READ, 1, 4096, 6, None, buffers)
    whole(reader_for(mode, request), error_reply(mode, 1, 4096, NbdError.EIO, "no"))
    assert error_of(request).text == "no"
    assert (request.buffer, buffers.made) == (None, 0)


def test_a_read_larger_than_the_head_is_received_straight_into_its_buffer() -> None:
    request = read_of(3 * replies.HEAD_SIZE)
    reader = reader_for(SIMPLE, request)
    data = bytes(range(256)) * (request.length // 256)
    whole(reader, data_header(SIMPLE, 1, 4096, request.length) + data)
    assert content(request) == data


@pytest.mark.parametrize("mode", CHUNKED)
def test_chunks_in_any_order_and_holes_make_up_a_read(mode: ReplyMode, feed: Feed) -> None:
    request = read_of(12)
    data = (
        data_chunk_header(mode, 1, 4096, 4104, 4, done=False)
        + b"last"
        + hole_chunk(mode, 1, 4096, 4099, 5, done=False)
        + data_chunk_header(mode, 1, 4096, 4096, 3, done=False)
        + b"new"
        + done_reply(mode, 1, 4096)
    )
    feed(reader_for(mode, request), data)
    assert content(request) == b"new\0\0\0\0\0last"


@pytest.mark.parametrize("mode", CHUNKED)
def test_an_error_chunk_fails_the_request_with_the_servers_text(mode: ReplyMode, feed: Feed) -> None:
    request, other = read_of(8), read_of(3, cookie=2)
    data = error_reply(mode, 1, 4096, NbdError.EINVAL, "cluster at offset 4096: trimmed ✂")
    feed(reader_for(mode, request, other), data + data_header(mode, 2, 4096, 3) + b"abc")
    error = error_of(request)
    assert (error.error, error.text) == (NbdError.EINVAL, "cluster at offset 4096: trimmed ✂")
    assert content(other) == b"abc"


@pytest.mark.parametrize("mode", CHUNKED)
def test_an_error_after_data_fails_the_request(mode: ReplyMode, feed: Feed) -> None:
    request = read_of(8)
    data = data_chunk_header(mode, 1, 4096, 4096, 8, done=False) + bytes(8)
    feed(reader_for(mode, request), data + error_reply(mode, 1, 4096, NbdError.EIO, "bad sector", at=4098))
    assert error_of(request).text == "bad sector"


@pytest.mark.parametrize("mode", CHUNKED)
def test_the_first_of_two_errors_is_kept(mode: ReplyMode) -> None:
    request = read_of(8)
    first = chunk(mode, ReplyType.ERROR, pack(">IH", 5, 5) + b"first", done=False)
    whole(reader_for(mode, request), first + error_reply(mode, 1, 4096, NbdError.EINVAL, "second"))
    assert error_of(request).text == "first"


@pytest.mark.parametrize("mode", CHUNKED)
def test_an_unknown_error_chunk_counts_as_an_error(mode: ReplyMode) -> None:
    request = read_of(8)
    whole(reader_for(mode, request), chunk(mode, 0x8077, pack(">IH", 5, 3) + b"hm.extra"))
    assert (error_of(request).error, error_of(request).text) == (5, "hm.")


def test_a_simple_error_is_named(feed: Feed) -> None:
    request = read_of(8)
    feed(reader_for(SIMPLE, request), error_reply(SIMPLE, 1, 4096, NbdError.EIO))
    assert error_of(request).text == "the server answered EIO to READ of 8 bytes at offset 4096"


@pytest.mark.parametrize("mode", [SIMPLE, STRUCTURED])
def test_a_simple_reply_ends_a_write(mode: ReplyMode, feed: Feed) -> None:
    request = Request(Cmd.WRITE, 1, 0, 5)
    feed(reader_for(mode, request), done_reply(SIMPLE, 1, 0))
    assert request.finished and request.error is None


# Block status


@pytest.mark.parametrize("mode", CHUNKED)
def test_block_status_of_several_contexts(mode: ReplyMode, feed: Feed) -> None:
    request = Request(Cmd.BLOCK_STATUS, 1, 4096, 100)
    feed(reader_for(mode, request), block_status_reply(mode, 1, 4096, [(9, [(50, 1)]), (7, [(60, 3), (40, 0)])]))
    assert request.finished
    assert request.status == {"base:allocation": [(60, 3), (40, 0)], "qemu:allocation-depth": [(50, 1)]}


@pytest.mark.parametrize("mode", CHUNKED)
def test_the_last_extent_is_cut_at_the_end_of_the_request(mode: ReplyMode) -> None:
    request = Request(Cmd.BLOCK_STATUS, 1, 4096, 100)
    whole(reader_for(mode, request), block_status_reply(mode, 1, 4096, [(9, [(100, 1)]), (7, [(60, 3), (4000, 0)])]))
    assert request.status["base:allocation"] == [(60, 3), (40, 0)]


@pytest.mark.parametrize("mode", CHUNKED)
def test_more_extents_than_are_kept_make_a_shorter_answer(mode: ReplyMode, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replies, "MAX_EXTENTS", 2)
    request = Request(Cmd.BLOCK_STATUS, 1, 4096, 100)
    answer = block_status_reply(mode, 1, 4096, [(9, [(9, 0), (9, 1), (9, 0)]), (7, [(100, 0)])])
    whole(reader_for(mode, request), answer)
    assert request.status == {"base:allocation": [(100, 0)], "qemu:allocation-depth": [(9, 0), (9, 1)]}


@pytest.mark.parametrize("mode", CHUNKED)
@pytest.mark.parametrize(
    "extents",
    [[(0, 0)], [(50, 0), (0, 1), (50, 0)], [(100, 0), (1, 0)], [(101, 0), (1, 0)]],
    ids=["empty", "empty among others", "one beyond the end", "one beyond the end, uneven"],
)
def test_impossible_extents_are_refused(mode: ReplyMode, extents: list[tuple[int, int]]) -> None:
    request = Request(Cmd.BLOCK_STATUS, 1, 4096, 100)
    assert "extents" in refused(mode, request, block_status_reply(mode, 1, 4096, [(7, extents)]))


@pytest.mark.parametrize("mode", CHUNKED)
@pytest.mark.parametrize("context", [8, 7], ids=["unknown", "twice"])
def test_a_context_that_was_not_agreed_or_comes_twice_is_refused(mode: ReplyMode, context: int) -> None:
    request = Request(Cmd.BLOCK_STATUS, 1, 4096, 100)
    refused(mode, request, block_status_reply(mode, 1, 4096, [(7, [(100, 0)]), (context, [(100, 0)])]))


@pytest.mark.parametrize("mode", CHUNKED)
def test_a_missing_context_is_refused(mode: ReplyMode) -> None:
    request = Request(Cmd.BLOCK_STATUS, 1, 4096, 100)
    assert "without all" in refused(mode, request, block_status_reply(mode, 1, 4096, [(7, [(100, 0)])]))


def test_a_count_of_extents_that_does_not_fit_its_chunk_is_refused() -> None:
    request = Request(Cmd.BLOCK_STATUS, 1, 4096, 100)
    payload = pack(">IIQQ", 7, 2, 100, 0)
    refused(EXTENDED, request, chunk(EXTENDED, ReplyType.BLOCK_STATUS_EXT, payload))


# What a server must not send


@pytest.mark.parametrize("mode", ReplyMode)
@pytest.mark.parametrize("garbage", [b"HTTP/1.1 400 Bad Request\r\n\r\n" * 3, bytes(64), b"\xff" * 64])
def test_garbage_where_a_reply_should_begin_is_refused(mode: ReplyMode, garbage: bytes) -> None:
    assert "where a reply should begin" in refused(mode, read_of(8), garbage)


@pytest.mark.parametrize("mode", ReplyMode)
def test_a_reply_to_nothing_in_flight_is_refused(mode: ReplyMode) -> None:
    assert "cookie 3" in refused(mode, read_of(8), data_header(mode, 3, 4096, 8) + bytes(8))


@pytest.mark.parametrize("mode", ReplyMode)
def test_a_second_reply_to_the_same_request_is_refused(mode: ReplyMode) -> None:
    reader = reader_for(mode, Request(Cmd.FLUSH, 1, 0, 0))
    with pytest.raises(ProtocolError, match="not in flight"):
        whole(reader, done_reply(mode, 1, 0) * 2)


@pytest.mark.parametrize("mode", CHUNKED)
@pytest.mark.parametrize("offset, length", [(4095, 4), (4100, 5), (4104, 1), (0, 8), ((1 << 64) - 1, 8), (4096, 9)])
def test_data_outside_the_request_is_refused(mode: ReplyMode, offset: int, length: int) -> None:
    refused(mode, read_of(8), data_chunk_header(mode, 1, 4096, offset, length, done=True) + bytes(length))


@pytest.mark.parametrize("mode", CHUNKED)
def test_a_chunk_of_2_gib_is_refused_before_any_of_it_is_received(mode: ReplyMode) -> None:
    refused(mode, read_of(8), data_chunk_header(mode, 1, 4096, 4096, (1 << 31) - 8, done=True))


@pytest.mark.parametrize("mode", CHUNKED)
@pytest.mark.parametrize("size", [0, 9, (1 << 32) - 1])
def test_a_hole_that_does_not_fit_is_refused(mode: ReplyMode, size: int) -> None:
    refused(mode, read_of(8), hole_chunk(mode, 1, 4096, 4096, size, done=True))


@pytest.mark.parametrize("mode", CHUNKED)
@pytest.mark.parametrize("first, second", [((0, 4), (3, 4)), ((3, 4), (0, 4)), ((0, 8), (2, 2)), ((2, 2), (2, 2))])
def test_content_that_overlaps_is_refused(mode: ReplyMode, first: tuple[int, int], second: tuple[int, int]) -> None:
    data = b"".join(hole_chunk(mode, 1, 4096, 4096 + at, size, done=False) for at, size in (first, second))
    assert "twice" in refused(mode, read_of(8), data)


@pytest.mark.parametrize("mode", CHUNKED)
def test_a_read_that_ends_without_all_data_is_refused(mode: ReplyMode) -> None:
    data = hole_chunk(mode, 1, 4096, 4096, 7, done=False) + done_reply(mode, 1, 4096)
    assert "without all of the data" in refused(mode, read_of(8), data)


def test_content_in_too_many_pieces_is_refused() -> None:
    data = b"".join(hole_chunk(STRUCTURED, 1, 0, 4096 + 2 * i, 1, done=False) for i in range(MAX_PIECES + 1))
    assert "scattered" in refused(STRUCTURED, read_of(MIB), data)


@pytest.mark.parametrize("mode", CHUNKED)
@pytest.mark.parametrize("kind", [ReplyType.OFFSET_DATA, ReplyType.OFFSET_HOLE])
def test_data_in_answer_to_a_write_is_refused(mode: ReplyMode, kind: ReplyType) -> None:
    request = Request(Cmd.WRITE, 1, 4096, 100)
    refused(mode, request, chunk(mode, kind, pack(">QI", 4096, 4)))


@pytest.mark.parametrize("mode", CHUNKED)
@pytest.mark.parametrize(
    "kind, payload",
    [
        (ReplyType.NONE, b"x"),
        (ReplyType.OFFSET_DATA, bytes(8)),
        (ReplyType.OFFSET_DATA, b""),
        (ReplyType.OFFSET_HOLE, bytes(11)),
        (ReplyType.OFFSET_HOLE, bytes(13)),
        (ReplyType.BLOCK_STATUS, pack(">III", 7, 8, 0)),
        (ReplyType.BLOCK_STATUS_EXT, pack(">IIQQ", 7, 1, 8, 0)),
        (ReplyType.ERROR, bytes(5)),
        (ReplyType.ERROR, pack(">IH", 0, 0)),
        (ReplyType.ERROR, pack(">IH", 5, 1)),
        (ReplyType.ERROR, pack(">IH", 5, 4097) + bytes(4097)),
        (ReplyType.ERROR, pack(">IH", 5, 0) + bytes(1 << 16)),
        (ReplyType.ERROR_OFFSET, pack(">IH", 5, 0) + bytes(7)),
        (ReplyType.ERROR_OFFSET, pack(">IH", 5, 2) + bytes(9)),
        (3, b""),
        (0x7777, bytes(10)),
    ],
)
def test_a_payload_of_the_wrong_kind_or_size_is_refused(mode: ReplyMode, kind: int, payload: bytes) -> None:
    refused(mode, read_of(8), chunk(mode, kind, payload))


@pytest.mark.parametrize("mode", CHUNKED)
def test_a_chunk_that_says_nothing_and_does_not_end_is_refused(mode: ReplyMode) -> None:
    refused(mode, read_of(8), chunk(mode, ReplyType.NONE, b"", done=False))


def test_unknown_chunk_flags_are_refused() -> None:
    assert "flags" in refused(STRUCTURED, read_of(8), CHUNK.pack(0x668E33EF, 3, 0, 1, 0))


def test_an_extended_chunk_with_another_offset_is_refused() -> None:
    refused(EXTENDED, read_of(8), chunk(EXTENDED, ReplyType.ERROR, pack(">IH", 5, 0), offset=4097))


def test_a_block_status_of_more_than_the_largest_payload_is_refused_before_any_of_it_is_received() -> None:
    request = Request(Cmd.BLOCK_STATUS, 1, 4096, 100)
    refused(STRUCTURED, request, CHUNK.pack(0x668E33EF, 1, 5, 1, 4 + 8 * (1 << 22)))


def test_a_simple_reply_to_a_read_is_refused_where_structured_ones_were_agreed() -> None:
    refused(STRUCTURED, read_of(8), error_reply(SIMPLE, 1, 4096, NbdError.EIO))


def test_any_simple_reply_is_refused_where_extended_ones_were_agreed() -> None:
    refused(EXTENDED, Request(Cmd.FLUSH, 1, 0, 0), done_reply(SIMPLE, 1, 0))


def test_chunks_are_refused_where_only_simple_replies_were_agreed() -> None:
    refused(SIMPLE, Request(Cmd.FLUSH, 1, 0, 0), done_reply(STRUCTURED, 1, 0))


def test_an_empty_success_of_a_block_status_is_refused() -> None:
    refused(STRUCTURED, Request(Cmd.BLOCK_STATUS, 1, 0, 8), done_reply(SIMPLE, 1, 0))


@given(st.sampled_from(ReplyMode), st.binary(max_size=300), st.binary(max_size=40), st.lists(st.integers(0, 50)))
def test_whatever_comes_is_accepted_or_refused(mode: ReplyMode, data: bytes, prefix: bytes, sizes: list[int]) -> None:
    good = data_header(mode, 1, 4096, 8)
    reader = reader_for(mode, read_of(8), read_of(8, cookie=2), Request(Cmd.BLOCK_STATUS, 3, 0, 8))
    try:
        feed_pieces(reader, good[: len(prefix)] + prefix + data, [*sizes, 1000])
    except ProtocolError:
        return
    assert len(reader.in_flight) + len(reader.finished) == 3
