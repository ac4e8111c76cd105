"""The end of a connection: clients that vanish anywhere, servers that drain or hang up."""

from __future__ import annotations

import gc
import weakref

import pytest

from fleecing.nbd.constants import Cmd, ReplyMode
from fleecing.server.connection import RECEIVE_SIZE
from fleecing.units import KiB, MiB
from tests.block.rig import SECONDS, in_thread, pattern
from tests.server.rig import Disk, Line, MakeDisk, MakeLine

SIZE = MiB


@pytest.fixture
def disk(make_disk: MakeDisk) -> Disk:
    return make_disk(pattern(SIZE))


def test_a_client_may_vanish_at_every_byte_of_a_request(disk: Disk, line: MakeLine, mode: ReplyMode) -> None:
    """Then the request is either done as a whole or not at all, and the thread is gone."""
    old, new = pattern(40), pattern(40, 1)
    client = line(disk.export, mode)
    stream = client.request(Cmd.WRITE, 0, payload=new) + client.request(Cmd.READ, 0, 100)
    write = len(client.request(Cmd.WRITE, 0, payload=new))
    client.end()
    for end in range(len(stream) + 1):
        disk.node.write(0, old)
        client = line(disk.export, mode)
        client.send(stream[:end])
        client.hang_up()
        assert disk.node.read(0, 40) == (old if end < write else new)


@pytest.mark.parametrize("end", [1, 40, RECEIVE_SIZE - 1, RECEIVE_SIZE, RECEIVE_SIZE + 1, 2 * RECEIVE_SIZE])
def test_a_client_may_vanish_in_a_long_payload(make_disk: MakeDisk, line: MakeLine, mode: ReplyMode, end: int) -> None:
    """What had come of it may be written, and not a byte more."""
    disk = make_disk(bytes(4 * MiB))
    client = line(disk.export, mode)
    stream = client.request(Cmd.WRITE, 0, payload=pattern(3 * MiB))
    in_thread(lambda: client.send(stream[:end])).wait()
    client.hang_up()
    written = disk.contents.rstrip(b"\0")
    assert len(written) <= end
    assert pattern(3 * MiB).startswith(written)


def test_a_client_may_vanish_without_reading_its_replies(disk: Disk, line: MakeLine, mode: ReplyMode) -> None:
    for length in (1, 100 * KiB, 700 * KiB):
        client = line(disk.export, mode, buffer=4 * KiB)
        client.send(*[client.request(Cmd.READ, 0, length) for _ in range(20)])
        client.hang_up()


def test_a_connection_goes_with_its_buffers_and_its_export(disk: Disk, mode: ReplyMode) -> None:
    """Not when the garbage collector comes by: it holds 1.5 MiB, and the files of a snapshot that is deleted."""
    gc.disable()
    try:
        client = Line(disk.export, mode)
        assert client.ask(Cmd.WRITE, 0, payload=b"x").error == 0
        client.end()
        client.connection._thread.join(SECONDS)
        connection = weakref.ref(client.connection)
        del client.connection
        assert connection() is None
    finally:
        gc.enable()


def test_a_client_may_vanish_at_once(disk: Disk, line: MakeLine, mode: ReplyMode) -> None:
    client = line(disk.export, mode)
    client.hang_up()
    assert client.connection.requests == 0


def test_what_comes_behind_a_goodbye_is_not_served(disk: Disk, line: MakeLine, mode: ReplyMode) -> None:
    client = line(disk.export, mode)
    client.send(client.request(Cmd.DISC), client.request(Cmd.WRITE, 0, payload=b"\xff" * 100))
    client.wait_closed()
    assert disk.contents == pattern(SIZE)


def arrived(client: Line) -> None:
    """What was sent before is with the server when this returns: the reply to a request behind it is there."""
    client.ask(Cmd.READ, 0, 1)


def test_a_drained_connection_answers_what_arrived_and_ends(disk: Disk, line: MakeLine, mode: ReplyMode) -> None:
    disk.host.changes.close()
    client = line(disk.export, mode)
    client.send(client.request(Cmd.WRITE_ZEROES, 0, 4096, cookie=1))
    disk.host.changes.wait_for_one()
    arrived(client)
    client.connection.drain()
    assert not client.closed.is_set()
    disk.host.changes.open()
    assert client.reply().cookie == 1
    client.wait_closed()
    assert client.ended()


def test_a_drained_connection_ends_though_the_client_says_nothing(disk: Disk, line: MakeLine) -> None:
    client = line(disk.export, ReplyMode.SIMPLE)
    arrived(client)
    client.connection.drain()
    client.wait_closed()
    client.connection.drain()  # again: nothing happens
    client.connection.kill()


@pytest.mark.parametrize("length", [1000, 700 * KiB])
def test_a_connection_that_is_killed_ends_though_its_client_reads_nothing(
    disk: Disk, line: MakeLine, mode: ReplyMode, length: int
) -> None:
    client = line(disk.export, mode, buffer=4 * KiB)
    count = 2 * MiB // length
    in_thread(lambda: client.send(*[client.request(Cmd.READ, 0, length) for _ in range(count)])).wait()
    client.take(10)  # it is sending
    client.connection.kill()
    client.wait_closed()


def test_a_connection_that_is_killed_ends_though_late_replies_are_unread(disk: Disk, line: MakeLine) -> None:
    client = line(disk.export, ReplyMode.SIMPLE, buffer=4 * KiB)
    stream = b"".join(client.request(Cmd.FLUSH) for _ in range(5000))
    sender = in_thread(lambda: client.sock.sendall(stream))
    client.take(16)
    client.connection.kill()
    client.wait_closed()
    assert sender.over.wait(SECONDS)


def test_the_node_is_kept_as_long_as_the_connection_lives(disk: Disk, line: MakeLine) -> None:
    said: list[str] = []
    disk.export._retain, disk.export._release = (lambda: said.append("retain")), (lambda: said.append("release"))
    client = line(disk.export, ReplyMode.SIMPLE)
    arrived(client)
    assert said == ["retain"]
    client.end()
    assert said == ["retain", "release"]
