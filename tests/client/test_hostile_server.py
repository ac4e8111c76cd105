"""A server that lies, stops half-way, or never stops: the client ends with an error, in bounded time and memory."""

from __future__ import annotations

import resource
import socket
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from fleecing.client.connection import Connection
from fleecing.client.dial import connect
from fleecing.errors import FleecingError, ProtocolError
from fleecing.nbd.client_handshake import ExportRefused
from fleecing.nbd.constants import BASE_ALLOCATION, IHAVEOPT, NBDMAGIC, NbdError, ReplyMode, TransmissionFlag
from fleecing.nbd.handshake import Agreement
from fleecing.nbd.options import GREETING
from fleecing.nbd.transmission import CHUNK, EXTENDED_REQUEST, REQUEST, data_header, done_reply, error_reply
from tests.client.servers import FLAGS, MIB, Script, scripted, served, take

TIMEOUT = 20.0
SHORT = 0.3
"""Seconds: for tests that are about the time-out itself."""

EXTENDED = ReplyMode.EXTENDED
HEADER = EXTENDED_REQUEST.size


def cookie_of(sock: socket.socket) -> int:
    """The cookie of the next request, which has no payload."""
    cookie = EXTENDED_REQUEST.unpack(take(sock, HEADER))[3]
    assert isinstance(cookie, int)
    return cookie


def answer(make: Callable[[int], bytes]) -> Script:
    """A script that sends `make(cookie)` for the first request and waits for the client to hang up."""

    def script(sock: socket.socket, agreement: Agreement) -> None:
        assert agreement.mode is EXTENDED
        sock.sendall(make(cookie_of(sock)))
        sock.recv(1)

    return script


def wait_for_the_end(connection: Connection) -> None:
    """Take what the server sends until it is an error."""
    while True:
        connection.next_finished()


def stop_after(count: int) -> Script:
    """A script that hangs up after `count` bytes of a right answer to a read of 4096 bytes at 0."""

    def script(sock: socket.socket, agreement: Agreement) -> None:
        sock.sendall((data_header(EXTENDED, cookie_of(sock), 0, 4096) + bytes(4096))[:count])

    return script


@pytest.mark.parametrize("count", [0, 1, 4, 31, 32, 39, 40, 41, 4135])
def test_half_a_reply_is_an_error(tmp_path: Path, count: int) -> None:
    with scripted(tmp_path, stop_after(count)) as uri, connect(uri, timeout=TIMEOUT) as connection:
        with pytest.raises(ConnectionError, match="closed the connection with 1 requests in flight"):
            connection.read(0, 4096)
        with pytest.raises(ConnectionError, match="is gone"):
            connection.read(0, 4096)


@pytest.mark.parametrize(
    "make",
    [
        lambda cookie: b"SSH-2.0-OpenSSH_9.2p1 Debian-2\r\n",
        lambda cookie: data_header(EXTENDED, cookie + 1, 0, 4096),
        lambda cookie: data_header(EXTENDED, cookie, 0, 4097),
        lambda cookie: data_header(EXTENDED, cookie, 0, 1 << 62),
        lambda cookie: done_reply(EXTENDED, cookie, 0),
        lambda cookie: error_reply(EXTENDED, cookie, 0, NbdError.EIO, "x")[:-1] + b"\0" + bytes(100),
    ],
    ids=["no NBD", "wrong cookie", "too much data", "far too much data", "no data", "bytes after an error"],
)
def test_what_a_server_must_not_send_ends_the_connection(tmp_path: Path, make: Callable[[int], bytes]) -> None:
    with scripted(tmp_path, answer(make)) as uri, connect(uri, timeout=TIMEOUT) as connection:
        first = connection.submit_read(0, bytearray(4096))
        with pytest.raises((ProtocolError, ConnectionError)) as caught:
            wait_for_the_end(connection)
        assert isinstance(caught.value, ProtocolError) or first.error is not None
        with pytest.raises(ConnectionError, match="is gone"):
            connection.flush()


