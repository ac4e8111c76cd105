"""Connections that are lost on the way: the pull comes back, and ends byte-exact, or with the first error."""

from __future__ import annotations

import itertools
import random
import socket
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from fleecing.client.connection import Connection
from fleecing.errors import FleecingError
from fleecing.nbd.client_handshake import ExportRefused
from fleecing.nbd.uri import NbdUri
from fleecing.pull.connecting import connect_unless
from fleecing.pull.engine import pull
from fleecing.pull.journal import Journal
from fleecing.pull.limiter import Bandwidth
from fleecing.pull.options import Check, Progress, PullOptions, PullReport
from fleecing.pull.qcow2_codec import Compression
from fleecing.pull.qcow2_target import Qcow2Options, Qcow2Target
from fleecing.pull.source import Source
from fleecing.pull.target import RawTarget
from fleecing.units import KiB, MiB
from tests.client.servers import FLAGS, activated, cutting, nbd_server, nbdkit, served, shake_hands, take
from tests.images import make_sparse
from tests.peers import Child, listen_unix, run
from tests.serving import Serve

SIZE = 24 * MiB + 777
COMES_BACK = PullOptions(piece=256 * KiB, reconnect=30, timeout=20)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.raw"
    chance = random.Random(4)
    make_sparse(path, SIZE, {0: chance.randbytes(9 * MiB), 15 * MiB: chance.randbytes(6 * MiB), SIZE - 9: b"e" * 9})
    return path


def pull_raw(path: Path, uri: NbdUri, options: PullOptions = COMES_BACK) -> PullReport:
    return pull(uri, lambda size: RawTarget.create(str(path), size), options)


@contextmanager
def mortal_nbdkit(folder: Path, *arguments: str) -> Iterator[NbdUri]:
    """nbdkit, started again whenever it has ended, as systemd would; its socket stays."""
    ended = threading.Event()

    def keep() -> None:
        for number in itertools.count():
            if ended.is_set():
                return
            with Child(["nbdkit", "-f", *arguments], folder, name=f"nbdkit{number}", activate=listener.dup()) as child:
                while child.returncode is None and not ended.wait(0.01):
                    pass

    with listen_unix(folder / "peer.sock") as listener:
        keeper = threading.Thread(target=keep)
        keeper.start()
        try:
            yield NbdUri(socket=str(folder / "peer.sock"))
        finally:
            ended.set()
            keeper.join()


def peer(kind: str, folder: Path, image: Path) -> AbstractContextManager[NbdUri]:
    if kind == "qemu-nbd":
        return activated(folder, "qemu-nbd", "-t", "-r", "-e", "99", "-f", "raw", "-x", "", str(image))
    if kind == "qemu-storage-daemon":
        words = ["--blockdev", f"driver=raw,node-name=d,read-only=on,file.driver=file,file.filename={image}"]
        words += ["--nbd-server", "addr.type=fd,addr.str=3,max-connections=0"]
        return activated(folder, "qemu-storage-daemon", *words, "--export", "type=nbd,id=e,node-name=d,name=")
    if kind == "nbd-server":
        return nbd_server(folder, image)
    # It ends with its last client. Besides, 1.32 aborts in raw_send_socket where a connection is cut.
    filters = ("--filter=exitlast", "--filter=delay")
    return mortal_nbdkit(folder, "-r", *filters, "file", str(image), "rdelay=1ms")


@pytest.mark.parametrize(
    "kind, seed",
    [("qemu-nbd", 0), ("qemu-nbd", 1), ("qemu-storage-daemon", 2), ("nbd-server", 3), ("nbdkit", 4), ("nbdkit", 5)],
)
def test_a_pull_through_many_cuts_is_byte_exact(tmp_path: Path, image: Path, kind: str, seed: int) -> None:
    """Cut in handshakes, in headers, in payloads."""
    chance = random.Random(seed)
    budgets = [chance.choice([10, 200, 70_000, 1_000_000, 3_000_000]) + chance.randrange(100) for _ in range(12)]
    (tmp_path / "relay").mkdir()
    with peer(kind, tmp_path, image) as inner, cutting(tmp_path / "relay", inner, [MiB, *budgets]) as uri:
        report = pull_raw(tmp_path / "copy", uri)
    # qemu-nbd and nbd-server tell whole sectors, the one rounded up, the other down
    assert abs(report.size - SIZE) < 512
    assert (tmp_path / "copy").read_bytes() == image.read_bytes().ljust(report.size, b"\0")[: report.size]
    assert report.reconnects > 0


