"""A new qcow2 file: compact, sparse, compressed if wanted, on top of a backing file if there is one.

    cluster 0        header, written last of all: before that no reader takes the file for an image
            1        L1 table
                     data clusters, packed compressed ones, L2 tables, in the order of need
            at the end  refcount blocks, refcount table, written by `finish`

Everything is written once, in the order data, L2 entry, journal. So the file itself tells a run that resumes what is
allocated: whatever an L2 entry names. Space that a killed run had taken and not linked is taken again, or stays
unused with a refcount of 0; neither is an error to `qemu-img check`.
"""

from __future__ import annotations

import sys
from array import array
from dataclasses import dataclass
from threading import Lock
from typing import Final

from fleecing.block.hostfile import HostFile
from fleecing.block.qcow2 import layout
from fleecing.errors import ImageError
from fleecing.pull.qcow2_codec import (
    BLOCK_ENTRIES,
    CLUSTER,
    L2_ENTRIES,
    Compression,
    Header,
    build_header,
    compress,
    compressed_entry,
    touched,
)
from fleecing.pull.qcow2_reader import ClusterReader, read_entries
from fleecing.pull.target import PART, Target, give_name, naming, new_part, remove_part, zero_runs
from fleecing.pull.write_behind import WriteBehind
from fleecing.units import align_up, div_up

_ENTRY: Final = layout.ENTRY_BYTES


@dataclass(frozen=True)
class Qcow2Options:
    """`backing`: the name of a qcow2 file as the header shall have it, relative to the new one's folder."""

    compression: Compression = Compression.NONE
    backing: str = ""


class _Space:
    """Host clusters and their refcounts; the file only grows. Its callers hold the lock of the target."""

    def __init__(self, used: int) -> None:
        self.counts = array("H", [1]) * used
        self._packed = 0
        """Where the next compressed bytes go, in a cluster that only such bytes share; a multiple of it: nowhere."""

    @property
    def clusters(self) -> int:
        return len(self.counts)

    def take(self, count: int) -> int:
        """The host offset of `count` neighbouring clusters."""
        first = len(self.counts)
        self.counts.extend([1] * count)
        return first * CLUSTER

    def pack(self, length: int) -> int:
        """The host offset of `length` bytes for compressed clusters; `count` enters each of them."""
        room = -self._packed % CLUSTER
        at_the_end = align_up(self._packed, CLUSTER) == len(self.counts) * CLUSTER
        if length > room and not at_the_end:
            self._packed = len(self.counts) * CLUSTER
        offset = self._packed
        self._packed += length
        self._grow(div_up(self._packed, CLUSTER))
        return offset

    def count(self, entry: int) -> None:
        """An L2 entry that a run has found or made: each host cluster that it touches has one more."""
        clusters = touched(entry)
        self._grow(clusters.stop)
        for cluster in clusters:
            self.counts[cluster] += 1

    def _grow(self, clusters: int) -> None:
        if clusters > len(self.counts):
            self.counts.extend([0] * (clusters - len(self.counts)))


