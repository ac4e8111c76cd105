"""Short reads of many clients in one thread: the same answers, and nobody who waits holds up another."""

from __future__ import annotations

import errno
import gc
import logging
import os
import select
import socket
import time
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest

from fleecing.block.hostfile import HostFile
from fleecing.nbd.constants import Cmd, CmdFlag, NbdError, ReplyMode
from fleecing.server.connection import CALM, LONGEST_SHORT, ROUND
from fleecing.server.poller import Poller
from fleecing.units import KiB, MiB
from tests.block.rig import SECONDS, pattern
from tests.server.rig import Disk, Line, MakeDisk, MakeLine

SIZE = 2 * MiB
OLD = pattern(SIZE)
SIMPLE, STRUCTURED = ReplyMode.SIMPLE, ReplyMode.STRUCTURED

MakeCalm = Callable[..., Line]


@pytest.fixture
def poller() -> Poller:
    return Poller()


@pytest.fixture
def disk(make_disk: MakeDisk) -> Disk:
    return make_disk(OLD)


@pytest.fixture
def calm(disk: Disk, line: MakeLine, poller: Poller) -> MakeCalm:
    """Makes a client whose connection sleeps. There is one more client, so that none is alone."""
    line(disk.export, SIMPLE, poller=poller)

    def make(mode: ReplyMode = STRUCTURED, **options: int) -> Line:
        client = line(disk.export, mode, poller=poller, **options)
        make_calm(client, poller)
        return client

    return make


def make_calm(client: Line, poller: Poller) -> None:
    """Read until its connection's thread sleeps."""
    asleep = poller.asleep
    end = time.monotonic() + SECONDS
    while poller.asleep == asleep:
        assert client.ask(Cmd.READ, 0, 512).data == OLD[:512]
        assert time.monotonic() < end, "the connection stays awake"


def read_here_and_there(client: Line) -> None:
    client.send(*(client.request(Cmd.READ, n * 7919, n * 97 + 1, cookie=n) for n in range(3 * ROUND)))
    for n, reply in client.replies(3 * ROUND).items():
        assert reply.data == OLD[n * 7919 : n * 7919 + n * 97 + 1]


def test_short_reads_bring_their_bytes_while_the_threads_sleep(calm: MakeCalm, poller: Poller, mode: ReplyMode) -> None:
    clients = [calm(mode) for _ in range(3)]
    for _ in range(4):
        for client in clients:
            read_here_and_there(client)
    for offset, length in ((0, 1), (SIZE - 1, 1), (SIZE - LONGEST_SHORT, LONGEST_SHORT)):
        assert clients[0].ask(Cmd.READ, offset, length).data == OLD[offset : offset + length]
    assert poller.asleep == 3
    for client in clients:
        client.end()


def test_one_client_alone_has_its_own_thread(disk: Disk, line: MakeLine, poller: Poller) -> None:
    client = line(disk.export, SIMPLE, poller=poller)
    for _ in range(3 * CALM):
        client.ask(Cmd.READ, 0, 512)
    assert not poller.asleep


def test_what_is_read_is_what_was_written_last(calm: MakeCalm) -> None:
    reader, writer = calm(), calm()
    for n in range(20):
        piece = bytes([n]) * 4096
        writer.ask(Cmd.WRITE, 4096, payload=piece)
        assert reader.ask(Cmd.READ, 4096, 4096).data == piece


@pytest.mark.parametrize(
    ("command", "offset", "length", "flags", "error"),
    [
        (Cmd.FLUSH, 0, 0, 0, 0),
        (Cmd.TRIM, 0, 64 * KiB, 0, 0),
        (Cmd.WRITE_ZEROES, 0, 100, CmdFlag.FUA, 0),
        (Cmd.CACHE, 0, 100, 0, 0),
        (Cmd.READ, 0, LONGEST_SHORT + 1, 0, 0),
        (Cmd.READ, 0, 512, CmdFlag.DF, 0),
        (Cmd.READ, 0, 0, 0, 0),
        (Cmd.READ, SIZE - 1, 2, 0, NbdError.EINVAL),
        (Cmd.READ, 0, 512, 1 << 9, NbdError.EINVAL),
        (99, 0, 512, 0, NbdError.EINVAL),
    ],
)
def test_anything_else_among_the_reads_is_answered_too(
    calm: MakeCalm, poller: Poller, command: int, offset: int, length: int, flags: int, error: int
) -> None:
    client = calm()
    start = SIZE // 2
    client.send(
        *(client.request(Cmd.READ, start + n, 64, cookie=n) for n in range(5)),
        client.request(command, offset, length, flags=flags, cookie=5),
        *(client.request(Cmd.READ, start + n, 64, cookie=n) for n in range(6, 11)),
    )
    replies = client.replies(11)
    assert replies.pop(5).error == error
    for n, reply in replies.items():
        assert reply.data == OLD[start + n : start + n + 64]
    assert not poller.asleep


