"""WRITE and its kin: what is written, what is refused, and a stream that stays in step whatever the payload."""

from __future__ import annotations

import pytest

from fleecing.nbd.constants import Cmd, CmdFlag, NbdError, ReplyMode
from fleecing.server.connection import LONGEST_WHOLE, RECEIVE_SIZE
from fleecing.server.export import MAXIMUM_PAYLOAD
from fleecing.units import MiB
from tests.block.rig import in_thread, pattern
from tests.server.rig import Disk, Line, MakeDisk, MakeLine

SIZE = 5 * MiB + 99


@pytest.fixture
def disk(make_disk: MakeDisk) -> Disk:
    return make_disk(pattern(SIZE))


def send_beside(client: Line, *requests: bytes) -> None:
    """Send what may be more than the sockets hold: the server is reading."""
    in_thread(lambda: client.send(*requests)).wait()


LONG = [LONGEST_WHOLE, LONGEST_WHOLE + 1, RECEIVE_SIZE, 3 * RECEIVE_SIZE + 12345]


@pytest.mark.parametrize("length", [1, 4096, *LONG])
def test_a_write_is_there_when_it_is_answered(disk: Disk, line: MakeLine, mode: ReplyMode, length: int) -> None:
    client, other = line(disk.export, mode), line(disk.export, mode)
    data = pattern(length, 1)
    send_beside(client, client.request(Cmd.WRITE, 1000, payload=data))
    assert client.reply().error == 0
    assert other.ask(Cmd.READ, 1000, length).data == data
    assert disk.contents == pattern(SIZE)[:1000] + data + pattern(SIZE)[1000 + length :]
    assert client.connection.bytes_written == length


@pytest.mark.parametrize("length", LONG)
def test_long_writes_and_what_follows_them_stay_in_step(
    disk: Disk, line: MakeLine, mode: ReplyMode, length: int
) -> None:
    """In step; in which order requests in flight are carried out is the server's business."""
    client = line(disk.export, mode)
    before, first, second = pattern(SIZE)[10 : 10 + length], pattern(length, 1), pattern(length, 2)
    send_beside(
        client,
        client.request(Cmd.READ, 0, 7, cookie=1),
        client.request(Cmd.WRITE, 10, payload=first, cookie=2),
        client.request(Cmd.READ, 10, 100, cookie=3),
        client.request(Cmd.WRITE, 10, payload=second, cookie=4),
        client.request(Cmd.READ, 10 + length - 100, 100, cookie=5),
    )
    replies = client.replies(5)
    assert replies[3].data in [data[:100] for data in (before, first, second)]
    assert replies[5].data in [data[-100:] for data in (before, first, second)]
    assert client.ask(Cmd.READ, 10, length).data in (first, second)


@pytest.mark.parametrize("length", LONG)
@pytest.mark.parametrize("wrong", ["beyond the end", "flag"])
def test_a_long_write_that_is_refused_is_passed_over(
    disk: Disk, line: MakeLine, mode: ReplyMode, length: int, wrong: str
) -> None:
    client = line(disk.export, mode)
    offset, flags, error = (0, CmdFlag.DF, NbdError.EINVAL) if wrong == "flag" else (SIZE - 1, 0, NbdError.ENOSPC)
    send_beside(
        client,
        client.request(Cmd.WRITE, offset, payload=bytes(length), flags=flags, cookie=1),
        client.request(Cmd.READ, SIZE - 10, 10, cookie=2),
    )
    replies = client.replies(2)
    assert replies[1].error == error
    assert replies[2].data == pattern(SIZE)[-10:]
    assert disk.contents == pattern(SIZE)
    assert client.connection.bytes_written == 0


def test_the_longest_write_that_is_allowed_is_taken(make_disk: MakeDisk, line: MakeLine, mode: ReplyMode) -> None:
    disk = make_disk(bytes(MAXIMUM_PAYLOAD))
    client = line(disk.export, mode)
    data = pattern(MAXIMUM_PAYLOAD)
    send_beside(client, client.request(Cmd.WRITE, 0, payload=data))
    assert client.reply().error == 0
    assert disk.contents == data


@pytest.mark.parametrize("length", [4096, *LONG])
def test_an_error_in_the_middle_of_a_write_is_told_and_the_stream_stays_in_step(
    disk: Disk, line: MakeLine, mode: ReplyMode, length: int
) -> None:
    disk.host.bad = range(length // 2, length // 2 + 1)
    client = line(disk.export, mode)
    send_beside(
        client,
        client.request(Cmd.WRITE, 0, payload=pattern(length, 1), cookie=1),
        client.request(Cmd.READ, SIZE - 10, 10, cookie=2),
    )
    replies = client.replies(2)
    assert replies[1].error == NbdError.EIO
    assert mode is ReplyMode.SIMPLE or "WRITE of" in replies[1].text
    assert replies[2].data == pattern(SIZE)[-10:]
    client.end()


@pytest.mark.parametrize("command", [Cmd.TRIM, Cmd.WRITE_ZEROES])
def test_trims_and_zeroes_read_as_zeroes(disk: Disk, line: MakeLine, mode: ReplyMode, command: Cmd) -> None:
    client = line(disk.export, mode)
    for flags in (0, CmdFlag.FUA) if command is Cmd.TRIM else (0, CmdFlag.NO_HOLE, CmdFlag.FAST_ZERO, CmdFlag.FUA):
        client.ask(Cmd.WRITE, 0, payload=pattern(10_000))
        assert client.ask(command, 77, 9000, flags=flags).error == 0
        assert client.ask(Cmd.READ, 0, 10_000).data == pattern(77) + bytes(9000) + pattern(10_000)[9077:]


def test_a_change_in_another_thread_that_fails_says_so(disk: Disk, line: MakeLine, mode: ReplyMode) -> None:
    disk.host.bad = range(100, 101)
    client = line(disk.export, mode)
    assert client.ask(Cmd.TRIM, 0, 4096).error == NbdError.EIO
    assert client.ask(Cmd.WRITE_ZEROES, 0, 4096).error == NbdError.EIO
    assert client.ask(Cmd.WRITE_ZEROES, 4096, 4096).error == 0
