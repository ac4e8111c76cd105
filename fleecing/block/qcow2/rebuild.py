"""Put a temp image right after a loss of power: keep what is known to be durable, and make all tables say just that.

What was written since the last sync may be on disk or not, in any order, torn at any sector. A cluster that is trusted
was synced with everything on the way to it, and none of that is written again with other contents as long as it is
trusted. So of the L1 table those entries count that lead to a trusted cluster, of an L2 table those that map one, and
nothing of the refcounts: these follow from the rest, and where a refcount block lies follows from its number.

It may be done again at any time: what a second loss of power leaves of the repair is put right in the same way.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable

from bitarray import bitarray

from fleecing.block.bitmap import bit_runs
from fleecing.block.hostfile import HostFile
from fleecing.block.qcow2 import layout
from fleecing.block.qcow2.geometry import Geometry
from fleecing.errors import ImageError


class Rebuild:
    """One image. `trusted`: a bit for each guest cluster that was durable, and padding."""

    def __init__(self, file: HostFile, geometry: Geometry, trusted: bitarray) -> None:
        self._file = file
        self._geometry = geometry
        self._trusted = trusted
        self._length = file.length()
        self._used: dict[int, bitarray] = {}  # by refcount block: its host clusters that are in use

    def run(self) -> None:
        """Rewrite what differs. Raises ImageError where a trusted cluster is not there, and OSError."""
        geometry, size = self._geometry, self._geometry.cluster_size
        self._use(0, 1)
        self._use(geometry.table_offset // size, geometry.table_clusters)
        self._use(geometry.l1_offset // size, geometry.l1_clusters)
        self._rebuild_tables()
        self._rebuild_refcounts()

    def _rebuild_tables(self) -> None:
        geometry = self._geometry
        per_table = geometry.l2_entries
        entries = self._read_entries(geometry.l1_offset, geometry.l1_entries)
        for index, entry in enumerate(entries):
            where = geometry.l1_offset + index * layout.ENTRY_BYTES
            base = index * per_table
            end = min(base + per_table, geometry.guest_clusters)
            if base >= end or self._trusted.find(1, base, end) < 0:
                if entry:
                    self._file.write(where, bytes(layout.ENTRY_BYTES))
                continue
            table = self._host(entry, where)
            self._use(table // geometry.cluster_size, 1)
            self._rebuild_table(table, base, end)

    def _rebuild_table(self, table: int, base: int, end: int) -> None:
        """Leave the trusted entries of [base, end) in the L2 table at this offset, and nothing else."""
        size = self._geometry.cluster_size
        found = self._read_entries(table, self._geometry.l2_entries)
        kept = array("Q", bytes(size))
        for start, stop, trusted in bit_runs(self._trusted, base, end):
            if trusted:
                kept[start - base : stop - base] = found[start - base : stop - base]
                for i in range(start - base, stop - base):
                    if kept[i] != layout.ZERO:
                        self._use(self._host(kept[i], table + i * layout.ENTRY_BYTES) // size, 1)
        if kept != found:
            layout.swap_entries(kept)
            self._file.write(table, kept.tobytes())

    def _host(self, entry: int, where: int) -> int:
        """The host offset in an entry that leads to a trusted cluster."""
        offset = entry & layout.OFFSET_MASK
        if entry != offset | layout.COPIED or offset % self._geometry.cluster_size or not 0 < offset < self._length:
            raise ImageError(
                self._file.path, where, f"entry {entry:#018x} is lost: it led to a copy that was durable once"
            )
        return offset

    def _rebuild_refcounts(self) -> None:
        geometry, size = self._geometry, self._geometry.cluster_size
        first_blocks = geometry.table_offset // size - 1
        wanted = {}
        for number in sorted({*range(first_blocks), *self._used}):
            cluster = 1 + number if number < first_blocks else number * geometry.block_entries
            self._use(cluster, 1)
            wanted[number] = cluster * size
        for number, offset in wanted.items():
            # A bit becomes a count of two bytes, big-endian.
            counts = bytearray(size)
            counts[1::2] = self._bits(number).unpack(one=b"\1")
            if self._read(offset, size) != counts:
                self._file.write(offset, counts)
        self._rebuild_refcount_table(wanted)

    def _rebuild_refcount_table(self, wanted: dict[int, int]) -> None:
        geometry = self._geometry
        entries = geometry.table_clusters * geometry.cluster_size // layout.ENTRY_BYTES
        found = self._read_entries(geometry.table_offset, entries)
        for number in self._differing(found, wanted):
            where = geometry.table_offset + number * layout.ENTRY_BYTES
            self._file.write(where, layout.ENTRY.pack(wanted.get(number, 0)))

    @staticmethod
    def _differing(found: array[int], wanted: dict[int, int]) -> Iterable[int]:
        return [number for number, offset in enumerate(found) if offset != wanted.get(number, 0)]

    def _bits(self, number: int) -> bitarray:
        bits = self._used.get(number)
        if bits is None:
            bits = self._used[number] = bitarray(self._geometry.block_entries, endian="little")
            bits.setall(0)
        return bits

    def _use(self, cluster: int, count: int) -> None:
        """Count these; what is used twice is found when the image is loaded."""
        per_block = self._geometry.block_entries
        end = cluster + count
        while cluster < end:
            number, lo = divmod(cluster, per_block)
            hi = min(lo + end - cluster, per_block)
            self._bits(number)[lo:hi] = 1
            cluster += hi - lo

    def _read_entries(self, offset: int, count: int) -> array[int]:
        entries = array("Q", self._read(offset, count * layout.ENTRY_BYTES))
        layout.swap_entries(entries)
        return entries

    def _read(self, offset: int, length: int) -> bytes:
        """The bytes of the file, zeroes where it ends."""
        buffer = bytearray(length)
        self._file.read_into(offset, memoryview(buffer))
        return bytes(buffer)
