"""The numbers of the qcow2 format, as far as a temp image uses it (QEMU docs/interop/qcow2.rst).

What lies where is said in layouts.py; what is read or written per table goes through `array` and the constants here,
and tests prove that both say the same.
"""

from __future__ import annotations

import struct
import sys
from array import array
from enum import IntEnum, IntFlag

from fleecing.units import MiB

MAGIC = b"QFI\xfb"
VERSION = 3
HEADER_LENGTH = 104  # "Header": the shortest that version 3 allows; no compression type follows
REFCOUNT_ORDER = 4  # 16 bits a count, what every reader of qcow2 knows
REFCOUNT_BYTES = 1 << REFCOUNT_ORDER >> 3
ENTRY_BYTES = 8  # of the L1 table, an L2 table and the refcount table
SECTOR = 512  # the virtual size is a multiple of it

MIN_CLUSTER_BITS = 9
MAX_CLUSTER_BITS = 21  # QEMU's MAX_CLUSTER_BITS
MAX_L1_BYTES = 32 * MiB  # QEMU's QCOW_MAX_L1_SIZE
MAX_REFCOUNT_TABLE_BYTES = 8 * MiB  # QEMU's QCOW_MAX_REFTABLE_SIZE
MAX_HOST_BYTES = 1 << 56  # "L1 table entry", "L2 table entry": offsets end with bit 55
MAX_BACKING_NAME = 1023  # "Header": backing_file_size

COPIED = 1 << 63  # L1 and L2 entries: the refcount is exactly one
COMPRESSED = 1 << 62  # L2 entries
ZERO = 1  # L2 entries: reads as zeroes, whatever the offset is
OFFSET_MASK = 0x00FF_FFFF_FFFF_FE00  # L1 and L2 entries: bits 9 to 55


class Incompatible(IntFlag):
    """Feature bits that a reader must know, or refuse the image ("Header", bytes 72-79)."""

    DIRTY = 1 << 0
    CORRUPT = 1 << 1
    EXTERNAL_DATA_FILE = 1 << 2
    COMPRESSION_TYPE = 1 << 3
    EXTENDED_L2 = 1 << 4


class ExtensionType(IntEnum):
    """ "Header extensions"."""

    END = 0x00000000
    BACKING_FORMAT = 0xE2792ACA
    FEATURE_NAMES = 0x6803F857
    BITMAPS = 0x23852875
    ENCRYPTION = 0x0537BE77
    EXTERNAL_DATA_FILE = 0x44415441


ENTRY = struct.Struct(">Q")
"""One entry of any table, for single reads and writes."""

ZERO_ENTRY = ENTRY.pack(ZERO)


def swap_entries(entries: array[int]) -> None:
    """Turn entries of the file into numbers, or numbers into entries of the file, in place."""
    if sys.byteorder == "little":
        entries.byteswap()


def data_entries(host_offset: int, count: int, cluster_size: int) -> bytes:
    """The L2 entries of `count` neighbouring data clusters from `host_offset` (bytes) on."""
    first = host_offset | COPIED
    if count == 1:
        return ENTRY.pack(first)
    entries = array("Q", range(first, first + count * cluster_size, cluster_size))
    swap_entries(entries)
    return entries.tobytes()


def ones(count: int) -> bytes:
    """`count` entries of a refcount block that all say 1."""
    return b"\0\1" * count
