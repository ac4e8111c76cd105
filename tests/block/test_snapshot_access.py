"""The frozen view: what a read gives whatever happens while it is under way."""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from bitarray import bitarray

from fleecing.block.extent import Allocation, ClusterState
from fleecing.block.snapshot_access import SnapshotAccess
from fleecing.errors import ClusterUnreadable, SnapshotBroken
from fleecing.units import GiB, KiB, MiB, TiB
from tests.block.rig import CLUSTER, SECONDS, Rig, blocks, pattern

MakeRig = Callable[..., Rig]
SIZE = 8 * CLUSTER
OLD = pattern(SIZE)
NEW = pattern(SIZE, seed=1)


def cached(snapshot: SnapshotAccess, offset: int, length: int) -> bytes:
    """As a connection reads: what takes no waiting first."""
    buffer = bytearray(length)
    if not snapshot.read_cached(offset, memoryview(buffer)):
        snapshot.read_into(offset, memoryview(buffer))
    return bytes(buffer)


# A read within one cluster, and one that goes over several, each in both ways: four code paths.
READS = [(read, 100, length) for read in (SnapshotAccess.read, cached) for length in (4 * KiB, 3 * CLUSTER)]
Read = Callable[[SnapshotAccess, int, int], bytes]


@pytest.mark.parametrize("read, offset, length", READS)
def test_read_gives_the_old_bytes_when_the_guest_writes_during_it(
    make_rig: MakeRig, read: Read, offset: int, length: int
) -> None:
    rig = make_rig(OLD)
    snapshot, _ = rig.snapshot()
    rig.file.after_read = lambda: rig.disk.write(0, NEW)
    assert read(snapshot, offset, length) == OLD[offset : offset + length]
    assert rig.disk.read(offset, length) == NEW[offset : offset + length]
    assert snapshot.read(0, SIZE) == OLD


@pytest.mark.parametrize("read, offset, length", READS)
def test_read_fails_when_the_snapshot_breaks_during_it(make_rig: MakeRig, read: Read, offset: int, length: int) -> None:
    """QEMU 7.2 returns the guest's new bytes as a success here."""
    rig = make_rig(OLD)
    snapshot, temp = rig.snapshot()

    def break_and_write() -> None:
        temp.fail = OSError(28, "No space left on device")
        rig.disk.write(0, NEW)

    rig.file.after_read = break_and_write
    with pytest.raises(SnapshotBroken, match="No space left on device"):
        read(snapshot, offset, length)
    assert rig.disk.read(0, SIZE) == NEW


@pytest.mark.parametrize("read, offset, length", READS)
def test_read_fails_when_a_trim_and_a_write_come_during_it(
    make_rig: MakeRig, read: Read, offset: int, length: int
) -> None:
    rig = make_rig(OLD)
    snapshot, _ = rig.snapshot()

    def trim_and_write() -> None:
        snapshot.discard(0, CLUSTER)
        rig.disk.write(0, NEW)

    rig.file.after_read = trim_and_write
    with pytest.raises(ClusterUnreadable, match="trimmed"):
        read(snapshot, offset, length)


@pytest.mark.parametrize("read, offset, length", READS)
def test_read_fails_when_the_snapshot_is_deleted_during_it(
    make_rig: MakeRig, read: Read, offset: int, length: int
) -> None:
    rig = make_rig(OLD)
    snapshot, _ = rig.snapshot()
    rig.disk.write(2 * CLUSTER, b"x")

    def delete_and_write() -> None:
        snapshot.remove(0)
        rig.disk.write(0, NEW)

    rig.file.after_read = delete_and_write
    with pytest.raises(SnapshotBroken, match="deleted"):
        read(snapshot, offset, length)