def test_a_write_that_comes_in_parts_is_written_whole(calm: MakeCalm, disk: Disk) -> None:
    client = calm()
    request = client.request(Cmd.READ, 0, 64, cookie=1) + client.request(Cmd.WRITE, 512, payload=b"n" * 1000, cookie=2)
    for start in range(0, len(request), 37):
        client.send(request[start : start + 37])
        time.sleep(0.001)
    assert sorted(client.replies(2)) == [1, 2]
    assert disk.contents == OLD[:512] + b"n" * 1000 + OLD[1512:]


def test_half_a_header_is_waited_for_by_the_connection_alone(calm: MakeCalm, poller: Poller) -> None:
    slow, other = calm(), calm()
    request = slow.request(Cmd.READ, 0, 64)
    slow.send(request[:13])
    for _ in range(3):
        read_here_and_there(other)
    slow.send(request[13:])
    assert slow.reply().data == OLD[:64]


def test_what_is_not_in_memory_is_read_by_the_connections_own_thread(
    calm: MakeCalm, disk: Disk, poller: Poller, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that hangs holds up who reads from it, and nobody else."""
    slow, other = calm(), calm()
    real = disk.host.read_into
    here, there = os.pipe()
    with open(here, "rb") as hangs, open(there, "wb") as goes_on:

        def hang(offset: int, buffer: memoryview) -> int:
            hangs.read(1)
            return real(offset, buffer)

        def cached(offset: int, buffer: memoryview) -> bool:
            return offset != MiB and bool(real(offset, buffer))

        monkeypatch.setattr(disk.host, "read_into", hang)
        monkeypatch.setattr(disk.node, "read_cached", cached)
        for client in (slow, other):
            monkeypatch.setattr(client.connection, "_read_cached", cached)
        slow.send(slow.request(Cmd.READ, MiB, 512))
        for _ in range(3):
            read_here_and_there(other)
        assert poller.asleep == 1
        goes_on.write(b".")
        goes_on.flush()
        assert slow.reply().data == OLD[MiB : MiB + 512]


def test_an_error_of_the_disk_is_told(calm: MakeCalm, disk: Disk) -> None:
    client = calm()
    disk.host.bad = range(5000, 5001)
    client.send(*(client.request(Cmd.READ, n * 4096, 4096, cookie=n) for n in range(3)))
    replies = client.replies(3)
    assert [replies[n].error for n in range(3)] == [0, NbdError.EIO, 0]
    assert replies[2].data == OLD[8192:12288]


def test_a_client_that_does_not_read_holds_up_nobody_and_loses_nothing(calm: MakeCalm, poller: Poller) -> None:
    stubborn, other = calm(buffer=4 * KiB), calm()
    count = 40
    for n in range(count):
        stubborn.send(stubborn.request(Cmd.READ, n * 4096, LONGEST_SHORT, cookie=n))
    for _ in range(3):
        read_here_and_there(other)
    for n, reply in stubborn.replies(count).items():
        assert reply.data == OLD[n * 4096 : n * 4096 + LONGEST_SHORT]


def test_a_late_reply_comes_whole_between_the_reads(calm: MakeCalm, disk: Disk, poller: Poller) -> None:
    client = calm()
    disk.host.syncs.close()
    client.send(client.request(Cmd.FLUSH, cookie=1))
    disk.host.syncs.wait_for_one()
    make_calm(client, poller)
    client.send(*(client.request(Cmd.READ, n, 4096, cookie=n) for n in range(2, 200)))
    disk.host.syncs.open()
    replies = client.replies(199)
    assert replies.pop(1).error == 0
    for n, reply in replies.items():
        assert reply.data == OLD[n : n + 4096]


@pytest.mark.parametrize("how", ["disc", "hang up", "kill", "drain", "garbage"])
def test_a_sleeping_connection_ends(calm: MakeCalm, poller: Poller, how: str) -> None:
    client, other = calm(), calm()
    if how == "disc":
        client.end()
    elif how == "hang up":
        client.hang_up()
    elif how == "kill":
        client.connection.kill()
        client.wait_closed()
    elif how == "drain":
        client.connection.drain()
        client.wait_closed()
    else:
        client.send(bytes(28))
        client.wait_closed()
    read_here_and_there(other)
    assert poller.asleep == 1


def test_the_thread_and_its_descriptors_end_with_the_last_client(disk: Disk, line: MakeLine, poller: Poller) -> None:
    def descriptors() -> list[str]:
        return sorted(os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if _is_open(fd))

    def polling() -> tuple[int, int]:
        return descriptors().count("anon_inode:[eventpoll]"), descriptors().count("anon_inode:[eventfd]")

    before = polling()
    for _ in range(2):  # it begins anew, too
        clients = [line(disk.export, SIMPLE, poller=poller) for _ in range(2)]
        for client in clients:
            make_calm(client, poller)
        for client in clients:
            client.end()
    end = time.monotonic() + SECONDS
    # Those of an earlier test may be closing still: fewer than before is well
    while any(now > then for now, then in zip(polling(), before, strict=True)):
        assert time.monotonic() < end, "something stays open"
        time.sleep(0.01)


def test_a_connection_goes_with_its_buffers(calm: MakeCalm, disk: Disk, poller: Poller) -> None:
    """Not when another client asks the poller for something: it holds 1.5 MiB."""
    gc.disable()
    try:
        client = Line(disk.export, SIMPLE, poller=poller)
        make_calm(client, poller)
        client.end()
        client.connection._thread.join(SECONDS)
        connection = weakref.ref(client.connection)
        del client.connection
        assert connection() is None
    finally:
        gc.enable()


def _is_open(fd: str) -> bool:
    return os.path.lexists(f"/proc/self/fd/{fd}")


def test_without_a_descriptor_for_it_all_have_their_own_threads(
    disk: Disk, line: MakeLine, poller: Poller, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse() -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(select, "epoll", refuse)
    clients = [line(disk.export, SIMPLE, poller=poller) for _ in range(2)]
    for _ in range(3 * CALM):
        for client in clients:
            assert client.ask(Cmd.READ, 0, 512).data == OLD[:512]
    assert not poller.asleep


def test_what_makes_the_poller_fail_fails_nobody_else(
    calm: MakeCalm, poller: Poller, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    client, other = calm(), calm()

    def fail() -> bool:
        raise AssertionError("it never raises")

    monkeypatch.setattr(client.connection, "serve_at_once", fail)
    for _ in range(3 * CALM):
        read_here_and_there(client)
        read_here_and_there(other)
    assert not poller.asleep
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    caplog.clear()  # the one error that is wanted here


def test_every_message_is_logged_where_that_is_wanted(calm: MakeCalm, caplog: pytest.LogCaptureFixture) -> None:
    client = calm()
    caplog.set_level(logging.DEBUG, "fleecing.server")
    for n in range(3 * CALM):
        client.ask(Cmd.READ, n, 64)
    assert sum("READ" in message for message in caplog.messages) >= 3 * CALM


def test_a_client_that_is_calm_only_at_times_is_left_to_its_own_thread(calm: MakeCalm, poller: Poller) -> None:
    """Going to sleep and waking up costs more than what is in between brings."""
    client = calm()
    asleep = 0
    for _ in range(20):
        for _ in range(CALM + 4):
            client.ask(Cmd.READ, 0, 64)
        asleep += poller.asleep
        client.ask(Cmd.FLUSH)
    assert asleep < 10


def test_a_disk_that_cannot_say_whether_a_read_waits_is_never_polled(
    disk: Disk, line: MakeLine, poller: Poller, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(disk.host), "never_waits", False)
    clients = [line(disk.export, SIMPLE, poller=poller) for _ in range(2)]
    for _ in range(3 * CALM):
        for client in clients:
            client.ask(Cmd.READ, 0, 512)
    assert not poller.asleep


def test_a_file_that_takes_no_nowait_may_wait_unless_it_is_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.preadv

    def preadv(fd: int, buffers: list[memoryview], offset: int, flags: int = 0) -> int:
        if flags:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        return real(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", preadv)
    for folder, never_waits in ((tmp_path, False), (Path("/dev/shm"), True)):
        path = folder / f"fleecing-{os.getpid()}"
        path.write_bytes(b"x" * 4096)
        file = HostFile.open(str(path))
        try:
            assert file.read_cached(0, memoryview(bytearray(4096)))
            assert file.never_waits is never_waits
        finally:
            file.close()
            path.unlink()


def test_a_tcp_client_is_polled_too(calm: MakeCalm, mode: ReplyMode) -> None:
    """Nothing is lost where the socket's stream is cut anywhere."""
    client = calm(mode, tcp=True)
    assert client.sock.family == socket.AF_INET
    requests = b"".join(client.request(Cmd.READ, n, 64, cookie=n) for n in range(100))
    for start in range(0, len(requests), 41):
        client.send(requests[start : start + 41])
    for n, reply in client.replies(100).items():
        assert reply.data == OLD[n : n + 64]
