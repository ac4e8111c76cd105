"""Late reads that the server puts into memory of this end (docs/shared-memory.md)."""

from __future__ import annotations

import errno
import os
import random
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from fleecing.client.connection import Connection
from fleecing.client.dial import connect
from fleecing.client.request import Request
from fleecing.errors import ProtocolError
from fleecing.nbd.constants import BASE_ALLOCATION, SHARED_MEMORY, NbdError, ReplyMode
from fleecing.nbd.handshake import Agreement
from fleecing.nbd.transmission import EXTENDED_REQUEST, SHARED_READ, data_header, done_reply, error_reply
from fleecing.nbd.uri import NbdUri
from tests.client.servers import MIB, TIMEOUT, Script, activated, scripted, served, take
from tests.serving import Server

EXTENDED = ReplyMode.EXTENDED
DATA = random.Random(6).randbytes(4 * MIB + 3)
CONTEXTS = (BASE_ALLOCATION, SHARED_MEMORY)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    image = tmp_path / "disk.img"
    image.write_bytes(DATA)
    running = Server(tmp_path / "server", image)
    yield running
    running.stop()


def opened(uri: NbdUri, *, timeout: float = TIMEOUT) -> Connection:
    return connect(uri, contexts=CONTEXTS, timeout=timeout)


def make_buffer(length: int) -> memoryview:
    return memoryview(bytearray(length))


def no_buffer(length: int) -> memoryview:
    raise AssertionError("the data should be in the shared memory")


def finished(connection: Connection) -> Request:
    """The next one, with its bytes as they should be."""
    request = connection.next_finished()
    assert request.error is None and request.buffer is not None
    assert bytes(request.buffer) == DATA[request.offset : request.offset + request.length]
    return request


def test_buffers_are_filled_and_used_again(server: Server) -> None:
    with opened(NbdUri(export="vda", socket=str(server.unix))) as connection:
        connection.share_memory(3, MIB)
        for _ in range(3):
            requests = [connection.submit_late_read(at * MIB + 1, MIB - at, no_buffer) for at in range(3)]
            assert sorted(request.position or 0 for request in requests) == [0, MIB, 2 * MIB]
            for _ in requests:
                connection.release(finished(connection))
        connection.submit_late_read(len(DATA) - 1, 1, no_buffer)
        finished(connection)


def test_what_has_no_place_there_comes_as_ever(server: Server) -> None:
    with opened(NbdUri(export="vda", socket=str(server.unix))) as connection:
        connection.share_memory(1, MIB)
        connection.submit_late_read(0, MIB + 1, make_buffer)  # too long
        connection.submit_late_read(0, MIB, no_buffer)
        connection.submit_late_read(MIB, MIB, make_buffer)  # none is free
        found = [finished(connection) for _ in range(3)]
        assert [request.position for request in found] == [None, 0, None]
        for request in found:
            connection.release(request)
            connection.release(request)  # twice does no harm
        assert connection.submit_late_read(3 * MIB, 512, no_buffer).position == 0
        with pytest.raises(ValueError, match="not within"):
            connection.submit_late_read(len(DATA), 1, make_buffer)
        connection.release(finished(connection))
        with pytest.raises(ValueError, match="not within"):
            connection.submit_late_read(len(DATA), 1, make_buffer)
        assert connection.submit_late_read(0, 512, no_buffer).position == 0  # the refused one gave it back
        finished(connection)


def test_other_requests_and_block_status_go_on(server: Server) -> None:
    with opened(NbdUri(export="vda", socket=str(server.unix))) as connection:
        connection.share_memory(2, MIB)
        assert connection.read(3, 4 * MIB) == DATA[3:]
        assert set(connection.block_status(0, MIB)) == set(CONTEXTS)
        connection.write(0, b"new")
        request = connection.wait(connection.submit_late_read(0, 3, no_buffer))
        assert request.buffer is not None and bytes(request.buffer) == b"new"


def test_an_error_is_the_requests_alone(server: Server) -> None:
    server.snapshot(name="s")
    with opened(NbdUri(export="vda@s", socket=str(server.unix))) as connection:
        connection.share_memory(1, MIB)
        connection.trim(0, MIB)
        request = connection.submit_late_read(0, MIB, no_buffer)
        assert connection.next_finished() is request
        assert request.error is not None and "trimmed" in str(request.error)
        connection.release(request)
        connection.submit_late_read(MIB, MIB, no_buffer)
        finished(connection)


def is_plain(connection: Connection) -> bool:
    """Whether late reads come through the socket, and come."""
    connection.submit_late_read(1, MIB, make_buffer)
    return connection.next_finished().position is None


def test_over_tcp_there_is_none(server: Server) -> None:
    with opened(NbdUri(export="vda", host="127.0.0.1", port=server.port)) as connection:
        assert SHARED_MEMORY not in connection.contexts
        connection.share_memory(2, MIB)
        assert is_plain(connection)


