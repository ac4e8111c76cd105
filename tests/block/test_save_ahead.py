"""What several writes overwrite is saved in one go, where that is simple; what is not is left to each of them."""

from __future__ import annotations

import errno
import os
import subprocess
import threading
from collections.abc import Callable

import pytest

from fleecing.block.copy_before_write import OnCbwError
from fleecing.block.extent import ClusterState
from fleecing.block.node import Buffer
from tests.block.rig import CLUSTER, SECONDS, FaultyTemp, Rig, in_thread, pattern, write_together

MakeRig = Callable[..., Rig]

CLUSTERS = 40
OLD = pattern(CLUSTERS * CLUSTER)
NO_SPACE = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def small_writes(*clusters: int) -> list[tuple[int, bytes]]:
    """A write of some bytes into each of these clusters."""
    return [(cluster * CLUSTER + 5, bytes([cluster + 1]) * 100) for cluster in clusters]


def expected(writes: list[tuple[int, bytes]], old: bytes = OLD) -> bytes:
    new = bytearray(old)
    for offset, data in writes:
        new[offset : offset + len(data)] = data
    return bytes(new)


def check(path: str) -> None:
    subprocess.run(["qemu-img", "check", "-q", "-f", "qcow2", path], check=True)


def data_writes(temp: FaultyTemp, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The lengths of writes of data that temp gets from now on, copies within the kernel left out."""
    temp.takes_copies = False
    seen: list[int] = []
    write = temp.write

    def look(offset: int, data: Buffer) -> None:
        if len(data) >= CLUSTER:
            seen.append(len(data))
        write(offset, data)

    monkeypatch.setattr(temp, "write", look)
    return seen


def test_clusters_all_over_the_disk_go_to_temp_in_one_write(make_rig: MakeRig, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = make_rig(OLD)
    snapshot, temp = rig.snapshot()
    rig.disk.write(39 * CLUSTER, b"x")  # there is a table now
    seen = data_writes(temp, monkeypatch)
    writes = small_writes(31, 3, 4, 17, 8, 4)
    assert write_together(rig.disk, writes) == [None] * 6
    assert seen == [5 * CLUSTER]
    assert rig.disk.read(0, 39 * CLUSTER) == expected(writes)[: 39 * CLUSTER]
    assert snapshot.read(0, len(OLD)) == OLD
    assert snapshot.counts()[ClusterState.COPIED] == 6
    check(temp.path)


def test_zero_clusters_cost_no_space(make_rig: MakeRig, monkeypatch: pytest.MonkeyPatch) -> None:
    old = OLD[: 2 * CLUSTER] + bytes(5 * CLUSTER) + OLD[7 * CLUSTER :]
    rig = make_rig(old)
    snapshot, temp = rig.snapshot()
    seen = data_writes(temp, monkeypatch)
    # Data alone, zeroes alone, two of zeroes, and a run of both, which is left to its writes.
    writes = small_writes(9, 3, 5, 6, 7)
    assert write_together(rig.disk, writes) == [None] * 5
    assert rig.disk.read(0, len(old)) == expected(writes, old)
    assert snapshot.read(0, len(old)) == old
    assert sum(seen) - CLUSTER == 2 * CLUSTER  # an L2 table, and the clusters 7 and 9
    check(temp.path)


def test_a_run_of_writes_over_neighbours_is_one_piece(make_rig: MakeRig, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = make_rig(OLD)
    snapshot, temp = rig.snapshot()
    rig.disk.write(39 * CLUSTER, b"x")
    seen = data_writes(temp, monkeypatch)
    writes = [(n * CLUSTER // 2, b"n" * (CLUSTER // 2)) for n in range(24)]
    assert not any(write_together(rig.disk, writes))
    assert seen == [12 * CLUSTER]
    assert snapshot.read(0, len(OLD)) == OLD


def test_space_in_pieces_is_used_piece_by_piece(make_rig: MakeRig) -> None:
    rig = make_rig(OLD)
    snapshot, temp = rig.snapshot(limit=(8 + 5) * CLUSTER)  # eight of data
    write_together(rig.disk, small_writes(*range(8)))
    for cluster in (0, 2, 3, 6):
        snapshot.discard(cluster * CLUSTER, CLUSTER)
    writes = small_writes(20, 25, 26, 30)
    assert write_together(rig.disk, writes) == [None] * 4
    assert snapshot.broken is None
    for cluster in (1, 4, 5, 7, *range(8, CLUSTERS)):
        assert snapshot.read(cluster * CLUSTER, CLUSTER) == OLD[cluster * CLUSTER : (cluster + 1) * CLUSTER]
    check(temp.path)


def test_where_the_limit_does_not_let_all_of_them_in_each_write_meets_it_by_itself(make_rig: MakeRig) -> None:
    rig = make_rig(OLD)
    snapshot, temp = rig.snapshot(limit=(2 + 5) * CLUSTER, on_cbw_error=OnCbwError.BREAK_GUEST_WRITE)
    writes = small_writes(1, 10, 20, 30)
    ends = write_together(rig.disk, writes)
    assert [e is None for e in ends] == [True, True, False, False]
    assert rig.disk.read(0, len(OLD)) == expected(writes[:2])
    assert snapshot.read(0, len(OLD)) == OLD
    check(temp.path)


@pytest.mark.parametrize("failures", [1, -1])
@pytest.mark.parametrize("skip", range(10))
def test_a_write_of_temp_that_fails_leaves_nothing_half_done(make_rig: MakeRig, skip: int, failures: int) -> None:
    rig = make_rig(OLD)
    snapshot, temp = rig.snapshot(on_cbw_error=OnCbwError.BREAK_GUEST_WRITE)
    temp.fail, temp.skip, temp.failures = NO_SPACE, skip, failures
    writes = small_writes(1, 10, 11, 30)
    ends = write_together(rig.disk, writes)
    temp.fail = None
    done = [write for write, error in zip(writes, ends, strict=True) if error is None]
    assert rig.disk.read(0, len(OLD)) == expected(done)
    assert snapshot.read(0, len(OLD)) == OLD
    if failures == 1:
        assert done == writes  # each has tried again by itself
    assert write_together(rig.disk, writes) == [None] * 4
    assert rig.disk.read(0, len(OLD)) == expected(writes)
    assert snapshot.read(0, len(OLD)) == OLD
    assert snapshot.broken is None


def test_a_trim_during_the_copy_takes_its_clusters_out_and_their_space_is_given_back(make_rig: MakeRig) -> None:
    rig = make_rig(OLD)
    snapshot, temp = rig.snapshot()
    rig.disk.write(39 * CLUSTER, b"x")
    used = snapshot.temp_used()
    temp.hold = hold = threading.Event()
    writes = small_writes(1, 10, 20, 30)
    writing = in_thread(lambda: write_together(rig.disk, writes))
    assert temp.held.acquire(timeout=SECONDS)
    temp.hold = None
    snapshot.discard(10 * CLUSTER, 11 * CLUSTER)
    hold.set()
    writing.wait()
    assert snapshot.temp_used() == used + 2 * CLUSTER
    assert snapshot.counts()[ClusterState.TRIMMED] == 11
    for cluster in (0, 1, 9, 21, 30):
        assert snapshot.read(cluster * CLUSTER, CLUSTER) == OLD[cluster * CLUSTER : (cluster + 1) * CLUSTER]
    check(temp.path)


def test_a_cluster_that_another_write_saves_is_left_to_it(make_rig: MakeRig) -> None:
    rig = make_rig(OLD)
    snapshot, temp = rig.snapshot()
    rig.disk.write(39 * CLUSTER, b"x")
    temp.hold = hold = threading.Event()
    first = in_thread(lambda: rig.disk.write(10 * CLUSTER, b"first"))
    assert temp.held.acquire(timeout=SECONDS)
    temp.hold = None
    together = in_thread(lambda: write_together(rig.disk, small_writes(5, 10, 20)))
    while snapshot.counts()[ClusterState.COPIED] < 3:  # 39, 5 and 20: the other two need not wait
        assert not together.over.is_set()
    hold.set()
    first.wait()
    together.wait()
    assert snapshot.read(0, len(OLD)) == OLD
    assert snapshot.counts()[ClusterState.COPIED] == 4


def test_a_snapshot_that_breaks_during_the_copy_gets_nothing_more(make_rig: MakeRig) -> None:
    rig = make_rig(OLD)
    snapshot, temp = rig.snapshot()
    temp.hold = hold = threading.Event()
    writes = small_writes(1, 10, 20)
    writing = in_thread(lambda: write_together(rig.disk, writes))
    assert temp.held.acquire(timeout=SECONDS)
    snapshot.clusters.break_("for the test")
    hold.set()
    writing.wait()
    assert rig.disk.read(0, len(OLD)) == expected(writes)
    assert snapshot.counts()[ClusterState.COPIED] == 0


def test_several_snapshots_each_get_theirs(make_rig: MakeRig) -> None:
    rig = make_rig(OLD)
    first, _ = rig.snapshot("first")
    early = small_writes(1, 2)
    write_together(rig.disk, early)
    second, _ = rig.snapshot("second", cluster_size=CLUSTER // 4)
    late = small_writes(2, 3, 30)
    write_together(rig.disk, late)
    assert first.read(0, len(OLD)) == OLD
    assert second.read(0, len(OLD)) == expected(early)
    assert rig.disk.read(0, len(OLD)) == expected(early + late)


def test_writes_that_find_the_gate_closed_wait_for_it(make_rig: MakeRig) -> None:
    rig = make_rig(OLD)
    writes = small_writes(1, 10, 20)
    views = [(offset, memoryview(data)) for offset, data in writes]

    class Closing:
        """A write in the middle of which somebody takes a snapshot."""

        done = 0

        def __call__(self, offset: int, data: Buffer) -> None:
            type(rig.file).write(rig.file, offset, data)
            self.done += 1
            if self.done == 1:
                rig.disk.gate.close()

    rig.file.write = Closing()  # type: ignore[method-assign]
    assert rig.disk.write_many(views) == [True, False, False]
    assert rig.disk.write_many(views) == [False, False, False]
    rig.disk.gate.open()
    assert rig.disk.write_many(views) == [True, True, True]
    assert rig.disk.read(0, len(OLD)) == expected(writes)