def test_a_server_that_never_answers_meets_the_time_out(tmp_path: Path) -> None:
    with scripted(tmp_path, answer(lambda cookie: b"")) as uri, connect(uri, timeout=SHORT) as connection:
        request = connection.submit_read(0, bytearray(4096))
        with pytest.raises(TimeoutError, match=r"did not answer within 0\.3 s"):
            connection.wait(request)


def test_a_server_that_trickles_meets_the_time_out(tmp_path: Path) -> None:
    """Each byte comes in time; the whole reply does not."""

    def script(sock: socket.socket, agreement: Agreement) -> None:
        sock.sendall(data_header(EXTENDED, cookie_of(sock), 0, 4096))
        pause = threading.Event()
        while not pause.wait(SHORT / 10):
            sock.sendall(b"x")

    with scripted(tmp_path, script) as uri, connect(uri, timeout=SHORT) as connection, pytest.raises(TimeoutError):
        connection.read(0, 4096)


def test_a_server_that_sends_errors_without_end_meets_the_time_out(tmp_path: Path) -> None:
    """Chunks that are right one by one, but none of them is the last."""

    def script(sock: socket.socket, agreement: Agreement) -> None:
        flood = error_reply(EXTENDED, cookie_of(sock), 0, NbdError.EIO, "again")
        flood = flood[:4] + b"\0\0" + flood[6:]
        while True:
            sock.sendall(flood * 100)

    with scripted(tmp_path, script) as uri, connect(uri, timeout=SHORT) as connection, pytest.raises(TimeoutError):
        connection.read(0, 4096)


def test_a_server_that_does_not_read_meets_the_time_out(tmp_path: Path) -> None:
    def script(sock: socket.socket, agreement: Agreement) -> None:
        finished.wait(TIMEOUT)

    finished = threading.Event()
    with scripted(tmp_path, script) as uri, connect(uri, timeout=SHORT) as connection:
        with pytest.raises(TimeoutError):
            connection.submit_write(0, bytes(16 * MIB))
        finished.set()


def test_replies_are_taken_while_a_request_is_being_sent(tmp_path: Path) -> None:
    """The server sends 8 MiB before it reads on: neither side's buffers hold that."""

    def script(sock: socket.socket, agreement: Agreement) -> None:
        cookie = cookie_of(sock)
        take(sock, HEADER)
        sock.sendall(data_header(EXTENDED, cookie, 0, 8 * MIB) + b"r" * 8 * MIB)
        take(sock, 8 * MIB)
        sock.sendall(done_reply(EXTENDED, cookie + 1, 0))
        sock.recv(1)

    buffer = bytearray(8 * MIB)
    with scripted(tmp_path, script) as uri, connect(uri, timeout=TIMEOUT) as connection:
        read = connection.submit_read(0, buffer)
        write = connection.submit_write(0, b"w" * 8 * MIB)
        assert [connection.next_finished(), connection.next_finished()] == [read, write]
    assert buffer == b"r" * 8 * MIB


def test_another_thread_can_abort_a_call_that_waits(tmp_path: Path) -> None:
    def script(sock: socket.socket, agreement: Agreement) -> None:
        cookie_of(sock)
        asked.set()
        sock.recv(1)

    asked = threading.Event()
    with scripted(tmp_path, script) as uri, connect(uri, timeout=TIMEOUT) as connection:

        def abort() -> None:
            asked.wait(TIMEOUT)
            connection.abort()

        thread = threading.Thread(target=abort)
        thread.start()
        with pytest.raises(ConnectionError):
            connection.read(0, 4096)
        thread.join(TIMEOUT)


def test_announced_sizes_are_not_believed(tmp_path: Path) -> None:
    """A structured chunk of nearly 4 GiB is refused by its header."""

    def script(sock: socket.socket, agreement: Agreement) -> None:
        take(sock, REQUEST.size)
        sock.sendall(CHUNK.pack(0x668E33EF, 1, 5, 1, (1 << 32) - 4))
        sock.recv(1)

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with scripted(tmp_path, script) as uri, connect(uri, extended=False, contexts=[BASE_ALLOCATION]) as connection:
        request = connection.submit_block_status(0, MIB)
        with pytest.raises(ProtocolError):
            connection.wait(request)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024


