"""Requests are found in the stream however it is cut, and whatever is wrong with them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import suppress
from random import Random

import pytest

from fleecing.nbd.constants import (
    BASE_ALLOCATION,
    EXTENDED_REQUEST_MAGIC,
    REQUEST_MAGIC,
    Cmd,
    CmdFlag,
    NbdError,
    ReplyMode,
)
from fleecing.nbd.transmission import STATUS_PAYLOAD, request
from fleecing.server.connection import LONGEST_WHOLE, RECEIVE_SIZE
from fleecing.server.export import MAXIMUM_PAYLOAD
from fleecing.server.meta_context import ALLOCATION_DEPTH
from fleecing.server.service import LARGEST_STATUS_PAYLOAD
from fleecing.units import KiB, MiB
from tests.block.rig import in_thread, pattern
from tests.server.rig import Disk, Line, MakeDisk, MakeLine
from tests.server.wire import Wire

SIZE = 300 * KiB + 77
EXTENDED = ReplyMode.EXTENDED


@pytest.fixture
def disk(make_disk: MakeDisk) -> Disk:
    return make_disk(pattern(SIZE))


def script(wire: Wire) -> list[bytes]:
    """Requests of every kind, right and wrong, whose outcome does not depend on their order; cookies 1, 2, ..."""
    asked: list[tuple[int, int, int, bytes, int]] = [
        (Cmd.READ, 0, 1, b"", 0),
        (Cmd.WRITE, 10 * KiB, 0, b"first", 0),
        (Cmd.READ, SIZE - 3, 3, b"", 0),
        (Cmd.READ, SIZE - 3, 4, b"", 0),
        (Cmd.WRITE, SIZE - 3, 0, b"past the end", 0),
        (Cmd.FLUSH, 0, 0, b"", 0),
        (Cmd.WRITE, 20 * KiB, 0, b"x" * 5000, CmdFlag.FUA),
        (Cmd.TRIM, 32 * KiB, 4 * KiB, b"", 0),
        (Cmd.WRITE_ZEROES, 40 * KiB, 4 * KiB, b"", CmdFlag.NO_HOLE),
        (Cmd.BLOCK_STATUS, 64 * KiB, 4 * KiB, b"", 0),
        (Cmd.CACHE, 0, 4096, b"", 0),
        (77, 5, 6, b"", 0),
        (Cmd.READ, 0, 512, b"", CmdFlag.FAST_ZERO),
        (Cmd.READ, 2**64 - 1, 512, b"", 0),
        (Cmd.READ, 100 * KiB, 0, b"", 0),
        (Cmd.WRITE, 50 * KiB, 0, b"last", 0),
        (Cmd.READ, 100 * KiB, 70 * KiB, b"", 0),
    ]
    return [
        wire.request(command, offset, length, payload=payload, flags=flags, cookie=cookie)
        for cookie, (command, offset, length, payload, flags) in enumerate(asked, 1)
    ]


def after_script() -> bytes:
    contents = bytearray(pattern(SIZE))
    contents[10 * KiB : 10 * KiB + 5] = b"first"
    contents[20 * KiB : 20 * KiB + 5000] = b"x" * 5000
    contents[32 * KiB : 36 * KiB] = contents[40 * KiB : 44 * KiB] = bytes(4 * KiB)
    contents[50 * KiB : 50 * KiB + 4] = b"last"
    return bytes(contents)


def whole(stream: bytes) -> Iterator[bytes]:
    yield stream


def bytewise(stream: bytes) -> Iterator[bytes]:
    for at in range(len(stream)):
        yield stream[at : at + 1]


def headers_apart(stream: bytes) -> Iterator[bytes]:
    for at in range(0, len(stream), 27):
        yield stream[at : at + 27]


@pytest.mark.parametrize("cut", [whole, bytewise, headers_apart])
@pytest.mark.parametrize("early", [0, 13, 100])
def test_every_request_is_answered_however_the_stream_is_cut(
    disk: Disk, line: MakeLine, mode: ReplyMode, cut: Callable[[bytes], Iterator[bytes]], early: int
) -> None:
    """`early` bytes came together with the end of the handshake."""
    contexts = [] if mode is ReplyMode.SIMPLE else [BASE_ALLOCATION]
    stream = b"".join(script(Wire(None, mode)))  # type: ignore[arg-type]
    client = line(disk.export, mode, contexts, leftover=stream[:early])
    count = len(script(client))
    for piece in cut(stream[early:]):
        client.send(piece)
    replies = client.replies(count)
    errors = {cookie: reply.error for cookie, reply in replies.items() if reply.error}
    status = {10: NbdError.EINVAL} if mode is ReplyMode.SIMPLE else {}
    einval = NbdError.EINVAL
    assert errors == {4: einval, 5: NbdError.ENOSPC, 12: einval, 13: einval, 14: einval, **status}
    contents = pattern(SIZE)
    assert replies[1].data == contents[:1]
    assert replies[3].data == contents[-3:]
    assert replies[15].data == b""
    assert replies[17].data == contents[100 * KiB : 170 * KiB]
    client.end()
    assert disk.contents == after_script()
    assert client.connection.requests == count


def test_many_requests_in_one_send_are_answered_in_order(disk: Disk, line: MakeLine, mode: ReplyMode) -> None:
    client = line(disk.export, mode)
    contents = pattern(SIZE)
    places = [(number * 137 % (SIZE - 4096), number % 4096 + 1) for number in range(3000)]
    stream = b"".join(client.request(Cmd.READ, *place, cookie=number) for number, place in enumerate(places))
    sender = in_thread(lambda: client.send(stream))
    for number, (offset, length) in enumerate(places):
        reply = client.reply()
        assert reply.cookie == number
        assert reply.data == contents[offset : offset + length]
    sender.wait()
    assert client.connection.bytes_read == sum(length for _, length in places)


def test_requests_that_lie_across_the_buffers_end_are_found(
    make_disk: MakeDisk, line: MakeLine, mode: ReplyMode
) -> None:
    disk = make_disk(bytes(2 * MiB))
    client = line(disk.export, mode)
    expected = bytearray(2 * MiB)
    stream = []
    for number in range(60):
        offset, data = number * 31_000, pattern(30_000 + number, number)
        expected[offset : offset + len(data)] = data
        stream.append(client.request(Cmd.WRITE, offset, payload=data))
    sender = in_thread(lambda: client.send(*stream))
    assert all(not reply.error for reply in client.replies(60).values())
    sender.wait()
    assert disk.contents == expected


@pytest.mark.parametrize("spare", [-1, 0, 1])
def test_a_write_that_is_just_received_whole_or_just_is_not(
    make_disk: MakeDisk, line: MakeLine, mode: ReplyMode, spare: int
) -> None:
    disk = make_disk(bytes(2 * MiB))
    client = line(disk.export, mode)
    data = pattern(LONGEST_WHOLE + spare)
    assert client.ask(Cmd.WRITE, 7, payload=data).error == 0
    assert disk.contents[7 : 7 + len(data)] == data
    assert client.connection.bytes_written == len(data)


def test_a_wrong_magic_drops_the_client(
    disk: Disk, line: MakeLine, mode: ReplyMode, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    client = line(disk.export, mode)
    right = EXTENDED_REQUEST_MAGIC if mode is EXTENDED else REQUEST_MAGIC
    wrong = REQUEST_MAGIC if mode is EXTENDED else EXTENDED_REQUEST_MAGIC
    stream = client.request(Cmd.READ, 0, 1)
    assert stream.startswith(right.to_bytes(4, "big"))
    client.send(client.request(Cmd.WRITE, 0, payload=b"answered"), wrong.to_bytes(4, "big") + stream[4:])
    client.wait_closed()
    assert "the stream is out of step" in caplog.text


def test_a_payload_beyond_the_maximum_drops_the_client(disk: Disk, line: MakeLine, mode: ReplyMode) -> None:
    client = line(disk.export, mode)
    flags = CmdFlag.PAYLOAD_LEN if mode is EXTENDED else 0
    client.send(request(mode, flags, Cmd.WRITE, 1, 0, MAXIMUM_PAYLOAD + 1))
    client.wait_closed()
    assert client.ended()


# Payloads with extended headers, where any request may have one


@pytest.mark.parametrize("command", [Cmd.READ, Cmd.FLUSH, Cmd.TRIM, Cmd.CACHE, Cmd.WRITE_ZEROES, 8, 65535])
@pytest.mark.parametrize("size", [1, 5000, RECEIVE_SIZE + 5])
def test_a_payload_that_a_request_must_not_have_is_passed_over(
    disk: Disk, line: MakeLine, command: int, size: int
) -> None:
    client = line(disk.export, EXTENDED)
    client.send(client.request(command, 0, payload=bytes(size)), client.request(Cmd.READ, 0, 10, cookie=1))
    replies = client.replies(2)
    assert replies.pop(1).data == pattern(SIZE)[:10]
    assert [reply.error for reply in replies.values()] == [NbdError.EINVAL]
    assert disk.contents == pattern(SIZE)


def test_a_write_must_say_that_it_has_a_payload(disk: Disk, line: MakeLine) -> None:
    client = line(disk.export, EXTENDED)
    reply = client.ask(Cmd.WRITE, 0, 4096)
    assert reply.error == NbdError.EINVAL
    assert "PAYLOAD_LEN" in reply.text


@pytest.mark.parametrize("offset", [0, 4096, SIZE + 4096, 2**63])
@pytest.mark.parametrize("size", [1, 4096, RECEIVE_SIZE + 5])
def test_a_goodbye_with_a_payload_changes_nothing(disk: Disk, line: MakeLine, offset: int, size: int) -> None:
    client = line(disk.export, EXTENDED)
    with suppress(BrokenPipeError):  # the server hangs up before all of it is sent
        client.send(client.request(Cmd.DISC, offset, payload=bytes(size)))
    client.wait_closed()
    assert disk.contents == pattern(SIZE)


def payload(length: int, *contexts: int) -> bytes:
    return STATUS_PAYLOAD.pack(length) + b"".join(number.to_bytes(4, "big") for number in contexts)


def status_line(line: MakeLine, disk: Disk) -> Line:
    return line(disk.export, EXTENDED, [BASE_ALLOCATION, ALLOCATION_DEPTH])


def test_a_status_payload_picks_contexts_and_length(disk: Disk, line: MakeLine) -> None:
    client = status_line(line, disk)
    assert set(client.ask(Cmd.BLOCK_STATUS, 0, 4096).status) == {1, 2}
    assert client.ask(Cmd.BLOCK_STATUS, 0, payload=payload(4096, 2)).status == {2: [(4096, 1)]}
    assert client.ask(Cmd.BLOCK_STATUS, SIZE - 10, payload=payload(10, 2)).status == {2: [(10, 1)]}
    assert set(client.ask(Cmd.BLOCK_STATUS, 0, payload=payload(100, 2, 1)).status) == {1, 2}


@pytest.mark.parametrize(
    "wrong",
    [
        payload(4096),
        payload(4096, 3),
        payload(4096, 1, 1),
        payload(0, 1),
        payload(SIZE + 1, 1),
        payload(2**64 - 1, 1),
        payload(4096, 1)[:-1],
        b"\0",
        payload(4096, *[1] * (LARGEST_STATUS_PAYLOAD // 4)),
        payload(4096, *range(1, RECEIVE_SIZE // 4)),
    ],
    ids=lambda wrong: f"{len(wrong)}-{wrong[:16].hex()}",
)
def test_a_wrong_status_payload_is_refused(disk: Disk, line: MakeLine, wrong: bytes) -> None:
    client = status_line(line, disk)
    assert client.ask(Cmd.BLOCK_STATUS, 0, payload=wrong).error == NbdError.EINVAL
    assert client.ask(Cmd.READ, 0, 4).data == pattern(4)


def test_a_status_payload_without_contexts_is_refused(disk: Disk, line: MakeLine) -> None:
    assert line(disk.export, EXTENDED).ask(Cmd.BLOCK_STATUS, 0, payload=payload(4096, 1)).error == NbdError.EINVAL


@pytest.mark.parametrize("size", [300, 20 * KiB, 64 * KiB, 256 * KiB, 700 * KiB])
def test_writes_cut_anywhere_arrive_whole(make_disk: MakeDisk, line: MakeLine, mode: ReplyMode, size: int) -> None:
    """The receive buffer is filled and emptied many times, with requests in part at every place of it."""
    count = 4 * RECEIVE_SIZE // size
    disk = make_disk(bytes(count * size) + b"behind" * 100)
    client = line(disk.export, mode)
    data = pattern(count * size)
    dice = Random(size)
    stream = b"".join(
        client.request(Cmd.WRITE, n * size, payload=data[n * size : (n + 1) * size], cookie=n)
        + client.request(Cmd.READ, count * size, 600, cookie=count + n)
        for n in range(count)
    )

    def send() -> None:
        at = 0
        while at < len(stream):
            step = dice.choice([17, 4096, size, 2 * size, RECEIVE_SIZE])
            client.sock.sendall(stream[at : at + step])
            at += step

    sending = in_thread(send)
    cookies = set()
    for _ in range(2 * count):
        reply = client.reply()
        assert reply.error == 0
        assert reply.data == (b"behind" * 100 if reply.cookie >= count else b"")
        cookies.add(reply.cookie)
    sending.wait()
    assert cookies == set(range(2 * count))
    assert disk.contents == data + b"behind" * 100
