"""Clients on their way in: welcomed, dropped, turned away; and the end of the server."""

from __future__ import annotations

import logging
import socket
import struct
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fleecing.nbd import options
from fleecing.nbd.constants import ClientFlag, Cmd, Opt, Rep, ReplyMode
from fleecing.server.connection import Connection
from fleecing.server.limits import Limits
from tests.block.rig import in_thread, pattern
from tests.server.listening import Exports, Listening, Log
from tests.server.rig import Disk, MakeDisk
from tests.server.wire import Wire

FLAGS = options.CLIENT_FLAGS.pack(ClientFlag.C_FIXED_NEWSTYLE | ClientFlag.C_NO_ZEROES)
GO = options.option(Opt.GO, options.info_request("vda", ()))
SIMPLE = ReplyMode.SIMPLE
SIZE = 1 << 16


@pytest.fixture
def disk(make_disk: MakeDisk) -> Disk:
    return make_disk(pattern(SIZE))


@pytest.fixture
def exports(disk: Disk) -> Exports:
    return Exports(disk.export)


Start = Callable[..., Listening]


@pytest.fixture
def start(tmp_path: Path, exports: Exports) -> Iterator[Start]:
    """Starts the server; takes what Limits takes."""
    started: list[Listening] = []

    def make(catalog: Exports = exports, **limits: Any) -> Listening:
        started.append(Listening(tmp_path, catalog, limits=Limits(**limits)))
        return started[-1]

    yield make
    for listening in started:
        listening.stop()


@pytest.fixture
def log() -> Iterator[Log]:
    logger, handler = logging.getLogger("fleecing"), Log()
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    yield handler
    logger.removeHandler(handler)
    logger.setLevel(logging.NOTSET)


def greeted(sock: socket.socket) -> bool:
    """Whether the server says hello; else it has hung up."""
    return len(take(sock, options.GREETING.size)) == options.GREETING.size


def take(sock: socket.socket, count: int) -> bytes:
    """So many bytes, or those that come before the end."""
    data = b""
    try:
        while len(data) < count and (piece := sock.recv(count - len(data))):
            data += piece
    except ConnectionResetError:
        pass
    return data


def rest(sock: socket.socket) -> bytes:
    return take(sock, 1 << 30)


def option_reply(sock: socket.socket) -> tuple[int, bytes]:
    _, _, reply, length = options.OPTION_REPLY.unpack(take(sock, options.OPTION_REPLY.size))
    return reply, take(sock, length)


def enter(sock: socket.socket) -> Wire:
    """Through the handshake with GO."""
    assert greeted(sock)
    sock.sendall(FLAGS + GO)
    while (reply := option_reply(sock)[0]) != Rep.ACK:
        assert reply == Rep.INFO
    return Wire(sock, SIMPLE)


def test_clients_are_served_on_every_listener(start: Start, disk: Disk) -> None:
    server = start()
    clients = [enter(server.connect(tcp=tcp)) for tcp in (False, True, False)]
    for number, client in enumerate(clients):
        assert client.ask(Cmd.WRITE, number, payload=b"x").error == 0
    assert disk.contents == b"xxx" + pattern(SIZE)[3:]


def test_the_server_lists_its_clients(start: Start, log: Log) -> None:
    server = start()
    unix, tcp = enter(server.connect()), enter(server.connect(tcp=True))
    unix.ask(Cmd.READ, 0, 100)
    tcp.ask(Cmd.WRITE, 0, payload=b"123")
    found = {connection.peer: connection for connection in server.server.connections}
    host, port = tcp.sock.getsockname()
    assert set(found) == {"unix", f"{host}:{port}"}
    assert (found["unix"].requests, found["unix"].bytes_read, found["unix"].export_name) == (1, 100, "vda")
    assert found[f"{host}:{port}"].bytes_written == 3
    unix.sock.close()
    assert log.wait_for("client unix left vda: 1 requests, 100 bytes read, 0 written").levelno == logging.INFO


