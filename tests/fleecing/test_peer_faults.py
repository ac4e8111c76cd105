"""The faults of the reference, QEMU's copy-before-write, each as a test that we do not have it.

The numbers are those of the list in the project's notes on its peers. What takes a thread to be at an exact place is
done on the block layer (`rig`), the rest on the real server.
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from fleecing.block.extent import ClusterState
from fleecing.errors import ClusterUnreadable, SnapshotBroken
from fleecing.nbd.constants import ReplyMode
from tests.block.rig import CLUSTER, SECONDS, Rig, in_thread
from tests.images import KIB, MIB, ODD_SIZES, allocated, make_image, make_sparse, padded, random_bytes
from tests.peers import run
from tests.raw_client import BLOCK_STATUS, EINVAL, READ, TRIM, WRITE, WRITE_ZEROES, RawClient
from tests.serving import Serve

MODES = pytest.mark.parametrize("mode", list(ReplyMode), ids=lambda mode: mode.name.lower())
STRUCTURED = pytest.mark.parametrize("mode", [ReplyMode.STRUCTURED, ReplyMode.EXTENDED], ids=["structured", "extended"])
SIZE = 8 * CLUSTER
OLD = random_bytes(SIZE)


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    """A disk of eight clusters without a server."""
    (tmp_path / "rig").mkdir()
    rig = Rig(tmp_path / "rig", OLD)
    yield rig
    rig.close()


@pytest.mark.parametrize("length", [512, 3 * CLUSTER])
def test_1_a_read_in_flight_when_the_snapshot_breaks_never_returns_new_data(rig: Rig, length: int) -> None:
    """QEMU 7.2 returned the guest's new bytes as a success."""
    snapshot, temp = rig.snapshot()

    def break_and_write() -> None:
        temp.fail = OSError(errno.ENOSPC, "No space left on device")
        rig.disk.write(0, random_bytes(SIZE, seed=1))

    rig.file.after_read = break_and_write
    with pytest.raises(SnapshotBroken, match="No space left on device"):
        snapshot.read(0, length)
    assert rig.disk.read(0, SIZE) == random_bytes(SIZE, seed=1)


@STRUCTURED
def test_2_a_block_status_error_with_several_contexts_is_one_reply(
    serve: Serve, tmp_path: Path, mode: ReplyMode
) -> None:
    """QEMU sent an error chunk with DONE, and more chunks behind it."""
    make_image(tmp_path / "disk.raw", SIZE)
    server = serve(tmp_path / "disk.raw")
    server.snapshot(name="s")
    contexts = ["base:allocation", "qemu:allocation-depth", "fleecing:cluster-state"]
    with RawClient(server.unix, "vda@s", mode, contexts) as client:
        assert client.request(TRIM, 0, CLUSTER, CLUSTER).error == 0
        reply = client.request(BLOCK_STATUS, 0, 0, SIZE)
        assert (reply.error, reply.chunks, reply.extents) == (EINVAL, 1, {})
        assert "trimmed" in reply.text
        whole = client.request(BLOCK_STATUS, 0, 2 * CLUSTER, 6 * CLUSTER)
        assert {sum(length for length, _ in extents) for extents in whole.extents.values()} == {6 * CLUSTER}
    with RawClient(server.unix, "vda@s", mode, contexts[2:]) as client:
        states = client.request(BLOCK_STATUS, 0, 0, SIZE).extents[client.contexts["fleecing:cluster-state"]]
        assert states == [(CLUSTER, 0), (CLUSTER, 2), (6 * CLUSTER, 0)]


