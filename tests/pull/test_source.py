"""What a source tells: allocation and dirty bitmap side by side, and which bitmap it is."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleecing.errors import RequestError
from fleecing.pull.engine import pull
from fleecing.pull.options import PullOptions
from fleecing.pull.plan import CLEAN
from fleecing.pull.source import Source, merge
from fleecing.pull.target import RawTarget
from tests.client.servers import activated
from tests.peers import run

EXTENTS = st.lists(st.tuples(st.integers(1, 9), st.integers(0, 3)), min_size=1, max_size=9)


def spread(extents: list[tuple[int, int]]) -> list[int]:
    return [status for length, status in extents for _ in range(length)]


@given(EXTENTS, EXTENTS)
def test_two_contexts_are_one_as_far_as_the_shorter_one_goes(
    allocation: list[tuple[int, int]], dirty: list[tuple[int, int]]
) -> None:
    merged = spread(merge(allocation, dirty))
    pairs = list(zip(spread(allocation), spread(dirty), strict=False))
    assert merged == [status if changed & 1 else status | CLEAN for status, changed in pairs]


def disk(tmp_path: Path) -> Path:
    """A qcow2 image with two persistent bitmaps; 1 MiB at 1 MiB changed since `one`, 64 KiB at 4 MiB since both."""
    path = tmp_path / "disk.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", str(path), "8M")
    run("qemu-io", "-f", "qcow2", "-c", "write -P 1 0 8M", str(path))
    run("qemu-img", "bitmap", "--add", str(path), "one")
    run("qemu-io", "-f", "qcow2", "-c", "write -P 2 1M 1M", str(path))
    run("qemu-img", "bitmap", "--add", str(path), "two")
    run("qemu-io", "-f", "qcow2", "-c", "write -P 3 4M 64k", str(path))
    return path


@pytest.mark.parametrize("bitmap, data", [("one", (1 << 20) + 65536), ("two", 65536), ("", 8 << 20)])
def test_qemus_bitmaps_are_obeyed(tmp_path: Path, bitmap: str, data: int) -> None:
    server = ["qemu-nbd", "-t", "-r", "-e", "9", "-f", "qcow2", "-B", "one", "-B", "two", "-x", "", str(disk(tmp_path))]
    with activated(tmp_path, *server) as uri:
        copy = tmp_path / "copy"
        report = pull(uri, lambda size: RawTarget.create(str(copy), size), PullOptions(bitmap=bitmap))
        with pytest.raises(RequestError, match=r"several dirty bitmaps \(one, two\)"):
            Source(uri, timeout=20)
        with pytest.raises(RequestError, match="no dirty bitmap 'three'"):
            Source(uri, timeout=20, bitmap="three")
    assert report.data == data
    assert report.clean == (8 << 20) - data
    content = copy.read_bytes()
    assert content[4 << 20 : (4 << 20) + 65536] == b"\3" * 65536
    assert (content[0] == 1) == (bitmap == "")


def test_the_only_bitmap_is_taken(tmp_path: Path) -> None:
    with activated(tmp_path, "qemu-nbd", "-t", "-r", "-f", "qcow2", "-B", "two", "-x", "", str(disk(tmp_path))) as uri:
        source = Source(uri, timeout=20)
        assert source.bitmap == "two"
        source.first.close()
