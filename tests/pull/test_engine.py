"""The pull: byte-exact from real servers, trimmed behind the read head, stopped by the first error of any part."""

from __future__ import annotations

import os
import random
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from fleecing.errors import RequestError
from fleecing.nbd.constants import BASE_ALLOCATION, Cmd, NbdError, ReplyMode, TransmissionFlag
from fleecing.nbd.handshake import Agreement
from fleecing.nbd.transmission import EXTENDED_REQUEST, block_status_reply, data_header, done_reply, error_reply
from fleecing.nbd.uri import NbdUri
from fleecing.pull.engine import pull
from fleecing.pull.options import Progress, PullOptions, PullReport, Trim
from fleecing.pull.source import CLUSTER_STATE
from fleecing.pull.target import RawTarget, Target
from tests.client.servers import FLAGS, activated, nbd_server, nbdkit, scripted, take
from tests.peers import run

KiB, MiB = 1 << 10, 1 << 20
CLUSTER = 64 * KiB
EXTENDED = ReplyMode.EXTENDED
SNAPSHOT = (BASE_ALLOCATION, CLUSTER_STATE)

# An odd size, with data and zeroes that begin and end inside clusters
SIZE = 21 * MiB + 4321


@pytest.fixture(scope="module")
def contents() -> bytes:
    data = bytearray(SIZE)
    chance = random.Random(3)
    for start, length in ((0, 3 * MiB + 5), (7 * MiB - 100, 200), (9 * MiB, 4 * MiB), (SIZE - 10, 10)):
        data[start : start + length] = chance.randbytes(length)
    return bytes(data)


@pytest.fixture
def image(tmp_path: Path, contents: bytes) -> Path:
    """The contents as a sparse raw file."""
    path = tmp_path / "disk.raw"
    with path.open("wb") as file:
        for start in range(0, SIZE, 4096):
            if block := contents[start : start + 4096].rstrip(b"\0"):
                file.seek(start)
                file.write(block)
        file.truncate(SIZE)
    return path


@pytest.fixture(params=["nbdkit", "qemu-nbd raw", "qemu-nbd qcow2", "qemu-storage-daemon", "nbd-server"])
def peer(request: pytest.FixtureRequest, tmp_path: Path, image: Path) -> Iterator[NbdUri]:
    server: AbstractContextManager[NbdUri]
    if request.param == "nbdkit":
        server = nbdkit(tmp_path, "-r", "file", str(image))
    elif request.param == "nbd-server":
        server = nbd_server(tmp_path, image)
    elif request.param == "qemu-storage-daemon":
        blockdev = f"driver=raw,node-name=disk,read-only=on,file.driver=file,file.filename={image}"
        export = "type=nbd,id=e,node-name=disk,name="
        words = [
            "--blockdev",
            blockdev,
            "--nbd-server",
            "addr.type=fd,addr.str=3,max-connections=0",
            "--export",
            export,
        ]
        server = activated(tmp_path, "qemu-storage-daemon", *words)
    else:
        form = request.param.split()[1]
        if form == "qcow2":
            run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", str(image), str(tmp_path / "disk.qcow2"))
        server = activated(
            tmp_path, "qemu-nbd", "-t", "-r", "-e", "9", "-f", form, "-x", "", str(tmp_path / f"disk.{form}")
        )
    with server as uri:
        yield uri