def test_bytes_behind_the_handshake_are_an_error(tmp_path: Path) -> None:
    def serve(sock: socket.socket) -> None:
        sock.sendall(GREETING.pack(NBDMAGIC, IHAVEOPT, 2))
        take(sock, 4 + 16)
        sock.sendall((MIB).to_bytes(8, "big") + (1).to_bytes(2, "big") + b"surplus")
        sock.recv(1)

    with served(tmp_path, serve) as uri, pytest.raises(ProtocolError, match="7 bytes that nobody asked for"):
        connect(uri, timeout=TIMEOUT)


@pytest.mark.parametrize("greeting", [b"", b"NBDMAG", b"HTTP/1.0 200 OK\r\n\r\n", GREETING.pack(NBDMAGIC, IHAVEOPT, 3)])
def test_a_handshake_that_ends_early_is_an_error(tmp_path: Path, greeting: bytes) -> None:
    with served(tmp_path, lambda sock: sock.sendall(greeting)) as uri, pytest.raises((FleecingError, OSError)):
        connect(uri, timeout=TIMEOUT)


def test_a_handshake_that_stalls_meets_the_time_out(tmp_path: Path) -> None:
    def serve(sock: socket.socket) -> None:
        take(sock, 1)

    expected = pytest.raises(TimeoutError, match=r"no end of the handshake within 0\.3 s")
    with served(tmp_path, serve) as uri, expected:
        connect(uri, timeout=SHORT)


def test_a_handshake_that_never_ends_meets_the_time_out(tmp_path: Path) -> None:
    """Information items without end, each of them right."""

    def serve(sock: socket.socket) -> None:
        sock.sendall(GREETING.pack(NBDMAGIC, IHAVEOPT, 3))
        take(sock, 4)
        item = bytes.fromhex("0003e889045565a9 00000007 00000003 0000000c 0000") + bytes(10)
        for _ in (11, 8):
            number = take(sock, 16)[8:12]
            sock.sendall(bytes.fromhex("0003e889045565a9") + number + bytes.fromhex("80000001 00000000"))
        take(sock, 16)
        while True:
            sock.sendall(item * 100)

    with served(tmp_path, serve) as uri, pytest.raises(TimeoutError):
        connect(uri, timeout=SHORT)


def test_a_refusal_reaches_the_caller_although_the_server_hangs_up_at_once(tmp_path: Path) -> None:
    def serve(sock: socket.socket) -> None:
        sock.sendall(GREETING.pack(NBDMAGIC, IHAVEOPT, 3))
        take(sock, 4)
        text = b"not today"
        for _ in range(3):
            number = take(sock, 16)[8:12]
            if number == b"\0\0\0\x07":
                code = bytes.fromhex("80000002")
            else:
                code = bytes.fromhex("80000001")
            sock.sendall(bytes.fromhex("0003e889045565a9") + number + code + len(text).to_bytes(4, "big") + text)

    with served(tmp_path, serve) as uri, pytest.raises(ExportRefused, match="not today"):
        connect(uri, timeout=TIMEOUT)


def test_no_goodbye_is_sent_into_a_half_sent_request(tmp_path: Path) -> None:
    """A DISC there would be taken for the rest of the write's payload."""

    def script(sock: socket.socket, agreement: Agreement) -> None:
        stalled.wait(TIMEOUT)
        while data := sock.recv(MIB):
            received.append(data)

    stalled = threading.Event()
    received: list[bytes] = []
    with scripted(tmp_path, script, flags=FLAGS | TransmissionFlag.SEND_FUA) as uri:
        connection = connect(uri, timeout=SHORT)
        with pytest.raises(TimeoutError):
            connection.submit_write(0, b"w" * 16 * MIB)
        connection.close()
        stalled.set()
    assert set(b"".join(received)[HEADER:]) == {ord("w")}
