"""A pipe and another export as targets."""

from __future__ import annotations

import errno
import os
import random
import re
import socket
import threading
from pathlib import Path

import pytest

from fleecing.client.connection import Connection
from fleecing.errors import BlockError, ImageError, RequestError
from fleecing.nbd.client_handshake import ExportRefused
from fleecing.nbd.constants import TransmissionFlag
from fleecing.nbd.handshake import Agreement
from fleecing.nbd.uri import NbdUri
from fleecing.pull.engine import pull
from fleecing.pull.nbd_target import NbdTarget
from fleecing.pull.options import PullOptions
from fleecing.pull.stream_target import WINDOW, StreamTarget
from fleecing.units import KiB, MiB
from tests.client.servers import FLAGS, TIMEOUT, activated, cutting, nbdkit, scripted, served, shake_hands
from tests.images import make_image

SIZE = 48 * MiB + 333


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.raw"
    with path.open("wb") as file:
        file.write(random.Random(2).randbytes(9 * MiB))
        file.seek(SIZE - 1000)
        file.write(b"e" * 1000)
    return path


class Reader(threading.Thread):
    """Collects what comes out of a pipe; gives up after `most` bytes."""

    def __init__(self, most: int = 1 << 62) -> None:
        super().__init__()
        self._out, self.end = os.pipe()
        self._most = most
        self.data = bytearray()
        self.start()

    def run(self) -> None:
        while len(self.data) < self._most and (piece := os.read(self._out, 1 << 20)):
            self.data += piece
        os.close(self._out)


def pull_to_pipe(uri: NbdUri, reader: Reader, options: PullOptions) -> None:
    try:
        pull(uri, lambda size: StreamTarget(reader.end, size), options)
    finally:
        os.close(reader.end)
        reader.join()


@pytest.mark.parametrize("connections, piece", [(1, MiB), (4, 64 * KiB)])
def test_a_pipe_gets_all_bytes_in_order(tmp_path: Path, image: Path, connections: int, piece: int) -> None:
    reader = Reader()
    arguments = ("--filter=delay", "file", str(image), "rdelay=1ms")
    with nbdkit(tmp_path, "-r", *arguments) as uri:
        pull_to_pipe(uri, reader, PullOptions(connections=connections, depth=4, piece=piece))
    assert reader.data == image.read_bytes()


def test_a_reader_that_hangs_up_ends_the_pull_with_a_sentence(tmp_path: Path, image: Path) -> None:
    reader = Reader(most=1)
    with nbdkit(tmp_path, "-r", "file", str(image)) as uri, pytest.raises(BlockError, match="has hung up"):
        pull_to_pipe(uri, reader, PullOptions())


def test_nothing_is_held_beyond_the_window() -> None:
    out, end = os.pipe()
    target = StreamTarget(end, SIZE)
    assert target.limit() == WINDOW
    target.write(4096, memoryview(b"2" * 4096))
    assert target.limit() == WINDOW
    target.write(0, memoryview(b"1" * 4096))
    assert target.limit() == WINDOW + 8192
    assert os.read(out, 65536) == b"1" * 4096 + b"2" * 4096
    with pytest.raises(BlockError, match=f"only 8192 of {SIZE}"):
        target.finish()
    os.close(out)
    os.close(end)


@pytest.mark.parametrize("kind", ["qemu-nbd", "nbdkit memory", "nbdkit without zeroes"])
def test_another_export_gets_all_bytes(tmp_path: Path, image: Path, kind: str) -> None:
    """Over old contents, on one connection or on several, with and without WRITE_ZEROES."""
    old = tmp_path / "old.raw"
    make_image(old, 64 * MiB)
    (tmp_path / "to").mkdir()
    server = {
        "qemu-nbd": ["qemu-nbd", "-t", "-e", "9", "-f", "raw", "-x", "", str(old)],
        "nbdkit memory": ["nbdkit", "-f", "file", str(old)],
        "nbdkit without zeroes": ["nbdkit", "-f", "--filter=nozero", "file", str(old), "zeromode=none"],
    }[kind]
    with (
        nbdkit(tmp_path, "-r", "file", str(image)) as uri,
        activated(tmp_path / "to", *server) as there,
    ):
        pull(uri, lambda size: NbdTarget(there, size), PullOptions(piece=256 * KiB))
    data = old.read_bytes()
    assert data[:SIZE] == image.read_bytes()
    assert len(data) == 64 * MiB and any(data[SIZE + 512 :])