def test_requests_may_come_together_with_the_end_of_the_handshake(start: Start) -> None:
    sock = start().connect()
    asked = Wire(sock, SIMPLE)
    sock.sendall(FLAGS + GO + asked.request(Cmd.READ, 5, 100) + asked.request(Cmd.READ, 7, 10)[:20])
    assert greeted(sock)
    while option_reply(sock)[0] != Rep.ACK:
        pass
    assert asked.reply().data == pattern(SIZE)[5:105]


def test_an_abort_is_answered_and_obeyed(start: Start) -> None:
    sock = start().connect()
    assert greeted(sock)
    sock.sendall(FLAGS + options.option(Opt.ABORT))
    assert option_reply(sock)[0] == Rep.ACK
    assert rest(sock) == b""


def test_an_export_that_goes_in_the_last_moment_drops_the_client(start: Start, exports: Exports, log: Log) -> None:
    exports.gone.add("vda")
    server = start()
    sock = server.connect()
    sock.sendall(FLAGS + GO)
    rest(sock)
    assert log.wait_for("vda is gone").levelno == logging.INFO
    exports.gone.clear()
    assert enter(server.connect()).ask(Cmd.READ, 0, 1).error == 0


# Those who never come in


@pytest.mark.parametrize("said", [b"", FLAGS[:3], FLAGS, FLAGS + GO[:10], FLAGS + options.option(Opt.LIST)])
def test_the_handshake_has_a_time_limit(start: Start, log: Log, said: bytes) -> None:
    server = start(handshake_seconds=0.1)
    sock = server.connect()
    sock.sendall(said)
    rest(sock)  # the server hangs up
    assert log.wait_for("no end of the handshake in 0.1 s").levelno == logging.INFO


class Talkative(Exports):
    """A list of exports that no socket's buffer holds."""

    def names(self) -> Iterable[tuple[str, str]]:
        return [("n" * 200, "d" * 4000)] * 3000


def test_the_time_limit_holds_for_a_client_that_reads_nothing(start: Start, disk: Disk, log: Log) -> None:
    server = start(Talkative(disk.export), handshake_seconds=0.5)
    server.connect().sendall(FLAGS + options.option(Opt.LIST))
    log.wait_for("no end of the handshake")


def test_the_time_limit_ends_with_the_handshake(start: Start, log: Log) -> None:
    server = start(handshake_seconds=0.3)
    client = enter(server.connect())
    server.connect().sendall(FLAGS)
    log.wait_for("no end of the handshake")  # so the first client's limit is over as well
    assert client.ask(Cmd.READ, 0, 1).error == 0


def test_a_client_too_many_is_turned_away_until_another_leaves(start: Start, log: Log) -> None:
    server = start(clients=2)
    inside = enter(server.connect())
    haggling = server.connect()
    assert greeted(haggling)
    for tcp in (False, True):
        assert not greeted(server.connect(tcp=tcp))
    assert log.wait_for("turned away: 2 clients are connected").levelno == logging.WARNING
    assert inside.ask(Cmd.READ, 0, 10).error == 0
    haggling.close()
    log.wait_for("unix hung up in the handshake")
    second = server.connect()
    assert greeted(second)
    inside.send(inside.request(Cmd.DISC))
    log.wait_for("left vda")
    assert greeted(server.connect())


def test_clients_of_one_address_are_limited_and_those_of_the_unix_socket_are_not(start: Start, log: Log) -> None:
    server = start(clients_per_address=1)
    inside = enter(server.connect(tcp=True))
    assert take(server.connect(tcp=True), 1) == b""
    log.wait_for("turned away: 1 clients of its address are connected")
    for _ in range(3):
        enter(server.connect())
    inside.send(inside.request(Cmd.DISC))
    log.wait_for("left vda")
    assert enter(server.connect(tcp=True)).ask(Cmd.READ, 0, 1).error == 0


@pytest.mark.parametrize("seconds, expected", [(120.0, (60, 12, 5)), (1.0, (1, 1, 5))])
def test_the_host_of_a_tcp_client_is_asked_for_a_sign_of_life(
    start: Start, seconds: float, expected: tuple[int, ...]
) -> None:
    server = start(keepalive_seconds=seconds)
    client = enter(server.connect(tcp=True))
    assert client.ask(Cmd.READ, 0, 1).error == 0
    (connection,) = server.server.connections
    sock = connection._sock
    assert isinstance(sock, socket.socket)
    assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
    options = (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)
    assert tuple(sock.getsockopt(socket.IPPROTO_TCP, option) for option in options) == expected
    # A reply that is not acknowledged has the same time, but not less than a client that does not read.
    unanswered = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT)
    assert unanswered == (1000 * seconds if seconds >= Limits().send_seconds else 0)


