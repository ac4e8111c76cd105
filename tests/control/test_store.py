"""A disk's folder in the state folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from fleecing.control.store import TEMP_NAME, DiskFolder
from fleecing.errors import ConfigError
from fleecing.units import KiB


def test_a_temp_file_lies_in_its_snapshots_folder(tmp_path: Path) -> None:
    folder = DiskFolder(str(tmp_path), "vda", ())
    assert folder.add_snapshot("s") == str(tmp_path / "vda" / "snapshots" / "s" / TEMP_NAME)
    assert folder.temp_location() == str(tmp_path / "vda" / "snapshots")
    folder.close()


def test_with_a_temp_folder_a_link_leads_to_the_file(tmp_path: Path) -> None:
    folder = DiskFolder(str(tmp_path / "state"), "d" * 128, [str(tmp_path / "temp")])
    target = Path(folder.add_snapshot("s" * 128))
    assert target.parent == tmp_path / "temp"
    target.write_bytes(bytes(64 * KiB))
    link = tmp_path / "state" / ("d" * 128) / "snapshots" / ("s" * 128) / TEMP_NAME
    assert link.readlink() == target
    assert folder.remove_snapshot("s" * 128) == 64 * KiB
    assert not link.parent.exists()
    assert not target.exists()
    folder.close()


def test_removing_what_is_gone_is_no_error(tmp_path: Path) -> None:
    folder = DiskFolder(str(tmp_path), "vda", ())
    folder.add_snapshot("s")
    assert folder.remove_snapshot("s") == 0
    assert folder.remove_snapshot("s") == 0
    folder.close()


def test_leftovers_are_found_by_the_next_one_and_foreign_things_are_not(tmp_path: Path) -> None:
    folder = DiskFolder(str(tmp_path), "vda", ())
    for name in ("b", "a"):
        Path(folder.add_snapshot(name)).touch()
    snapshots = tmp_path / "vda" / "snapshots"
    (snapshots / "lost+found?").mkdir()
    (snapshots / "file").touch()
    folder.close()
    again = DiskFolder(str(tmp_path), "vda", ())
    assert list(again.kept_snapshots()) == ["a", "b"]
    again.close()


def test_files_that_are_not_ours_are_never_removed(tmp_path: Path) -> None:
    folder = DiskFolder(str(tmp_path), "vda", ())
    mine = Path(folder.add_snapshot("s")).with_name("mine")
    mine.write_text("keep")
    folder.remove_snapshot("s")
    assert mine.read_text() == "keep"
    folder.close()


def test_a_link_to_what_is_no_regular_file_loses_the_link_only(tmp_path: Path) -> None:
    folder = DiskFolder(str(tmp_path / "state"), "vda", [str(tmp_path / "temp")])
    target = Path(folder.add_snapshot("s"))
    target.mkdir()
    assert folder.remove_snapshot("s") == 0
    assert target.is_dir()
    assert list(folder.kept_snapshots()) == []
    folder.close()


def test_one_server_holds_the_folder(tmp_path: Path) -> None:
    folder = DiskFolder(str(tmp_path), "vda", ())
    with pytest.raises(ConfigError, match="in use by another server"):
        DiskFolder(str(tmp_path), "vda", ())
    folder.close()
    folder.close()
    DiskFolder(str(tmp_path), "vda", ()).close()
