"""The temp image of a snapshot: a qcow2 file that receives the clusters that the guest is about to change.

    place   host space for clusters            the caller writes their data there, and then
    link    makes them the guest's clusters    count, then L2 entry: two writes, so a crash leaks but never lies
    unlink  the same backwards                 and when no reader can be at the bytes any more
    release punches them and makes them reusable

Version 3, one file, refcount_order 4, the active image as its backing file. At any moment of rest `qemu-img check`
finds nothing to say about it. What lies where is in geometry.py.

Threads: `place`, `link`, `link_zero`, `unlink`, `release` and `drop` may be called from any thread; a lock orders their
bookkeeping and their writes of metadata. Data is written, and host space punched, without it. Whoever calls makes sure
that one cluster is not linked and unlinked at once. Readers (`host_offset`, `read_into`, `next_change`) take no lock.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterator, Sequence

from bitarray import bitarray

from fleecing.block.hostfile import HostFile
from fleecing.block.qcow2 import geometry, header, layout
from fleecing.block.qcow2.header import Header
from fleecing.block.qcow2.load import load
from fleecing.block.qcow2.mapping import Mapping, Piece
from fleecing.block.qcow2.refcounts import ClusterRuns, Refcounts, merge
from fleecing.errors import ImageError
from fleecing.units import MiB

log = logging.getLogger(__name__)

UNMAPPED = 0
ZERO_CLUSTER = layout.ZERO

HostRuns = list[tuple[int, int]]
"""(host offset in bytes, clusters), clusters above 0."""

_ZEROES = memoryview(bytes(MiB))


class TempImage:
    """One temp qcow2. Guest clusters count from 0 to `clusters` - 1; offsets and sizes are bytes."""

    def __init__(self, file: HostFile, head: Header, refcounts: Refcounts, mapping: Mapping) -> None:
        """For `create` and `open`."""
        self.file = file
        self.path = file.path
        self.size = head.geometry.size  # virtual: the disk's, rounded up to 512
        self.cluster_size = head.geometry.cluster_size
        self.clusters = head.geometry.guest_clusters
        self.backing_file = head.backing_file
        self.backing_format = head.backing_format
        self._bits = head.geometry.cluster_bits
        self._mask = self.cluster_size - 1
        self._table_bits = head.geometry.l2_entries.bit_length() - 1
        self._table_mask = head.geometry.l2_entries - 1
        self._lock = threading.Lock()
        self._refcounts = refcounts  # under the lock
        self._mapping = mapping  # changed under the lock
        self._entries = mapping.entries
        self._dropped = False  # set once, under the lock
        self._punch_failed = False
        self._on_pressure: Callable[[], None] | None = None

    @classmethod
    def create(
        cls, file: HostFile, *, size: int, cluster_size: int, backing_file: str, backing_format: str, limit: int | None
    ) -> TempImage:
        """Make an image in the empty `file`; the time and space this takes do not depend on `size`.

        `cluster_size`: a power of two from 512 to 2 MiB; `backing_file`: an absolute path; `limit`: bytes of host
        clusters, metadata included, None = no limit. Raises ImageError where these do not go together, and OSError.
        """
        plan, first_blocks = geometry.plan(file.path, size, cluster_size)
        head = Header(plan, backing_file, backing_format)
        first_cluster = header.build(file.path, head)
        end = plan.l1_offset // cluster_size + plan.l1_clusters
        least = (end + 2) * cluster_size  # with one L2 table and one cluster of data
        if limit is not None and limit < least:
            raise ImageError(
                file.path, -1, f"a temp limit of {limit} bytes is too small: a temp of one cluster takes {least} bytes"
            )
        blocks = {number: (1 + number) * cluster_size for number in range(first_blocks)}
        file.truncate(end * cluster_size)
        file.write(cluster_size, layout.ones(end))
        file.write(plan.table_offset, b"".join(layout.ENTRY.pack(offset) for offset in blocks.values()))
        file.write(0, first_cluster)
        refcounts = Refcounts(file, plan, blocks, end, end, limit)
        return cls(file, head, refcounts, Mapping(file, plan, refcounts))

    @classmethod
    def open(cls, file: HostFile, limit: int | None = None, *, trusted: bitarray | None = None) -> TempImage:
        """Take over the image that an earlier process made in `file`, and free what leaked when it was killed.

        `trusted`, after a loss of power: a bit for each guest cluster that was linked and synced. All others become
        unmapped, whatever the file says of them. Raises ImageError with the offset of whatever is not as `create` and
        `link` write it, and OSError.
        """
        found = load(file, limit, trusted)
        image = cls(file, found.header, found.refcounts, found.mapping)
        if file.length() > found.end:
            file.truncate(found.end)
        for start, count in found.unused:
            image._punch(start, count)
        found.refcounts.add_free(found.unused)
        return image

    def place(self, count: int) -> HostRuns:
        """Host space for `count` data clusters, in as few runs as can be had; free ones are reused first.

        Raises TempLimitReached before anything changes. What is placed counts as used until it is released.
        """
        if not count:
            return []
        with self._lock:
            self._check_not_dropped()
            runs = self._refcounts.take(count)
        if self._refcounts.alarm:
            self._tell_pressure()
        return [(start << self._bits, n) for start, n in runs]

    def watch(self, on_pressure: Callable[[], None], percent: int) -> None:
        """Call it once each time that the use comes up to `percent` of the limit, at once if it is there already.

        It is called without the lock, by the thread that takes the space.
        """
        with self._lock:
            self._on_pressure = on_pressure
            self._refcounts.set_watermark(percent)
        if self._refcounts.alarm:
            self._tell_pressure()

    def set_limit(self, limit: int | None) -> None:
        """From now on; bytes, metadata included, None = no limit. ImageError where more is in use than it allows."""
        with self._lock:
            if limit is not None and limit < self.used_bytes:
                raise ImageError(
                    self.path, -1, f"a temp limit of {limit} bytes is below the {self.used_bytes} bytes that are in use"
                )
            self._refcounts.set_limit(limit)
        if self._refcounts.alarm:
            self._tell_pressure()

    def _tell_pressure(self) -> None:
        with self._lock:
            call = self._on_pressure if self._refcounts.alarm else None
            if call is not None:
                self._refcounts.alarm = False
        if call is not None:
            call()

    def link(self, first: int, host_offset: int, count: int) -> None:
        """Map `count` unmapped guest clusters to placed clusters whose data is written; see `link_pieces`."""
        self.link_pieces([(first, host_offset, count)])

    def link_pieces(self, pieces: Sequence[Piece]) -> None:
        """Map unmapped guest clusters, each once, to placed clusters whose data is written.

        All or nothing: after OSError or TempLimitReached (there is no room for an L2 table) nothing is linked, and the
        caller may try again or release the clusters. Raises ImageError where one of them is linked already.
        """
        for first, host_offset, count in pieces:
            assert first >= 0 and first + count <= self.clusters and not host_offset & self._mask
        with self._lock:
            self._check_not_dropped()
            self._mapping.link(pieces)

    def link_zero(self, first: int, count: int) -> None:
        """Make guest clusters that are unmapped (or zero) read as zeroes, without space.

        Raises TempLimitReached before anything changes; after an OSError some may be linked: try again, or leave it.
        """
        assert first >= 0 and first + count <= self.clusters
        if count:
            with self._lock:
                self._check_not_dropped()
                self._mapping.link_zero(first, count)

    def unlink(self, first: int, count: int) -> HostRuns:
        """Unmap guest clusters; the host runs that held their data, to be released when no reader can be at them.

        Unmapped clusters are passed over quickly. After an OSError everything is mapped as before; try again.
        """
        assert first >= 0 and first + count <= self.clusters
        if not count:
            return []
        with self._lock:
            if self._dropped:
                return []
            data, tables = self._mapping.unlink(first, count)
        if tables:
            self._release(tables)
        return [(start << self._bits, n) for start, n in data]

    def release(self, runs: Sequence[tuple[int, int]]) -> None:
        """Punch host runs that are placed or were unlinked, each once, and only then make them reusable.

        Space that the host's file system does not give back is reused all the same.
        """
        self._release(merge(sorted((offset >> self._bits, count) for offset, count in runs if count)))

    def linked(self) -> bitarray:
        """A bit for each guest cluster, padded to a whole byte, least significant first: whether it is mapped."""
        return self._mapping.linked(self.clusters)

    def facts(self) -> Iterator[bytes]:
        """All that its tables say, for a checksum; while nothing is linked or unlinked."""
        yield f"{self.size} {self.cluster_size} {self.backing_format} ".encode() + os.fsencode(self.backing_file)
        yield from self._mapping.facts()

    def host_offset(self, cluster: int) -> int:
        """0 = unmapped, 1 = zero cluster, else the host offset (bytes) of the guest cluster's data."""
        return self._entries[cluster >> self._table_bits][cluster & self._table_mask]

    def next_change(self, cluster: int, end: int) -> tuple[bool, int]:
        """Whether this is a zero cluster, and how many up to `end` are as it is. Unmapped counts as data."""
        return self.host_offset(cluster) == ZERO_CLUSTER, self._mapping.next_change(cluster, end) - cluster

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from a range all of whose clusters are linked; ImageError where one is not (any more).

        Raises WritesLost where the host's disk may have lost them.
        """
        bits, length = self._bits, len(buffer)
        cluster = offset >> bits
        within = offset & self._mask
        if within + length <= self.cluster_size:
            host = self._entries[cluster >> self._table_bits][cluster & self._table_mask]
            if host > ZERO_CLUSTER:  # what `_read_run` does, in line
                file = self.file
                done = file.read_into(host + within, buffer)
                file.check_written()
                if done < length:
                    _fill_zeroes(buffer[done:])
            else:
                self._read_run(cluster, host, within, buffer)
            return
        end = (offset + length - 1 >> bits) + 1
        done = 0
        for first, host, count in self._host_runs(cluster, end):
            stop = min(done + (count << bits) - within, length)
            self._read_run(first, host, within, buffer[done:stop])
            done, within = stop, 0

    def _host_runs(self, cluster: int, end: int) -> Iterator[tuple[int, int, int]]:
        """(first guest cluster, its host offset, clusters) of runs that are contiguous in the host, or all zero."""
        size, per_table = self.cluster_size, self._table_mask + 1
        first = cluster
        host = following = -1
        while cluster < end:
            lo = cluster & self._table_mask
            n = min(end - cluster, per_table - lo)
            for entry in self._entries[cluster >> self._table_bits][lo : lo + n]:
                if entry != following:
                    if host >= 0:
                        yield first, host, cluster - first
                    first, host = cluster, entry
                following = entry + size if entry > ZERO_CLUSTER else entry
                cluster += 1
        yield first, host, cluster - first

    def _read_run(self, cluster: int, host: int, within: int, buffer: memoryview) -> None:
        if host > ZERO_CLUSTER:
            done = self.file.read_into(host + within, buffer)
            self.file.check_written()
            if done < len(buffer):  # the file ends in the last data cluster
                _fill_zeroes(buffer[done:])
        elif host == ZERO_CLUSTER:
            _fill_zeroes(buffer)
        else:
            raise ImageError(self.path, -1, f"guest cluster {cluster} is not mapped")

    @property
    def used_bytes(self) -> int:
        """Host clusters in use, metadata included: what the limit is about."""
        return self._refcounts.used << self._bits

    @property
    def peak_bytes(self) -> int:
        """The most that `used_bytes` ever was since the image was created or opened."""
        return self._refcounts.peak << self._bits

    def allocated(self) -> int:
        """Bytes of disk space that the file takes (st_blocks)."""
        return self.file.allocated()

    def sync(self) -> None:
        """Everything that is linked is durable when this returns."""
        self.file.sync()
        self.file.check_written()  # an error that `check_written` was told is not told to a sync any more

    def check_written(self) -> None:
        """Raise WritesLost where the host's disk did not take what was written here. Waits for nothing."""
        self.file.check_written()

    def close(self) -> None:
        """Give the file back; once is enough."""
        self._on_pressure = None  # it may hold what holds this image, and nobody collects such rings soon
        self.file.close()

    def drop(self) -> None:
        """Forget everything and free all space, even while the file is open elsewhere; twice does no harm.

        Nothing can be placed or linked afterwards, and nothing is mapped. A write of data that is still on its way
        takes space again, so callers drop when no copy is running.
        """
        with self._lock:
            self._dropped = True
            self._mapping.clear()
            self._refcounts.used = 0
            self.file.truncate(0)

    def _check_not_dropped(self) -> None:
        if self._dropped:
            raise ImageError(self.path, -1, "the temp image was dropped")

    def _release(self, runs: ClusterRuns) -> None:
        with self._lock:
            runs = [good for start, count in runs for good in self._refcounts.split_doubtful(start, count)]
        for start, count in runs:
            self._punch(start, count)
        with self._lock:
            if not self._dropped:
                self._refcounts.give_back(runs)

    def _punch(self, start: int, count: int) -> None:
        """Give host space back. Where that fails, the space stays taken until the clusters are reused: no more harm."""
        try:
            self.file.punch(start << self._bits, count << self._bits)
        except OSError as e:
            if not self._punch_failed:
                self._punch_failed = True
                log.warning("%s: host space of freed clusters cannot be given back: %s", self.path, e)


def _fill_zeroes(buffer: memoryview) -> None:
    done, length = 0, len(buffer)
    while done < length:
        n = min(length - done, len(_ZEROES))
        buffer[done : done + n] = _ZEROES[:n]
        done += n
