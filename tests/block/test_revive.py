"""Snapshots that outlive the process: what the next one makes of the files that are there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from bitarray import bitarray

from fleecing.block.bitmap import ones
from fleecing.block.copy_before_write import CopyBeforeWrite
from fleecing.block.extent import ClusterState
from fleecing.block.file import FileNode
from fleecing.block.graph import SnapshotSpec, freeze, open_disk, revive
from fleecing.block.snapshot_access import SnapshotAccess
from fleecing.errors import ClusterUnreadable, ImageError, SnapshotBroken
from tests.block.rig import CLUSTER, SECONDS, pattern

SIZE = 8 * CLUSTER + 100
OLD = pattern(SIZE)
NEW = pattern(SIZE, seed=1)
Revive = Callable[[], tuple[CopyBeforeWrite, SnapshotAccess]]


def nothing_breaks(snapshot: SnapshotAccess, cause: str) -> None:
    raise AssertionError(cause)


def spec(folder: Path, **options: object) -> SnapshotSpec:
    return SnapshotSpec(
        "s",
        str(folder / "temp.qcow2"),
        CLUSTER,
        trimmed_path=str(folder / "trimmed.bits"),
        **options,  # type: ignore[arg-type]
    )


def begin(folder: Path, **options: object) -> tuple[CopyBeforeWrite, SnapshotAccess]:
    (folder / "disk.img").write_bytes(OLD)
    disk = open_disk(str(folder / "disk.img"))
    return disk, freeze(
        [(disk, spec(folder, **options))], drain_timeout=SECONDS, on_broken=lambda snapshot, cause: None
    )[0]


def again(folder: Path, disk: CopyBeforeWrite, scope: bitarray | None = None) -> tuple[CopyBeforeWrite, SnapshotAccess]:
    """What a new process does. The old one is left as kill -9 leaves it, but for the lock that dies with it."""
    disk.file.close()
    new = CopyBeforeWrite(FileNode.open(str(folder / "disk.img")))
    return new, revive(new, spec(folder), scope, on_broken=nothing_breaks)


def test_copied_stays_copied_and_trimmed_stays_trimmed(tmp_path: Path) -> None:
    disk, snapshot = begin(tmp_path)
    disk.write(0, NEW[: 3 * CLUSTER])
    disk.write(SIZE - 1, b"x")
    snapshot.discard(CLUSTER, CLUSTER)
    snapshot.discard(5 * CLUSTER, CLUSTER)
    states = snapshot.cluster_state(0, SIZE)
    disk, snapshot = again(tmp_path, disk)
    assert snapshot.cluster_state(0, SIZE) == states
    disk.write(0, bytes(SIZE))
    assert snapshot.read(0, CLUSTER) == OLD[:CLUSTER]
    assert snapshot.read(2 * CLUSTER, 3 * CLUSTER) == OLD[2 * CLUSTER : 5 * CLUSTER]
    assert snapshot.read(6 * CLUSTER, SIZE - 6 * CLUSTER) == OLD[6 * CLUSTER :]
    for cluster in (1, 5):
        with pytest.raises(ClusterUnreadable, match="trimmed"):
            snapshot.read(cluster * CLUSTER, 1)


def test_snapshot_with_a_scope_comes_back_with_it(tmp_path: Path) -> None:
    scope = bitarray("0110000000000000", endian="little")
    disk, snapshot = begin(tmp_path, scope=lambda: scope)
    disk.write(0, NEW)
    disk, snapshot = again(tmp_path, disk, scope)
    assert snapshot.read(CLUSTER, 2 * CLUSTER) == OLD[CLUSTER : 3 * CLUSTER]
    with pytest.raises(ClusterUnreadable, match="not in bitmap"):
        snapshot.read(0, 1)
    assert snapshot.counts()[ClusterState.NOT_IN_BITMAP] == 7


def test_broken_snapshot_comes_back_broken_with_its_reason(tmp_path: Path) -> None:
    disk, snapshot = begin(tmp_path)
    snapshot.clusters.break_("temp is gone")
    disk, snapshot = again(tmp_path, disk)
    assert disk.snapshots == ()
    with pytest.raises(SnapshotBroken, match="temp is gone"):
        snapshot.read(0, 1)
    snapshot.remove(0)


def test_trim_that_was_interrupted_is_finished(tmp_path: Path) -> None:
    disk, snapshot = begin(tmp_path)
    disk.write(0, NEW)
    used = snapshot.temp_used()
    trimmed = snapshot.clusters.trimmed
    assert trimmed is not None
    trimmed.bits[2:4] = 1  # killed before temp was touched
    disk, snapshot = again(tmp_path, disk)
    assert snapshot.counts()[ClusterState.TRIMMED] == 2
    assert used - snapshot.temp_used() == 2 * CLUSTER
    assert snapshot.read(4 * CLUSTER, CLUSTER) == OLD[4 * CLUSTER : 5 * CLUSTER]


def test_data_that_was_written_and_not_linked_is_copied_again(tmp_path: Path) -> None:
    disk, snapshot = begin(tmp_path)
    runs = snapshot.temp.place(1)
    snapshot.temp.file.write(runs[0][0], NEW[:CLUSTER])  # killed before the link, and before the guest's write
    disk, snapshot = again(tmp_path, disk)
    assert snapshot.counts()[ClusterState.UNTOUCHED] == 9
    disk.write(0, NEW)
    assert snapshot.read(0, SIZE) == OLD


@pytest.mark.parametrize("damage", ["temp gone", "temp cut", "temp garbage", "bits gone", "bits garbage", "other size"])
def test_damaged_files_are_refused_and_the_disk_is_as_before(tmp_path: Path, damage: str) -> None:
    disk, _snapshot = begin(tmp_path)
    disk.write(0, NEW)
    temp, bits = tmp_path / "temp.qcow2", tmp_path / "trimmed.bits"
    match damage:
        case "temp gone":
            temp.unlink()
        case "temp cut":
            temp.write_bytes(temp.read_bytes()[:70000])
        case "temp garbage":
            temp.write_bytes(pattern(1 << 20))
        case "bits gone":
            bits.unlink()
        case "bits garbage":
            bits.write_bytes(pattern(8192))
        case "other size":
            (tmp_path / "disk.img").write_bytes(NEW + bytes(CLUSTER))
    with pytest.raises((OSError, ImageError)):
        again(tmp_path, disk)
    assert (tmp_path / "disk.img").read_bytes()[:SIZE] == NEW


def test_suspended_snapshot_can_be_revived(tmp_path: Path) -> None:
    disk, snapshot = begin(tmp_path)
    disk.write(0, NEW)
    snapshot.suspend()
    disk, snapshot = again(tmp_path, disk)
    assert snapshot.read(0, SIZE) == OLD
    snapshot.remove(0)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["disk.img"]


def test_linked_clusters_are_known_whole_tables_of_zeroes_too(tmp_path: Path) -> None:
    _disk, snapshot = begin(tmp_path)
    snapshot.temp.link_zero(0, 9)
    assert snapshot.temp.linked() == ones(9)
    snapshot.temp.unlink(3, 1)
    assert snapshot.temp.linked().find(0) == 3
