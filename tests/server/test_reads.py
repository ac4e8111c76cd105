"""READ: short and long, in every reply mode, from memory and from the disk, with errors at the start and in between."""

from __future__ import annotations

import pytest

from fleecing.nbd.constants import Cmd, CmdFlag, NbdError, ReplyMode
from fleecing.server.budget import Budget
from fleecing.server.connection import MAX_COLD
from fleecing.server.export import MAXIMUM_PAYLOAD
from fleecing.server.outbox import GATHER, LARGEST_PIECE
from fleecing.units import KiB, MiB
from tests.block.rig import SECONDS, in_thread, pattern
from tests.server.rig import Disk, MakeDisk, MakeLine

SIZE = 3 * MiB + 333
SIMPLE, STRUCTURED, EXTENDED = ReplyMode.SIMPLE, ReplyMode.STRUCTURED, ReplyMode.EXTENDED
LENGTHS = [1, 512, GATHER - 1, GATHER, LARGEST_PIECE, LARGEST_PIECE + 1, MiB, 2 * LARGEST_PIECE, SIZE]


@pytest.fixture(params=["warm", "cold"])
def disk(make_disk: MakeDisk, request: pytest.FixtureRequest) -> Disk:
    """With its bytes in memory, and with none there."""
    disk = make_disk(pattern(SIZE))
    disk.host.cold = request.param == "cold"
    return disk