@pytest.mark.parametrize("length, refused", [(257, False), (258, True)])
def test_the_length_of_names_is_limited(start: Start, length: int, refused: bool) -> None:
    sock = start(name_bytes=257).connect()
    assert greeted(sock)
    sock.sendall(FLAGS + options.option(Opt.GO, options.info_request("n" * length, ())))
    assert answer(sock)[0] == (Rep.ERR_TOO_BIG if refused else Rep.ERR_UNKNOWN)
    assert enter_again(sock)


def test_the_length_of_options_is_limited(start: Start) -> None:
    sock = start(option_bytes=8192).connect()
    assert greeted(sock)
    sock.sendall(FLAGS)
    for length, kind in ((8192, Rep.ERR_INVALID), (8193, Rep.ERR_TOO_BIG)):
        sock.sendall(options.option(Opt.INFO, bytes(length)))
        assert answer(sock)[0] == kind
    assert b"more than 8192 bytes" in answer_to_option(sock, options.option(Opt.GO, bytes(9000)))
    assert enter_again(sock)


def answer(sock: socket.socket) -> tuple[int, bytes]:
    """The next reply to an option: its type and data."""
    _, _, kind, length = options.OPTION_REPLY.unpack(take(sock, options.OPTION_REPLY.size))
    return kind, take(sock, length)


def answer_to_option(sock: socket.socket, option: bytes) -> bytes:
    sock.sendall(option)
    return answer(sock)[1]


def enter_again(sock: socket.socket) -> bool:
    """Whether the haggling has gone on after a refusal."""
    sock.sendall(GO)
    return answer(sock)[0] == Rep.INFO


# Those who do not read


@pytest.mark.parametrize("tcp", [False, True])
def test_a_client_that_does_not_read_is_dropped(start: Start, log: Log, tcp: bool) -> None:
    server = start(send_seconds=0.2)
    other = enter(server.connect())
    client = enter(server.connect(tcp=tcp))
    client.send(*[client.request(Cmd.READ, 0, SIZE) for _ in range(400)])
    assert log.wait_for("dropped: it does not read what is sent to it").levelno == logging.INFO
    log.wait_for("left vda")
    assert len(list(server.server.connections)) == 1
    assert other.ask(Cmd.READ, 0, 1).error == 0  # silence is no offence
    assert log.worst == logging.INFO


def test_the_memory_of_those_who_do_not_read_goes_to_others(start: Start, make_disk: MakeDisk, log: Log) -> None:
    size = 4 << 20
    server = start(Exports(make_disk(pattern(size)).export), send_seconds=0.2, read_memory=size)
    stuck, other = enter(server.connect()), enter(server.connect())
    stuck.send(stuck.request(Cmd.READ, 0, size))
    stuck.take(1)
    assert other.ask(Cmd.READ, 0, size).data == pattern(size)
    log.wait_for("dropped: it does not read what is sent to it")


def hang_up(sock: socket.socket) -> None:
    sock.close()


def hang_up_after_the_greeting(sock: socket.socket) -> None:
    take(sock, 18)
    sock.close()


def reset(sock: socket.socket) -> None:
    if sock.family == socket.AF_INET:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


def half_close(sock: socket.socket) -> None:
    sock.shutdown(socket.SHUT_WR)
    rest(sock)
    sock.close()


@pytest.mark.parametrize("tcp", [False, True])
@pytest.mark.parametrize("scan", [hang_up, hang_up_after_the_greeting, reset, half_close])
def test_port_scanners_and_health_checks_leave_no_trace_in_the_log(
    start: Start, log: Log, tcp: bool, scan: Callable[[socket.socket], None]
) -> None:
    server = start()
    for _ in range(5):
        scan(server.connect(tcp=tcp))
    log.wait_for("x ", 5)
    assert log.worst == logging.DEBUG
    enter(server.connect())


