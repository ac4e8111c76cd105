"""Durable snapshots: what is synced before what, and what a failing or hanging disk does to it."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from fleecing.block import durability
from fleecing.block.bitfile import BitFile
from fleecing.block.copy_before_write import CopyBeforeWrite, OnCbwError
from fleecing.block.durability import GroupCommit
from fleecing.block.file import FileNode
from fleecing.block.flusher import Done
from fleecing.block.graph import NOT_DURABLE, SnapshotSpec, freeze, open_disk, revive
from fleecing.block.snapshot_access import SnapshotAccess
from fleecing.errors import ClusterUnreadable, ImageError, SnapshotBroken
from tests.block.qcow2.tools import check
from tests.block.rig import CLUSTER, SECONDS, in_thread, pattern
from tests.crash.recorder import Recorder

SIZE = 8 * CLUSTER
OLD = pattern(SIZE)
NEW = pattern(SIZE, seed=1)
IO_ERROR = OSError(5, "Input/output error")


def spec(folder: Path, policy: OnCbwError = OnCbwError.BREAK_SNAPSHOT, *, durable: bool = True) -> SnapshotSpec:
    return SnapshotSpec(
        "s",
        str(folder / "temp.qcow2"),
        CLUSTER,
        on_cbw_error=policy,
        trimmed_path=str(folder / "trimmed.bits"),
        durable=durable,
        copied_path=str(folder / "copied.bits"),
    )


def begin(
    folder: Path, policy: OnCbwError = OnCbwError.BREAK_SNAPSHOT, *, durable: bool = True
) -> tuple[CopyBeforeWrite, SnapshotAccess]:
    (folder / "disk.img").write_bytes(OLD)
    disk = open_disk(str(folder / "disk.img"))
    pairs = [(disk, spec(folder, policy, durable=durable))]
    return disk, freeze(pairs, drain_timeout=SECONDS, on_broken=lambda snapshot, cause: None)[0]


def again(
    folder: Path, disk: CopyBeforeWrite, *, power_lost: bool, durable: bool = True
) -> tuple[CopyBeforeWrite, SnapshotAccess]:
    """What the next process makes of the files as they are now."""
    disk.file.close()
    new = CopyBeforeWrite(FileNode.open(str(folder / "disk.img")))
    try:
        snapshot = revive(
            new, spec(folder, durable=durable), None, on_broken=lambda snapshot, cause: None, power_lost=power_lost
        )
    except BaseException:
        new.close()
        raise
    return new, snapshot


def copied(folder: Path) -> list[int]:
    return list(BitFile.open(str(folder / "copied.bits")).bits.search(1))


# One sync for many.


def test_those_who_come_while_a_commit_runs_share_the_next_one() -> None:
    batches: list[list[int]] = []
    began, go_on = threading.Semaphore(0), threading.Event()

    def commit(items: list[int]) -> None:
        batches.append(items)
        began.release()
        assert go_on.wait(SECONDS)

    group = GroupCommit(commit)
    first = in_thread(lambda: group.submit(1))
    assert began.acquire(timeout=SECONDS)
    queued = threading.Barrier(4)

    def join(number: int) -> None:
        queued.wait(SECONDS)
        group.submit(number)

    others = [in_thread(lambda n=n: join(n)) for n in (2, 3, 4)]  # type: ignore[misc]
    queued.wait(SECONDS)
    while group._next is None or len(group._next.items) < 3:
        assert not first.over.wait(0.001)
    go_on.set()
    for one in (first, *others):
        one.wait()
    assert [sorted(batch) for batch in batches] == [[1], [2, 3, 4]]


def test_error_of_a_commit_reaches_all_who_waited_for_it_and_no_others() -> None:
    def commit(items: list[int]) -> None:
        if 1 in items:
            raise IO_ERROR

    group = GroupCommit(commit)
    with pytest.raises(OSError, match="Input"):
        group.submit(1)
    group.submit(2)


# The order.


def test_guest_write_waits_until_its_copy_is_durable(tmp_path: Path) -> None:
    disk, _snapshot = begin(tmp_path)
    recorder = Recorder(tmp_path)
    with recorder.recording():
        disk.write(0, NEW[:CLUSTER])
    temp, bits, image = (recorder.files[name] for name in ("temp.qcow2", "copied.bits", "disk.img"))
    last_of_temp = max(versions[-1][0] for versions in temp.sectors.values())
    bit_set = max(versions[-1][0] for versions in bits.sectors.values())
    first_of_image = min(versions[1][0] for versions in image.sectors.values() if len(versions) > 1)
    assert last_of_temp < temp.syncs[-1][0] <= temp.syncs[-1][1] <= bit_set
    assert bit_set <= bits.syncs[-1][0] < bits.syncs[-1][1] < first_of_image
    assert copied(tmp_path) == [0]


def test_creation_syncs_every_file_and_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced = []
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(os.readlink(f"/proc/self/fd/{fd}")))
    folder = tmp_path / "snapshots" / "s"
    folder.mkdir(parents=True)
    begin(folder)
    assert {str(folder.resolve()), str(folder.parent.resolve())} <= set(synced)


def test_snapshot_that_is_not_durable_syncs_nothing(tmp_path: Path) -> None:
    disk, snapshot = begin(tmp_path, durable=False)
    recorder = Recorder(tmp_path)
    with recorder.recording():
        disk.write(0, NEW)
        snapshot.discard(0, CLUSTER)
    assert all(history.syncs == [(0, 0)] for history in recorder.files.values())
    assert not (tmp_path / "copied.bits").exists()


def test_many_guest_writes_at_once_share_the_syncs(tmp_path: Path) -> None:
    disk, snapshot = begin(tmp_path)
    recorder = Recorder(tmp_path)
    over = threading.Semaphore(0)
    sync = snapshot.temp.file.sync
    held = threading.Event()

    def slow_sync() -> None:
        assert held.wait(SECONDS)
        sync()

    snapshot.temp.file.sync = slow_sync  # type: ignore[method-assign]
    with recorder.recording():
        for cluster in range(4):
            disk.submit_write(cluster * CLUSTER, NEW[:CLUSTER], lambda error: over.release())
        while len(snapshot.copier._tasks) < 4 or snapshot.temp.linked().count() < 4:
            assert not over.acquire(timeout=0.001)
        held.set()
        for _ in range(4):
            assert over.acquire(timeout=SECONDS)
    assert len(recorder.files["temp.qcow2"].syncs) - 1 <= 2
    assert snapshot.read(0, SIZE) == OLD


def test_trim_takes_effect_when_it_is_durable(tmp_path: Path) -> None:
    disk, snapshot = begin(tmp_path)
    trimmed = snapshot.clusters.trimmed
    assert trimmed is not None
    began, go_on = threading.Event(), threading.Event()

    def slow_sync() -> None:
        began.set()
        assert go_on.wait(SECONDS)

    trimmed.sync = slow_sync  # type: ignore[method-assign]
    trim = in_thread(lambda: snapshot.discard(0, CLUSTER))
    assert began.wait(SECONDS)
    disk.write(0, NEW[:CLUSTER])  # still saved: the trim may be lost with the power
    assert snapshot.read(0, CLUSTER) == OLD[:CLUSTER]
    go_on.set()
    trim.wait()
    with pytest.raises(ClusterUnreadable, match="trimmed"):
        snapshot.read(0, 1)
    snapshot.remove(SECONDS)


# Disks that fail or hang.


def test_copy_that_cannot_be_made_durable_breaks_the_snapshot(tmp_path: Path) -> None:
    disk, snapshot = begin(tmp_path)
    recorder = Recorder(tmp_path)
    recorder.fail_sync = "temp.qcow2"
    with recorder.recording():
        disk.write(0, NEW)
    assert snapshot.broken == "copy before a guest write failed: Input/output error"
    assert disk.read(0, SIZE) == NEW


@pytest.mark.parametrize("name", ["temp.qcow2", "copied.bits"])
def test_sync_that_failed_once_is_not_believed_again(tmp_path: Path, name: str) -> None:
    disk, snapshot = begin(tmp_path, OnCbwError.BREAK_GUEST_WRITE)
    recorder = Recorder(tmp_path)
    recorder.fail_sync = name
    with recorder.recording():
        with pytest.raises(OSError, match="Input"):
            disk.write(0, NEW[:CLUSTER])
        recorder.fail_sync = None
        for offset in (0, CLUSTER):
            with pytest.raises(OSError, match="Input"):
                disk.write(offset, NEW[:CLUSTER])
    assert snapshot.read(0, SIZE) == disk.read(0, SIZE) == OLD
    with pytest.raises(SnapshotBroken, match="could not be made durable: Input"):
        again(tmp_path, disk, power_lost=False)


def test_trim_that_cannot_be_made_durable_is_an_error_and_nothing_is_given_up(tmp_path: Path) -> None:
    disk, snapshot = begin(tmp_path)
    recorder = Recorder(tmp_path)
    recorder.fail_sync = "trimmed.bits"
    with recorder.recording(), pytest.raises(OSError, match="Input"):
        snapshot.discard(0, CLUSTER)
    assert snapshot.read(0, SIZE) == OLD
    disk.close()


def test_break_waits_for_its_note_and_not_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(durability, "NOTE_SECONDS", 0.01)
    disk, snapshot = begin(tmp_path)
    trimmed = snapshot.clusters.trimmed
    assert trimmed is not None
    go_on, noted = threading.Event(), []

    def hanging_sync() -> None:
        noted.append((trimmed.note, snapshot.broken))
        go_on.wait(SECONDS)

    trimmed.sync = hanging_sync  # type: ignore[method-assign]
    snapshot.clusters.break_("temp hangs")
    assert noted == [("temp hangs", None)]  # the guest goes on only after that
    assert snapshot.broken == "temp hangs"
    go_on.set()
    disk.close()


# The next process.


def test_copies_that_were_not_yet_known_to_be_durable_are_so_when_the_next_process_goes_on(tmp_path: Path) -> None:
    disk, snapshot = begin(tmp_path)
    disk.write(0, NEW[:CLUSTER])
    runs = snapshot.temp.place(1)
    snapshot.temp.file.write(runs[0][0], OLD[CLUSTER : 2 * CLUSTER])
    snapshot.temp.link(1, runs[0][0], 1)  # killed before the sync
    trimmed = snapshot.clusters.trimmed
    assert trimmed is not None
    trimmed.bits[5] = 1  # and before this one
    recorder = Recorder(tmp_path)
    with recorder.recording():
        disk, snapshot = again(tmp_path, disk, power_lost=False)
        for name in ("temp.qcow2", "copied.bits", "trimmed.bits"):
            assert len(recorder.files[name].syncs) > 1, name
        disk.write(0, NEW)
    assert set(copied(tmp_path)) == {0, 1, 2, 3, 4, 6, 7}
    disk, snapshot = again(tmp_path, disk, power_lost=True)
    assert snapshot.read(0, 5 * CLUSTER) == OLD[: 5 * CLUSTER]
    with pytest.raises(ClusterUnreadable, match="trimmed"):
        snapshot.read(5 * CLUSTER, 1)


def test_after_a_power_loss_only_what_is_known_to_be_durable_counts(tmp_path: Path) -> None:
    disk, snapshot = begin(tmp_path)
    disk.write(0, NEW[: 2 * CLUSTER])
    runs = snapshot.temp.place(1)
    snapshot.temp.link(5, runs[0][0], 1)  # linked, and nothing of its data is there
    disk, snapshot = again(tmp_path, disk, power_lost=True)
    assert snapshot.read(0, SIZE) == OLD
    assert snapshot.temp.linked().count() == 2
    assert check(snapshot.temp) == {}


@pytest.mark.parametrize("where", ["refcounts", "refcount table", "L2 table"])
def test_metadata_that_is_garbage_is_put_right(tmp_path: Path, where: str) -> None:
    disk, snapshot = begin(tmp_path)
    disk.write(0, NEW[: 2 * CLUSTER])
    geometry = 3 * CLUSTER  # header, refcount block, refcount table, L1, then the L2 table
    with open(tmp_path / "temp.qcow2", "r+b") as file:
        match where:
            case "refcounts":
                file.seek(CLUSTER)
                file.write(b"\xff" * 600)
            case "refcount table":
                file.seek(2 * CLUSTER)
                file.write(b"\xff" * 600)
            case "L2 table":
                file.seek(geometry)
                table = int.from_bytes(file.read(8), "big") & 0xFFFF_FFFF_FFFF
                file.seek(table + 16)
                file.write(b"\xff" * 600)
    disk, snapshot = again(tmp_path, disk, power_lost=True)
    assert snapshot.read(0, SIZE) == OLD
    assert check(snapshot.temp) == {}


@pytest.mark.parametrize("where", ["L1", "L2"])
def test_copy_that_was_durable_and_is_lost_breaks_the_snapshot_for_good(tmp_path: Path, where: str) -> None:
    disk, _snapshot = begin(tmp_path)
    disk.write(0, NEW[: 2 * CLUSTER])
    with open(tmp_path / "temp.qcow2", "r+b") as file:
        file.seek(3 * CLUSTER)
        table = int.from_bytes(file.read(8), "big") & 0xFFFF_FFFF_FFFF
        at = 3 * CLUSTER if where == "L1" else table + 8
        file.seek(at)
        entry = file.read(8)
        file.seek(at)
        file.write(bytes(8))
    with pytest.raises(ImageError, match="durable once"):
        again(tmp_path, disk, power_lost=True)
    with open(tmp_path / "temp.qcow2", "r+b") as file:
        file.seek(at)
        file.write(entry)  # back again, too late: the guest may have gone on
    _disk, snapshot = again(tmp_path, disk, power_lost=False)
    with pytest.raises(SnapshotBroken, match="durable once"):
        snapshot.read(0, 1)


def test_snapshot_that_is_not_durable_is_broken_by_a_power_loss_for_good(tmp_path: Path) -> None:
    disk, _snapshot = begin(tmp_path, durable=False)
    with pytest.raises(SnapshotBroken, match=NOT_DURABLE):
        again(tmp_path, disk, power_lost=True, durable=False)
    disk, snapshot = again(tmp_path, disk, power_lost=False, durable=False)
    with pytest.raises(SnapshotBroken, match=NOT_DURABLE):
        snapshot.read(0, 1)


def test_removed_durable_snapshot_leaves_nothing(tmp_path: Path) -> None:
    disk, snapshot = begin(tmp_path)
    disk.write(0, NEW)
    snapshot.discard(0, 2 * CLUSTER)
    snapshot.remove(SECONDS)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["disk.img"]
    disk.close()


def test_trim_that_comes_while_a_durable_snapshot_is_deleted_is_answered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where its flush was never answered, the connection that asked for it never ended."""
    disk, snapshot = begin(tmp_path)
    assert snapshot._durability is not None
    submit_trim = snapshot._durability.submit_trim

    def deleted_first(done: Done) -> None:
        snapshot.remove(SECONDS)
        submit_trim(done)

    monkeypatch.setattr(snapshot._durability, "submit_trim", deleted_first)
    answers: list[Exception | None] = []
    snapshot.submit_discard(0, CLUSTER, answers.append)
    assert [str(answer) for answer in answers] == ["snapshot broken: deleted"]
    disk.close()
