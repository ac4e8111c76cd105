"""What the qcow2 files of pulls have that a temp image has not: no or a relative backing file, compressed clusters.

The rest of the format is in fleecing/block/qcow2/layout.py. Sections named here are those of QEMU's
docs/interop/qcow2.rst.
"""

from __future__ import annotations

import os
import struct
import threading
import zlib
from dataclasses import dataclass
from enum import Enum
from typing import Final

import zstandard

from fleecing.block.qcow2 import layout
from fleecing.block.qcow2.layout import ExtensionType, Incompatible
from fleecing.errors import ImageError
from fleecing.units import KiB, align_up, div_up

CLUSTER: Final = 64 * KiB
CLUSTER_BITS: Final = 16
L2_ENTRIES: Final = CLUSTER // layout.ENTRY_BYTES
BLOCK_ENTRIES: Final = CLUSTER // layout.REFCOUNT_BYTES

_HEADER: Final = struct.Struct(">4sIQIIQIIQQIIQQQQIIB7x")
"""Version 3 with the compression type (layouts.HEADER has its fields' names but for that)."""
_EXTENSION: Final = struct.Struct(">II")

_OFFSET_BITS: Final = 62 - (CLUSTER_BITS - 8)
""" "Compressed Clusters Descriptor (x = 62 - (cluster_bits - 8))"."""
_WINDOW: Final = -12
"""Raw deflate with a window of 4 KiB: QEMU reads nothing larger."""
_SECTOR: Final = 512


class Compression(Enum):
    """How clusters are compressed; the values of deflate and zstd are those of the header."""

    NONE = None
    DEFLATE = 0
    ZSTD = 1


_contexts = threading.local()


def compress(data: bytes | memoryview, how: Compression) -> bytes | None:
    """One whole cluster compressed; None where that does not make it smaller. From any thread."""
    if how is Compression.ZSTD:
        compressor = getattr(_contexts, "compressor", None)
        if compressor is None:
            compressor = _contexts.compressor = zstandard.ZstdCompressor(level=3)
        packed: bytes = compressor.compress(data)
    else:
        deflate = zlib.compressobj(wbits=_WINDOW)
        packed = deflate.compress(data) + deflate.flush()
    return packed if len(packed) < CLUSTER else None


def decompress(data: bytes, how: Compression) -> bytes:
    """The cluster. Raises ValueError where it is none; bytes behind its end are ignored."""
    try:
        if how is Compression.ZSTD:
            cluster = zstandard.ZstdDecompressor().stream_reader(data).read(CLUSTER + 1)  # no more, whatever it says
        else:
            cluster = zlib.decompressobj(wbits=-15).decompress(data, CLUSTER)
    except (zlib.error, zstandard.ZstdError) as e:
        raise ValueError(f"compressed data that cannot be read: {e}") from None
    if len(cluster) != CLUSTER:
        raise ValueError(f"compressed data of {len(cluster)} bytes where a cluster was")
    return cluster


def compressed_entry(offset: int, length: int) -> int:
    """The L2 entry of `length` bytes at any host `offset`: "number of additional 512-byte sectors"."""
    sectors = (offset + length - 1) // _SECTOR - offset // _SECTOR
    return layout.COMPRESSED | sectors << _OFFSET_BITS | offset


def compressed_range(entry: int) -> tuple[int, int]:
    """(host offset, bytes up to the end of the last sector) of such an entry."""
    offset = entry & ((1 << _OFFSET_BITS) - 1)
    sectors = (entry & ~(layout.COPIED | layout.COMPRESSED)) >> _OFFSET_BITS
    return offset, (sectors + 1) * _SECTOR - offset % _SECTOR


def touched(entry: int) -> range:
    """The host clusters that an L2 entry counts in."""
    if entry & layout.COMPRESSED:
        offset, length = compressed_range(entry)
        return range(offset // CLUSTER, div_up(offset + length, CLUSTER))
    offset = entry & layout.OFFSET_MASK
    return range(offset // CLUSTER, offset // CLUSTER + bool(offset))


@dataclass(frozen=True, kw_only=True)
class Header:
    """What the first cluster says. Sizes and offsets in bytes; `backing` as it is written there, "" for none."""

    size: int
    l1_entries: int
    l1_offset: int
    table_offset: int
    table_clusters: int
    compression: Compression = Compression.NONE
    backing: str = ""
    backing_format: str = "qcow2"


def build_header(header: Header) -> bytes:
    """The bytes of the first cluster, without the zeroes at its end. Raises ValueError for a backing name too long."""
    zstd = header.compression is Compression.ZSTD
    name = os.fsencode(header.backing)
    extensions = b""
    if name:
        form = header.backing_format.encode("ascii")
        extensions += _EXTENSION.pack(ExtensionType.BACKING_FORMAT, len(form)) + form.ljust(
            align_up(len(form), 8), b"\0"
        )
    extensions += _EXTENSION.pack(ExtensionType.END, 0)
    if len(name) > layout.MAX_BACKING_NAME:
        raise ValueError(f"the name of the backing file is above {layout.MAX_BACKING_NAME} bytes")
    fixed = _HEADER.pack(
        layout.MAGIC,
        layout.VERSION,
        _HEADER.size + len(extensions) if name else 0,
        len(name),
        CLUSTER_BITS,
        header.size,
        0,  # crypt_method
        header.l1_entries,
        header.l1_offset,
        header.table_offset,
        header.table_clusters,
        0,  # nb_snapshots
        0,  # snapshots_offset
        Incompatible.COMPRESSION_TYPE if zstd else 0,
        0,  # compatible_features
        0,  # autoclear_features
        layout.REFCOUNT_ORDER,
        _HEADER.size,
        1 if zstd else 0,
    )
    return fixed + extensions + name


def parse_header(path: str, data: bytes) -> Header:
    """What a file that a pull wrote says of itself. Raises ImageError for anything else, other qcow2 files too."""
    if len(data) < _HEADER.size or data[:4] != layout.MAGIC:
        raise ImageError(path, 0, "is no qcow2 image")
    (_, version, name_at, name_size, bits, size, crypt, l1_entries, l1_offset, table_offset, table_clusters) = (
        _HEADER.unpack_from(data)[:11]
    )
    snapshots, _, incompatible, _, _, order, length, kind = _HEADER.unpack_from(data)[11:]
    plain = (version, bits, crypt, snapshots, order) == (layout.VERSION, CLUSTER_BITS, 0, 0, layout.REFCOUNT_ORDER)
    if not plain or incompatible & ~Incompatible.COMPRESSION_TYPE or length < _HEADER.size:
        raise ImageError(path, 0, "is a qcow2 image that no pull has written: use qemu-img for it")
    needed = div_up(div_up(size, CLUSTER), L2_ENTRIES)
    fits = needed <= l1_entries <= layout.MAX_L1_BYTES // layout.ENTRY_BYTES and l1_offset & ~layout.OFFSET_MASK == 0
    if kind > 1 or bool(kind) != bool(incompatible) or not fits:
        raise ImageError(path, 0, "has a header that contradicts itself")
    backing = os.fsdecode(data[name_at : name_at + name_size]) if name_at else ""
    return Header(
        size=size,
        l1_entries=l1_entries,
        l1_offset=l1_offset,
        table_offset=table_offset,
        table_clusters=table_clusters,
        compression=Compression.ZSTD if kind else Compression.DEFLATE,
        backing=backing,
    )