@MODES
def test_3_an_error_in_the_middle_of_a_read_keeps_the_connection(serve: Serve, tmp_path: Path, mode: ReplyMode) -> None:
    """Here a trimmed cluster in a long read; an I/O error is in tests/interop/test_raw_requests.py."""
    old = make_image(tmp_path / "disk.raw", 4 * MIB)
    server = serve(tmp_path / "disk.raw")
    server.snapshot(name="s")
    with RawClient(server.unix, "vda@s", mode) as client:
        assert client.request(TRIM, 0, 3 * MIB, CLUSTER).error == 0
        reply = client.request(READ, 0, 0, 4 * MIB)
        assert reply.error == EINVAL
        for offset, piece in reply.data:
            assert piece == old[offset : offset + len(piece)]
        assert client.read(0, 3 * MIB) == old[: 3 * MIB]
        assert client.read(3 * MIB + CLUSTER, MIB - CLUSTER) == old[3 * MIB + CLUSTER :]


@MODES
def test_4_a_trim_of_any_alignment_is_rounded_inwards(serve: Serve, tmp_path: Path, mode: ReplyMode) -> None:
    """QEMU 7.2 aborted."""
    old = make_image(tmp_path / "disk.raw", SIZE)
    server = serve(tmp_path / "disk.raw")
    server.snapshot(name="s")
    with RawClient(server.unix, "vda@s", mode) as client:
        for offset, length in ((0, 1), (1, CLUSTER), (CLUSTER - 1, 2), (CLUSTER + 1, 2 * CLUSTER - 2), (SIZE - 1, 1)):
            assert client.request(TRIM, 0, offset, length).error == 0
            assert client.read(0, SIZE) == old
        assert client.request(TRIM, 0, CLUSTER - 1, CLUSTER + 2).error == 0
        assert server.map("vda@s")[1] == (CLUSTER, CLUSTER, "trimmed")
        assert client.read(0, CLUSTER) == old[:CLUSTER]
        assert client.request(READ, 0, CLUSTER - 1, 2).error == EINVAL
        assert client.request(READ, 0, 2 * CLUSTER - 1, 1).error == EINVAL
        assert client.read(2 * CLUSTER, SIZE - 2 * CLUSTER) == old[2 * CLUSTER :]


@pytest.mark.parametrize("size", ODD_SIZES)
def test_5_the_short_last_cluster_can_be_trimmed(serve: Serve, tmp_path: Path, size: int) -> None:
    old = make_image(tmp_path / "disk.raw", size)
    server = serve(tmp_path / "disk.raw")
    server.snapshot(name="s")
    last = (size - 1) // CLUSTER * CLUSTER
    with RawClient(server.unix, "vda", ReplyMode.STRUCTURED) as guest:
        assert guest.request(WRITE, 0, size - 1, 1, b"!").error == 0
        assert server.show("vda@s")["clusters"]["copied"] == 1
        with RawClient(server.unix, "vda@s", ReplyMode.STRUCTURED) as client:
            assert client.read(0, size) == old
            assert client.request(TRIM, 0, last, size - last).error == 0
            assert client.request(READ, 0, size - 1, 1).error == EINVAL
            assert client.read(0, last) == old[:last]
        assert guest.request(WRITE, 0, size - 1, 1, b"?").error == 0
    assert server.show("vda@s")["clusters"]["trimmed"] == 1
    assert server.show("vda@s")["copied_total"] == 1
    run("qemu-img", "check", "-U", str(server.temp("vda@s")))


def test_6_a_long_cbw_timeout_is_long(rig: Rig) -> None:
    """4295 s are 2^32 times 1000 ns and 33 ms: QEMU 7.2 counted nanoseconds in 32 bits."""
    snapshot, temp = rig.snapshot(cbw_timeout=4295.0)
    temp.hold = threading.Event()
    write = in_thread(lambda: rig.disk.write(0, bytes(CLUSTER)))
    assert temp.held.acquire(timeout=SECONDS)
    assert not write.over.wait(0.7)  # the watch over the time-outs looks five times a second
    temp.hold.set()
    write.wait()
    assert snapshot.broken is None
    assert snapshot.read(0, SIZE) == OLD


