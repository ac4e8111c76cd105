"""What saving clusters costs, and why snapshots break: counted exactly."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable

import pytest

from fleecing.block.block_copy import _Task
from fleecing.block.breakage import Breakage, kind_of
from fleecing.block.copy_figures import CopyFigures
from fleecing.units import KiB
from tests.block.rig import CLUSTER, SECONDS, Rig, in_thread, pattern, write_together

MakeRig = Callable[..., Rig]
SIZE = 20 * CLUSTER + 100


def total(rig: Rig) -> CopyFigures:
    return rig.disk.copies.total()


def test_clusters_and_bytes_are_those_that_the_guest_overwrote(make_rig: MakeRig) -> None:
    rig = make_rig(pattern(10 * CLUSTER) + bytes(5 * CLUSTER) + pattern(5 * CLUSTER + 100))
    rig.snapshot()
    rig.disk.write(CLUSTER - 1, b"ab")  # two clusters
    rig.disk.write(0, b"again")
    rig.disk.write(10 * CLUSTER, b"c" * 3 * CLUSTER)  # zeroes
    rig.disk.write_zeroes(20 * CLUSTER, 100)  # the short tail
    figures = total(rig)
    assert figures.clusters == 6
    assert (figures.bytes_data, figures.bytes_zeroes) == (2 * CLUSTER + 100, 3 * CLUSTER)
    assert figures.latency.count == 3
    assert figures.latency.seconds > 0
    assert (figures.failures, figures.task_waits, figures.rereads) == (0, 0, 0)


def test_writes_that_are_saved_for_together_are_one_copy(make_rig: MakeRig) -> None:
    rig = make_rig(pattern(SIZE))
    rig.snapshot()
    assert write_together(rig.disk, [(2 * n * CLUSTER, b"x") for n in range(5)]) == [None] * 5
    figures = total(rig)
    assert (figures.clusters, figures.bytes_data, figures.latency.count) == (5, 5 * CLUSTER, 1)


def test_each_snapshot_copies_for_itself_and_the_sum_outlives_them(make_rig: MakeRig) -> None:
    rig = make_rig(pattern(SIZE))
    one, _ = rig.snapshot("one")
    rig.disk.write(0, b"x")
    two, _ = rig.snapshot("two")
    rig.disk.write(0, b"y" * 2 * CLUSTER)
    assert (one.clusters_copied_total, two.clusters_copied_total) == (2, 2)
    for snapshot in (one, two):
        snapshot.remove(SECONDS)
        assert total(rig).clusters == 4
    assert total(rig).latency.count == 3
    assert rig.disk.copies.opened == 2


def test_a_copy_that_fails_is_counted_as_such(make_rig: MakeRig) -> None:
    rig = make_rig(pattern(SIZE))
    _, temp = rig.snapshot()
    temp.fail = OSError(errno.EIO, os.strerror(errno.EIO))
    rig.disk.write(0, b"x")
    figures = total(rig)
    assert (figures.clusters, figures.bytes_data, figures.failures, figures.latency.count) == (0, 0, 1, 0)


def test_who_waits_for_anothers_copy_is_counted(make_rig: MakeRig, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = make_rig(pattern(SIZE))
    waiting = threading.Semaphore(0)
    wait = _Task.wait

    def wait_and_tell(task: _Task, deadline: float) -> bool:
        waiting.release()
        return wait(task, deadline)

    monkeypatch.setattr(_Task, "wait", wait_and_tell)
    _, temp = rig.snapshot()
    temp.hold = threading.Event()
    first = in_thread(lambda: rig.disk.write(0, b"x"))
    assert temp.held.acquire(timeout=SECONDS)
    second = in_thread(lambda: rig.disk.write(100, b"y"))
    third = in_thread(lambda: rig.disk.write(200, b"z"))
    for _ in range(2):
        assert waiting.acquire(timeout=SECONDS)
    temp.hold.set()
    for write in (first, second, third):
        write.wait()
    figures = total(rig)
    assert (figures.clusters, figures.task_waits) == (1, 2)
    assert figures.task_wait_seconds > 0


def test_who_waits_for_the_lock_of_a_snapshot_is_counted(make_rig: MakeRig, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = make_rig(pattern(SIZE))
    snapshot, _ = rig.snapshot()
    held = threading.Event()

    class TellingLock:
        """Says when somebody has found it held."""

        def __init__(self, lock: threading.Lock) -> None:
            self._lock = lock
            self.release = lock.release

        def acquire(self, *, blocking: bool = True, timeout: float = -1) -> bool:
            taken = self._lock.acquire(blocking, timeout)
            if not taken:
                held.set()
            return taken

        def __enter__(self) -> None:
            self.acquire()

        def __exit__(self, *exc: object) -> None:
            self.release()

    monkeypatch.setattr(snapshot.clusters, "lock", TellingLock(snapshot.clusters.lock))
    with snapshot.clusters.lock:
        write = in_thread(lambda: rig.disk.write(0, b"x"))
        assert held.wait(SECONDS)
    write.wait()
    figures = total(rig)
    assert (figures.clusters, figures.lock_waits) == (1, 1)
    assert figures.lock_wait_seconds > 0


@pytest.mark.parametrize("length, runs", [(100, 1), (4 * CLUSTER, 1)])
def test_a_read_that_the_guest_overtakes_is_counted_once(make_rig: MakeRig, length: int, runs: int) -> None:
    old = pattern(SIZE)
    rig = make_rig(old)
    snapshot, _ = rig.snapshot()
    for expected in (runs, runs):  # the second one finds all of it in temp from the start
        rig.file.after_read = lambda: rig.disk.write(0, b"n" * length)
        assert snapshot.read(0, length) == old[:length]
        assert total(rig).rereads == expected
    cached = memoryview(bytearray(100))
    rig.file.after_read = lambda: rig.disk.write(8 * CLUSTER, b"new")
    assert snapshot.read_cached(8 * CLUSTER, cached)
    assert cached == old[8 * CLUSTER : 8 * CLUSTER + 100]
    assert total(rig).rereads == runs + 1


def test_snapshots_that_break_are_counted_by_reason(make_rig: MakeRig) -> None:
    rig = make_rig(pattern(SIZE))
    for number, kind in (
        (errno.ENOSPC, Breakage.TEMP_FULL),
        (errno.EDQUOT, Breakage.TEMP_FULL),
        (errno.EFBIG, Breakage.TEMP_FULL),
        (errno.EIO, Breakage.TEMP_ERROR),
    ):
        before = rig.disk.breakages.counts()[kind]
        snapshot, temp = rig.snapshot(f"s{number}")
        temp.fail = OSError(number, os.strerror(number))
        rig.disk.write(0, b"x")
        assert snapshot.broken is not None
        assert rig.disk.breakages.counts()[kind] == before + 1
    snapshot, _ = rig.snapshot("limited", limit=1024 * KiB)
    rig.disk.write(0, b"y" * SIZE)
    assert rig.disk.breakages.counts()[Breakage.TEMP_LIMIT] == 1
    snapshot, temp = rig.snapshot("slow", cbw_timeout=0.05)
    temp.hold = threading.Event()
    rig.disk.write(0, b"z")
    temp.hold.set()
    assert rig.disk.breakages.counts()[Breakage.TIMEOUT] == 1
    snapshot, _ = rig.snapshot("unread")

    def fail() -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    rig.file.after_read = fail
    rig.disk.write(0, b"z")
    assert snapshot.broken == "copy before a guest write failed: the image cannot be read: Input/output error"
    assert rig.disk.breakages.counts()[Breakage.OTHER] == 1
    assert sum(rig.disk.breakages.counts().values()) == 7


def test_a_snapshot_that_is_deleted_is_not_one_that_broke(make_rig: MakeRig) -> None:
    rig = make_rig(pattern(SIZE))
    rig.snapshot()[0].remove(SECONDS)
    assert not any(rig.disk.breakages.counts().values())


@pytest.mark.parametrize(
    "cause, kind",
    [
        ("the image was written by something else while it was not served, the last time", Breakage.IMAGE_CHANGED),
        ("the size of the image changed from 5 to 6 bytes while it was not served", Breakage.IMAGE_CHANGED),
        ("another file was put in the place of the image while it was not served", Breakage.IMAGE_CHANGED),
        ("another device was put in the place of the image while it was not served", Breakage.IMAGE_CHANGED),
        ("a file was replaced by a block device, or the other way round", Breakage.IMAGE_CHANGED),
        (
            "copy before a guest write failed: the image cannot be read: /a/b: has shrunk from 10 to 5 bytes since it",
            Breakage.IMAGE_CHANGED,
        ),
        ("the image could not be made durable: Input/output error", Breakage.OTHER),
        ("the snapshot's files could not be made durable: Input/output error", Breakage.TEMP_ERROR),
        ("its files could not be made durable: No space left on device", Breakage.TEMP_FULL),
        ("the disk of temp did not take what was written to it: Input/output error", Breakage.TEMP_ERROR),
        ("/var/copy before a guest write failed: temp limit of 5 bytes reached/x: no such file", Breakage.REVIVAL),
    ],
)
def test_a_reason_that_was_kept_over_a_restart_is_of_the_same_kind(cause: str, kind: Breakage) -> None:
    assert kind_of(cause, Breakage.REVIVAL) is kind
