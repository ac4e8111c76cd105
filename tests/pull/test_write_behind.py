"""What a copy writes comes to the disk soon and leaves the memory then; and a disk that did not take it is told of."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from threading import Thread

import pytest

from fleecing.block.hostfile import HostFile
from fleecing.pull.destination import Destination, Format
from fleecing.pull.qcow2_codec import Compression
from fleecing.pull.target import PART, Target
from fleecing.pull.write_behind import WriteBehind
from fleecing.units import KiB, MiB
from tests.faulty import CAN_FAIL, Faults, faulty_folder
from tests.images import random_bytes
from tests.peers import run

PIECE = random_bytes(MiB)

needs_disk = pytest.mark.skipif(not CAN_FAIL, reason="takes root")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Faults]:
    """A folder on an ext4 of its own, on a disk that may fail."""
    with faulty_folder(tmp_path / "faulty", 160 * MiB) as folder:
        yield folder


class Recorder(HostFile):
    """Says what the system is asked for, in MiB."""

    calls: list[tuple[str, int, int]]

    def start_write_out(self, offset: int, length: int) -> None:
        self.calls.append(("start", offset // MiB, length // MiB))

    def wait_for_write_out(self, offset: int, length: int) -> None:
        self.calls.append(("wait", offset // MiB, length // MiB))

    def forget(self, offset: int, length: int) -> None:
        self.calls.append(("forget", offset // MiB, length // MiB))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, int]]:
    monkeypatch.setattr("fleecing.pull.write_behind.HostFile", Recorder)
    monkeypatch.setattr(Recorder, "calls", [], raising=False)
    return Recorder.calls


def fill(path: Path, mebibytes: list[int], *, waits: bool) -> None:
    file = HostFile.create(str(path))
    behind = WriteBehind(file)
    for at in mebibytes:
        behind.write(at * MiB, memoryview(PIECE), waits=waits)
    behind.close()
    for at in mebibytes:
        assert path.read_bytes()[at * MiB : (at + 1) * MiB] == PIECE
    file.close()


def test_neighbours_are_sent_to_the_disk_together(tmp_path: Path, calls: list[tuple[str, int, int]]) -> None:
    fill(tmp_path / "f", [1, 0, 3, 2, 10, 12, 11, 20, 21], waits=True)
    assert calls == [("start", 0, 4), ("start", 10, 3), ("start", 20, 1)]


@pytest.mark.parametrize("waits", [True, False])
def test_what_was_sent_is_waited_for_and_forgotten_sixteen_groups_later(
    tmp_path: Path, calls: list[tuple[str, int, int]], waits: bool
) -> None:
    fill(tmp_path / "f", list(range(72)), waits=waits)
    starts = [("start", at, 4) for at in range(0, 72, 4)]
    ends = [[("wait", at, 4), ("forget", at, 4)] if waits else [("forget", at, 4)] for at in (0, 4)]
    assert calls == [*starts[:17], *ends[0], starts[17], *ends[1]]


def test_threads_lose_nothing_to_each_other(tmp_path: Path, calls: list[tuple[str, int, int]]) -> None:
    file = HostFile.create(str(tmp_path / "f"))
    behind = WriteBehind(file)

    def write(first: int) -> None:
        for at in range(first, 64, 4):
            behind.write(at * MiB, memoryview(PIECE), waits=True)

    threads = [Thread(target=write, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    behind.close()
    file.close()
    assert (tmp_path / "f").read_bytes() == PIECE * 64
    started = sorted(at for what, first, count in calls if what == "start" for at in range(first, first + count))
    assert started == list(range(64))


def test_without_a_descriptor_for_it_the_data_are_written_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: str, *, writable: bool = True) -> HostFile:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr("fleecing.pull.write_behind.HostFile.open", refuse)
    fill(tmp_path / "f", list(range(48)), waits=True)


class Limited(HostFile):
    """Has space for 3 MiB, as far as it is asked for it."""

    is_able = True
    asked: list[tuple[int, int]]

    def reserve(self, offset: int, length: int) -> bool:
        self.asked.append((offset, length))
        if offset >= 3 * MiB:
            raise OSError(errno.ENOSPC, "No space left on device")
        return self.is_able


@pytest.fixture
def limited(tmp_path: Path) -> Iterator[Limited]:
    file = Limited.create(str(tmp_path / "f"))
    file.asked = []
    file.is_on_ext4 = True  # whatever the tests run on
    yield file
    file.close()


def test_space_is_asked_for_once_for_large_pieces_and_not_at_all_for_small_ones(limited: Limited) -> None:
    behind = WriteBehind(limited)
    behind.write(0, memoryview(PIECE)[: 256 * KiB - 1], waits=True)
    behind.write(MiB, memoryview(PIECE)[: 256 * KiB], waits=True)
    behind.write(2 * MiB, memoryview(PIECE), waits=True)
    assert limited.asked == [(MiB, 256 * KiB), (2 * MiB, MiB)]
    with pytest.raises(OSError, match="No space left"):
        behind.write(3 * MiB, memoryview(PIECE), waits=True)
    behind.close()


@pytest.mark.parametrize("why", ["another file system", "no extents"])
def test_where_space_cannot_be_asked_for_data_are_written_all_the_same(limited: Limited, why: str) -> None:
    limited.is_on_ext4 = why != "another file system"
    limited.is_able = False
    behind = WriteBehind(limited)
    for at in range(6):
        behind.write(at * MiB, memoryview(PIECE), waits=True)
    behind.close()
    assert len(limited.asked) == limited.is_on_ext4
    assert Path(limited.path).read_bytes() == PIECE * 6


@pytest.mark.parametrize("compression", list(Compression))
def test_all_data_of_a_qcow2_file_goes_this_way(
    tmp_path: Path, compression: Compression, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[int] = []
    real = WriteBehind.write

    def write(self: WriteBehind, offset: int, data: memoryview, *, waits: bool) -> None:
        written.append(len(data))
        real(self, offset, data, waits=waits)

    monkeypatch.setattr(WriteBehind, "write", write)
    path = tmp_path / "copy.qcow2"
    target = Destination(str(path), format=Format.QCOW2, compression=compression).open(8 * MiB)
    can_shrink = b"".join(PIECE[at : at + MiB // 32] + b"x" * (MiB // 32) for at in range(0, MiB // 2, MiB // 32))
    for at in range(0, 8 * MiB, MiB):
        target.write(at, memoryview(can_shrink))
    target.finish()
    assert path.stat().st_size - MiB < sum(written) < path.stat().st_size
    assert (path.stat().st_size < 6 * MiB) is (compression is not Compression.NONE)


def open_target(disk: Faults, form: Format, *, waits: bool) -> tuple[Target, Path]:
    path = disk.path / "copy"
    return Destination(str(path), format=form, waits=waits).open(120 * MiB), path


FORMS = pytest.mark.parametrize("form", [Format.RAW, Format.QCOW2])


@needs_disk
def test_space_is_taken_for_data_alone(disk: Faults) -> None:
    target, path = open_target(disk, Format.RAW, waits=True)
    half = memoryview(PIECE[: MiB // 2] + bytes(MiB // 2))
    for at in range(0, 120 * MiB, 4 * MiB):
        target.write(at, half)
    target.finish()
    assert 15 * MiB <= path.stat().st_blocks * 512 < 16 * MiB
    assert path.read_bytes()[: 4 * MiB] == bytes(half) + bytes(3 * MiB)


@needs_disk
def test_a_disk_that_is_full_is_told_before_anything_is_written_there(disk: Faults) -> None:
    target, path = open_target(disk, Format.RAW, waits=True)
    with (disk.path / "other").open("wb") as other:
        os.posix_fallocate(other.fileno(), 0, 60 * MiB)
    with pytest.raises(OSError, match="No space left") as caught:
        for at in range(0, 120 * MiB, MiB):
            target.write(at, memoryview(PIECE))
    assert caught.value.filename == str(path) + PART
    target.abandon()
    assert [each.name for each in disk.path.iterdir() if each.is_file()] == ["other"]


@needs_disk
@FORMS
def test_a_copy_takes_no_more_memory_than_what_is_on_its_way(disk: Faults, form: Format) -> None:
    target, path = open_target(disk, form, waits=True)
    for at in range(0, 120 * MiB, MiB):
        target.write(at, memoryview(PIECE))
    resident = int(run("fincore", "--bytes", "--noheadings", "--output", "RES", str(path) + PART))
    assert 0 < resident < 80 * MiB
    target.finish()


@needs_disk
@FORMS
@pytest.mark.parametrize("waits", [True, False])
def test_what_the_disk_has_lost_meanwhile_is_told(disk: Faults, form: Format, waits: bool) -> None:
    """To who waits for the write-out at once, and in any case at the end."""
    target, path = open_target(disk, form, waits=waits)
    disk.fail_writes()
    for at in range(0, 40 * MiB, MiB):
        target.write(at, memoryview(PIECE))
    run("sync", "--file-system", str(disk.path), expect=None)
    disk.heal()
    lost = [target.has_lost]
    at_once: AbstractContextManager[object] = nullcontext()
    if waits:
        at_once = pytest.raises(OSError, match=f"Input/output error: '{path}{PART}'")
    with at_once:
        for at in range(40 * MiB, 80 * MiB, MiB):  # the write-out of what is lost is waited for meanwhile
            target.write(at, memoryview(PIECE))
    lost.append(target.has_lost)
    with pytest.raises(OSError, match="Input/output error") as failure:
        target.finish()
    assert [*lost, target.has_lost] == [False, waits, True]
    assert failure.value.filename == str(path) + PART
    target.abandon()
    assert not path.exists()
