"""What lies where in a qcow2 file: the parts that a temp image uses (QEMU docs/interop/qcow2.rst).

All integers are big-endian. This is the documented truth; see layout.py. Apart from it because `construct` takes long
to import, and a client that writes an image does without.
"""

from __future__ import annotations

from construct import BitsInteger, BitStruct, Bytes, Const, Flag, Int32ub, Int64ub, Padding, Struct, this

from fleecing.block.qcow2.layout import MAGIC

HEADER = Struct(
    "magic" / Const(MAGIC),
    "version" / Int32ub,
    "backing_file_offset" / Int64ub,
    "backing_file_size" / Int32ub,
    "cluster_bits" / Int32ub,
    "size" / Int64ub,
    "crypt_method" / Int32ub,
    "l1_size" / Int32ub,
    "l1_table_offset" / Int64ub,
    "refcount_table_offset" / Int64ub,
    "refcount_table_clusters" / Int32ub,
    "nb_snapshots" / Int32ub,
    "snapshots_offset" / Int64ub,
    "incompatible_features" / Int64ub,
    "compatible_features" / Int64ub,
    "autoclear_features" / Int64ub,
    "refcount_order" / Int32ub,
    "header_length" / Int32ub,
)

EXTENSION = Struct(
    "type" / Int32ub,
    "length" / Int32ub,
    "data" / Bytes(this.length),
    Padding(-this.length % 8),
)

# Offsets of the three entries below count in units of 512 bytes, as bit 9 is their lowest.
L1_ENTRY = BitStruct(
    "copied" / Flag, "reserved_56" / BitsInteger(7), "offset" / BitsInteger(47), "reserved_0" / BitsInteger(9)
)

L2_ENTRY = BitStruct(
    "copied" / Flag,
    "compressed" / Flag,
    "reserved_56" / BitsInteger(6),
    "offset" / BitsInteger(47),
    "reserved_1" / BitsInteger(8),
    "zero" / Flag,
)

REFCOUNT_TABLE_ENTRY = BitStruct("offset" / BitsInteger(55), "reserved_0" / BitsInteger(9))
