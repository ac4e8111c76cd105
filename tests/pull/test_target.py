"""The raw target: sparse, named when it is whole, and nothing left when it is not."""

from __future__ import annotations

import errno
import os
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleecing.block.hostfile import HostFile
from fleecing.errors import ImageError
from fleecing.pull.destination import Destination, Format
from fleecing.pull.target import RawTarget, zero_runs
from fleecing.units import MiB


def allocated(path: Path) -> int:
    return path.stat().st_blocks * 512


def test_a_new_file_has_the_data_and_holes_between(tmp_path: Path) -> None:
    path = tmp_path / "copy"
    target = RawTarget.create(str(path), 64 * MiB + 1)
    target.write(MiB, memoryview(b"x" * 4096))
    target.zero(2 * MiB, 30 * MiB)
    target.write(64 * MiB, memoryview(b"e"))
    target.finish()
    data = path.read_bytes()
    assert len(data) == 64 * MiB + 1
    assert (data[MiB : MiB + 4096], data[-1:], data.count(0)) == (b"x" * 4096, b"e", 64 * MiB - 4096)
    assert allocated(path) < MiB


def test_the_name_appears_only_when_all_is_written(tmp_path: Path) -> None:
    path = tmp_path / "copy"
    target = RawTarget.create(str(path), MiB)
    target.write(0, memoryview(b"x"))
    assert not path.exists()
    target.finish()
    assert os.listdir(tmp_path) == ["copy"]


@pytest.mark.parametrize("name", ["copy.img", "copy.qcow2"])
def test_a_copy_is_on_the_disk_before_it_has_its_name_unless_nobody_waits(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    for call in ("fdatasync", "fsync"):
        monkeypatch.setattr(f"os.{call}", lambda _, call=call: calls.append(f"{call}, {(tmp_path / name).exists()}"))
    form = Format.QCOW2 if name.endswith("qcow2") else Format.RAW
    for waits in (True, False):
        target = Destination(str(tmp_path / name), format=form, waits=waits).open(MiB)
        target.write(0, memoryview(b"x" * MiB))
        target.finish()
        assert (calls[0], calls[-1]) == ("fdatasync, False", "fsync, True") if waits else not calls
        calls.clear()
        (tmp_path / name).unlink()


def test_an_abandoned_target_leaves_nothing(tmp_path: Path) -> None:
    target = RawTarget.create(str(tmp_path / "copy"), MiB)
    target.write(0, memoryview(b"x"))
    target.abandon()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("taken", ["copy", "copy.part"])
def test_a_name_that_is_taken_is_refused_and_left_alone(tmp_path: Path, taken: str) -> None:
    (tmp_path / taken).write_bytes(b"precious")
    with pytest.raises(FileExistsError, match=taken):
        RawTarget.create(str(tmp_path / "copy"), MiB)
    assert os.listdir(tmp_path) == [taken]
    assert (tmp_path / taken).read_bytes() == b"precious"


def test_a_size_that_no_file_can_have_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"copy\.part"):
        RawTarget.create(str(tmp_path / "copy"), (1 << 63) - 1)
    assert os.listdir(tmp_path) == []


def test_zeroes_in_an_old_file_are_punched(tmp_path: Path) -> None:
    path = tmp_path / "old"
    path.write_bytes(b"o" * 4 * MiB)
    target = RawTarget.overwrite(str(path), 3 * MiB)
    target.zero(0, 2 * MiB)
    target.write(2 * MiB, memoryview(b"n" * MiB))
    target.finish()
    assert path.read_bytes() == bytes(2 * MiB) + b"n" * MiB + b"o" * MiB
    assert allocated(path) <= 2 * MiB + 65536


def test_zeroes_are_written_where_nothing_else_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for call in ("punch", "zero_range"):
        monkeypatch.setattr(HostFile, call, lambda self, offset, length: False)
    path = tmp_path / "old"
    path.write_bytes(b"o" * 3 * MiB)
    target = RawTarget.overwrite(str(path), 3 * MiB)
    target.zero(1, 2 * MiB + 7)
    target.finish()
    assert path.read_bytes() == b"o" + bytes(2 * MiB + 7) + b"o" * (MiB - 8)


def test_an_old_file_that_is_too_small_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "old"
    path.write_bytes(b"o" * 10)
    with pytest.raises(ImageError, match="has 10 bytes, 11 are needed"):
        RawTarget.overwrite(str(path), 11)


def test_an_old_file_survives_being_abandoned(tmp_path: Path) -> None:
    path = tmp_path / "old"
    path.write_bytes(b"o" * 10)
    RawTarget.overwrite(str(path), 10).abandon()
    assert path.read_bytes() == b"o" * 10


def test_a_full_disk_is_told_with_the_files_name(tmp_path: Path) -> None:
    target = RawTarget("/dev/full", HostFile("/dev/full", os.open("/dev/full", os.O_WRONLY)), is_new=False)
    with pytest.raises(OSError, match="/dev/full") as caught:
        target.write(0, memoryview(b"x"))
    assert caught.value.errno == errno.ENOSPC
    target.abandon()


def test_what_an_earlier_run_left_stays_when_the_next_one_cannot_even_begin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = tmp_path / "copy.part"
    left.write_bytes(b"of an earlier run")

    def refuse(path: str) -> HostFile:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), path)

    monkeypatch.setattr(HostFile, "create", refuse)
    destination = Destination(str(tmp_path / "copy"), format=Format.RAW)
    with pytest.raises(OSError, match="Too many open files"):
        destination.open(MiB)
    assert destination.give_up() is None
    assert left.read_bytes() == b"of an earlier run"


@given(
    st.lists(st.sampled_from([b"0000", b"\0\0\0\0", b"\0\0\x001", b"1\0\0\0", b"\x001\0\0"]), max_size=12),
    st.integers(0, 3),
)
def test_runs_of_zeroes_are_whole_units_of_zeroes(units: list[bytes], cut: int) -> None:
    data = b"".join(units)
    data = data[: len(data) - cut]
    runs = list(zero_runs(memoryview(data), 4))
    assert [start for start, _, _ in runs] == [0, *(end for _, end, _ in runs)][: len(runs)]
    assert b"".join(data[start:end] for start, end, _ in runs) == data
    assert all(before[2] != after[2] for before, after in pairwise(runs))
    for start, end, is_zero in runs:
        for at in range(start, end, 4):
            assert is_zero == (not any(data[at : at + 4]))
