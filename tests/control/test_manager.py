"""Disks and snapshots by name, over the real block layer."""

from __future__ import annotations

import gc
import logging
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from fleecing.control.config import make_settings
from fleecing.control.disk import Snapshot
from fleecing.control.manager import Manager
from fleecing.control.models import SnapshotRequest
from fleecing.errors import ConfigError, ControlError, SnapshotBroken
from fleecing.units import KiB, MiB

SIZE = 4 * MiB


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Manager]:
    """Disks vda and vdb, full of ones."""
    for name in ("vda", "vdb"):
        (tmp_path / f"{name}.img").write_bytes(b"\1" * SIZE)
    made = start(tmp_path)
    yield made
    made.close()


def start(folder: Path, **options: str) -> Manager:
    disks = {name: {"path": str(folder / f"{name}.img")} for name in ("vda", "vdb")}
    return Manager(
        make_settings({"disk": disks, "state-dir": str(folder / "state"), **options}, "test"), drain_seconds=0
    )


def create(manager: Manager, *disks: str, name: str | None = "s", temp_limit: int | None = None) -> list[Snapshot]:
    return manager.create(SnapshotRequest(disks=list(disks), name=name, temp_limit=temp_limit))


def traces(folder: Path) -> list[str]:
    """All that lies below the snapshots' folders."""
    return sorted(str(path.relative_to(folder)) for path in (folder / "state").glob("*/snapshots/**/*"))


def refusal(status: int, manager: Manager, *disks: str, temp_limit: int | None = None) -> str:
    """The sentence with which a creation is refused."""
    with pytest.raises(ControlError) as caught:
        create(manager, *disks, temp_limit=temp_limit)
    assert caught.value.status == status
    return caught.value.text


def test_a_snapshot_keeps_what_the_guest_overwrites(manager: Manager) -> None:
    (snapshot,) = create(manager, "vda")
    manager.disks["vda"].node.write(0, b"\2" * MiB)
    assert snapshot.node.read(0, 2 * MiB) == b"\1" * 2 * MiB


def test_several_disks_are_frozen_under_one_name(manager: Manager) -> None:
    made = create(manager, "vdb", "vda", name="monday")
    assert [snapshot.export.name for snapshot in made] == ["vdb@monday", "vda@monday"]
    assert [snapshot.export.name for snapshot in manager.snapshots()] == ["vda@monday", "vdb@monday"]
    assert made[0].record.created == made[1].record.created


def test_names_made_of_the_time_are_unique(manager: Manager) -> None:
    names = [create(manager, "vda", name=None)[0].name for _ in range(3)]
    assert len(set(names)) == 3
    assert all(name[8] == "-" and name[:8].isdigit() for name in names)


def test_a_taken_name_is_refused_and_the_snapshot_stays(manager: Manager, tmp_path: Path) -> None:
    create(manager, "vdb")
    before = traces(tmp_path)
    assert "disk 'vdb' has a snapshot 's' already" in refusal(409, manager, "vda", "vdb")
    assert traces(tmp_path) == before


def test_an_unknown_disk_is_refused_with_those_there_are(manager: Manager, tmp_path: Path) -> None:
    assert refusal(404, manager, "vda", "vdc") == "there is no disk 'vdc': this server has vda, vdb"
    assert traces(tmp_path) == []


@pytest.mark.parametrize("size, change", [(SIZE + 1, "grown"), (SIZE - 1, "shrunk")])
def test_an_image_of_another_size_is_refused(manager: Manager, tmp_path: Path, size: int, change: str) -> None:
    with (tmp_path / "vdb.img").open("r+b") as image:
        image.truncate(size)
    assert f"has {change} from {SIZE} to {size} bytes" in refusal(409, manager, "vda", "vdb")
    assert traces(tmp_path) == []


def test_a_temp_file_that_cannot_be_made_undoes_the_others(manager: Manager, tmp_path: Path) -> None:
    (tmp_path / "state" / "vdb" / "snapshots" / "s").mkdir()
    assert "in the way" in refusal(409, manager, "vda", "vdb")
    assert traces(tmp_path) == ["state/vdb/snapshots/s"]
    assert manager.disks["vda"].node.snapshots == ()


def test_a_temp_limit_below_one_cluster_is_refused(manager: Manager, tmp_path: Path) -> None:
    assert "temp limit of 4096 bytes is too small" in refusal(409, manager, "vda", temp_limit=4096)
    assert traces(tmp_path) == []


def test_guest_writes_that_do_not_end_undo_the_creation(manager: Manager, tmp_path: Path) -> None:
    gate = manager.disks["vdb"].node.gate
    gate.enter("a write")
    assert "writes of the guest took longer than 0 s" in refusal(503, manager, "vda", "vdb")
    gate.leave("a write")
    assert traces(tmp_path) == []
    assert manager.snapshots() == []
    assert len(create(manager, "vda", "vdb")) == 2