def test_servers_that_do_not_know_it(tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(DATA)
    command = ["qemu-nbd", "-t", "-f", "raw", "-x", "", str(image)]
    with activated(tmp_path, *command) as uri, opened(uri) as connection:
        connection.share_memory(2, MIB)
        assert is_plain(connection)


def test_a_system_without_such_memory(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str, flags: int) -> int:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(os, "memfd_create", refuse)
    with opened(NbdUri(export="vda", socket=str(server.unix))) as connection:
        connection.share_memory(2, MIB)
        assert is_plain(connection)


def test_behind_a_relay_that_passes_bytes_only(server: Server, tmp_path: Path) -> None:
    def relay(sock: socket.socket) -> None:
        with socket.socket(socket.AF_UNIX) as further:
            further.connect(str(server.unix))
            ends = {sock: further, further: sock}
            for each in ends:
                each.setblocking(False)
            while True:
                for source, sink in ends.items():
                    try:
                        data = source.recv(1 << 16)
                    except BlockingIOError:
                        continue
                    if not data:
                        return
                    sink.setblocking(True)
                    sink.sendall(data)
                    sink.setblocking(False)

    with served(tmp_path, relay) as uri, opened(NbdUri(export="vda", socket=uri.socket)) as connection:
        assert SHARED_MEMORY in connection.contexts
        before = len(os.listdir("/proc/self/fd"))
        connection.share_memory(2, MIB)
        assert len(os.listdir("/proc/self/fd")) == before
        assert is_plain(connection)


# Servers that lie


def next_read(sock: socket.socket) -> tuple[int, int, int]:
    """(cookie, offset, length) of the next request, which is a READ with a payload."""
    *_, cookie, offset, size = EXTENDED_REQUEST.unpack(take(sock, EXTENDED_REQUEST.size))
    assert size == SHARED_READ.size
    return cookie, offset, SHARED_READ.unpack(take(sock, size))[0]


def takes_memory(answer: bytes | None) -> Script:
    """A script that takes the memory, and answers the READ with what is made of `answer`: data, None = never."""

    def script(sock: socket.socket, agreement: Agreement) -> None:
        cookie, _, length = next_read(sock)
        assert length == 0
        sock.sendall(done_reply(EXTENDED, cookie, 0))
        cookie, offset, _ = next_read(sock)
        if answer is not None:
            sock.sendall(data_header(EXTENDED, cookie, offset, len(answer)) + answer)
        sock.recv(1)

    return script


def test_data_in_answer_to_a_shared_read_is_a_breach(tmp_path: Path) -> None:
    with scripted(tmp_path, takes_memory(bytes(512)), contexts=CONTEXTS, local=True) as uri, opened(uri) as connection:
        connection.share_memory(1, 512)
        connection.submit_late_read(0, 512, no_buffer)
        with pytest.raises(ProtocolError, match="sent data in answer to READ"):
            connection.next_finished()
        assert connection.is_lost


def test_no_answer_to_a_shared_read_is_a_time_out(tmp_path: Path) -> None:
    script = takes_memory(None)
    with scripted(tmp_path, script, contexts=CONTEXTS, local=True) as uri, opened(uri, timeout=0.3) as connection:
        connection.share_memory(1, 512)
        connection.submit_late_read(0, 512, no_buffer)
        with pytest.raises(TimeoutError):
            connection.next_finished()


@pytest.mark.parametrize("hangs_up", [False, True])
def test_no_answer_to_the_memory_loses_the_connection(tmp_path: Path, *, hangs_up: bool) -> None:
    def script(sock: socket.socket, agreement: Agreement) -> None:
        next_read(sock)
        if not hangs_up:
            sock.recv(1)

    with scripted(tmp_path, script, contexts=CONTEXTS, local=True) as uri, opened(uri, timeout=0.3) as connection:
        before = len(os.listdir("/proc/self/fd"))
        with pytest.raises(OSError, match="closed the connection" if hangs_up else "did not answer"):
            connection.share_memory(1, 512)
        assert connection.is_lost
        assert len(os.listdir("/proc/self/fd")) <= before
        with pytest.raises(ConnectionError, match="is gone"):
            connection.share_memory(1, 512)


def test_memory_that_is_refused_is_done_without(tmp_path: Path) -> None:
    def script(sock: socket.socket, agreement: Agreement) -> None:
        cookie, *_ = next_read(sock)
        sock.sendall(error_reply(EXTENDED, cookie, 0, NbdError.EINVAL, "no"))
        cookie = EXTENDED_REQUEST.unpack(take(sock, EXTENDED_REQUEST.size))[3]
        sock.sendall(data_header(EXTENDED, cookie, 1, MIB) + bytes(MIB))
        sock.recv(1)

    with scripted(tmp_path, script, contexts=CONTEXTS, local=True) as uri, opened(uri) as connection:
        connection.share_memory(1, MIB)
        assert is_plain(connection)
