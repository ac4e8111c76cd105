"""Take over a temp image that lies in a file: every table is read and checked before anything trusts it.

What a killed server leaves behind is at worst a count too high and data that nothing links. Both are put right here:
their space is free again afterwards. What a loss of power leaves behind is put right by rebuild.py before.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field

from bitarray import bitarray

from fleecing.block.hostfile import HostFile
from fleecing.block.qcow2 import header, layout
from fleecing.block.qcow2.geometry import Geometry
from fleecing.block.qcow2.header import Header
from fleecing.block.qcow2.mapping import Mapping
from fleecing.block.qcow2.rebuild import Rebuild
from fleecing.block.qcow2.refcounts import ClusterRuns, Refcounts, merge
from fleecing.errors import ImageError
from fleecing.units import div_up


@dataclass(slots=True)
class Found:
    """An image as it was found."""

    header: Header
    refcounts: Refcounts
    mapping: Mapping
    unused: ClusterRuns = field(default_factory=list)  # free, though the host may still hold space for them
    end: int = 0  # bytes of the file that are in use


def load(file: HostFile, limit: int | None, trusted: bitarray | None = None) -> Found:
    """Read the image in `file`. Raises ImageError with the offset of what is wrong, and OSError.

    `trusted`, after a loss of power: the guest clusters that are known to be durable, to be kept alone.
    """
    head = header.parse(file.path, _read(file, 0, 1 << layout.MAX_CLUSTER_BITS), file.length())
    if trusted is not None:
        Rebuild(file, head.geometry, trusted).run()
    length = file.length()
    loader = _Loader(file, head.geometry, length)
    loader.read_refcounts()
    loader.claim_fixed()
    tables = loader.read_tables()
    # What is counted and was not claimed by anything leaked.
    counted, leaked = loader.counted, loader.unclaimed
    for number, bits in leaked.items():
        counted[number] &= ~bits
    frontier, free, reserved = loader.free_space()
    used = sum(bits.count() for bits in counted.values()) + reserved
    refcounts = Refcounts(file, head.geometry, loader.blocks, frontier, used, limit)
    per_block = head.geometry.block_entries
    for number, bits in leaked.items():
        for start, count in _ones(bits):
            refcounts.down(number * per_block + start, count)
    mapping = Mapping(file, head.geometry, refcounts)
    for index, cluster, entries in tables:
        mapped = len(entries) - entries.count(0)
        mapping.load(index, cluster, entries, mapped, entries.count(layout.ZERO))
    return Found(head, refcounts, mapping, free, frontier * head.geometry.cluster_size)


class _Loader:
    """Reads and checks; changes nothing. `unclaimed` starts as `counted`; every reference claims what it names."""

    def __init__(self, file: HostFile, geometry: Geometry, length: int) -> None:
        self.blocks: dict[int, int] = {}
        self.counted: dict[int, bitarray] = {}  # by range: the clusters with refcount 1
        self.unclaimed: dict[int, bitarray] = {}
        self._file = file
        self._geometry = geometry
        self._length = length

    def read_refcounts(self) -> None:
        """The refcount table and its blocks, checked by themselves."""
        geometry, size = self._geometry, self._geometry.cluster_size
        table = self._entries(geometry.table_offset, geometry.table_clusters * size)
        for number, offset in enumerate(table):
            if not offset:
                continue
            where = geometry.table_offset + number * layout.ENTRY_BYTES
            if offset % size or not size <= offset <= self._length - size:
                raise ImageError(self._file.path, where, f"a refcount block at {offset:#x} is impossible")
            block = _read(self._file, offset, size)
            low = block[1::2]
            if any(block[::2]) or low.translate(None, b"\0\1"):
                raise ImageError(self._file.path, offset, "a refcount above 1, a temp image has none")
            bits = bitarray(endian="little")
            bits.pack(low)
            self.blocks[number] = offset
            self.counted[number] = bits
            self.unclaimed[number] = bits.copy()

    def claim_fixed(self) -> None:
        """Everything but the L2 tables and the data."""
        geometry, size = self._geometry, self._geometry.cluster_size
        self._claim(0, 1, 0)
        self._claim(geometry.table_offset // size, geometry.table_clusters, 48)
        self._claim(geometry.l1_offset // size, geometry.l1_clusters, 40)
        for number, offset in self.blocks.items():
            self._claim(offset // size, 1, geometry.table_offset + number * layout.ENTRY_BYTES)

    def read_tables(self) -> list[tuple[int, int, array[int]]]:
        """(L1 index, host cluster, entries as numbers) of every L2 table."""
        geometry = self._geometry
        needed = div_up(geometry.guest_clusters, geometry.l2_entries)
        tables = []
        for index, entry in enumerate(self._entries(geometry.l1_offset, geometry.l1_entries * layout.ENTRY_BYTES)):
            if not entry:
                continue
            where = geometry.l1_offset + index * layout.ENTRY_BYTES
            offset = self._data_offset(entry, where)
            if index >= needed:
                raise ImageError(self._file.path, where, "an L2 table beyond the end of the disk")
            self._claim(offset // geometry.cluster_size, 1, where)
            last = geometry.guest_clusters - index * geometry.l2_entries
            tables.append((index, offset // geometry.cluster_size, self._read_table(offset, last)))
        return tables

    def _read_table(self, table: int, last: int) -> array[int]:
        """The entries of the L2 table at this offset, of which `last` and those behind it are beyond the disk."""
        size = self._geometry.cluster_size
        entries = self._entries(table, size)
        if any(entries[last:]):
            raise ImageError(self._file.path, table + last * layout.ENTRY_BYTES, "a cluster beyond the end of the disk")
        start = count = 0  # of the run of neighbouring host clusters, claimed in one step
        for i, entry in enumerate(entries):
            if entry <= layout.ZERO:
                continue
            where = table + i * layout.ENTRY_BYTES
            offset = entries[i] = self._data_offset(entry, where)
            cluster = offset // size
            if cluster != start + count:
                if count:
                    self._claim(start, count, table)
                start, count = cluster, 0
            count += 1
        if count:
            self._claim(start, count, table)
        return entries

    def _data_offset(self, entry: int, where: int) -> int:
        """The host offset (bytes) in an L1 entry, or in an L2 entry of a data cluster."""
        offset = entry & layout.OFFSET_MASK
        # "reserved bits: should be 0"; bit 62 is compression and bit 0 zero flag, which a temp image never combines
        # with an offset. "Bit 63: 0 for a cluster that is unused, compressed or requires COW, 1 if refcount is one".
        if entry != offset | layout.COPIED:
            raise ImageError(self._file.path, where, f"entry {entry:#018x} has bits that a temp image does not use")
        if offset % self._geometry.cluster_size or not 0 < offset < self._length:
            raise ImageError(self._file.path, where, f"entry {entry:#018x} points to where no cluster can be")
        return offset

    def _claim(self, start: int, count: int, where: int) -> None:
        """These clusters are used by what lies at `where`: each must be counted, and used once."""
        per_block = self._geometry.block_entries
        first = start
        end = start + count
        while first < end:
            number, lo = divmod(first, per_block)
            hi = min(lo + end - first, per_block)
            bits = self.unclaimed.get(number)
            missing = lo if bits is None else bits.find(0, lo, hi)
            if bits is None or missing >= 0:
                offset = (number * per_block + missing) * self._geometry.cluster_size
                raise ImageError(
                    self._file.path, where, f"the host cluster at {offset:#x} is not counted, or used twice"
                )
            bits[lo:hi] = 0
            first += hi - lo

    def free_space(self) -> tuple[int, ClusterRuns, int]:
        """The frontier, the free runs before it, and the clusters before it that are kept for refcount blocks."""
        per_block = self._geometry.block_entries
        used = [number for number, bits in self.counted.items() if bits.any()]
        last = max(used)
        frontier = last * per_block + self.counted[last].find(1, right=True) + 1
        free: ClusterRuns = []
        reserved = 0
        for number in range(last + 1):
            base = number * per_block
            bits = self.counted.get(number)
            if bits is None:
                reserved += 1
                free.append((base + 1, per_block - 1))
            else:
                free += [(base + start, count) for start, count in _ones(~bits[: frontier - base])]
        return frontier, merge(free), reserved

    def _entries(self, offset: int, length: int) -> array[int]:
        entries = array("Q", _read(self._file, offset, length))
        layout.swap_entries(entries)
        return entries


def _read(file: HostFile, offset: int, length: int) -> bytes:
    """The bytes of the file, zeroes where it ends."""
    buffer = bytearray(length)
    file.read_into(offset, memoryview(buffer))
    return bytes(buffer)


def _ones(bits: bitarray) -> ClusterRuns:
    """(start, length) of the runs of 1."""
    runs = []
    start = bits.find(1)
    while start >= 0:
        end = bits.find(0, start)
        if end < 0:
            end = len(bits)
        runs.append((start, end - start))
        start = bits.find(1, end)
    return runs
