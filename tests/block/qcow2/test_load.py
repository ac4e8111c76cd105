"""Images that are opened again: what is found, what is put right, and what is refused."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fleecing.block.hostfile import HostFile
from fleecing.block.qcow2 import layout
from fleecing.block.qcow2.node import TempImage
from fleecing.errors import ImageError
from fleecing.units import KiB, MiB
from tests.block.qcow2.tools import check, copy, make_image, pattern, qemu_img, read, reopen

CLUSTER = 4 * KiB
SIZE = 6 * MiB + 512  # 1537 clusters in 4 L2 tables of 512


@pytest.fixture
def image(tmp_path: Path) -> Iterator[TempImage]:
    """Some data, some zero clusters, some holes in the host file."""
    image = make_image(tmp_path, SIZE, CLUSTER)
    copy(image, 0, 100)
    copy(image, 1536)
    image.link_zero(512, 512)
    image.link_zero(200, 10)
    image.release(image.unlink(50, 10))
    yield image
    image.close()


def _patch(image: TempImage, offset: int, data: bytes) -> None:
    with Path(image.path).open("r+b") as file:
        file.seek(offset)
        file.write(data)


def _field(image: TempImage, offset: int) -> int:
    with Path(image.path).open("rb") as file:
        file.seek(offset)
        value: int = layout.ENTRY.unpack(file.read(8))[0]
        return value


def _refused(image: TempImage, text: str | None = None) -> ImageError:
    file = HostFile.open(image.path)
    try:
        with pytest.raises(ImageError, match=text) as caught:
            TempImage.open(file)
    finally:
        file.close()
    return caught.value


# What is found


def test_everything_is_found_again(image: TempImage) -> None:
    hosts = [image.host_offset(i) for i in range(image.clusters)]
    used = image.used_bytes
    again = reopen(image)
    assert [again.host_offset(i) for i in range(again.clusters)] == hosts
    assert (again.size, again.cluster_size, again.clusters) == (image.size, CLUSTER, image.clusters)
    assert (again.backing_file, again.backing_format) == (image.backing_file, "raw")
    assert again.used_bytes == again.peak_bytes == used
    assert read(again, 1536 * CLUSTER, 512) == pattern(again, 1536)[:512]
    assert again.next_change(512, 1024) == (True, 512)


def test_opened_image_goes_on_like_the_one_that_was_closed(image: TempImage) -> None:
    again = reopen(image)
    (reused,) = copy(again, 50, 10)
    assert reused[0] < again.host_offset(60)
    copy(again, 300, 300 - 88)
    again.release(again.unlink(0, again.clusters))
    copy(again, 0, again.clusters)
    assert check(again) == {}
    assert read(again, 0, CLUSTER) == pattern(again, 0)


def test_range_that_was_placed_but_never_linked_is_free(tmp_path: Path) -> None:
    image = make_image(tmp_path, MiB, 512)
    lost = image.place(600)  # two ranges of 256 clusters and more
    image.file.write(lost[-1][0], b"x")
    copy(image, 0)
    again = reopen(image)
    used = again.used_bytes
    runs = again.place(200) + again.place(200)
    assert [count for _, count in runs] == [200, 200]
    assert again.used_bytes == used + 400 * 512
    assert all(offset % (256 * 512) and offset < again.host_offset(0) for offset, _ in runs)
    for i, (offset, count) in enumerate(runs):
        again.file.write(offset, bytes(count * 512))
        again.link(1 + 200 * i, offset, count)
    assert check(again) == {}


def test_data_that_nothing_links_gives_its_space_back(image: TempImage) -> None:
    image.sync()
    before = image.allocated()
    (run,) = image.place(256)
    image.file.write(run[0], b"x" * 256 * CLUSTER)
    image.sync()
    again = reopen(image)
    assert again.allocated() <= before
    assert check(again) == {}


def test_leaks_are_freed(image: TempImage) -> None:
    table = image.host_offset(0)
    used = image.used_bytes
    # What is left when the server is killed between the two writes of an unlink.
    l2 = _field(image, _l1_offset(image)) & layout.OFFSET_MASK
    _patch(image, l2, bytes(8 * 5))
    assert check(image) == {"leaks": 5}
    again = reopen(image)
    assert check(again) == {}
    assert again.used_bytes == used - 5 * CLUSTER
    (run,) = again.place(15)  # with the ten that the fixture freed: not neighbours
    assert run[0] != table


def test_limit_holds_after_opening(image: TempImage) -> None:
    again = reopen(image, image.used_bytes)
    assert len(copy(again, 0, 0)) == 0
    freed = again.unlink(0, 3)
    again.release(freed)
    assert sum(count for _, count in again.place(3)) == 3


def test_image_that_qemu_wrote_to_is_read_right(image: TempImage) -> None:
    qemu_img("bench", "-q", "-f", "qcow2", "-w", "-c", "3", "-s", "8192", "-o", "409600", "--pattern", "9", image.path)
    again = reopen(image)
    assert read(again, 100 * CLUSTER, 6 * CLUSTER) == b"\x09" * 6 * CLUSTER
    assert read(again, 0, CLUSTER) == pattern(again, 0)


# What is refused


def _l1_offset(image: TempImage) -> int:
    return _field(image, 40)


@pytest.mark.parametrize(
    "offset, data, text",
    [
        (0, b"QFI\xfa", "is no qcow2 image"),
        (7, b"\2", "qcow2 version 2"),
        (8, b"\xff" * 8, "backing file name"),
        (16, b"\0\0\0\0", "backing file name of 0 bytes"),
        (16, b"\0\1\0\0", "backing file name of 65536 bytes"),
        (23, b"\x08", "cluster_bits 8"),
        (23, b"\x16", "cluster_bits 22"),
        (24, bytes(8), "size 0"),
        (31, b"\1", "no multiple of 512"),
        (24, b"\xff", "size .* within the limits"),
        (24, b"\0\x10", "an L1 table of 4 entries for a disk of"),
        (35, b"\1", "crypt_method is 1"),
        (36, b"\0\0\0\1", "an L1 table of 1 entries"),
        (36, b"\xff\0\0\0", "an L1 table of"),
        (40, b"\xff", "a table of 4096 bytes at"),
        (47, b"\1", "a table of 4096 bytes at"),
        (40, bytes(8), "a table of 4096 bytes at 0"),
        (48, b"\xff", "a table of"),
        (56, bytes(4), "a refcount table of 0 clusters"),
        (56, b"\1", "a refcount table of"),
        (63, b"\1", "nb_snapshots is 1"),
        (79, b"\1", "incompatible features .*DIRTY"),
        (72, b"\x80", "incompatible features"),
        (95, b"\1", "autoclear_features is 1"),
        (99, b"\5", "refcount_order 5"),
        (100, b"\0\0\0\x60", "header_length 96"),
        (103, b"\x69", "header_length 105"),
        (100, b"\xff\0\0\0", "header_length"),
        (104, b"\xff", "has no backing format"),
        (108, b"\xff\xff\xff\xff", "header extensions without an end"),
    ],
)
def test_header_that_cannot_be_is_refused(image: TempImage, offset: int, data: bytes, text: str) -> None:
    _patch(image, offset, data)
    error = _refused(image, text)
    assert 0 <= error.offset < CLUSTER
    assert error.path == image.path


@pytest.mark.parametrize("length", [0, 3, 103, 104, 200, 4096, 8192])
def test_cut_file_is_refused(image: TempImage, length: int) -> None:
    os.truncate(image.path, length)
    _refused(image)


@pytest.mark.parametrize(
    "entry, text",
    [
        (1 << 62 | layout.COPIED, "bits that a temp image does not use"),  # compressed
        (0x10000, "bits that a temp image does not use"),  # not COPIED
        (0x10001 | layout.COPIED, "bits that a temp image does not use"),  # a zero cluster with an offset
        (0x10002 | layout.COPIED, "bits that a temp image does not use"),  # reserved
        (1 << 56 | layout.COPIED, "bits that a temp image does not use"),  # reserved
        (layout.COPIED, "where no cluster can be"),  # an external data file's
        (0x10200 | layout.COPIED, "where no cluster can be"),  # not aligned
        (1 << 40 | layout.COPIED, "where no cluster can be"),  # beyond the file
        (CLUSTER | layout.COPIED, "not counted, or used twice"),  # the first refcount block
    ],
)
def test_l2_entry_that_cannot_be_is_refused(image: TempImage, entry: int, text: str) -> None:
    l2 = _field(image, _l1_offset(image)) & layout.OFFSET_MASK
    _patch(image, l2 + 8 * 70, layout.ENTRY.pack(entry))
    error = _refused(image, text)
    assert l2 <= error.offset < l2 + CLUSTER


def test_cluster_that_is_linked_twice_is_refused(image: TempImage) -> None:
    l2 = _field(image, _l1_offset(image)) & layout.OFFSET_MASK
    _patch(image, l2 + 8 * 70, layout.ENTRY.pack(_field(image, l2)))
    _refused(image, "not counted, or used twice")


def test_linked_cluster_that_is_not_counted_is_refused(image: TempImage) -> None:
    block = _field(image, _field(image, 48))
    _patch(image, block + 2 * (image.host_offset(7) // CLUSTER), bytes(2))
    assert f"host cluster at {image.host_offset(7):#x}" in _refused(image, "is not counted").text


def test_cluster_beyond_the_disk_is_refused(image: TempImage) -> None:
    l2 = _field(image, _l1_offset(image) + 3 * 8) & layout.OFFSET_MASK
    _patch(image, l2 + 8 * 5, layout.ZERO_ENTRY)
    _refused(image, "beyond the end of the disk")


@pytest.mark.parametrize("entry", [1, 0x1200, 1 << 60, 1 << 55])
def test_refcount_block_that_cannot_be_is_refused(image: TempImage, entry: int) -> None:
    _patch(image, _field(image, 48) + 8, layout.ENTRY.pack(entry))
    _refused(image, "a refcount block at")


def test_refcount_block_used_as_two_is_refused(image: TempImage) -> None:
    table = _field(image, 48)
    _patch(image, table + 8, layout.ENTRY.pack(_field(image, table)))
    _refused(image, "used twice")


@pytest.mark.parametrize("count", [b"\0\2", b"\1\0", b"\xff\xff"])
def test_refcount_above_one_is_refused(image: TempImage, count: bytes) -> None:
    _patch(image, _field(image, _field(image, 48)) + 2 * 9, count)
    _refused(image, "refcount above 1")


@pytest.mark.parametrize("entry", [CLUSTER, CLUSTER | layout.COPIED, 1 << 40 | layout.COPIED, 2, layout.COPIED])
def test_l1_entry_that_cannot_be_is_refused(image: TempImage, entry: int) -> None:
    where = _l1_offset(image) + 2 * 8
    _patch(image, where, layout.ENTRY.pack(entry))
    assert _refused(image).offset == where


def test_table_beyond_the_disk_is_refused(image: TempImage) -> None:
    _patch(image, 36, b"\0\0\0\5")
    _patch(image, _l1_offset(image) + 4 * 8, layout.ENTRY.pack(image.host_offset(99) | layout.COPIED))
    _refused(image, "an L2 table beyond the end of the disk")


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    changes=st.lists(st.tuples(st.integers(0, 1 << 16), st.integers(1, 255)), min_size=1, max_size=3),
    in_header=st.booleans(),
)
def test_garbage_is_an_image_error_or_harmless(
    tmp_path: Path, image: TempImage, changes: list[tuple[int, int]], in_header: bool
) -> None:
    data = bytearray(Path(image.path).read_bytes())
    tables = [0, _field(image, 48), _field(image, _field(image, 48)), _l1_offset(image)]
    tables += [_field(image, _l1_offset(image) + 8 * i) & layout.OFFSET_MASK for i in range(4)]
    for position, change in changes:
        offset = position % 160 if in_header else tables[position % 8] + position // 8 % CLUSTER
        data[offset] ^= change
    path = tmp_path / "garbage.qcow2"
    path.write_bytes(data)
    file = HostFile.open(str(path))
    error = None
    try:
        opened = TempImage.open(file)
        assert all(opened.host_offset(cluster) < len(data) for cluster in range(opened.clusters))
    except ImageError as e:
        error = e
    finally:
        file.close()
    assert error is None or error.offset >= 0