def test_a_server_that_takes_few_connections_gives_its_data_over_them(tmp_path: Path, image: Path) -> None:
    """nbdkit tells that connections can be shared, and hangs up on each that is one too many."""
    with nbdkit(tmp_path, "-r", "--filter=limit", "file", str(image), "limit=2") as uri:
        pull_raw(tmp_path / "copy", uri)
    assert (tmp_path / "copy").read_bytes() == image.read_bytes()


def test_a_trimmed_snapshot_survives_cuts_and_is_trimmed_as_a_whole(serve: Serve, tmp_path: Path, image: Path) -> None:
    server = serve(image)
    inner = NbdUri.parse(server.snapshot(name="s"))
    with cutting(tmp_path, inner, [2 * MiB] * 6) as uri:
        target = tmp_path / "copy.qcow2"
        options = Qcow2Options(Compression.ZSTD)
        report = pull(uri, lambda size: Qcow2Target.create(str(target), size, options), COMES_BACK)
    assert report.reconnects > 0
    run("qemu-img", "check", "-f", "qcow2", str(target))
    run("qemu-img", "compare", "-f", "raw", "-F", "qcow2", str(image), str(target))
    assert server.show("vda@s")["clusters"]["trimmed"] * 65536 >= SIZE


def test_a_server_that_is_killed_and_started_again_is_found(tmp_path: Path, image: Path) -> None:
    """nbdkit, killed in the middle; the socket is away meanwhile."""
    arguments = ("-r", "file", str(image))
    written = threading.Event()
    ended = threading.Event()
    uri = NbdUri(socket=str(tmp_path / "peer.sock"))
    listener = listen_unix(tmp_path / "peer.sock")

    class Tells(RawTarget):
        def write(self, offset: int, data: memoryview) -> None:
            super().write(offset, data)
            written.set()

    def serve_twice() -> None:
        with Child(["nbdkit", "-f", *arguments], tmp_path, activate=listener) as first:
            written.wait(20)
            first.kill()
        (tmp_path / "peer.sock").unlink()
        with nbdkit(tmp_path, *arguments):
            ended.wait(60)

    slowly = replace(COMES_BACK, bandwidth=Bandwidth(10 * MiB))
    servers = threading.Thread(target=serve_twice)
    servers.start()
    try:
        report = pull(uri, lambda size: Tells.create(str(tmp_path / "copy"), size), slowly)
    finally:
        ended.set()
        servers.join()
    assert (tmp_path / "copy").read_bytes() == image.read_bytes()
    assert report.reconnects > 0


def test_a_server_that_never_comes_back_is_an_error_after_a_while(tmp_path: Path, image: Path) -> None:
    (tmp_path / "relay").mkdir()
    with (
        nbdkit(tmp_path, "-r", "file", str(image)) as inner,
        cutting(tmp_path / "relay", inner, [MiB] + [0] * 1000) as uri,
        pytest.raises((OSError, FleecingError), match="closed the connection"),
    ):
        pull_raw(tmp_path / "copy", uri, PullOptions(connections=1, reconnect=0.3))
    assert not (tmp_path / "copy").exists()


@pytest.mark.parametrize("reconnect", [0.2, 3600.0])
def test_a_connection_that_cannot_come_back_is_no_loss_where_another_has_all_the_rest(
    tmp_path: Path, image: Path, reconnect: float
) -> None:
    """With a short time the other one goes on when it is over, with a long one nobody waits for it at the end."""
    (tmp_path / "relay").mkdir()
    budgets = [MiB, 1 << 62] + [0] * 1000
    slowly = replace(COMES_BACK, connections=2, reconnect=reconnect, bandwidth=Bandwidth(10 * MiB))
    with (
        nbdkit(tmp_path, "-r", "file", str(image)) as inner,
        cutting(tmp_path / "relay", inner, budgets) as uri,
    ):
        report = pull_raw(tmp_path / "copy", uri, slowly)
    assert (tmp_path / "copy").read_bytes() == image.read_bytes()
    assert report.reconnects == 0
    assert len(budgets) < 1000  # it was tried