@pytest.mark.parametrize("read, offset, length", READS)
def test_read_from_temp_fails_when_it_is_trimmed_and_its_space_used_again(
    make_rig: MakeRig, read: Read, offset: int, length: int
) -> None:
    rig = make_rig(OLD)
    snapshot, temp = rig.snapshot()
    rig.disk.write(0, b"x")  # cluster 0 is in temp now
    read_into = temp.read_into

    def reuse_then_read(offset: int, buffer: memoryview) -> int:
        temp.read_into = read_into  # type: ignore[method-assign]
        snapshot.discard(0, CLUSTER)
        rig.disk.write(CLUSTER, b"x")  # takes the host cluster that the trim freed
        return read_into(offset, buffer)

    temp.read_into = reuse_then_read  # type: ignore[method-assign]
    with pytest.raises(ClusterUnreadable, match="trimmed"):
        read(snapshot, offset, length)
    assert snapshot.read(CLUSTER, CLUSTER) == OLD[CLUSTER : 2 * CLUSTER]


@pytest.mark.parametrize("read, offset, length", READS)
@pytest.mark.parametrize("fails", [False, True])
def test_read_from_temp_fails_when_the_snapshot_breaks_during_it(
    make_rig: MakeRig, read: Read, offset: int, length: int, fails: bool
) -> None:
    """Whether the file gave its bytes or an error: the reader learns why, and gets none."""
    rig = make_rig(OLD)
    snapshot, temp = rig.snapshot()
    rig.disk.write(0, b"x")  # cluster 0 is in temp now
    read_into = temp.read_into

    def break_then_read(offset: int, buffer: memoryview) -> int:
        snapshot.clusters.break_("its disk is gone")
        if fails:
            raise OSError(5, "Input/output error")
        return read_into(offset, buffer)

    temp.read_into = break_then_read  # type: ignore[method-assign]
    with pytest.raises(SnapshotBroken, match="its disk is gone"):
        read(snapshot, offset, length)


def test_block_status_never_calls_old_data_a_hole_when_the_guest_trims_meanwhile(make_rig: MakeRig) -> None:
    rig = make_rig(OLD)
    snapshot, _ = rig.snapshot()
    block_status = rig.file.block_status

    def trim_then_look(offset: int, length: int, max_runs: int = 1 << 20) -> list[tuple[int, int]]:
        rig.file.block_status = block_status  # type: ignore[method-assign]
        rig.disk.discard(2 * CLUSTER, CLUSTER)
        return block_status(offset, length, max_runs)

    rig.file.block_status = trim_then_look  # type: ignore[method-assign]
    assert snapshot.block_status(0, SIZE) == [(SIZE, Allocation.DATA)]
    assert rig.disk.block_status(2 * CLUSTER, CLUSTER) == [(CLUSTER, Allocation.HOLE_ZERO)]


def test_block_status_still_knows_holes_behind_a_copied_cluster(make_rig: MakeRig) -> None:
    rig = make_rig(OLD, 2 * SIZE)
    snapshot, _ = rig.snapshot()
    rig.disk.write(SIZE - CLUSTER, NEW[:CLUSTER])
    assert snapshot.block_status(0, 2 * SIZE) == [(SIZE, Allocation.DATA), (SIZE, Allocation.HOLE_ZERO)]


def test_one_run_of_block_status_goes_on_over_clusters_of_both_files(make_rig: MakeRig) -> None:
    """qemu-img convert asks for one run at a time: it would ask for every cluster of a busy disk."""
    rig = make_rig(OLD + bytes(CLUSTER) + OLD)
    rig.disk.write_zeroes(SIZE, CLUSTER)
    snapshot, _ = rig.snapshot()
    for n in (1, 2, 5, 7):
        rig.disk.write(n * CLUSTER, NEW[:100])
    assert snapshot.block_status(100, SIZE + 500, 1) == [(SIZE - 100, Allocation.DATA)]
    rig.disk.write(SIZE, b"new")
    assert snapshot.block_status(100, SIZE + 500, 1) == [(SIZE - 100, Allocation.DATA)]
    assert snapshot.block_status(SIZE, SIZE, 1) == [(CLUSTER, Allocation.HOLE_ZERO)]
    assert snapshot.block_status(0, 2 * SIZE, 2) == [(SIZE, Allocation.DATA), (CLUSTER, Allocation.HOLE_ZERO)]