def test_a_temp_folder_that_has_gone_is_named(manager: Manager, tmp_path: Path) -> None:
    (tmp_path / "state" / "vdb" / "snapshots").rmdir()
    assert "state/vdb/snapshots cannot take its files: No such file" in refusal(500, manager, "vda", "vdb")
    assert traces(tmp_path) == []


def test_snapshots_are_deleted_in_any_order(manager: Manager, tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        create(manager, "vda", name=name)
        manager.disks["vda"].node.write(0, name.encode() * MiB)
    assert manager.delete("vda", "b")
    assert manager.snapshot("vda", "a").node.read(0, 1) == b"\1"
    assert manager.snapshot("vda", "c").node.read(0, 1) == b"b"
    assert manager.delete("vda", "a")
    assert manager.delete("vda", "c")
    assert traces(tmp_path) == []


def test_deleting_again_says_that_there_was_none(manager: Manager) -> None:
    create(manager, "vda")
    assert manager.delete("vda", "s")
    assert not manager.delete("vda", "s")
    with pytest.raises(ControlError, match="no disk 'vdc'"):
        manager.delete("vdc", "s")


def open_files_of(folder: Path) -> list[str]:
    """Files below the folder that this process has open or mapped, those that are deleted, too."""
    links = [f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd")]
    names = [os.readlink(link) for link in links if os.path.islink(link)]
    return sorted(name for name in names if name.startswith(f"{folder}/"))


@pytest.mark.parametrize("durable", [False, True])
def test_a_deletion_gives_all_files_back_at_once(manager: Manager, tmp_path: Path, durable: bool) -> None:
    before = open_files_of(tmp_path)
    gc.disable()  # what only it would free stays for hours in a server that has little to do
    try:
        manager.create(SnapshotRequest(disks=["vda", "vdb"], name="s", durable=durable))
        manager.disks["vda"].node.write(0, b"\2" * MiB)
        assert manager.delete("vda", "s") and manager.delete("vdb", "s")
        assert open_files_of(tmp_path) == before
    finally:
        gc.enable()


def test_deletions_at_once_all_wait_for_the_one_that_works(manager: Manager, tmp_path: Path) -> None:
    create(manager, "vda")
    answers: list[bool] = []

    def delete() -> None:
        done = manager.delete("vda", "s")
        assert traces(tmp_path) == []
        answers.append(done)

    threads = [threading.Thread(target=delete) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(answers) == [False] * 7 + [True]


def test_a_deletion_that_takes_too_long_can_be_asked_for_again(
    manager: Manager, monkeypatch: pytest.MonkeyPatch
) -> None:
    (snapshot,) = create(manager, "vda")

    def busy(timeout: float) -> None:
        raise TimeoutError

    with monkeypatch.context() as patch:
        patch.setattr(snapshot.node, "remove", busy)
        with pytest.raises(ControlError, match="ask again"):
            manager.delete("vda", "s")
    assert manager.open("vda@s") is None
    assert "has a snapshot 's' already" in refusal(409, manager, "vda")
    assert manager.delete("vda", "s")
    assert create(manager, "vda")


def test_a_reader_of_a_deleted_snapshot_is_told_so(manager: Manager) -> None:
    (snapshot,) = create(manager, "vda")
    manager.delete("vda", "s")
    with pytest.raises(SnapshotBroken, match="deleted"):
        snapshot.node.read(0, 1)


def test_a_broken_snapshot_is_logged_and_can_be_deleted(
    manager: Manager, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (snapshot,) = create(manager, "vda", temp_limit=512 * KiB)
    manager.disks["vda"].node.write(0, b"\2" * SIZE)
    assert snapshot.node.broken is not None
    assert "temp limit of 524288 bytes reached" in snapshot.node.broken
    assert f"snapshot vda@s is broken: {snapshot.node.broken}" in caplog.messages
    assert manager.delete("vda", "s")
    assert traces(tmp_path) == []


def test_a_deletion_is_no_break_in_the_log(manager: Manager, caplog: pytest.LogCaptureFixture) -> None:
    create(manager, "vda")
    manager.delete("vda", "s")
    assert not any("broken" in message for message in caplog.messages)


def test_the_catalog_lists_disks_and_snapshots(manager: Manager) -> None:
    create(manager, "vda")
    assert [name for name, _ in manager.names()] == ["vda", "vda@s", "vdb"]
    info = manager.find("vda@s")
    assert info is not None
    assert (info.name, info.size) == ("vda@s", SIZE)
    assert info.description.startswith("snapshot of vda, ")


def test_no_two_snapshots_of_a_name_have_the_same_description(manager: Manager) -> None:
    """A pull that goes on over a new connection knows by it that the snapshot is still the one it began with."""
    descriptions = set()
    for _ in range(5):
        create(manager, "vda")
        info = manager.find("vda@s")
        assert info is not None
        descriptions.add(info.description)
        manager.delete("vda", "s")
    assert len(descriptions) == 5


@pytest.mark.parametrize("name", ["", "vdc", "vda@", "@s", "vda@s", "vda@s@s", "vdc@s"])
def test_an_export_that_is_not_there_is_not_found(manager: Manager, name: str) -> None:
    create(manager, "vdb")
    assert manager.find(name) is None
    assert manager.open(name) is None


def test_the_empty_name_is_the_only_disk(tmp_path: Path) -> None:
    (tmp_path / "a.img").write_bytes(bytes(SIZE))
    one = {"disk": {"a": {"path": str(tmp_path / "a.img")}}, "state-dir": str(tmp_path / "state")}
    manager = Manager(make_settings(one, "test"))
    info = manager.find("")
    assert info is not None
    assert info.name == "a"
    manager.close()


def test_a_folder_without_a_record_is_reported_and_freed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, manager: Manager
) -> None:
    manager.close()
    left = tmp_path / "state" / "vda" / "snapshots" / "old"
    left.mkdir()
    (left / "temp.qcow2").write_bytes(bytes(64 * KiB))
    with caplog.at_level(logging.INFO):
        start(tmp_path).close()
    assert "leftover of an earlier run: snapshot vda@old, 64 KiB of temp space freed" in caplog.messages
    assert traces(tmp_path) == []


def test_closing_keeps_every_snapshot_and_gives_the_images_back(manager: Manager, tmp_path: Path) -> None:
    create(manager, "vda", "vdb")
    manager.disks["vda"].node.write(0, b"\2" * MiB)
    manager.close()
    again = start(tmp_path)
    assert [snapshot.export.name for snapshot in again.snapshots()] == ["vda@s", "vdb@s"]
    assert again.snapshot("vda", "s").node.read(0, SIZE) == b"\1" * SIZE
    again.close()


def test_a_disk_that_cannot_be_had_gives_the_others_back(manager: Manager, tmp_path: Path) -> None:
    manager.close()
    (tmp_path / "vdb.img").unlink()
    with pytest.raises(ConfigError, match=r"image .*/vdb\.img of disk 'vdb' cannot be opened: No such file"):
        start(tmp_path)
    (tmp_path / "vdb.img").write_bytes(bytes(SIZE))
    start(tmp_path).close()


def test_an_image_that_is_served_already_is_refused_and_makes_no_folder(manager: Manager, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is locked: another server has this image open"):
        start(tmp_path, **{"state-dir": str(tmp_path / "other")})
    assert not (tmp_path / "other").exists()


def test_two_servers_do_not_share_a_disks_state(manager: Manager, tmp_path: Path) -> None:
    create(manager, "vda")
    (tmp_path / "copy.img").write_bytes(bytes(SIZE))
    same = {"disk": {"vda": {"path": str(tmp_path / "copy.img")}}, "state-dir": str(tmp_path / "state")}
    with pytest.raises(ConfigError, match="in use by another server"):
        Manager(make_settings(same, "test"))
    assert manager.snapshot("vda", "s").node.read(0, 1) == b"\1"


def test_a_durable_snapshot_of_an_image_that_cannot_be_flushed_is_not_made(
    manager: Manager, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(manager.disks["vda"].node.file, "flush", fail)
    with pytest.raises(ControlError, match="not made: the image could not be made durable: Input"):
        manager.create(SnapshotRequest(disks=["vda"], name="s", durable=True))
    monkeypatch.undo()
    assert traces(tmp_path) == []
    assert manager.snapshots() == []


def test_a_deletion_waits_for_the_creation_that_is_making_the_snapshot(tmp_path: Path) -> None:
    """A client that was killed while it waited for its snapshot: whoever cleans up after it must not come too early."""
    (tmp_path / "vda.img").write_bytes(bytes(SIZE))
    settings = {"disk": {"vda": {"path": str(tmp_path / "vda.img")}}, "state-dir": str(tmp_path / "state")}
    manager = Manager(make_settings(settings, "test"), drain_seconds=60)
    gate = manager.disks["vda"].node.gate
    gate.enter("a write")
    creating = threading.Thread(target=create, args=(manager, "vda"))
    creating.start()
    while not gate._closed:
        threading.Event().wait(0.001)
    deleted: list[bool] = []
    deleting = threading.Thread(target=lambda: deleted.append(manager.delete("vda", "s")))
    deleting.start()
    deleting.join(0.1)
    gate.leave("a write")
    creating.join()
    deleting.join()
    assert deleted == [True]
    assert manager.snapshots() == [] and traces(tmp_path) == []
    manager.close()