def test_6_a_long_cbw_timeout_is_taken(serve: Serve, tmp_path: Path) -> None:
    make_image(tmp_path / "disk.raw", SIZE)
    server = serve(tmp_path / "disk.raw")
    server.snapshot(name="s", cbw_timeout=86400)
    run("qemu-io", "-f", "raw", "-c", "write -P 1 0 64k", server.uri())
    shown = server.show("vda@s")
    assert (shown["cbw_timeout"], shown["state"]) == (86400.0, "ready")


def test_8_a_trim_gives_disk_space_back_at_once(serve: Serve, tmp_path: Path) -> None:
    make_image(tmp_path / "disk.raw", 8 * MIB)
    server = serve(tmp_path / "disk.raw")
    frozen = server.snapshot(name="s")
    temp = server.temp("vda@s")
    empty = allocated(temp)
    run("qemu-io", "-f", "raw", "-c", "write -P 1 0 8M", server.uri())
    assert allocated(temp) >= empty + 8 * MIB
    assert server.show("vda@s")["temp"]["used"] >= 8 * MIB
    run("qemu-io", "-f", "raw", "-d", "unmap", "-c", "discard 1M 6M", frozen)
    assert allocated(temp) <= empty + 2 * MIB + 4 * CLUSTER
    run("qemu-img", "check", "-U", str(temp))
    run("qemu-io", "-f", "raw", "-d", "unmap", "-c", "discard 0 8M", frozen)
    assert allocated(temp) <= empty + 4 * CLUSTER
    assert server.show("vda@s")["temp"]["peak"] >= 8 * MIB


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 1, 0], [1, 2, 0], [1, 0, 2]])
def test_9_snapshots_are_deleted_in_any_order(serve: Serve, tmp_path: Path, order: list[int]) -> None:
    make_image(tmp_path / "disk.raw", SIZE)
    server = serve(tmp_path / "disk.raw")
    contents, temps = [], []
    for number in range(3):
        contents.append((tmp_path / "disk.raw").read_bytes())
        server.snapshot(name=f"s{number}")
        temps.append(server.temp(f"vda@s{number}"))
        run("qemu-io", "-f", "raw", "-c", f"write -P {number + 1} {number * 64 + 1}k 100k", server.uri())
    left = [0, 1, 2]
    for number in order:
        assert server.delete(f"vda@s{number}")
        assert not temps[number].exists()
        left.remove(number)
        run("qemu-io", "-f", "raw", "-c", f"write -P {number + 9} 0 512k", server.uri())
        for other in left:
            run("nbdcopy", server.uri(f"vda@s{other}"), str(tmp_path / "pulled.raw"))
            assert (tmp_path / "pulled.raw").read_bytes() == contents[other]
            run("qemu-img", "check", "-U", str(temps[other]))


@pytest.mark.parametrize("hole", [True, False], ids=["holes", "written zeroes"])
def test_10_old_zeroes_cost_no_space(serve: Serve, tmp_path: Path, hole: bool) -> None:
    make_sparse(tmp_path / "disk.raw", 16 * MIB, {0: random_bytes(CLUSTER)} if hole else {0: bytes(16 * MIB)})
    server = serve(tmp_path / "disk.raw")
    frozen = server.snapshot(name="s")
    temp = server.temp("vda@s")
    before = allocated(temp)
    run("qemu-io", "-f", "raw", "-c", "write -P 1 1M 15M", server.uri())
    assert server.show("vda@s")["clusters"]["copied"] == 240
    assert allocated(temp) <= before + 2 * CLUSTER
    assert server.show("vda@s")["temp"]["used"] <= 8 * CLUSTER
    run("qemu-io", "-r", "-f", "raw", "-c", "read -P 0 1M 15M", frozen)
    run("qemu-io", "-r", "-U", "-c", "read -P 0 1M 15M", str(temp))
    run("qemu-img", "check", "-U", str(temp))


