"""Reads the clusters that one qcow2 file has itself, without its backing file."""

from __future__ import annotations

from array import array
from collections import OrderedDict
from threading import Lock
from typing import Final, Self

from fleecing.block.hostfile import HostFile
from fleecing.block.qcow2 import layout
from fleecing.errors import ImageError
from fleecing.pull.qcow2_codec import (
    CLUSTER,
    L2_ENTRIES,
    Compression,
    Header,
    build_header,
    compressed_range,
    decompress,
    parse_header,
)
from fleecing.pull.target import naming

_ZEROES: Final = bytes(CLUSTER)

_CACHED_TABLES: Final = 64
"""L2 tables that are held: 4 MiB, the mapping of 32 GiB."""


class ClusterReader:
    """Finds and reads clusters by their L2 entries; for several threads. Errors are OSError and ImageError."""

    def __init__(self, file: HostFile, l1: array[int], compression: Compression) -> None:
        self._file = file
        self._l1 = l1
        self._compression = compression
        self._tables: OrderedDict[int, array[int]] = OrderedDict()
        self._lock = Lock()

    def entry(self, cluster: int) -> int:
        """The L2 entry of a guest cluster, 0 where there is none."""
        number, index = divmod(cluster, L2_ENTRIES)
        offset = self._l1[number] & layout.OFFSET_MASK
        return self._table(offset)[index] if offset else 0

    def _table(self, offset: int) -> array[int]:
        with self._lock:
            table = self._tables.get(offset)
            if table is None:
                table = self._tables[offset] = read_entries(self._file, offset, L2_ENTRIES)
                if len(self._tables) > _CACHED_TABLES:
                    self._tables.popitem(last=False)
            return table

    def read_cluster(self, cluster: int) -> bytes | None:
        """Its bytes; None where the file does not have it."""
        entry = self.entry(cluster)
        if entry & layout.COMPRESSED:
            offset, length = compressed_range(entry)
            try:
                return decompress(self._at(offset, length), self._compression)
            except ValueError as e:
                raise ImageError(self._file.path, offset, str(e)) from None
        if entry & layout.ZERO:
            return _ZEROES
        offset = entry & layout.OFFSET_MASK
        return self._at(offset, CLUSTER).ljust(CLUSTER, b"\0") if offset else None

    def _at(self, offset: int, length: int) -> bytes:
        buffer = bytearray(length)
        with naming(self._file.path):
            n = self._file.read_into(offset, memoryview(buffer))
        return bytes(buffer[:n])


class Qcow2File(ClusterReader):
    """A finished file."""

    def __init__(self, file: HostFile, header: Header) -> None:
        super().__init__(file, read_entries(file, header.l1_offset, header.l1_entries), header.compression)
        self.path = file.path
        self.header = header

    @classmethod
    def open(cls, path: str) -> Self:
        """Raises OSError, and ImageError for what no pull has written."""
        file = HostFile.open(path, writable=False)
        try:
            data = bytearray(CLUSTER)
            n = file.read_into(0, memoryview(data))
            return cls(file, parse_header(path, bytes(data[:n])))
        except BaseException:
            file.close()
            raise

    def close(self) -> None:
        self._file.close()

    def length(self) -> int:
        """Bytes of the file itself."""
        return self._file.length()

    def read(self, offset: int, length: int) -> bytes:
        """Bytes that this file has itself; `offset` is a multiple of the cluster. Raises ImageError for others.

        A file without a backing file has everything.
        """
        parts = []
        for cluster in range(offset // CLUSTER, -(-(offset + length) // CLUSTER)):
            data = self.read_cluster(cluster)
            if data is None:
                if self.header.backing:
                    raise ImageError(self.path, -1, f"lacks the cluster at {cluster * CLUSTER} that it should have")
                data = bytes(CLUSTER)
            parts.append(data)
        return b"".join(parts)[:length]

    def check_first_cluster(self) -> None:
        """It is to the byte what a pull writes there: others obey what we do not look at. Raises ImageError."""
        data = bytearray(CLUSTER)
        with naming(self.path):
            self._file.read_into(0, memoryview(data))
        header = self.header
        needed = -(-header.size // (CLUSTER * L2_ENTRIES))
        end = header.table_offset + header.table_clusters * CLUSTER
        fits = (header.l1_entries, header.l1_offset, end) == (needed, CLUSTER, self.length()) and header.table_clusters
        if not fits or bytes(data) != build_header(header).ljust(CLUSTER, b"\0"):
            raise ImageError(self.path, 0, "has a header that no pull has written")

    def check_nothing(self, offset: int, end: int) -> None:
        """The file has nothing in that range, which ends and begins with a cluster or the disk. Raises ImageError."""
        cluster, stop = -(-offset // CLUSTER), -(-end // CLUSTER)
        while cluster < stop:
            number, index = divmod(cluster, L2_ENTRIES)
            count = min(stop - cluster, L2_ENTRIES - index)
            table = self._l1[number]
            if table and any(self._table(table & layout.OFFSET_MASK)[index : index + count]):
                raise ImageError(self.path, -1, "is damaged: it maps clusters that no pull has written")
            cluster += count

    def is_zero(self, offset: int, length: int) -> bool:
        """Whether that range, from a multiple of the cluster on, is zeroes that this file has itself."""
        cluster, end = offset // CLUSTER, -(-(offset + length) // CLUSTER)
        while cluster < end:
            if not self._l1[cluster // L2_ENTRIES]:
                if self.header.backing:
                    return False
                cluster = (cluster // L2_ENTRIES + 1) * L2_ENTRIES
                continue
            data = self.read_cluster(cluster)
            if data is None and self.header.backing:
                return False
            if data is not None and data != _ZEROES:
                return False
            cluster += 1
        return True


def read_entries(file: HostFile, offset: int, count: int) -> array[int]:
    """A table as numbers; what lies behind the end of the file is 0."""
    data = bytearray(count * layout.ENTRY_BYTES)
    with naming(file.path):
        file.read_into(offset, memoryview(data))
    entries = array("Q", bytes(data))
    layout.swap_entries(entries)
    return entries
