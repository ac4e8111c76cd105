"""The construct layouts against files of qemu-img, and against what the code writes with array and struct."""

from __future__ import annotations

import os
from array import array
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleecing.block.hostfile import HostFile
from fleecing.block.qcow2 import header, layout, layouts
from fleecing.block.qcow2.layout import ExtensionType
from fleecing.block.qcow2.node import TempImage
from fleecing.units import KiB, MiB
from tests.block.qcow2.tools import check, copy, make_backing, make_image, qemu_img

OFFSETS = st.integers(1, (1 << 47) - 1).map(lambda sectors: sectors << 9)


def by_qemu(folder: Path, *options: str, size: int = 3 * MiB) -> Path:
    """An empty image over a raw disk, made by qemu-img."""
    backing = make_backing(folder, size)
    path = folder / "qemu.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-b", backing, "-F", "raw", *options, path)
    return path


def test_header_of_qemu_img_parses(tmp_path: Path) -> None:
    data = by_qemu(tmp_path, "-o", "cluster_size=4096").read_bytes()
    fields = layouts.HEADER.parse(data)
    assert (fields.version, fields.cluster_bits, fields.size) == (3, 12, 3 * MiB)
    assert (fields.refcount_order, fields.nb_snapshots, fields.crypt_method) == (4, 0, 0)
    assert (fields.l1_size, fields.header_length) == (2, 112)
    name = data[fields.backing_file_offset :][: fields.backing_file_size]
    assert os.fsdecode(name) == str(tmp_path / "disk.raw")


def test_extensions_of_qemu_img_parse(tmp_path: Path) -> None:
    data = by_qemu(tmp_path).read_bytes()
    offset = layouts.HEADER.parse(data).header_length
    first = layouts.EXTENSION.parse(data[offset:])
    assert (first.type, first.data) == (ExtensionType.BACKING_FORMAT, b"raw")
    second = layouts.EXTENSION.parse(data[offset + 16 :])
    assert second.type == ExtensionType.FEATURE_NAMES
    assert second.data[:11] == b"\0\0dirty bit"
    end = layouts.EXTENSION.parse(data[offset + 16 + 8 + second.length :])
    assert (end.type, end.length) == (ExtensionType.END, 0)


def test_tables_of_qemu_img_parse(tmp_path: Path) -> None:
    path = by_qemu(tmp_path)
    qemu_img("bench", "-q", "-f", "qcow2", "-w", "-c", "1", "-s", "65536", "-o", "131072", "--pattern", "7", path)
    data = path.read_bytes()
    fields = layouts.HEADER.parse(data)
    l1 = layouts.L1_ENTRY.parse(data[fields.l1_table_offset :])
    assert l1.copied and l1.reserved_56 == l1.reserved_0 == 0
    l2 = layouts.L2_ENTRY.parse(data[l1.offset * 512 + 2 * 8 :])
    assert l2.copied and not l2.compressed and not l2.zero
    assert data[l2.offset * 512 :][:65536] == b"\7" * 65536
    block = layouts.REFCOUNT_TABLE_ENTRY.parse(data[fields.refcount_table_offset :]).offset * 512
    assert data[block : block + 2] == layout.ones(1)


def test_image_of_qemu_img_opens(tmp_path: Path) -> None:
    path = by_qemu(tmp_path, size=3 * MiB + 512)
    qemu_img("bench", "-q", "-f", "qcow2", "-w", "-c", "1", "-s", "65536", "-o", "131072", "--pattern", "7", path)
    image = TempImage.open(HostFile.open(str(path)))
    assert (image.size, image.backing_file, image.backing_format) == (3 * MiB + 512, str(tmp_path / "disk.raw"), "raw")
    assert [image.host_offset(i) > 1 for i in range(4)] == [False, False, True, False]
    copy(image, 40)
    image.release(image.unlink(0, 20))
    assert check(path) == {}


def test_our_header_is_what_construct_says(tmp_path: Path) -> None:
    image = make_image(tmp_path, 10 * MiB + 1, 4 * KiB)
    data = Path(image.path).read_bytes()
    fields = layouts.HEADER.parse(data)
    assert (fields.version, fields.size, fields.header_length) == (3, 10 * MiB + 512, 104)
    head = header.parse(image.path, data, len(data))
    assert (head.backing_file, head.backing_format) == (str(tmp_path / "disk.raw"), "raw")
    assert header.build(image.path, head) == data[: fields.backing_file_offset + fields.backing_file_size]


@given(first=OFFSETS, count=st.integers(1, 20), bits=st.integers(9, 21))
def test_data_entries_agree_with_construct(first: int, count: int, bits: int) -> None:
    host = first >> bits << bits
    if not host or host + (count << bits) > layout.MAX_HOST_BYTES:
        return
    written = layout.data_entries(host, count, 1 << bits)
    for i in range(count):
        entry = layouts.L2_ENTRY.parse(written[8 * i :])
        assert entry.offset * 512 == host + (i << bits)
        assert (entry.copied, entry.compressed, entry.zero, entry.reserved_56, entry.reserved_1) == (
            True,
            False,
            False,
            0,
            0,
        )


@given(offset=OFFSETS)
def test_constants_agree_with_construct(offset: int) -> None:
    fields = {"copied": True, "reserved_56": 0, "offset": offset // 512, "reserved_0": 0}
    assert layouts.L1_ENTRY.build(fields) == layout.ENTRY.pack(offset | layout.COPIED)
    assert layouts.REFCOUNT_TABLE_ENTRY.build({"offset": offset // 512, "reserved_0": 0}) == layout.ENTRY.pack(offset)
    assert offset & layout.OFFSET_MASK == offset


def test_flags_agree_with_construct() -> None:
    none = dict.fromkeys(("copied", "compressed", "reserved_56", "offset", "reserved_1", "zero"), 0)
    assert layouts.L2_ENTRY.build(none | {"zero": 1}) == layout.ZERO_ENTRY == layout.ENTRY.pack(layout.ZERO)
    assert layouts.L2_ENTRY.build(none | {"compressed": 1}) == layout.ENTRY.pack(layout.COMPRESSED)
    assert layouts.L2_ENTRY.build(none | {"copied": 1}) == layout.ENTRY.pack(layout.COPIED)


@given(st.lists(st.integers(0, (1 << 64) - 1)))
def test_swapped_entries_are_big_endian(numbers: list[int]) -> None:
    entries = array("Q", numbers)
    layout.swap_entries(entries)
    assert entries.tobytes() == b"".join(map(layout.ENTRY.pack, numbers))


@pytest.mark.parametrize("length", [0, 1, 7, 8, 9])
def test_extension_is_padded_to_8_bytes(length: int) -> None:
    built = layouts.EXTENSION.build({"type": 1, "length": length, "data": b"x" * length})
    assert len(built) % 8 == 0 and built[8:].rstrip(b"\0") == b"x" * length