def test_block_status_tells_zero_clusters_of_temp_and_holes_of_the_image(make_rig: MakeRig) -> None:
    rig = make_rig(OLD[:CLUSTER] + bytes(2 * CLUSTER) + OLD[: 5 * CLUSTER])
    rig.disk.discard(CLUSTER, 2 * CLUSTER)
    snapshot, _temp = rig.snapshot()
    rig.disk.write(0, NEW[: 2 * CLUSTER])
    expected = [(CLUSTER, Allocation.DATA), (2 * CLUSTER, Allocation.HOLE_ZERO), (5 * CLUSTER, Allocation.DATA)]
    assert snapshot.block_status(0, SIZE) == expected
    assert snapshot.block_status(CLUSTER + 512, CLUSTER) == [(CLUSTER, Allocation.HOLE_ZERO)]
    assert snapshot.allocation_depth(0, SIZE) == [(2 * CLUSTER, 1), (6 * CLUSTER, 2)]


def test_trim_is_rounded_inwards_and_the_short_tail_cluster_counts_as_whole(make_rig: MakeRig) -> None:
    size = 2 * CLUSTER + 1
    rig = make_rig(pattern(size))
    snapshot, _temp = rig.snapshot()
    rig.disk.write(0, bytes([1]) * size)
    snapshot.discard(1, CLUSTER)  # no cluster whole
    snapshot.discard(CLUSTER - 1, CLUSTER)
    assert snapshot.read(0, size) == pattern(size)
    snapshot.discard(CLUSTER + 1, size - CLUSTER - 1)  # cluster 1 in part, the tail whole
    assert snapshot.cluster_state(0, size) == [(2 * CLUSTER, ClusterState.COPIED), (1, ClusterState.TRIMMED)]
    with pytest.raises(ClusterUnreadable, match="trimmed"):
        snapshot.read(2 * CLUSTER, 1)
    assert snapshot.read(0, 2 * CLUSTER) == pattern(size)[: 2 * CLUSTER]


def test_trim_gives_temp_space_back_and_stops_the_copying(make_rig: MakeRig) -> None:
    rig = make_rig(OLD)
    snapshot, temp = rig.snapshot()
    empty = snapshot.temp_used()
    rig.disk.write(0, NEW)
    full = blocks(temp.path)
    snapshot.discard(0, SIZE)
    assert full - blocks(temp.path) >= SIZE
    assert snapshot.temp_peak() - snapshot.temp_used() >= SIZE
    rig.disk.write(0, OLD)
    rig.disk.write(5, b"x")
    assert snapshot.temp_used() <= empty + CLUSTER  # an L2 table may stay
    assert snapshot.counts()[ClusterState.TRIMMED] == SIZE // CLUSTER
    snapshot.discard(0, SIZE)  # again does no harm


def test_clusters_outside_the_bitmap_are_neither_readable_nor_copied(make_rig: MakeRig) -> None:
    rig = make_rig(OLD)
    snapshot, _ = rig.snapshot(bitmap=bitarray("01000000"))
    rig.disk.write(0, NEW)
    with pytest.raises(ClusterUnreadable, match="not in bitmap"):
        snapshot.read(0, 10)
    assert snapshot.read(CLUSTER, CLUSTER) == OLD[CLUSTER : 2 * CLUSTER]
    assert snapshot.clusters_copied_total == 1
    snapshot.discard(0, 2 * CLUSTER)
    assert snapshot.cluster_state(0, SIZE) == [
        (CLUSTER, ClusterState.NOT_IN_BITMAP),
        (CLUSTER, ClusterState.TRIMMED),
        (6 * CLUSTER, ClusterState.NOT_IN_BITMAP),
    ]


def test_removal_frees_the_temp_while_a_client_still_has_it_open(make_rig: MakeRig) -> None:
    rig = make_rig(OLD)
    snapshot, temp = rig.snapshot()
    rig.disk.write(0, NEW)
    snapshot.retain()
    snapshot.remove(0)
    assert temp.allocated() == 0
    assert not Path(temp.path).exists()
    with pytest.raises(SnapshotBroken, match="deleted"):
        snapshot.read(0, 1)
    with pytest.raises(SnapshotBroken, match="deleted"):
        snapshot.discard(0, SIZE)
    snapshot.remove(0)
    snapshot.release()
    assert temp.fd == -1
    assert rig.broken == []


