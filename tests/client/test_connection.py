"""The client against real servers: every command, many in flight, errors with their texts."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest

from fleecing.client.connection import Connection
from fleecing.client.dial import connect, list_exports
from fleecing.errors import RequestError
from fleecing.nbd.client_handshake import ExportRefused
from fleecing.nbd.constants import BASE_ALLOCATION, NbdError, ReplyMode, TransmissionFlag
from fleecing.nbd.uri import NbdUri
from tests.client.servers import MIB, activated, nbd_server, nbdkit
from tests.peers import Children, listen_tcp, port_of, run

PEERS = ["nbdkit", "qemu-nbd raw", "qemu-nbd qcow2", "nbd-server"]
TIMEOUT = 20.0


@pytest.fixture(params=PEERS)
def uri(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[NbdUri]:
    """An empty disk of 16 MiB."""
    image = tmp_path / "disk"
    if request.param == "nbdkit":
        server = nbdkit(tmp_path, "memory", "16M")
    elif request.param == "nbd-server":
        image.write_bytes(bytes(16 * MIB))
        server = nbd_server(tmp_path, image)
    else:
        form = request.param.split()[1]
        run("qemu-img", "create", "-q", "-f", form, str(image), "16M")
        server = activated(tmp_path, "qemu-nbd", "-t", "-f", form, "-x", "", "--discard=unmap", str(image))
    with server as uri:
        yield uri


@pytest.fixture(params=["best replies", "simple replies"])
def connection(request: pytest.FixtureRequest, uri: NbdUri) -> Iterator[Connection]:
    best = request.param == "best replies"
    with connect(uri, contexts=[BASE_ALLOCATION], structured=best, extended=best, timeout=TIMEOUT) as connection:
        yield connection


def test_the_handshake_tells_what_the_export_is(connection: Connection) -> None:
    assert connection.size == 16 * MIB
    assert connection.can(TransmissionFlag.HAS_FLAGS) and not connection.can(TransmissionFlag.READ_ONLY)
    assert (connection.contexts != {}) == (connection.mode is not ReplyMode.SIMPLE)


def test_what_was_written_is_read(connection: Connection) -> None:
    connection.write(5, b"hello")
    connection.write(16 * MIB - 3, b"end")
    assert connection.read(0, 12) == b"\0\0\0\0\0hello\0\0"
    assert connection.read(16 * MIB - 5, 5) == b"\0\0end"


def test_large_requests_go_through_whole(connection: Connection) -> None:
    data = random.Random(1).randbytes(9 * MIB)
    connection.write(MIB + 1, data)
    assert connection.read(MIB + 1, len(data)) == data


def test_flush_and_fua_succeed(connection: Connection) -> None:
    connection.write(0, b"x" * 4096, fua=connection.can(TransmissionFlag.SEND_FUA))
    if connection.can(TransmissionFlag.SEND_FLUSH):
        connection.flush()


def test_zeroes_and_trims_succeed(connection: Connection) -> None:
    connection.write(0, b"x" * 3 * 65536)
    if connection.can(TransmissionFlag.SEND_TRIM):
        connection.trim(0, 65536)
    if connection.can(TransmissionFlag.SEND_WRITE_ZEROES):
        connection.write_zeroes(65536, 65536)
        connection.write_zeroes(65536, 4096, no_hole=True)
        assert connection.read(65536, 65536) == bytes(65536)
    assert connection.read(131072, 65536) == b"x" * 65536


def test_many_requests_in_flight_find_their_answers(connection: Connection) -> None:
    """Writes larger than any socket buffer, with reads between them, so that both sides have to send at once."""
    chance = random.Random(2)
    blocks = [chance.randbytes(256 * 1024) for _ in range(32)]
    buffers = [bytearray(256 * 1024) for _ in range(32)]
    writes = [connection.submit_write(i * 256 * 1024, block) for i, block in enumerate(blocks)]
    for request in writes:
        connection.wait(request)
    reads = {}
    for i, buffer in enumerate(buffers):
        reads[connection.submit_read(i * 256 * 1024, buffer).cookie] = i
        connection.submit_write((i + 32) * 256 * 1024, blocks[i])
    while connection.in_flight:
        request = connection.next_finished()
        assert request.error is None
        if request.cookie in reads:
            i = reads.pop(request.cookie)
            assert buffers[i] == blocks[i]
    assert not reads
    assert connection.read(32 * 256 * 1024, 8 * MIB) == b"".join(blocks)


def test_late_reads_share_their_buffers(connection: Connection) -> None:
    """What was emptied is filled again, while others are still on their way."""
    data = random.Random(3).randbytes(16 * MIB)
    connection.write(0, data)
    free: list[memoryview] = []
    made = 0

    def make_buffer(length: int) -> memoryview:
        nonlocal made
        made += not free
        return free.pop() if free else memoryview(bytearray(length))

    offsets = iter(range(0, 16 * MIB, MIB // 4))
    for offset in islice(offsets, 16):
        connection.submit_late_read(offset, MIB // 4, make_buffer)
    while connection.in_flight:
        request = connection.next_finished()
        assert request.error is None and request.buffer is not None
        assert request.buffer == data[request.offset : request.offset + MIB // 4]
        free.append(request.buffer)
        for offset in islice(offsets, 1):
            connection.submit_late_read(offset, MIB // 4, make_buffer)
    assert made <= 16


def test_requests_can_be_awaited_in_any_order(connection: Connection) -> None:
    connection.write(0, bytes(range(256)))
    buffers = [bytearray(16) for _ in range(16)]
    requests = [connection.submit_read(16 * i, buffer) for i, buffer in enumerate(buffers)]
    for request in reversed(requests):
        connection.wait(request)
    assert b"".join(buffers) == bytes(range(256))
    assert connection.in_flight == 0


def test_block_status_covers_data_and_holes(tmp_path: Path) -> None:
    image = tmp_path / "disk.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", str(image), "16M")
    run("qemu-io", "-f", "qcow2", "-c", "write 1M 2M", str(image))
    contexts = [BASE_ALLOCATION, "qemu:allocation-depth", "nobody:knows"]
    command = ["qemu-nbd", "-t", "-f", "qcow2", "-x", "", "-A", str(image)]
    with activated(tmp_path, *command) as uri, connect(uri, contexts=contexts, timeout=TIMEOUT) as connection:
        assert set(connection.contexts) == set(contexts[:2])
        status = connection.block_status(MIB // 2, 15 * MIB)
    assert status == {
        BASE_ALLOCATION: [(MIB // 2, 3), (2 * MIB, 0), (12 * MIB + MIB // 2, 3)],
        "qemu:allocation-depth": [(MIB // 2, 0), (2 * MIB, 1), (12 * MIB + MIB // 2, 0)],
    }


def test_replies_in_another_order_than_the_requests(tmp_path: Path) -> None:
    """Reads are delayed, writes are not: later writes overtake earlier reads."""
    server = nbdkit(tmp_path, "--filter=delay", "memory", "16M", "rdelay=200ms")
    with server as uri, connect(uri, timeout=TIMEOUT) as connection:
        read = connection.submit_read(0, bytearray(4096))
        write = connection.submit_write(MIB, b"x")
        assert [connection.next_finished() for _ in range(2)] == [write, read]


def test_the_wait_for_the_server_is_told(tmp_path: Path) -> None:
    server = nbdkit(tmp_path, "--filter=delay", "memory", "16M", "rdelay=200ms")
    with server as uri, connect(uri, timeout=TIMEOUT) as connection:
        connection.write(0, b"x")
        before = connection.waited
        connection.read(0, 4096)
        assert connection.waited - before > 0.15


def test_a_servers_error_leaves_the_connection_alive(tmp_path: Path) -> None:
    script = ("get_size=echo 1048576", "pread=echo EIO the platter is cracked >&2; exit 1")
    with nbdkit(tmp_path, "eval", *script) as uri, connect(uri, timeout=TIMEOUT) as connection:
        for _ in range(2):
            with pytest.raises(RequestError) as caught:
                connection.read(0, 512)
            assert caught.value.error == NbdError.EIO


@pytest.mark.parametrize("structured", [True, False])
def test_injected_errors_fail_their_request_alone(tmp_path: Path, structured: bool) -> None:
    arguments = ["--filter=error", "memory", "16M", "error-pwrite-rate=100%", "error-pwrite=ENOSPC"]
    with nbdkit(tmp_path, *arguments) as uri, connect(uri, structured=structured, timeout=TIMEOUT) as connection:
        read = connection.submit_read(0, bytearray(512))
        write = connection.submit_write(0, b"x")
        connection.wait(read)
        with pytest.raises(RequestError) as caught:
            connection.wait(write)
        assert caught.value.error == NbdError.ENOSPC
        assert connection.read(0, 2) == b"\0\0"


def test_exports_are_listed(tmp_path: Path) -> None:
    image = tmp_path / "disk"
    image.write_bytes(bytes(MIB))
    with activated(tmp_path, "qemu-nbd", "-t", "-f", "raw", "-x", "vda", "-D", "the disk", str(image)) as uri:
        assert list_exports(uri, timeout=TIMEOUT) == (("vda", "the disk"),)


def test_an_export_that_is_not_there_is_refused_with_its_name(tmp_path: Path) -> None:
    image = tmp_path / "disk"
    image.write_bytes(bytes(MIB))
    server = activated(tmp_path, "qemu-nbd", "-t", "-f", "raw", "-x", "vda", str(image))
    with server as uri, pytest.raises(ExportRefused, match="vdb"):
        connect(NbdUri(socket=uri.socket, export="vdb"), timeout=TIMEOUT)


def test_nobody_listening_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        connect(NbdUri(socket=str(tmp_path / "nothing")), timeout=TIMEOUT)


def test_a_read_only_export_takes_no_writes(tmp_path: Path) -> None:
    with nbdkit(tmp_path, "-r", "memory", "16M") as uri, connect(uri, timeout=TIMEOUT) as connection:
        with pytest.raises(RequestError, match="read-only") as caught:
            connection.write(0, b"x")
        assert caught.value.error == NbdError.EPERM
        with pytest.raises(RequestError):
            connection.write_zeroes(0, 512)


@pytest.mark.parametrize("offset, length", [(-1, 512), (16 * MIB, 1), (16 * MIB - 1, 2), (0, 0), (1 << 63, 1)])
def test_what_lies_outside_the_export_is_never_asked(tmp_path: Path, offset: int, length: int) -> None:
    with nbdkit(tmp_path, "memory", "16M") as uri, connect(uri, timeout=TIMEOUT) as connection:
        with pytest.raises(ValueError, match="is not within"):
            connection.read(offset, length)
        with pytest.raises(ValueError, match="is not within"):
            connection.trim(offset, length)


def test_more_than_the_maximum_payload_is_never_asked(tmp_path: Path) -> None:
    with nbdkit(tmp_path, "memory", "1G") as uri, connect(uri, timeout=TIMEOUT) as connection:
        assert connection.maximum_payload < connection.size
        with pytest.raises(ValueError, match="is above"):
            connection.read(0, connection.maximum_payload + 1)


def test_a_command_that_was_not_offered_is_never_sent(tmp_path: Path) -> None:
    server = nbdkit(tmp_path, "--filter=nozero", "memory", "16M", "zeromode=none")
    with server as uri, connect(uri, timeout=TIMEOUT) as connection:
        assert not connection.contexts
        with pytest.raises(RequestError, match="offers no WRITE_ZEROES"):
            connection.write_zeroes(0, 512)
        with pytest.raises(RequestError, match="offers no block status"):
            connection.block_status(0, 512)


def test_a_closed_connection_says_so(tmp_path: Path) -> None:
    with nbdkit(tmp_path, "memory", "16M") as uri:
        connection = connect(uri, timeout=TIMEOUT)
        connection.close()
        connection.close()
        with pytest.raises(ConnectionError, match="it was closed"):
            connection.read(0, 512)
        with pytest.raises(LookupError):
            connection.next_finished()


def test_tcp_works_as_well(children: Children) -> None:
    listener = listen_tcp()
    uri = NbdUri(host="127.0.0.1", port=port_of(listener))
    children.start("nbdkit", "-f", "memory", "16M", activate=listener)
    with connect(uri, timeout=TIMEOUT) as connection:
        connection.write(0, b"over TCP")
        assert connection.read(0, 8) == b"over TCP"
