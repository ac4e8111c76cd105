"""The active image as a node: files and block devices."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fleecing.block import hostfile
from fleecing.block.extent import Allocation
from fleecing.block.file import FileNode
from fleecing.block.hostfile import HostFile
from fleecing.errors import ImageError
from fleecing.units import KiB, MiB
from tests.block.rig import blocks, pattern


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(pattern(MiB))
    return path


@pytest.fixture
def loop_device(image: Path) -> Iterator[str]:
    """A real block device over the image. Needs root, as CI has."""
    device = subprocess.run(
        ["losetup", "--find", "--show", image], check=True, capture_output=True, text=True
    ).stdout.strip()
    yield device
    subprocess.run(["losetup", "--detach", device], check=True)


def test_second_opening_of_the_same_image_is_refused(image: Path, tmp_path: Path) -> None:
    other_name = tmp_path / "link.img"
    os.link(image, other_name)
    node = FileNode.open(str(image))
    with pytest.raises(ImageError, match="another server has this image open"):
        FileNode.open(str(other_name))
    node.close()
    FileNode.open(str(other_name)).close()


def test_empty_image_folder_and_fifo_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    with pytest.raises(ImageError, match="is empty"):
        FileNode.open(str(tmp_path / "empty"))
    with pytest.raises(OSError, match="directory"):
        FileNode.open(str(tmp_path))
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(ImageError, match="neither a regular file nor a block device"):
        FileNode.open(str(tmp_path / "fifo"))


def test_image_that_is_shrunk_or_grown_is_noticed(image: Path) -> None:
    node = FileNode.open(str(image))
    os.truncate(image, MiB - 1)
    with pytest.raises(ImageError, match="shrunk from 1048576 to 1048575 bytes"):
        node.read(MiB - 10, 10)
    assert node.read(0, 10) == pattern(10)
    os.truncate(image, MiB + 1)
    with pytest.raises(ImageError, match="grown from 1048576 to 1048577 bytes"):
        node.check_size()
    node.close()


def test_discard_and_zeroes_punch_holes_and_no_unmap_keeps_the_space(image: Path) -> None:
    node = FileNode.open(str(image))
    full = blocks(str(image))
    node.write_zeroes(0, 64 * KiB, may_unmap=False)
    assert blocks(str(image)) == full
    node.write_zeroes(64 * KiB, 64 * KiB)
    node.discard(128 * KiB, 64 * KiB)
    assert full - blocks(str(image)) == 128 * KiB
    assert node.read(0, 192 * KiB + 1) == bytes(192 * KiB) + pattern(MiB)[192 * KiB : 192 * KiB + 1]
    # Whether allocated zeroes count as a hole is the file system's choice.
    assert node.block_status(64 * KiB, MiB - 64 * KiB) == [
        (128 * KiB, Allocation.HOLE_ZERO),
        (MiB - 192 * KiB, Allocation.DATA),
    ]
    node.close()


def test_block_status_stops_at_the_runs_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    with path.open("wb") as f:
        for at in range(0, MiB, 128 * KiB):
            f.seek(at)
            f.write(b"x" * 4096)
        f.truncate(2 * MiB)
    node = FileNode.open(str(path))
    runs = node.block_status(0, 2 * MiB)
    assert sum(length for length, _ in runs) == 2 * MiB
    assert len(runs) == 16
    assert node.block_status(0, 2 * MiB, 3) == runs[:3]
    assert node.block_status(2 * MiB - 5, 5) == [(5, Allocation.HOLE_ZERO)]
    node.close()


def test_block_status_looks_for_the_end_of_the_same_data_once(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looks = []
    seek = os.lseek

    def counting(fd: int, offset: int, whence: int) -> int:
        if whence == os.SEEK_HOLE:
            looks.append(offset)
        return seek(fd, offset, whence)

    monkeypatch.setattr(os, "lseek", counting)
    node = FileNode(HostFile.open(str(image)))
    for offset in range(0, MiB, 64 * KiB):
        assert node.block_status(offset, 64 * KiB) == [(64 * KiB, Allocation.DATA)]
    assert looks == [0]
    node.discard(128 * KiB, 64 * KiB)
    node.write(300 * KiB, b"x")
    assert node.block_status(0, MiB) == [
        (128 * KiB, Allocation.DATA),
        (64 * KiB, Allocation.HOLE_ZERO),
        (MiB - 192 * KiB, Allocation.DATA),
    ]
    node.write_zeroes(MiB - 4 * KiB, 4 * KiB)
    assert node.block_status(MiB - 8 * KiB, 8 * KiB) == [(4 * KiB, Allocation.DATA), (4 * KiB, Allocation.HOLE_ZERO)]
    node.close()


@settings(max_examples=100, deadline=None)
@given(
    data=st.sets(st.integers(0, 15)),
    changes=st.lists(st.tuples(st.booleans(), st.integers(-2, 2), st.integers(0, 4)), max_size=20),
    first=st.integers(0, 15),
    count=st.integers(1, 16),
    max_runs=st.integers(1, 16),
)
def test_block_status_of_an_image_that_changes_between_two_looks(
    tmp_path_factory: pytest.TempPathFactory,
    data: set[int],
    changes: list[tuple[bool, int, int]],
    first: int,
    count: int,
    max_runs: int,
) -> None:
    """What was data all the time is told as data, and each run differs from the one before it."""
    path = tmp_path_factory.mktemp("status") / "disk.img"
    page = 4 * KiB
    with path.open("wb") as f:
        f.truncate(16 * page)
        for n in data:
            os.pwrite(f.fileno(), b"x" * page, n * page)
    host, always_data, looks, seek = HostFile.open(str(path)), set(data), iter(changes), os.lseek
    last = min(first + count, 16)

    def with_changes(fd: int, offset: int, whence: int) -> int:
        writes, near, count = next(looks, (True, 0, 0))
        start = max(0, offset // page + near)
        pages = range(start, min(start + count, 16))
        if pages and writes:
            host.write(start * page, b"y" * (len(pages) * page))
        elif pages:
            host.punch(start * page, len(pages) * page)
            always_data.difference_update(pages)
        return seek(fd, offset, whence)

    node = FileNode(host)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(os, "lseek", with_changes)
        runs = node.block_status(first * page, (last - first) * page, max_runs)
    assert 0 < len(runs) <= max_runs
    assert all(a[1] != b[1] for a, b in pairwise(runs))
    at = first
    for length, state in runs:
        assert length % page == 0 < length
        end = at + length // page
        assert state == Allocation.DATA or not always_data.intersection(range(at, end))
        at = end
    assert at == last or (len(runs) == max_runs and at < last)
    node.close()


@settings(max_examples=60, deadline=None)
@given(
    steps=st.lists(
        st.tuples(st.sampled_from(["write", "discard", "status"]), st.integers(0, 31), st.integers(1, 32)), max_size=30
    )
)
def test_block_status_never_calls_data_a_hole(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, int, int]]
) -> None:
    path = tmp_path_factory.mktemp("status") / "disk.img"
    with path.open("wb") as f:
        f.truncate(128 * KiB)
    node = FileNode.open(str(path))
    page = 4 * KiB
    for what, first, count in [*steps, ("status", 0, 32)]:
        offset, length = first * page, min(count, 32 - first) * page
        if what == "write":
            node.write(offset, b"x" * length)
        elif what == "discard":
            node.discard(offset, length)
        else:
            data, at = path.read_bytes(), offset
            runs = node.block_status(offset, length)
            assert all(a[1] != b[1] for a, b in pairwise(runs))
            for n, state in runs:
                assert state == Allocation.DATA or not any(data[at : at + n])
                at += n
            assert at == offset + length
    node.close()


def test_a_file_system_without_nowait_is_asked_for_it_once(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    class Old:
        """The module `os` where the file system knows no RWF_NOWAIT, as tmpfs and NFS."""

        def preadv(self, fd: int, buffers: tuple[memoryview], offset: int, flags: int = 0) -> int:
            calls.append(flags)
            if flags:
                raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
            return os.preadv(fd, buffers, offset)

        def __getattr__(self, name: str) -> Any:
            return getattr(os, name)

    node = FileNode.open(str(image))
    monkeypatch.setattr(hostfile, "os", Old())
    buffer = bytearray(4 * KiB)
    for at in range(0, 16 * KiB, 4 * KiB):
        assert node.read_cached(at, memoryview(buffer))
        assert buffer == pattern(MiB)[at : at + 4 * KiB]
    assert calls == [os.RWF_NOWAIT, 0, 0, 0, 0]
    node.close()


def test_block_device_reads_writes_zeroes_and_discards(loop_device: str) -> None:
    node = FileNode.open(loop_device)
    assert node.size == MiB
    node.write(1000, b"hello")
    assert node.read(998, 9) == pattern(MiB)[998:1000] + b"hello" + pattern(MiB)[1005:1007]
    node.write_zeroes(700, 9000)
    node.write_zeroes(20001, 10, fast_only=True)
    node.discard(64 * KiB + 1, 64 * KiB)
    expected = bytearray(pattern(MiB))
    expected[700:9700] = bytes(9000)
    expected[20001:20011] = bytes(10)
    got = node.read(0, MiB)
    assert got[: 64 * KiB + 512] == expected[: 64 * KiB + 512]
    assert got[128 * KiB + 1 :] == expected[128 * KiB + 1 :]
    assert node.block_status(0, MiB) == [(MiB, Allocation.DATA)]
    node.flush()
    node.check_size()
    with pytest.raises(ImageError, match="another server"):
        FileNode.open(loop_device)
    node.close()
