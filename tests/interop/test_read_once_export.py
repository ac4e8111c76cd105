"""Clients that know nothing of TRIM, on an export where reading trims, while the guest writes."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from fleecing.client.dial import connect
from fleecing.nbd.uri import NbdUri
from fleecing.pull.engine import pull
from fleecing.pull.options import PullOptions
from fleecing.pull.target import RawTarget
from tests.client.servers import cutting
from tests.images import KIB, MIB, make_image, make_sparse, padded, random_bytes
from tests.peers import Children, run
from tests.serving import Serve, Server

CLUSTER = 64 * KIB


class Guest(threading.Thread):
    """Writes and zeroes all over its disk, and knows what the disk must have."""

    def __init__(self, server: Server, image: Path) -> None:
        super().__init__()
        self._server = server
        self._chance = random.Random(1)
        self._disk = bytearray(image.read_bytes())
        self._turn = threading.Lock()  # for one write, or for a snapshot between two of them
        self._ended = threading.Event()
        self._failure: BaseException | None = None

    def run(self) -> None:
        try:
            with connect(NbdUri.parse(self._server.uri())) as connection:
                while not self._ended.wait(0.001):
                    with self._turn:
                        self._write(connection)
        except BaseException as e:
            self._failure = e

    def _write(self, connection: Any) -> None:
        length = self._chance.choice((1, 512, 4096, 100_000))
        offset = self._chance.randrange(len(self._disk) - length)
        data = bytes(length) if self._chance.random() < 0.2 else self._chance.randbytes(length)
        if any(data):
            connection.write(offset, data)
        else:
            connection.write_zeroes(offset, length)
        self._disk[offset : offset + length] = data

    def snapshot(self, name: str, **request: Any) -> tuple[str, bytes]:
        """Freeze the disk; the URI, and what must be read there."""
        with self._turn:
            return self._server.snapshot(name=name, read_once=True, **request), bytes(self._disk)

    def __enter__(self) -> Guest:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self.join()
        if self._failure is not None:
            raise self._failure

    @property
    def disk(self) -> bytes:
        return bytes(self._disk)


def clusters(server: Server, export: str, state: str) -> set[int]:
    """Those in this state, where clusters have the size of CLUSTER; else parts of the disk that have any."""
    runs = [(offset, length) for offset, length, found in server.map(export) if found == state]
    return {n for offset, length in runs for n in range(offset // CLUSTER, -(-(offset + length) // CLUSTER))}


def with_data(contents: bytes) -> set[int]:
    """Clusters that are not all zeroes."""
    return {at // CLUSTER for at in range(0, len(contents), CLUSTER) if any(contents[at : at + CLUSTER])}


def convert(uri: str, target: Path) -> None:
    run("qemu-img", "convert", "-f", "raw", "-O", "raw", uri, str(target))


def convert_out_of_order(uri: str, target: Path) -> None:
    run("qemu-img", "convert", "-W", "-m", "16", "-f", "raw", "-O", "qcow2", uri, f"{target}.qcow2")
    run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", f"{target}.qcow2", str(target))


def convert_and_guess(uri: str, target: Path) -> None:
    """Without -f it reads the first bytes twice; they are less than a cluster."""
    run("qemu-img", "convert", "-O", "raw", uri, str(target))


def nbdcopy(*options: str) -> Tool:
    def tool(uri: str, target: Path) -> None:
        run("nbdcopy", *options, uri, str(target))

    return tool


Tool = Callable[[str, Path], None]


def our_pull(uri: str, target: Path) -> None:
    """It sends TRIM, which is what reading does here anyway."""
    pull(NbdUri.parse(uri), lambda size: RawTarget.create(str(target), size), PullOptions())


TOOLS: list[Tool] = [
    convert,
    convert_out_of_order,
    convert_and_guess,
    nbdcopy("-C", "1"),
    nbdcopy("-C", "4", "--request-size=32768"),
    nbdcopy("--synchronous", "--no-extents"),
    our_pull,
]


def full(path: Path) -> None:
    make_image(path, 6 * MIB + 777)


def small_holes(path: Path) -> None:
    """Most are smaller than a cluster; one at the beginning, one at the end."""
    make_sparse(path, 6 * MIB, {n * 100 * KIB: random_bytes(4096 + n % 3 * 30 * KIB) for n in range(1, 40)})


@pytest.mark.parametrize(
    ("layout", "cluster_size", "durable"), [(full, "2M", False), (small_holes, "64K", False), (small_holes, "4K", True)]
)
def test_each_tool_reads_a_busy_disk_exactly_and_what_it_read_is_trimmed(
    serve: Serve, tmp_path: Path, layout: Callable[[Path], None], cluster_size: str, durable: bool
) -> None:
    """Without any grace: none of them asks for anything twice, nor for the status of what it has read."""
    image = tmp_path / "disk.raw"
    layout(image)
    server = serve(image, "--cluster-size", cluster_size)
    with Guest(server, image) as guest:
        for number, tool in enumerate(TOOLS):
            uri, old = guest.snapshot(f"s{number}", read_once_grace=0, durable=durable)
            tool(uri, tmp_path / "pulled")
            assert padded((tmp_path / "pulled").read_bytes()) == padded(old)
            (tmp_path / "pulled").unlink()
            assert clusters(server, f"vda@s{number}", "trimmed") >= with_data(old)
    server.stop()
    assert image.read_bytes() == guest.disk


def test_connections_of_nbdcopy_far_apart(serve: Serve, tmp_path: Path) -> None:
    """They share a disk out in pieces of 128 MiB."""
    places = {n * 128 * MIB - 100 * KIB: random_bytes(MIB, seed=n) for n in (1, 2)}
    make_sparse(tmp_path / "disk.raw", 260 * MIB + 512, places)
    server = serve(tmp_path / "disk.raw")
    uri = server.snapshot(name="s", read_once=True, read_once_grace=0)
    make_sparse(tmp_path / "pulled", 260 * MIB + 512, {})
    run("nbdcopy", "-C", "4", "--destination-is-zero", uri, str(tmp_path / "pulled"))
    with (tmp_path / "pulled").open("rb") as pulled:
        for at, data in places.items():
            pulled.seek(at)
            assert pulled.read(len(data)) == data
    touched = {n for at in places for n in range(at // CLUSTER, -(-(at + MIB) // CLUSTER))}
    assert clusters(server, "vda@s", "trimmed") >= touched


def test_compare_reads_both_sides_once(serve: Serve, tmp_path: Path) -> None:
    small_holes(tmp_path / "disk.raw")
    old = (tmp_path / "disk.raw").read_bytes()
    server = serve(tmp_path / "disk.raw")
    for name in ("a", "b"):
        server.snapshot(name=name, read_once=True, read_once_grace=0)
    run("qemu-io", "-f", "raw", "-c", "write -P 1 0 6M", server.uri())
    run("qemu-img", "compare", "-f", "raw", "-F", "raw", server.uri("vda@a"), server.uri("vda@b"))
    assert all(clusters(server, f"vda@{name}", "trimmed") >= with_data(old) for name in ("a", "b"))


def test_temp_takes_no_more_data_once_all_was_read(serve: Serve, tmp_path: Path) -> None:
    small_holes(tmp_path / "disk.raw")
    old = (tmp_path / "disk.raw").read_bytes()
    server = serve(tmp_path / "disk.raw")
    run("nbdcopy", server.snapshot(name="plain"), "null:")
    run("nbdcopy", server.snapshot(name="once", read_once=True, read_once_grace=64 * KIB), "null:")
    run("qemu-io", "-f", "raw", "-c", "write -P 1 0 6M", server.uri())
    plain, once = (server.show(f"vda@{name}")["temp"]["used"] for name in ("plain", "once"))
    assert plain - once >= (len(with_data(old)) - 1) * CLUSTER


def test_libnbd_reads_out_of_order_in_odd_pieces(libnbd: ModuleType, serve: Serve, tmp_path: Path) -> None:
    size = 3 * MIB + 777
    contents = make_image(tmp_path / "disk.raw", size)
    server = serve(tmp_path / "disk.raw")
    uri = server.snapshot(name="s", read_once=True, read_once_grace=0)
    step = 12345
    places = list(range(0, size, step))
    random.Random(2).shuffle(places)
    handles = [libnbd.NBD() for _ in range(3)]
    for handle in handles:
        handle.connect_uri(uri)
    buffers = {offset: libnbd.Buffer(min(step, size - offset)) for offset in places}
    cookies = [(handles[n % 3], handles[n % 3].aio_pread(buffers[at], at)) for n, at in enumerate(places)]
    run("qemu-io", "-f", "raw", "-c", f"write -P 1 0 {size}", server.uri())
    for handle, cookie in cookies:
        while handle.aio_in_flight():
            handle.poll(-1)
        assert handle.aio_command_completed(cookie)
    assert b"".join(bytes(buffers[offset].to_bytearray()) for offset in sorted(places)) == contents
    with pytest.raises(libnbd.Error, match="Invalid argument"):
        handles[0].pread(1, 0)
    handles[0].trim(CLUSTER, 0)  # it still may: the export is not read-only on the wire
    for handle in handles:
        handle.shutdown()
    assert server.map("vda@s") == [(0, size, "trimmed")]


def qemu_source(socket: str) -> str:
    """vda@s for a QEMU that comes back when its connection is lost."""
    place = f"driver=raw,file.driver=nbd,file.server.type=unix,file.server.path={socket},file.export=vda@s"
    return f"{place},file.reconnect-delay=60"


def test_qemu_asks_again_over_lost_connections(serve: Serve, tmp_path: Path) -> None:
    """What was in flight, up to 4 MiB, left the server and did not arrive: the grace is there for that."""
    image = tmp_path / "disk.raw"
    old = make_image(image, 24 * MIB)
    server = serve(image)
    server.snapshot(name="s", read_once=True, read_once_grace=6 * MIB)
    run("qemu-io", "-f", "raw", "-c", "write -P 1 0 24M", server.uri())
    (tmp_path / "relay").mkdir()
    budgets = [3 * MIB + 4711] * 5
    with cutting(tmp_path / "relay", NbdUri.parse(server.uri("vda@s")), budgets) as uri:
        assert uri.socket is not None
        source = qemu_source(uri.socket)
        run("qemu-img", "convert", "-m", "2", "--image-opts", "-O", "raw", source, str(tmp_path / "pulled"))
    assert not budgets
    assert (tmp_path / "pulled").read_bytes() == old
    assert server.show("vda@s")["clusters"]["trimmed"] >= 16 * MIB // CLUSTER


def test_qemu_goes_on_when_the_server_was_killed(serve: Serve, tmp_path: Path, children: Children) -> None:
    """What the killed one knew of sent bytes is forgotten: more can be read again, not less."""
    image = tmp_path / "disk.raw"
    old = make_image(image, 24 * MIB)
    server = serve(image)
    server.snapshot(name="s", read_once=True, read_once_grace=6 * MIB)
    # Slowed down, so that the kill comes in the middle of it, if the machine is not very slow.
    source, target = qemu_source(str(server.unix)), tmp_path / "pulled"
    child = children.start("qemu-img", "convert", "-r", "32M", "-m", "2", "--image-opts", source, str(target))
    while not (trimmed := clusters(server, "vda@s", "trimmed")):
        assert not child.returncode, child.stderr
    server.kill()
    server.start()
    run("qemu-io", "-f", "raw", "-c", "write -P 1 0 24M", server.uri())
    assert child.wait() == 0, child.stderr
    assert target.read_bytes() == old
    assert clusters(server, "vda@s", "trimmed") >= trimmed