def pull_to(path: Path, uri: NbdUri, options: PullOptions | None = None, **more: object) -> PullReport:
    return pull(uri, lambda size: RawTarget.create(str(path), size), options, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize("connections, depth, piece", [(1, 1, MiB), (4, 4, 256 * KiB), (3, 16, 10)])
def test_a_pull_is_byte_exact(
    peer: NbdUri, tmp_path: Path, contents: bytes, connections: int, depth: int, piece: int
) -> None:
    copy = tmp_path / "copy"
    report = pull_to(copy, peer, PullOptions(connections=connections, depth=depth, piece=piece))
    data = copy.read_bytes()
    # qemu-nbd and nbd-server tell whole sectors, the one rounded up, the other down
    assert len(data) == report.size
    assert abs(report.size - SIZE) < 512
    assert data == contents.ljust(report.size, b"\0")[: report.size]
    assert report.data + report.zeroes == report.size
    assert report.trimmed == 0


def test_zeroes_are_not_read_and_take_no_space(tmp_path: Path, image: Path) -> None:
    copy = tmp_path / "copy"
    with nbdkit(tmp_path, "-r", "file", str(image)) as uri:
        report = pull_to(copy, uri)
    assert report.data < 8 * MiB
    assert copy.stat().st_blocks * 512 < SIZE // 2


def test_a_pull_out_of_order_is_byte_exact(tmp_path: Path, image: Path, contents: bytes) -> None:
    """Some reads are late: those behind them overtake."""
    copy = tmp_path / "copy"
    arguments = ("--filter=delay", "file", str(image), "rdelay=10ms")
    with nbdkit(tmp_path, "-r", *arguments) as uri:
        pull_to(copy, uri, PullOptions(connections=2, depth=8, piece=256 * KiB))
    assert copy.read_bytes() == contents


def test_errors_of_the_server_end_the_pull_and_leave_nothing(tmp_path: Path, image: Path) -> None:
    with nbdkit(tmp_path, "-r", "--filter=error", "file", str(image), "error-pread-rate=30%", "error=EIO") as uri:
        with pytest.raises(RequestError) as caught:
            pull_to(tmp_path / "copy", uri, PullOptions(piece=64 * KiB))
        assert caught.value.error == NbdError.EIO
    assert not [name for name in os.listdir(tmp_path) if name.startswith("copy")]


# A server whose every request is seen


class Disk:
    """An export in memory that notes its requests, in one list with what the target is given."""

    def __init__(self, data: bytes, contexts: tuple[str, ...] = SNAPSHOT, flags: TransmissionFlag = FLAGS) -> None:
        self.data = data.ljust(64 * MiB, b"\0")
        self.used = len(data)
        self.contexts = contexts
        self.flags = flags
        self.events: list[tuple[str, int, int]] = []
        self.connections = 0
        self.refuse: Callable[[str, int], bytes | None] = lambda command, offset: None

    def __call__(self, sock: socket.socket, agreement: Agreement) -> None:
        self.connections += 1
        while True:
            _, _, kind, cookie, offset, length = EXTENDED_REQUEST.unpack(take(sock, EXTENDED_REQUEST.size))
            command = Cmd(kind).name
            if command == "DISC":
                return
            self.events.append((command, offset, length))
            refusal = self.refuse(command, offset)
            if refusal is not None:
                if not refusal:
                    return
                sock.sendall(error_reply(EXTENDED, cookie, offset, NbdError.EINVAL, refusal.decode()))
            elif command == "READ":
                sock.sendall(data_header(EXTENDED, cookie, offset, length) + self.data[offset : offset + length])
            elif command == "BLOCK_STATUS":
                data = min(max(self.used - offset, 0), length)
                runs = [(n, s) for n, s in ((data, 0), (length - data, 3)) if n]
                sock.sendall(block_status_reply(EXTENDED, cookie, offset, [(i, runs) for i, _ in agreement.contexts]))
            else:
                sock.sendall(done_reply(EXTENDED, cookie, offset))

    def of(self, command: str) -> list[tuple[int, int]]:
        return [(offset, length) for name, offset, length in self.events if name == command]


class Memory(Target):
    """A target in memory that notes what it is given."""

    def __init__(self, size: int, events: list[tuple[str, int, int]]) -> None:
        self.data = bytearray(size)
        self.events = events
        self.ended: list[str] = []
        self.fail: Exception | None = None

    def write(self, offset: int, data: memoryview) -> None:
        if self.fail is not None:
            raise self.fail
        self.data[offset : offset + len(data)] = data
        self.events.append(("written", offset, len(data)))

    def zero(self, offset: int, length: int) -> None:
        self.events.append(("written", offset, length))

    def finish(self) -> None:
        self.ended.append("finished")

    def abandon(self) -> None:
        self.ended.append("abandoned")


class Run:
    """A pull of a `Disk` into a `Memory`."""

    def __init__(self, tmp_path: Path, disk: Disk) -> None:
        self.disk = disk
        self.target = Memory(64 * MiB, disk.events)
        self._folder = tmp_path

    def __call__(
        self, options: PullOptions | None = None, progress: Callable[[Progress], None] | None = None
    ) -> PullReport:
        def open_target(size: int) -> Memory:
            assert size == 64 * MiB
            return self.target

        with scripted(self._folder, self.disk, contexts=self.disk.contexts, flags=self.disk.flags) as uri:
            return pull(uri, open_target, options, progress=progress, interval=0.01)


def data_of(length: int) -> bytes:
    return random.Random(5).randbytes(length)


def test_all_of_a_snapshot_is_trimmed_each_piece_after_it_was_written(tmp_path: Path) -> None:
    run = Run(tmp_path, Disk(data_of(5 * MiB - 3 * CLUSTER - 7)))
    report = run()
    assert run.target.data == run.disk.data
    assert report.trimmed == report.size
    trims = run.disk.of("TRIM")
    assert sum(length for _, length in trims) == 64 * MiB
    for offset, length in trims:
        assert not offset % CLUSTER and not length % CLUSTER
        assert run.disk.events.index(("written", offset, length)) < run.disk.events.index(("TRIM", offset, length))


def test_every_byte_of_data_is_read_once(tmp_path: Path) -> None:
    run = Run(tmp_path, Disk(data_of(5 * MiB)))
    report = run(PullOptions(connections=3, depth=2, piece=128 * KiB))
    assert sorted(run.disk.of("READ")) == [(at, 128 * KiB) for at in range(0, 5 * MiB, 128 * KiB)]
    assert report.data == 5 * MiB


@pytest.mark.parametrize("trim", [Trim.SNAPSHOT, Trim.NEVER])
def test_a_disk_in_use_is_not_trimmed(tmp_path: Path, trim: Trim) -> None:
    run = Run(tmp_path, Disk(data_of(MiB), contexts=(BASE_ALLOCATION,)))
    assert run(PullOptions(trim=trim)).trimmed == 0
    assert not run.disk.of("TRIM")


def test_a_snapshot_is_not_trimmed_when_it_is_not_wanted(tmp_path: Path) -> None:
    run = Run(tmp_path, Disk(data_of(MiB)))
    assert run(PullOptions(trim=Trim.NEVER)).trimmed == 0
    assert not run.disk.of("TRIM")


def test_any_export_is_trimmed_when_it_must_be(tmp_path: Path) -> None:
    run = Run(tmp_path, Disk(data_of(MiB), contexts=()))
    assert run(PullOptions(trim=Trim.ALWAYS)).trimmed == 64 * MiB


def test_an_export_without_trim_is_refused_where_it_must_be_trimmed(tmp_path: Path) -> None:
    run = Run(tmp_path, Disk(data_of(MiB), flags=FLAGS & ~TransmissionFlag.SEND_TRIM))
    with pytest.raises(RequestError, match="offers no TRIM"):
        run(PullOptions(trim=Trim.ALWAYS))
    assert run.target.ended == ["abandoned"]


@pytest.mark.parametrize("shared, expected", [(TransmissionFlag.CAN_MULTI_CONN, 4), (TransmissionFlag(0), 1)])
def test_several_connections_only_where_the_export_can_share_them(
    tmp_path: Path, shared: TransmissionFlag, expected: int
) -> None:
    run = Run(tmp_path, Disk(data_of(MiB), flags=FLAGS & ~TransmissionFlag.CAN_MULTI_CONN | shared))
    run(PullOptions(connections=4))
    assert run.disk.connections == expected


@pytest.mark.parametrize("command", ["READ", "TRIM", "BLOCK_STATUS"])
def test_the_first_refusal_stops_everything_with_the_servers_text(tmp_path: Path, command: str) -> None:
    run = Run(tmp_path, Disk(data_of(20 * MiB)))
    refused = threading.Event()

    def refuse(name: str, offset: int) -> bytes | None:
        if name == command:
            refused.set()
        return b"cluster at offset 0: trimmed" if name == command else None

    run.disk.refuse = refuse
    with pytest.raises(RequestError, match="cluster at offset 0: trimmed"):
        run()
    assert run.target.ended == ["abandoned"]


def test_a_server_that_hangs_up_ends_the_pull(tmp_path: Path) -> None:
    run = Run(tmp_path, Disk(data_of(20 * MiB)))
    run.disk.refuse = lambda name, offset: b"" if name == "READ" and offset >= 10 * MiB else None
    with pytest.raises(ConnectionError, match="closed the connection"):
        run()
    assert run.target.ended == ["abandoned"]


def test_an_error_of_the_target_ends_the_pull_and_nothing_unwritten_is_trimmed(tmp_path: Path) -> None:
    run = Run(tmp_path, Disk(data_of(20 * MiB)))
    run.target.fail = OSError(28, "No space left on device", "copy")
    with pytest.raises(OSError, match="No space left on device"):
        run()
    assert run.target.ended == ["abandoned"]
    assert not [offset for offset, _ in run.disk.of("TRIM") if offset < 20 * MiB]


def test_a_target_that_shuts_down_is_no_reason_to_connect_to_the_source_again(tmp_path: Path) -> None:
    """ESHUTDOWN of the source is a loss that a new connection mends; of the target it is the end."""
    run = Run(tmp_path, Disk(data_of(5 * MiB)))
    run.target.fail = RequestError(NbdError.ESHUTDOWN, "the server is going down")
    with pytest.raises(RequestError, match="is going down"):
        run(PullOptions(reconnect=60))
    assert run.target.ended == ["abandoned"]


def test_an_error_of_one_connection_ends_those_that_wait(tmp_path: Path) -> None:
    """Three connections wait for an answer that never comes; the fourth one's error must not wait for them."""
    run = Run(tmp_path, Disk(data_of(20 * MiB)))
    waiting = threading.Semaphore(0)
    ended = threading.Event()

    def refuse(name: str, offset: int) -> bytes | None:
        if name != "READ":
            return None
        if offset < 3 * MiB:
            waiting.release()
            ended.wait(60)
            return b""
        for _ in range(3):
            waiting.acquire()
        return b"enough"

    run.disk.refuse = refuse
    target_abandon = run.target.abandon

    def abandon() -> None:
        target_abandon()
        ended.set()

    run.target.abandon = abandon  # type: ignore[method-assign]
    with pytest.raises(RequestError, match="enough"):
        run(PullOptions(connections=4, depth=1, piece=MiB))
    assert ended.is_set()


def test_progress_grows_to_the_whole(tmp_path: Path) -> None:
    run = Run(tmp_path, Disk(data_of(30 * MiB)))
    told: list[Progress] = []
    run(progress=told.append)
    done = [progress.done for progress in told]
    assert done == sorted(done)
    assert done[-1] == told[-1].total == 64 * MiB
    assert told[-1].rate > 0


def test_what_progress_raises_stops_the_pull(tmp_path: Path) -> None:
    def interrupt(progress: Progress) -> None:
        raise KeyboardInterrupt

    run = Run(tmp_path, Disk(data_of(64 * MiB)))
    with pytest.raises(KeyboardInterrupt):
        run(progress=interrupt)
    assert run.target.ended == ["abandoned"]


def test_no_server_no_target(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        pull_to(tmp_path / "copy", NbdUri(socket=str(tmp_path / "nothing")))
    assert os.listdir(tmp_path) == []


def test_a_taken_name_is_refused_before_anything_is_read(tmp_path: Path, image: Path) -> None:
    with nbdkit(tmp_path, "-r", "file", str(image)) as uri, pytest.raises(FileExistsError, match=r"disk\.raw"):
        pull_to(image, uri)