@pytest.mark.parametrize("end", range(len(FLAGS + GO)))
def test_a_client_may_vanish_at_every_byte_of_the_handshake(start: Start, log: Log, end: int) -> None:
    server = start()
    sock = server.connect()
    sock.sendall((FLAGS + GO)[:end])
    sock.close()
    log.wait_for("x ")
    assert log.worst == logging.DEBUG


@pytest.mark.parametrize(
    "said",
    [
        b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
        bytes(100),
        b"\xff" * 100,
        FLAGS + b"not an option at all",
        FLAGS + options.OPTION.pack(0x49484156454F5054, 7, 0xFFFFFFFF),
        FLAGS + options.option(Opt.EXPORT_NAME, b"nosuch"),
    ],
)
def test_whoever_breaks_the_protocol_is_dropped_with_one_line(start: Start, log: Log, said: bytes) -> None:
    server = start()
    sock = server.connect()
    sock.sendall(said)
    rest(sock)
    assert log.wait_for("dropped in the handshake: ").levelno == logging.INFO
    assert log.worst == logging.INFO
    enter(server.connect())


def test_a_fault_of_ours_costs_one_client_and_is_logged(
    start: Start, exports: Exports, log: Log, caplog: pytest.LogCaptureFixture
) -> None:
    server = start()
    exports.fault = ZeroDivisionError("a mistake")
    sock = server.connect()
    sock.sendall(FLAGS + GO)
    rest(sock)
    assert log.wait_for("dropped in the handshake").exc_info is not None
    exports.fault = None
    enter(server.connect())
    caplog.clear()


def test_a_client_for_whom_there_is_no_thread_is_dropped_and_makes_room(
    start: Start, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = start(clients=1)
    monkeypatch.setattr(Connection, "start", no_thread)
    sock = server.connect()
    sock.sendall(FLAGS + GO)
    rest(sock)
    assert log.wait_for("dropped: can't start new thread").levelno == logging.WARNING
    monkeypatch.undo()
    enter(server.connect())


def no_thread(connection: Connection) -> None:
    raise RuntimeError("can't start new thread")


# The end of the server


def test_a_server_that_closes_lets_requests_end(start: Start, disk: Disk, log: Log) -> None:
    disk.host.changes.close()
    server = start()
    client = enter(server.connect())
    client.send(client.request(Cmd.TRIM, 0, 4096, cookie=1))
    disk.host.changes.wait_for_one()
    closing = in_thread(server.close_server)
    assert not closing.over.is_set()
    disk.host.changes.open()
    assert client.reply().cookie == 1
    closing.wait()
    assert client.ended()
    assert log.worst == logging.INFO


def test_a_server_that_closes_turns_others_away(start: Start) -> None:
    server = start()
    haggling, idle = server.connect(), enter(server.connect())
    assert greeted(haggling)
    server.close_server()
    assert rest(haggling) == b""
    assert idle.ended()
    for tcp in (False, True):
        with pytest.raises(ConnectionRefusedError):
            server.connect(tcp=tcp)
    server.close_server()  # again: nothing to do


def test_a_server_that_closes_hangs_up_on_who_does_not_read(start: Start, log: Log) -> None:
    server = start()
    client = enter(server.connect())
    client.send(*[client.request(Cmd.READ, 0, SIZE) for _ in range(50)])
    client.take(10)
    server.close_server(grace=0.1)
    assert log.wait_for("does not end: hung up").levelno == logging.WARNING
    assert not list(server.server.connections)


def test_a_request_that_does_not_end_is_left_behind_with_a_line_in_the_log(
    start: Start, disk: Disk, log: Log, caplog: pytest.LogCaptureFixture
) -> None:
    disk.host.changes.close()
    server = start()
    client = enter(server.connect())
    client.send(client.request(Cmd.TRIM, 0, 4096, cookie=1))
    disk.host.changes.wait_for_one()
    server.close_server(grace=0.1)
    assert log.wait_for("1 clients have requests that do not end").levelno == logging.ERROR
    disk.host.changes.open()
    log.wait_for("left vda")
    caplog.clear()