@pytest.mark.parametrize(
    "arguments, problem", [(("memory", "1M"), "has 1048576 bytes"), (("-r", "memory", "1G"), "read-only")]
)
def test_an_export_that_cannot_take_it_is_refused(
    tmp_path: Path, image: Path, arguments: tuple[str, ...], problem: str
) -> None:
    (tmp_path / "to").mkdir()
    with (
        nbdkit(tmp_path, "-r", "file", str(image)) as uri,
        nbdkit(tmp_path / "to", *arguments) as there,
        pytest.raises(ImageError, match=problem),
    ):
        pull(uri, lambda size: NbdTarget(there, size))


def test_a_connection_that_is_made_when_the_pull_has_failed_is_cut(tmp_path: Path) -> None:
    """The thread that makes it would wait for an answer of this server, and the pull for the thread."""

    def never(sock: socket.socket, _: Agreement) -> None:
        while sock.recv(65536):
            pass

    with scripted(tmp_path, never, contexts=()) as there:
        target = NbdTarget(there, SIZE, timeout=TIMEOUT)
        target.cancel()
        with pytest.raises(ConnectionError):
            target.write(0, memoryview(b"1" * 512))
        target.abandon()


def test_a_target_that_is_cancelled_does_not_wait_for_a_server_that_says_nothing(tmp_path: Path) -> None:
    """A thread's own connection is taken, and not greeted."""
    served_first, hangs, ended = threading.Event(), threading.Event(), threading.Event()

    def serve(sock: socket.socket) -> None:
        if not served_first.is_set():
            served_first.set()
            shake_hands(sock, FLAGS, ())
        else:
            hangs.set()
        while sock.recv(65536):
            pass

    def write() -> None:
        with pytest.raises(ConnectionError):
            target.write(0, memoryview(b"1" * 512))
        ended.set()

    with served(tmp_path, serve) as there:
        target = NbdTarget(there, SIZE, timeout=3600)
        writer = threading.Thread(target=write)
        writer.start()
        assert hangs.wait(TIMEOUT)
        target.cancel()
        assert ended.wait(TIMEOUT)
        target.abandon()
    writer.join(TIMEOUT)


def test_an_error_of_the_other_export_ends_the_pull(tmp_path: Path, image: Path) -> None:
    (tmp_path / "to").mkdir()
    failing = ("--filter=error", "memory", "64M", "error-pwrite-rate=100%", "error=ENOSPC")
    with (
        nbdkit(tmp_path, "-r", "file", str(image)) as uri,
        nbdkit(tmp_path / "to", *failing) as there,
        pytest.raises(RequestError, match=f"^{re.escape(str(there))}: .* ENOSPC"),
    ):
        pull(uri, lambda size: NbdTarget(there, size), PullOptions(reconnect=30))


@pytest.mark.parametrize(
    "budgets, error",
    [
        ([0], ExportRefused),
        ([1 << 30] + [0] * 9, ExportRefused),
        ([600] * 9, ConnectionError),
    ],
)
def test_whatever_happens_to_the_other_export_is_told_of_it(
    tmp_path: Path, image: Path, budgets: list[int], error: type[Exception]
) -> None:
    """It hangs up on the first connection, on one that a thread makes for itself, or in the middle."""
    (tmp_path / "to").mkdir()
    (tmp_path / "relay").mkdir()
    with (
        nbdkit(tmp_path, "-r", "file", str(image)) as uri,
        nbdkit(tmp_path / "to", "memory", "64M") as inner,
        cutting(tmp_path / "relay", inner, budgets) as there,
        pytest.raises(error, match=re.escape(str(there))),
    ):
        pull(uri, lambda size: NbdTarget(there, size), PullOptions(piece=64 * KiB, reconnect=30))


def test_an_error_of_the_systems_is_told_with_the_other_export(tmp_path: Path) -> None:
    """Those of the network have no name of a file."""

    def never(sock: socket.socket, _: Agreement) -> None:
        while sock.recv(65536):
            pass

    with scripted(tmp_path, never, contexts=(), flags=FLAGS & ~TransmissionFlag.CAN_MULTI_CONN) as there:
        target = NbdTarget(there, SIZE, timeout=TIMEOUT)
        with pytest.MonkeyPatch.context() as patched:

            def unreachable(*_: object) -> None:
                raise OSError(errno.EHOSTUNREACH, os.strerror(errno.EHOSTUNREACH))

            patched.setattr(Connection, "_take", unreachable)
            with pytest.raises(OSError, match=f"No route to host: '{re.escape(str(there))}'"):
                target.write(0, memoryview(b"1" * 512))
        target.abandon()