def test_11_a_trim_during_a_copy_leaves_nothing_in_temp(rig: Rig) -> None:
    snapshot, temp = rig.snapshot()
    empty = snapshot.temp_used()
    temp.hold = threading.Event()
    write = in_thread(lambda: rig.disk.write(0, bytes(CLUSTER)))
    assert temp.held.acquire(timeout=SECONDS)
    snapshot.discard(0, CLUSTER)
    temp.hold.set()
    write.wait()
    assert snapshot.cluster_state(0, CLUSTER) == [(CLUSTER, ClusterState.TRIMMED)]
    assert snapshot.temp_used() == empty
    with pytest.raises(ClusterUnreadable, match="trimmed"):
        snapshot.read(0, 1)


def test_11_a_copy_that_fails_after_a_trim_marks_nothing_again(rig: Rig) -> None:
    snapshot, temp = rig.snapshot()
    temp.hold = threading.Event()
    temp.fail = OSError(errno.EIO, "Input/output error")
    write = in_thread(lambda: rig.disk.write(0, bytes(CLUSTER)))
    assert temp.held.acquire(timeout=SECONDS)
    snapshot.discard(0, CLUSTER)
    temp.hold.set()
    write.wait()
    assert not snapshot.clusters.needs_copy(0, CLUSTER)
    assert rig.disk.read(0, CLUSTER) == bytes(CLUSTER)


@pytest.mark.parametrize("cluster", ["4K", "64K"])
def test_14_a_read_over_copied_and_uncopied_clusters_is_all_old(serve: Serve, tmp_path: Path, cluster: str) -> None:
    """QEMU before 8.0 answered the copied part from the live disk."""
    old = make_image(tmp_path / "disk.raw", SIZE + 777)
    server = serve(tmp_path / "disk.raw", "--cluster-size", cluster)
    server.snapshot(name="s")
    with RawClient(server.unix, "vda", ReplyMode.STRUCTURED) as guest:
        for offset in range(CLUSTER // 2, SIZE, 2 * CLUSTER):
            assert guest.request(WRITE, 0, offset, CLUSTER // 2, bytes(CLUSTER // 2)).error == 0
    with RawClient(server.unix, "vda@s", ReplyMode.STRUCTURED, ["base:allocation"]) as client:
        assert client.read(0, len(old)) == old
        for offset in range(100, SIZE - 100 * KIB, 40 * KIB):
            assert client.read(offset, 100 * KIB) == old[offset : offset + 100 * KIB]
        assert client.request(BLOCK_STATUS, 0, 100, SIZE).extents == {client.contexts["base:allocation"]: [(SIZE, 0)]}


@MODES
def test_a_guest_change_of_any_kind_copies_first(serve: Serve, tmp_path: Path, mode: ReplyMode) -> None:
    """QEMU's reference semantics: write, write-zeroes and discard alike."""
    old = make_image(tmp_path / "disk.raw", SIZE)
    server = serve(tmp_path / "disk.raw")
    server.snapshot(name="s")
    with RawClient(server.unix, "vda", mode) as guest:
        assert guest.request(WRITE, 0, 100, 5, b"write").error == 0
        assert guest.request(WRITE_ZEROES, 0, 2 * CLUSTER - 1, 2).error == 0
        assert guest.request(TRIM, 0, 4 * CLUSTER + 1, 2 * CLUSTER).error == 0
    states = [(0, 3 * CLUSTER, "copied"), (3 * CLUSTER, CLUSTER, "untouched"), (4 * CLUSTER, 3 * CLUSTER, "copied"),
              (7 * CLUSTER, CLUSTER, "untouched")]  # fmt: skip
    assert server.map("vda@s") == states
    with RawClient(server.unix, "vda@s", mode) as client:
        assert client.read(0, SIZE) == old
    run("qemu-img", "convert", "-U", "-O", "raw", str(server.temp("vda@s")), str(tmp_path / "temp.raw"))
    assert (tmp_path / "temp.raw").read_bytes() == padded(old)