@pytest.mark.parametrize("length", LENGTHS)
def test_a_read_brings_its_bytes(disk: Disk, line: MakeLine, mode: ReplyMode, length: int) -> None:
    client = line(disk.export, mode)
    for offset in {0, (SIZE - length) // 2, SIZE - length}:
        assert client.ask(Cmd.READ, offset, length).data == pattern(SIZE)[offset : offset + length]
    client.end()


@pytest.mark.parametrize("length", LENGTHS)
def test_an_error_in_the_last_byte_is_told_and_the_connection_goes_on(
    disk: Disk, line: MakeLine, mode: ReplyMode, length: int
) -> None:
    disk.host.bad = range(length - 1, length)
    client = line(disk.export, mode)
    client.send(client.request(Cmd.READ, 0, length, cookie=1), client.request(Cmd.READ, SIZE - 9, 9, cookie=2))
    replies = client.replies(2)
    assert replies[1].error == NbdError.EIO
    assert replies[2].error == (NbdError.EIO if length == SIZE else 0)
    disk.host.bad = range(0)
    assert client.ask(Cmd.READ, 0, length).data == pattern(SIZE)[:length]
    client.end()


@pytest.mark.parametrize("mode", [STRUCTURED, EXTENDED], ids=str)
def test_an_error_in_the_middle_keeps_what_was_read_and_says_where(disk: Disk, line: MakeLine, mode: ReplyMode) -> None:
    disk.host.bad = range(MiB + 5, MiB + 6)
    client = line(disk.export, mode)
    reply = client.ask(Cmd.READ, 100, 2 * MiB)
    assert reply.error == NbdError.EIO
    assert reply.at is not None
    assert reply.at <= MiB + 5 < reply.at + LARGEST_PIECE
    assert "Input/output error" in reply.text
    assert sum(length for _, length in reply.pieces) == reply.at - 100
    assert reply.data[: reply.at - 100] == pattern(SIZE)[100 : reply.at]
    client.end()


def test_a_simple_reply_with_an_error_has_no_data(disk: Disk, line: MakeLine) -> None:
    disk.host.bad = range(MiB, MiB + 1)
    client = line(disk.export, SIMPLE)
    client.send(client.request(Cmd.READ, 0, 2 * MiB, cookie=1), client.request(Cmd.READ, 0, 10, cookie=2))
    replies = client.replies(2)
    assert replies[1].error == NbdError.EIO
    assert not replies[1].data
    assert replies[2].data == pattern(10)


@pytest.mark.parametrize("mode", [STRUCTURED, EXTENDED], ids=str)
def test_df_gets_one_chunk_or_an_overflow(disk: Disk, line: MakeLine, mode: ReplyMode) -> None:
    client = line(disk.export, mode)
    for length in (1, 65536, LARGEST_PIECE):
        reply = client.ask(Cmd.READ, 3, length, flags=CmdFlag.DF)
        assert reply.pieces == [(3, length)]
        assert reply.data == pattern(SIZE)[3 : 3 + length]
    assert client.ask(Cmd.READ, 3, LARGEST_PIECE + 1, flags=CmdFlag.DF).error == NbdError.EOVERFLOW
    assert client.ask(Cmd.READ, 3, 10).error == 0


def test_df_is_unknown_to_simple_replies(disk: Disk, line: MakeLine) -> None:
    assert line(disk.export, SIMPLE).ask(Cmd.READ, 0, 10, flags=CmdFlag.DF).error == NbdError.EINVAL


def test_a_read_above_the_maximum_payload_is_refused(disk: Disk, line: MakeLine, mode: ReplyMode) -> None:
    client = line(disk.export, mode)
    assert client.ask(Cmd.READ, 0, MAXIMUM_PAYLOAD + 1).error == NbdError.EINVAL
    assert client.ask(Cmd.READ, 0, 10).error == 0


def test_an_image_that_shrank_is_an_error_and_no_end(disk: Disk, line: MakeLine, mode: ReplyMode) -> None:
    client = line(disk.export, mode)
    with disk.path.open("r+b") as image:
        image.truncate(MiB)
    reply = client.ask(Cmd.READ, MiB - 5, 10)
    assert reply.error == NbdError.EIO
    assert mode is SIMPLE or "has shrunk" in reply.text
    assert client.ask(Cmd.READ, MiB - 5, 5).error == 0


def test_replies_larger_than_the_outbox_keep_their_order(disk: Disk, line: MakeLine, mode: ReplyMode) -> None:
    disk.host.cold = False
    client = line(disk.export, mode, buffer=4 * KiB)
    lengths = [LARGEST_PIECE, 1, LARGEST_PIECE - 1, GATHER, 2 * MiB, 7, LARGEST_PIECE, LARGEST_PIECE, 3]
    client.send(*[client.request(Cmd.READ, 5, length, cookie=number) for number, length in enumerate(lengths)])
    for number, length in enumerate(lengths):
        reply = client.reply()
        assert reply.cookie == number
        assert reply.data == pattern(SIZE)[5 : 5 + length]


# Reads that would wait for the disk


@pytest.mark.parametrize("count", [1, 2, MAX_COLD, MAX_COLD + 1, 3 * MAX_COLD + 5])
def test_cold_reads_are_all_answered(make_disk: MakeDisk, line: MakeLine, mode: ReplyMode, count: int) -> None:
    disk = make_disk(pattern(SIZE))
    disk.host.cold = True
    client = line(disk.export, mode)
    places = [(number * 4099 % (SIZE - 10_000), number * 37 % 9999 + 1) for number in range(count)]
    client.send(*[client.request(Cmd.READ, *place, cookie=number) for number, place in enumerate(places)])
    replies = client.replies(count)
    for number, (offset, length) in enumerate(places):
        assert replies[number].data == pattern(SIZE)[offset : offset + length]
    assert client.connection.bytes_read == sum(length for _, length in places)


def test_cold_reads_wait_behind_what_does_not(make_disk: MakeDisk, line: MakeLine) -> None:
    disk = make_disk(pattern(SIZE))
    disk.host.cold = True
    client = line(disk.export, SIMPLE)
    client.send(
        client.request(Cmd.READ, 0, 10, cookie=1),
        client.request(Cmd.WRITE, MiB, payload=b"new", cookie=2),
        client.request(Cmd.READ, 0, 2 * MiB, cookie=3),
    )
    assert list(client.replies(3)) == [3, 2, 1]  # WRITEs are put aside, too, until the rest is served


def test_cold_reads_are_answered_before_a_goodbye_is_obeyed(make_disk: MakeDisk, line: MakeLine) -> None:
    disk = make_disk(pattern(SIZE))
    disk.host.cold = True
    client = line(disk.export, SIMPLE)
    client.send(*[client.request(Cmd.READ, number, 10) for number in range(5)], client.request(Cmd.DISC))
    assert len(client.replies(5)) == 5
    client.wait_closed()


def test_a_cold_read_that_fails_is_the_only_one(make_disk: MakeDisk, line: MakeLine, mode: ReplyMode) -> None:
    disk = make_disk(pattern(SIZE))
    disk.host.cold = True
    client = line(disk.export, mode)
    disk.host.bad = range(5000, 5001)
    client.send(*[client.request(Cmd.READ, number * 1000, 1000, cookie=number) for number in range(10)])
    replies = client.replies(10)
    assert {cookie: reply.error for cookie, reply in replies.items() if reply.error} == {5: NbdError.EIO}


# Memory for long reads with simple replies


def test_a_long_simple_read_waits_for_its_share_of_memory(make_disk: MakeDisk, line: MakeLine) -> None:
    disk = make_disk(pattern(SIZE))
    budget = Budget(2 * MiB)
    assert budget.take(MiB, 0)
    client = line(disk.export, SIMPLE, budget=budget)
    client.send(client.request(Cmd.READ, 0, 2 * MiB))
    reader = in_thread(client.reply)
    assert not reader.over.is_set()
    budget.give_back(MiB)
    reader.wait()
    assert budget.take(2 * MiB, SECONDS)


def test_a_share_that_does_not_come_is_an_error(make_disk: MakeDisk, line: MakeLine) -> None:
    disk = make_disk(pattern(SIZE))
    client = line(disk.export, SIMPLE, budget=NoBudget(0))
    assert client.ask(Cmd.READ, 0, 2 * MiB).error == NbdError.ENOMEM
    assert client.ask(Cmd.READ, 0, 10).error == 0


class NoBudget(Budget):
    """One whose wait is over."""

    def take(self, count: int, timeout: float) -> bool:
        return super().take(count, 0)


def test_a_long_simple_read_that_fails_gives_its_memory_back(make_disk: MakeDisk, line: MakeLine) -> None:
    disk = make_disk(pattern(SIZE))
    disk.host.bad = range(MiB, MiB + 1)
    budget = Budget(2 * MiB)
    client = line(disk.export, SIMPLE, budget=budget)
    for _ in range(3):
        assert client.ask(Cmd.READ, 0, 2 * MiB).error == NbdError.EIO
    assert budget.take(2 * MiB, 0)


def test_a_client_that_goes_during_a_long_simple_read_gives_its_memory_back(
    make_disk: MakeDisk, line: MakeLine
) -> None:
    disk = make_disk(pattern(SIZE))
    budget = Budget(2 * MiB)
    client = line(disk.export, SIMPLE, budget=budget, buffer=4 * KiB)
    client.send(client.request(Cmd.READ, 0, 2 * MiB))
    client.take(100)
    client.hang_up()
    assert budget.take(2 * MiB, 0)