def test_a_temp_that_hangs_in_its_tables_stops_neither_looks_nor_a_deletion(make_rig: MakeRig) -> None:
    """The writes of temp's tables are made under the lock of the clusters' states."""
    rig = make_rig(OLD)
    snapshot, temp = rig.snapshot(cbw_timeout=0.01)
    temp.before_hold, temp.hold = 1, threading.Event()
    rig.disk.write(0, NEW)
    assert rig.broken == [("s", "temp did not take a copy within cbw-timeout (0.01 s)")]
    assert snapshot.clusters.lock.locked()
    assert snapshot.counts()[ClusterState.UNTOUCHED] == 8
    with pytest.raises(TimeoutError, match="a copy under way"):
        snapshot.remove(0.01)
    temp.hold.set()
    snapshot.remove(SECONDS)
    assert not Path(temp.path).exists()


def test_snapshots_go_in_any_order_and_the_others_stay_exact(make_rig: MakeRig) -> None:
    rig = make_rig(OLD)
    first, _ = rig.snapshot("first")
    rig.disk.write(0, NEW[: 2 * CLUSTER])
    second, _ = rig.snapshot("second")
    rig.disk.write(CLUSTER, OLD[: 3 * CLUSTER])
    third, _ = rig.snapshot("third")
    rig.disk.write(0, bytes(SIZE))
    second.remove(0)
    assert first.read(0, SIZE) == OLD
    assert third.read(0, SIZE) == (NEW[:CLUSTER] + OLD[: 3 * CLUSTER] + OLD[4 * CLUSTER :])
    first.remove(0)
    rig.disk.write(0, NEW)
    assert third.read(0, SIZE) == (NEW[:CLUSTER] + OLD[: 3 * CLUSTER] + OLD[4 * CLUSTER :])


@pytest.mark.parametrize("cluster_size", [4 * KiB, 64 * KiB, 2 * MiB])
@pytest.mark.parametrize("size", [1, 511, 512, 5 * MiB + 513, 3 * MiB])
def test_temp_read_by_qemu_img_is_the_frozen_disk(make_rig: MakeRig, cluster_size: int, size: int) -> None:
    rig = make_rig(pattern(size))
    _snapshot, temp = rig.snapshot(cluster_size=cluster_size)
    rig.disk.write(0, b"new")
    rig.disk.write_zeroes(size // 2, size - size // 2)
    frozen = rig.folder / "frozen.raw"
    subprocess.run(["qemu-img", "check", "-U", "-f", "qcow2", temp.path], check=True, capture_output=True)
    subprocess.run(["qemu-img", "convert", "-U", "-f", "qcow2", "-O", "raw", temp.path, frozen], check=True)
    assert frozen.read_bytes()[:size] == pattern(size)


def test_zeroing_the_holes_of_a_huge_disk_copies_nothing(make_rig: MakeRig) -> None:
    rig = make_rig(OLD, 1 * TiB)
    snapshot, _ = rig.snapshot()
    before = snapshot.temp_used()
    rig.disk.discard(0, rig.size)
    assert snapshot.clusters_copied_total == SIZE // CLUSTER
    assert snapshot.temp_used() - before <= SIZE + 3 * CLUSTER
    assert snapshot.read(0, SIZE) == OLD


def test_zeroes_over_a_hole_are_saved_as_zero_clusters_without_reading_the_hole(make_rig: MakeRig) -> None:
    rig = make_rig(OLD, 1 * GiB)
    snapshot, _ = rig.snapshot()
    before = snapshot.temp_used()
    rig.disk.write_zeroes(SIZE, rig.size - SIZE, may_unmap=False)
    assert snapshot.clusters_copied_total == (rig.size - SIZE) // CLUSTER
    assert snapshot.temp_used() - before <= 3 * CLUSTER
    assert snapshot.block_status(SIZE, rig.size - SIZE) == [(rig.size - SIZE, Allocation.HOLE_ZERO)]