def test_nobody_waits_for_a_server_that_says_nothing_when_another_connection_has_had_all(
    tmp_path: Path, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, over, connect = threading.Event(), threading.Event(), Source.connect
    first = [True]

    def silent(source: Source) -> Connection:
        if first and first.pop():
            return connect(source)
        asked.set()
        assert over.wait(60)
        raise ConnectionError("too late")

    monkeypatch.setattr(Source, "connect", silent)
    (tmp_path / "relay").mkdir()
    slowly = replace(COMES_BACK, connections=2, timeout=3600, reconnect=3600, bandwidth=Bandwidth(10 * MiB))
    try:
        with (
            nbdkit(tmp_path, "-r", "file", str(image)) as inner,
            cutting(tmp_path / "relay", inner, [MiB]) as uri,
        ):
            pull_raw(tmp_path / "copy", uri, slowly)
        assert asked.is_set()
    finally:
        over.set()
    assert (tmp_path / "copy").read_bytes() == image.read_bytes()


def test_connections_that_are_all_lost_for_good_are_an_error(tmp_path: Path, image: Path) -> None:
    (tmp_path / "relay").mkdir()
    with (
        nbdkit(tmp_path, "-r", "file", str(image)) as inner,
        cutting(tmp_path / "relay", inner, [MiB, 2 * MiB, 3 * MiB] + [0] * 1000) as uri,
        pytest.raises((OSError, FleecingError), match="closed the connection"),
    ):
        pull_raw(tmp_path / "copy", uri, PullOptions(connections=3, reconnect=0.2, piece=256 * KiB))
    assert not (tmp_path / "copy").exists()


def test_another_snapshot_of_the_same_name_is_not_taken_for_the_first(
    serve: Serve, tmp_path: Path, image: Path
) -> None:
    """The second run finds a new snapshot under the old name: it must not mix the two."""
    server = serve(image)
    uri = NbdUri.parse(server.snapshot(name="s"))
    journal = Journal(str(tmp_path / "j"))

    class Stops(RawTarget):
        def write(self, offset: int, data: memoryview) -> None:
            if offset > 4 * MiB:
                raise OSError(28, "No space left on device", self.path)
            super().write(offset, data)

    def broken(size: int) -> RawTarget:
        target = RawTarget.create(str(tmp_path / "copy"), size)
        target.__class__ = Stops
        return target

    with pytest.raises(OSError, match="No space"):
        pull(uri, broken, PullOptions(connections=1, depth=1, check=Check.CRC32), journal=journal)
    journal.close()
    server.delete("vda@s")
    server.snapshot(name="s")
    again = Journal.resume(str(tmp_path / "j"))
    with pytest.raises(FleecingError, match="belongs to another pull"):
        pull(uri, lambda size: RawTarget.resume(str(tmp_path / "copy"), size), PullOptions(), journal=again)


def test_an_export_that_is_gone_is_told_at_once(serve: Serve, tmp_path: Path, image: Path) -> None:
    server = serve(image)
    inner = NbdUri.parse(server.snapshot(name="s"))
    deleted = threading.Event()

    class Deletes(RawTarget):
        def write(self, offset: int, data: memoryview) -> None:
            if not deleted.is_set():
                deleted.set()
                server.delete("vda@s")
            super().write(offset, data)

    with pytest.raises(FleecingError) as caught:
        pull(inner, lambda size: Deletes.create(str(tmp_path / "copy"), size), COMES_BACK)
    assert isinstance(caught.value, ExportRefused) or "deleted" in str(caught.value)


def test_a_pull_that_is_stopped_does_not_wait_for_a_server_that_says_nothing(tmp_path: Path) -> None:
    """It is lost, and when the pull comes back, it takes the connection and does not greet."""
    first, hangs = threading.Semaphore(2), threading.Event()

    def serve(sock: socket.socket) -> None:
        if first.acquire(blocking=False):
            shake_hands(sock, FLAGS, ())
            take(sock, 1)
            return
        hangs.set()
        while sock.recv(65536):
            pass

    def stop(_: Progress) -> None:
        if hangs.is_set():
            raise KeyboardInterrupt

    options = PullOptions(connections=2, timeout=3600, reconnect=3600)
    with served(tmp_path, serve) as uri, pytest.raises(KeyboardInterrupt):
        pull(uri, lambda size: RawTarget.create(str(tmp_path / "copy"), size), options, progress=stop)
    assert not list(tmp_path.glob("copy*"))


class Late:
    """A connection that comes too late."""

    def __init__(self) -> None:
        self.closed = threading.Event()

    def close(self) -> None:
        self.closed.set()


def test_a_connection_that_comes_when_the_pull_has_been_stopped_is_closed() -> None:
    stopped, comes, late = threading.Event(), threading.Event(), Late()

    def connect() -> Late:
        stopped.set()
        comes.wait()
        return late

    with pytest.raises(ConnectionError, match="nobody needs"):
        connect_unless(stopped.is_set, connect)
    assert not late.closed.is_set()
    comes.set()
    assert late.closed.wait(60)
