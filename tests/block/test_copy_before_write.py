"""The filter and the copy engine: what a guest change saves, waits for, and survives."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable
from functools import partial

import pytest

from fleecing.block.block_copy import MAX_TASK
from fleecing.block.copy_before_write import OnCbwError, same_instant
from fleecing.block.extent import ClusterState
from fleecing.errors import SnapshotBroken, TempLimitReached
from fleecing.units import MiB
from tests.block.rig import CLUSTER, SECONDS, Rig, blocks, in_thread, pattern

MakeRig = Callable[..., Rig]
SIZE = 8 * CLUSTER
OLD = pattern(SIZE)
NEW = pattern(SIZE, seed=1)
NO_SPACE = OSError(28, "No space left on device")


def test_write_without_snapshot_is_done_at_once(make_rig: MakeRig) -> None:
    rig = make_rig(OLD)
    assert rig.disk.write_now(5, b"abc")
    assert rig.disk.read(5, 3) == b"abc"


def test_write_now_changes_nothing_where_something_is_to_be_saved(make_rig: MakeRig) -> None:
    rig = make_rig(OLD)
    snapshot, _ = rig.snapshot()
    assert not rig.disk.write_now(CLUSTER - 1, b"abc")
    assert rig.disk.read(0, SIZE) == OLD
    rig.disk.write(CLUSTER - 1, b"abc")
    assert snapshot.clusters_copied_total == 2
    assert rig.disk.write_now(10, b"abc")


@pytest.mark.parametrize("change", ["write", "zeroes", "zeroes kept allocated", "discard"])
def test_every_change_copies_the_clusters_that_it_touches_first(make_rig: MakeRig, change: str) -> None:
    rig = make_rig(OLD)
    snapshot, _ = rig.snapshot()
    offset, length = CLUSTER - 1, 2 * CLUSTER + 2
    match change:
        case "write":
            rig.disk.write(offset, NEW[:length])
        case "discard":
            rig.disk.discard(offset, length)
        case _:
            rig.disk.write_zeroes(offset, length, may_unmap=change == "zeroes")
    assert snapshot.cluster_state(0, SIZE) == [
        (4 * CLUSTER, ClusterState.COPIED),
        (4 * CLUSTER, ClusterState.UNTOUCHED),
    ]
    assert snapshot.read(0, SIZE) == OLD
    now = NEW[:length] if change == "write" else bytes(length)
    assert rig.disk.read(0, SIZE) == OLD[:offset] + now + OLD[offset + length :]


def test_zero_clusters_cost_no_space_and_data_beside_them_does(make_rig: MakeRig) -> None:
    rig = make_rig(OLD[:CLUSTER] + bytes(CLUSTER) + OLD[:CLUSTER] + bytes(5 * CLUSTER))
    snapshot, temp = rig.snapshot()
    before = snapshot.temp_used()
    rig.disk.write(0, NEW)
    assert snapshot.temp_used() - before == 3 * CLUSTER  # two of data, one L2 table
    assert snapshot.counts()[ClusterState.COPIED] == 8
    assert blocks(temp.path) < 8 * CLUSTER


def test_a_large_change_is_copied_in_tasks_and_stays_exact(make_rig: MakeRig) -> None:
    old = pattern(3 * MAX_TASK + 777)
    rig = make_rig(old)
    snapshot, _ = rig.snapshot()
    rig.disk.write(1, b"x")
    rig.disk.write(0, bytes([9]) * len(old))
    assert snapshot.read(0, len(old)) == old


def test_failing_copy_breaks_the_snapshot_and_the_guest_goes_on(make_rig: MakeRig) -> None:
    rig = make_rig(OLD)
    snapshot, temp = rig.snapshot()
    other, _ = rig.snapshot("other")
    temp.fail = NO_SPACE
    rig.disk.write(0, NEW)
    assert rig.disk.read(0, SIZE) == NEW
    assert snapshot.broken == "copy before a guest write failed: No space left on device"
    assert rig.broken == [("s", snapshot.broken)]
    with pytest.raises(SnapshotBroken, match="No space left on device"):
        snapshot.read(7 * CLUSTER, 1)
    assert other.read(0, SIZE) == OLD
    temp.fail = None
    rig.disk.write(0, OLD)
    assert snapshot.broken is not None


def test_failing_copy_fails_the_guest_write_where_that_is_asked_for(make_rig: MakeRig) -> None:
    rig = make_rig(OLD)
    snapshot, temp = rig.snapshot(on_cbw_error=OnCbwError.BREAK_GUEST_WRITE)
    temp.fail = NO_SPACE
    with pytest.raises(OSError, match="No space left"):
        rig.disk.write(0, NEW)
    assert rig.disk.read(0, SIZE) == OLD
    assert snapshot.read(0, SIZE) == OLD
    temp.fail = None
    rig.disk.write(0, NEW)  # it is tried again
    assert snapshot.read(0, SIZE) == OLD
    assert snapshot.broken is None


@pytest.mark.parametrize("writes", range(8))
def test_copy_that_fails_at_any_write_leaves_nothing_half_done(make_rig: MakeRig, writes: int) -> None:
    rig = make_rig(OLD)
    snapshot, temp = rig.snapshot(on_cbw_error=OnCbwError.BREAK_GUEST_WRITE)
    rig.disk.write(3 * CLUSTER, b"x")
    temp.skip, temp.fail = writes, NO_SPACE
    try:
        rig.disk.write(0, NEW)
    except OSError:
        assert rig.disk.read(0, 3 * CLUSTER) == OLD[: 3 * CLUSTER]
    temp.fail = None
    assert snapshot.read(0, SIZE) == OLD
    rig.disk.write(0, NEW)
    assert snapshot.read(0, SIZE) == OLD
    # What failed was given back, or put aside where it is in doubt whether its count was written.
    assert snapshot.temp_used() <= (8 + 5 + 5) * CLUSTER


def test_quota_reached_is_a_copy_error(make_rig: MakeRig) -> None:
    rig = make_rig(OLD)
    snapshot, _ = rig.snapshot(limit=9 * CLUSTER)
    rig.disk.write(0, NEW)
    assert snapshot.broken is not None
    assert "temp limit of 589824 bytes reached" in snapshot.broken
    kept, _ = rig.snapshot("kept", limit=9 * CLUSTER, on_cbw_error=OnCbwError.BREAK_GUEST_WRITE)
    with pytest.raises(TempLimitReached):
        rig.disk.write(0, OLD)
    assert kept.read(0, SIZE) == NEW


def test_error_of_the_active_image_while_copying_is_a_copy_error(make_rig: MakeRig) -> None:
    rig = make_rig(OLD)
    snapshot, _ = rig.snapshot()

    def fail() -> None:
        raise OSError(5, "Input/output error")

    rig.file.after_read = fail
    rig.disk.write(0, NEW)
    assert snapshot.broken == "copy before a guest write failed: the image cannot be read: Input/output error"
    assert rig.disk.read(0, SIZE) == NEW


def test_write_waits_for_a_copy_of_its_cluster_and_not_for_others(make_rig: MakeRig) -> None:
    rig = make_rig(OLD)
    snapshot, temp = rig.snapshot()
    rig.disk.write(5 * CLUSTER, b"x")
    temp.hold = hold = threading.Event()
    first = in_thread(lambda: rig.disk.write(0, NEW[:CLUSTER]))
    assert temp.held.acquire(timeout=SECONDS)
    same = in_thread(lambda: rig.disk.write(10, b"same cluster"))
    temp.hold = None
    rig.disk.write(2 * CLUSTER, b"other cluster")
    assert rig.disk.write_now(5 * CLUSTER, b"copied already")
    assert not first.over.is_set()
    assert not same.over.is_set()
    assert rig.disk.read(0, CLUSTER) == OLD[:CLUSTER]
    hold.set()
    first.wait()
    same.wait()
    assert snapshot.read(0, SIZE) == OLD
    assert snapshot.clusters_copied_total == 3


def test_reader_does_not_wait_for_a_copy_under_way(make_rig: MakeRig) -> None:
    rig = make_rig(OLD)
    snapshot, temp = rig.snapshot()
    temp.hold = hold = threading.Event()
    write = in_thread(lambda: rig.disk.write(0, NEW[:CLUSTER]))
    assert temp.held.acquire(timeout=SECONDS)
    assert snapshot.read(0, SIZE) == OLD
    hold.set()
    write.wait()
    assert snapshot.read(0, SIZE) == OLD


def test_waiter_tries_the_copy_itself_where_the_first_task_failed(make_rig: MakeRig) -> None:
    rig = make_rig(OLD)
    snapshot, temp = rig.snapshot(on_cbw_error=OnCbwError.BREAK_GUEST_WRITE)
    temp.hold = hold = threading.Event()
    first = in_thread(lambda: rig.disk.write(0, b"first"))
    assert temp.held.acquire(timeout=SECONDS)
    temp.hold, temp.fail, temp.failures = None, NO_SPACE, 1
    second = in_thread(lambda: rig.disk.write(100, b"second"))
    assert not second.over.wait(0.05)
    hold.set()
    with pytest.raises(OSError, match="No space left"):
        first.wait()
    second.wait()
    assert rig.disk.read(0, 106) == OLD[:100] + b"second"
    assert snapshot.read(0, SIZE) == OLD


def test_trim_during_a_copy_cancels_it_and_its_space_is_given_back(make_rig: MakeRig) -> None:
    rig = make_rig(OLD)
    snapshot, temp = rig.snapshot()
    rig.disk.write(7 * CLUSTER, b"x")
    used = snapshot.temp_used()
    temp.hold = hold = threading.Event()
    write = in_thread(lambda: rig.disk.write(0, NEW[: 3 * CLUSTER]))
    assert temp.held.acquire(timeout=SECONDS)
    snapshot.discard(0, 2 * CLUSTER)  # does not wait for the copy
    temp.hold = None
    assert rig.disk.write_now(0, b"nothing to save any more")
    hold.set()
    write.wait()
    assert snapshot.temp_used() - used == CLUSTER
    assert snapshot.counts()[ClusterState.TRIMMED] == 2
    assert snapshot.read(2 * CLUSTER, CLUSTER) == OLD[2 * CLUSTER : 3 * CLUSTER]
    assert not snapshot.clusters.needs_copy(0, 3 * CLUSTER)


@pytest.mark.parametrize("policy", list(OnCbwError))
def test_trim_during_a_copy_that_fails_marks_nothing_again_and_breaks_nothing(
    make_rig: MakeRig, policy: OnCbwError
) -> None:
    """QEMU marks the clusters dirty again when the task fails, though nobody wants them."""
    rig = make_rig(OLD)
    snapshot, temp = rig.snapshot(on_cbw_error=policy)
    temp.hold = hold = threading.Event()
    write = in_thread(lambda: rig.disk.write(0, NEW[:CLUSTER]))
    assert temp.held.acquire(timeout=SECONDS)
    snapshot.discard(0, CLUSTER)
    temp.fail = NO_SPACE
    hold.set()
    write.wait()
    assert not snapshot.clusters.needs_copy(0, CLUSTER)
    assert rig.disk.read(0, CLUSTER) == NEW[:CLUSTER]
    assert snapshot.broken is None


def test_hanging_temp_breaks_the_snapshot_at_the_timeout_and_the_guest_goes_on(make_rig: MakeRig) -> None:
    rig = make_rig(OLD)
    snapshot, temp = rig.snapshot(cbw_timeout=0.3)
    other, _ = rig.snapshot("other")
    temp.hold = hold = threading.Event()
    writes = [in_thread(partial(rig.disk.write, at * CLUSTER + at, b"guest")) for at in range(8)]
    assert temp.held.acquire(timeout=SECONDS)
    assert rig.disk.read(0, SIZE)  # reads go on
    for write in writes:
        write.wait()
    assert not hold.is_set()
    assert snapshot.broken is not None
    assert snapshot.broken == "temp did not take a copy within cbw-timeout (0.3 s)"
    for at in range(8):
        assert rig.disk.read(at * CLUSTER + at, 5) == b"guest"
    assert other.read(0, SIZE) == OLD
    hold.set()  # the threads that hung come back and change nothing
    snapshot.remove(SECONDS)
    for at in range(8):
        assert rig.disk.read(at * CLUSTER + at, 5) == b"guest"


def test_hanging_temp_fails_the_guest_write_at_the_timeout_where_that_is_asked_for(make_rig: MakeRig) -> None:
    rig = make_rig(OLD)
    snapshot, temp = rig.snapshot(cbw_timeout=0.3, on_cbw_error=OnCbwError.BREAK_GUEST_WRITE)
    temp.hold = hold = threading.Event()
    write = in_thread(lambda: rig.disk.write(0, NEW[:CLUSTER]))
    with pytest.raises(TimeoutError):
        write.wait()
    assert rig.disk.read(0, SIZE) == OLD
    with pytest.raises(TimeoutError):
        rig.disk.write(10, b"the same cluster, whose copy still hangs")
    temp.hold = None
    hold.set()
    rig.disk.write(0, NEW[:CLUSTER])
    assert snapshot.broken is None
    assert snapshot.read(0, SIZE) == OLD


@pytest.mark.parametrize("end", ["broken", "deleted"])
def test_a_copy_that_fails_when_its_snapshot_is_given_up_already_is_no_error_of_the_guest(
    make_rig: MakeRig, end: str
) -> None:
    rig = make_rig(OLD)
    snapshot, temp = rig.snapshot(on_cbw_error=OnCbwError.BREAK_GUEST_WRITE)
    temp.hold = hold = threading.Event()
    write = in_thread(lambda: rig.disk.write(0, NEW[:CLUSTER]))
    assert temp.held.acquire(timeout=SECONDS)
    if end == "deleted":
        with pytest.raises(TimeoutError):
            snapshot.remove(0)
    else:
        snapshot.clusters.break_("its disk loses writes")
    temp.fail = OSError(errno.EIO, "temp is gone")
    hold.set()
    write.wait()
    assert rig.disk.read(0, SIZE) == NEW[:CLUSTER] + OLD[CLUSTER:]


def test_a_change_that_waited_for_the_lock_of_a_deleted_snapshot_copies_nothing(make_rig: MakeRig) -> None:
    rig = make_rig(OLD)
    snapshot, temp = rig.snapshot()
    lock, looked = snapshot.clusters.lock, threading.Event()

    class Contended:
        """Whoever comes here has looked at `broken` before, and finds the lock taken."""

        def acquire(self, *, blocking: bool = True) -> bool:
            looked.set()
            return lock.acquire(blocking)

        def release(self) -> None:
            lock.release()

        __enter__ = acquire

        def __exit__(self, *error: object) -> None:
            self.release()

    lock.acquire()
    snapshot.clusters.lock = Contended()  # type: ignore[assignment]
    save = in_thread(lambda: snapshot.copier.save(0, 1))
    assert looked.wait(SECONDS)
    snapshot.clusters.break_("deleted")
    temp.fail = OSError(errno.EIO, "temp is closed")  # whoever removes it saw no task
    lock.release()
    save.wait()
    snapshot.clusters.lock = lock


def test_timeout_of_more_than_four_seconds_does_not_wrap(make_rig: MakeRig) -> None:
    """In QEMU 7.2 a cbw-timeout of 5 s is one of 0.7 s."""
    rig = make_rig(OLD)
    snapshot, temp = rig.snapshot(cbw_timeout=5)
    temp.hold = hold = threading.Event()
    write = in_thread(lambda: rig.disk.write(0, b"guest"))
    assert temp.held.acquire(timeout=SECONDS)
    assert not write.over.wait(1.2)
    hold.set()
    write.wait()
    assert snapshot.broken is None


def test_a_snapshot_waits_for_writes_under_way_and_holds_new_ones(make_rig: MakeRig) -> None:
    rig = make_rig(OLD)
    first, temp = rig.snapshot("first")
    temp.hold = hold = threading.Event()
    under_way = in_thread(lambda: rig.disk.write(0, NEW[:CLUSTER]))
    assert temp.held.acquire(timeout=SECONDS)
    second = in_thread(lambda: rig.snapshot("second"))
    assert not second.over.wait(0.05)
    held = in_thread(lambda: rig.disk.write(CLUSTER, b"later"))
    assert rig.disk.read(CLUSTER, 5) == OLD[CLUSTER : CLUSTER + 5]
    temp.hold = None
    hold.set()
    for call in (under_way, second, held):
        call.wait()
    assert rig.snapshots[1].read(0, SIZE) == NEW[:CLUSTER] + OLD[CLUSTER:]
    assert first.read(0, SIZE) == OLD


def test_a_snapshot_that_cannot_be_taken_in_time_is_not_taken_and_writes_go_on(make_rig: MakeRig) -> None:
    rig = make_rig(OLD)
    first, temp = rig.snapshot("first")
    temp.hold = hold = threading.Event()
    under_way = in_thread(lambda: rig.disk.write(0, NEW[:CLUSTER]))
    assert temp.held.acquire(timeout=SECONDS)
    installed: list[bool] = []
    with pytest.raises(TimeoutError, match=r"did not end within 0\.1 s"):
        same_instant([rig.disk], lambda: installed.append(True), timeout=0.1)
    assert not installed
    temp.hold = None
    rig.disk.write(2 * CLUSTER, b"goes on")
    hold.set()
    under_way.wait()
    assert first.read(0, SIZE) == OLD


def test_flush_covers_the_writes_that_returned_before_it(make_rig: MakeRig) -> None:
    rig = make_rig(OLD)
    synced: list[bytes] = []
    sync = rig.file.host.sync

    def record() -> None:
        synced.append(rig.path.read_bytes()[:3])
        sync()

    rig.file.host.sync = record  # type: ignore[method-assign]
    rig.disk.write(0, b"abc")
    rig.disk.flush()
    assert synced[-1] == b"abc"


def test_removal_waits_for_a_copy_under_way_and_can_be_asked_again(make_rig: MakeRig) -> None:
    rig = make_rig(OLD)
    snapshot, temp = rig.snapshot()
    temp.hold = hold = threading.Event()
    write = in_thread(lambda: rig.disk.write(0, NEW[:CLUSTER]))
    assert temp.held.acquire(timeout=SECONDS)
    with pytest.raises(TimeoutError, match="copy under way"):
        snapshot.remove(0.05)
    temp.hold = None
    hold.set()
    write.wait()
    snapshot.remove(SECONDS)
    assert rig.disk.read(0, CLUSTER) == NEW[:CLUSTER]
    assert temp.fd == -1


def test_copy_of_a_run_longer_than_a_task_and_partly_hole(make_rig: MakeRig) -> None:
    old = pattern(MiB)
    rig = make_rig(old, 64 * MiB)
    snapshot, _ = rig.snapshot()
    rig.disk.write_zeroes(0, 64 * MiB, may_unmap=False)
    rig.disk.write(40 * MiB, NEW)
    assert snapshot.read(0, MiB) == old
    assert snapshot.read(MiB, 63 * MiB) == bytes(63 * MiB)