class Qcow2Target(Target):
    """A file that is called `path`.part until `finish`."""

    granularity = CLUSTER

    def __init__(self, path: str, file: HostFile, size: int, options: Qcow2Options) -> None:
        self.path = path
        self._file = file
        self._data = WriteBehind(file)
        self._size = align_up(size, layout.SECTOR)
        self._options = options
        self._lock = Lock()
        self._l1 = array("Q", bytes(_ENTRY)) * div_up(div_up(self._size, CLUSTER), L2_ENTRIES)
        self._fixed = 1 + div_up(len(self._l1) * _ENTRY, CLUSTER)
        self._space = _Space(self._fixed)
        self._is_resumed = False

    @classmethod
    def create(cls, path: str, size: int, options: Qcow2Options) -> Qcow2Target:
        """A new one for a disk of `size` bytes. Raises OSError, and ImageError for a disk that is too large."""
        if div_up(div_up(size, CLUSTER), L2_ENTRIES) * _ENTRY > layout.MAX_L1_BYTES:
            raise ImageError(path, -1, f"cannot be a qcow2 image of {size} bytes: use the raw format")
        return cls(path, new_part(path), size, options)

    @classmethod
    def resume(cls, path: str, size: int, options: Qcow2Options) -> Qcow2Target:
        """What an earlier run, for the same disk and with the same options, left. Raises OSError."""
        target = cls(path, HostFile.open(path + PART), size, options)
        try:
            target._find_what_is_there()
        except BaseException:
            target._close()
            raise
        return target

    def _find_what_is_there(self) -> None:
        self._is_resumed = True
        self._l1 = read_entries(self._file, CLUSTER, len(self._l1))
        self._count_again()
        with naming(self._file.path):
            self._file.truncate(self._space.clusters * CLUSTER)

    def _count_again(self) -> None:
        """The refcounts of what is linked, and of nothing else."""
        self._space = _Space(self._fixed)
        for number in self._l1:
            if not number:
                continue
            self._space.count(number)
            for entry in read_entries(self._file, number & layout.OFFSET_MASK, L2_ENTRIES):
                if entry:
                    self._space.count(entry)

    def write(self, offset: int, data: memoryview) -> None:
        """Data of whole clusters; the disk's last one may be cut."""
        for start, end, is_zero in zero_runs(data, CLUSTER):
            if is_zero:
                self.zero(offset + start, end - start)
            elif self._options.compression is Compression.NONE:
                self._write_plain(offset + start, data[start:end])
            else:
                self._write_compressed(offset + start, data[start:end])

    def zero(self, offset: int, length: int) -> None:
        """Nothing to do, unless there is a backing file that would shine through."""
        if self._options.backing:
            self._link(offset, array("Q", [layout.ZERO]) * div_up(length, CLUSTER))

    def _write_plain(self, offset: int, data: memoryview) -> None:
        count = div_up(len(data), CLUSTER)
        with self._lock:
            host = self._space.take(count)
        with naming(self._file.path):
            self._data.write(host, data, waits=self.waits)
        first = host | layout.COPIED
        self._link(offset, array("Q", range(first, first + count * CLUSTER, CLUSTER)))

    def _write_compressed(self, offset: int, data: memoryview) -> None:
        """What does not become smaller stays as it is."""
        packed: list[bytes] = []
        for start in range(0, len(data), CLUSTER):
            cluster = data[start : start + CLUSTER]
            small = compress(cluster if len(cluster) == CLUSTER else bytes(cluster).ljust(CLUSTER, b"\0"), self._how)
            if small is not None:
                packed.append(small)
                continue
            self._write_packed(offset + start - len(packed) * CLUSTER, packed)
            self._write_plain(offset + start, cluster)
            packed = []
        self._write_packed(offset + align_up(len(data), CLUSTER) - len(packed) * CLUSTER, packed)

    @property
    def _how(self) -> Compression:
        return self._options.compression

    def _write_packed(self, offset: int, packed: list[bytes]) -> None:
        """Compressed clusters that follow each other, one behind the other."""
        if not packed:
            return
        entries = array("Q")
        with self._lock:
            host = at = self._space.pack(sum(map(len, packed)))
            for small in packed:
                entries.append(compressed_entry(at, len(small)))
                self._space.count(entries[-1])
                at += len(small)
        with naming(self._file.path):
            self._data.write(host, memoryview(b"".join(packed)), waits=self.waits)
        self._link(offset, entries)

    def _put(self, host: int, data: memoryview | bytes) -> None:
        with naming(self._file.path):
            self._file.write(host, data)

    def _link(self, offset: int, entries: array[int]) -> None:
        """Enter neighbouring clusters, whose data are written, from a guest offset on."""
        cluster = offset // CLUSTER
        layout.swap_entries(entries)
        at = 0
        while at < len(entries):
            number, index = divmod(cluster + at, L2_ENTRIES)
            count = min(L2_ENTRIES - index, len(entries) - at)
            self._put(self._table(number) + index * _ENTRY, entries[at : at + count].tobytes())
            at += count

    def _table(self, number: int) -> int:
        """The host offset of an L2 table, which is made where there is none."""
        with self._lock:
            if not self._l1[number]:
                self._l1[number] = self._space.take(1) | layout.COPIED
                self._put(CLUSTER + number * _ENTRY, layout.ENTRY.pack(self._l1[number]))
            return self._l1[number] & layout.OFFSET_MASK

    def read(self, offset: int, length: int) -> bytes:
        """What an earlier run wrote; what it did not is zeroes."""
        reader = ClusterReader(self._file, self._l1, self._how)
        clusters = range(offset // CLUSTER, div_up(offset + length, CLUSTER))
        return b"".join(reader.read_cluster(cluster) or bytes(CLUSTER) for cluster in clusters)[:length]

    def look_again(self) -> None:
        with naming(self._file.path):
            self._data.look_again(waits=self.waits)
        self._find_what_is_there()
        self._write_tables_again()

    def _write_tables_again(self) -> None:
        """Where a disk had lost what it was given, they may be right in memory only, and are not to stay so."""
        for number in self._l1:
            if number:
                offset = number & layout.OFFSET_MASK
                table = read_entries(self._file, offset, L2_ENTRIES)
                layout.swap_entries(table)
                self._put(offset, table.tobytes())
        l1 = array("Q", self._l1)
        layout.swap_entries(l1)
        self._put(CLUSTER, l1.tobytes())

    def sync(self) -> None:
        with naming(self._file.path):
            self._data.sync(waits=self.waits)

    def finish(self) -> None:
        if self._is_resumed:
            self._count_again()  # what an earlier run had linked may have been written once more, elsewhere
        header = self._write_refcounts()
        self.sync()
        self._put(0, header)
        self.sync()
        give_name(self.path, durably=self.waits)
        self._close()

    def _write_refcounts(self) -> bytes:
        """Write the refcounts, which count themselves; the header that names them."""
        used = self._space.clusters
        blocks = table = 1
        while True:
            need = div_up(used + blocks + table, BLOCK_ENTRIES)
            if (need, div_up(need * _ENTRY, CLUSTER)) == (blocks, table):
                break
            blocks, table = need, div_up(need * _ENTRY, CLUSTER)
        first = self._space.take(blocks + table)
        counts = array("H", self._space.counts)
        if sys.byteorder == "little":
            counts.byteswap()
        self._put(first, counts.tobytes())
        entries = array("Q", range(first, first + blocks * CLUSTER, CLUSTER))
        layout.swap_entries(entries)
        table_offset = first + blocks * CLUSTER
        self._put(table_offset, entries.tobytes())
        with naming(self._file.path):
            self._file.truncate(self._space.clusters * CLUSTER)
        return build_header(
            Header(
                size=self._size,
                l1_entries=len(self._l1),
                l1_offset=CLUSTER,
                table_offset=table_offset,
                table_clusters=table,
                compression=self._how,
                backing=self._options.backing,
            )
        )

    def abandon(self) -> None:
        self._close()
        remove_part(self.path)

    @property
    def has_lost(self) -> bool:
        return self._data.has_lost

    def suspend(self) -> None:
        self._close()

    def _close(self) -> None:
        self._data.close()
        self._file.close()
