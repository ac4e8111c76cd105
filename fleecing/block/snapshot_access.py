"""The frozen view: reads of a snapshot, and the trim that gives clusters up.

Nothing here waits for the guest, nor makes the guest wait. A read looks at the cluster bits, reads each run from where
they say it is, and looks again:

    look     broken? every cluster in `access`?   else: error, nothing is returned
    read     `done` runs from temp, the others from the active image
    look     a run read from the active image that is `done` by now is read again from temp
    look     broken? still every cluster in `access`?   else: error

A guest change sets `done` (or the snapshot `broken`) before it touches the active image, and a trim clears `access`
before it frees temp; so what the last look lets through are the bytes of the instant of creation.

The bytes must be copied out of the active image before the second look. Never hand its pages to a socket by reference
(sendfile, splice, MSG_ZEROCOPY): a later guest write would change what the client receives.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from collections.abc import Callable, Iterator, Sequence

from bitarray import bitarray

from fleecing.block.bitfile import BitFile
from fleecing.block.bitmap import bit_runs, clusters_touched, clusters_within
from fleecing.block.block_copy import BlockCopy
from fleecing.block.breakage import FILES_NOT_SYNCED, TEMP_LOST, kind_of
from fleecing.block.cluster_map import ClusterMap
from fleecing.block.copy_before_write import CopyBeforeWrite, OnCbwError
from fleecing.block.durability import Durability
from fleecing.block.extent import MAX_RUNS, Allocation, ClusterState, Runs, append_run, merge_runs, total_length
from fleecing.block.flusher import Done, wait_for
from fleecing.block.hostfile import WritesLost
from fleecing.block.node import Buffer, Node
from fleecing.block.qcow2.node import TempImage
from fleecing.errors import BlockError, ImageError, SnapshotBroken

TRIM_STEP = 1 << 14
"""Clusters that a trim changes under the lock at once, so that guest copies get their turn in between."""

STATUS_STEP = 1 << 10
"""Runs of the active image looked at between two looks at `done`, and looks that make a reply's last run longer."""


class SnapshotAccess(Node):
    """One disk as it was at the instant of creation. Read and discard; it cannot be written."""

    def __init__(
        self,
        name: str,
        disk: CopyBeforeWrite,
        temp: TempImage,
        *,
        cluster_size: int,
        on_cbw_error: OnCbwError,
        cbw_timeout: float,
        temp_limit: int | None = None,
        bitmap: bitarray | None = None,
        trimmed: BitFile | None = None,
        durability: Durability | None = None,
        done: bitarray | None = None,
        on_broken: Callable[[SnapshotAccess, str], None],
    ) -> None:
        self.name = name
        self.disk = disk
        self.size = disk.size
        self.temp = temp
        self.on_cbw_error = on_cbw_error
        self.cbw_timeout = cbw_timeout
        self.temp_limit = temp_limit  # bytes, None = none; `temp` keeps to it
        self._on_broken = on_broken
        self.clusters = ClusterMap(
            disk.size,
            cluster_size,
            scope=bitmap,
            trimmed=trimmed,
            done=done,
            durable=durability is not None,
            on_broken=self._broke,
        )
        self.copier = BlockCopy(disk.file, temp, self.clusters, durability)
        disk.copies.open(self.copier.figures)
        self._durability = durability
        self._source = disk.file
        self._ends = False  # being removed: what breaks it then is no news
        self._users = 0  # under _users_lock, as is the next
        self._removed = False
        self._users_lock = threading.Lock()

    @property
    def broken(self) -> str | None:
        """Why the snapshot is dead, or None."""
        return self.clusters.broken

    @property
    def cluster_size(self) -> int:
        """Bytes."""
        return self.clusters.cluster_size

    @property
    def durable(self) -> bool:
        """Whether it outlives the loss of power."""
        return self._durability is not None

    @property
    def clusters_copied_total(self) -> int:
        """Clusters ever saved, those trimmed since and those of zeroes too."""
        return self.copier.figures.clusters

    @property
    def temp_path(self) -> str:
        return self.temp.file.path

    def temp_used(self) -> int:
        """Bytes of temp in use, its tables too."""
        return self.temp.used_bytes

    def temp_peak(self) -> int:
        """The most bytes of temp that ever were in use."""
        return self.temp.peak_bytes

    def watch_temp(self, on_pressure: Callable[[SnapshotAccess], None], percent: int) -> None:
        """Call it, from any thread, each time that temp comes up to `percent` of its limit; at once if it is there."""
        self.temp.watch(lambda: on_pressure(self), percent)

    def set_temp_limit(self, limit: int | None) -> None:
        """From now on; bytes, None = no limit. Raises ImageError where more is in use; callers take turns."""
        self.temp.set_limit(limit)
        self.temp_limit = limit

    def _broke(self, cause: str) -> None:
        self.disk.detach(self)
        self.copier.cancel_waits()
        if not self._ends:
            self.disk.breakages.add(kind_of(cause))
            self._on_broken(self, cause)

    # Reading.

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` with the frozen bytes. Raises SnapshotBroken, ClusterUnreadable, and errors of the files."""
        clusters = self.clusters
        length = len(buffer)
        first = offset >> clusters.shift
        if first != offset + length - 1 >> clusters.shift:
            self._read_clusters(offset, buffer)
            return
        # One cluster, the common case of small requests, without the general form's loops.
        if clusters.broken is not None or not clusters.access[first]:
            clusters.check_readable(offset, length)
        try:
            from_source = not clusters.done[first]
            if from_source:
                self._source.read_into(offset, buffer)
            if clusters.done[first]:
                if from_source:
                    self.copier.figures.read_again()
                self.temp.read_into(offset, buffer)
        except (OSError, BlockError) as e:
            self._read_failed(e, offset, length)
            raise
        if clusters.broken is not None or not clusters.access[first]:
            clusters.check_readable(offset, length)

    def read_cached(self, offset: int, buffer: memoryview) -> bool:
        """`read_into` if that takes no waiting for a disk; else False. Only a read within one cluster can be False."""
        clusters = self.clusters
        length = len(buffer)
        first = offset >> clusters.shift
        if first != offset + length - 1 >> clusters.shift:
            self._read_clusters(offset, buffer)
            return True
        if clusters.broken is not None or not clusters.access[first]:
            clusters.check_readable(offset, length)
        if clusters.done[first]:
            try:  # temp was written not long ago: it is in the page cache, or worth waiting for
                self.temp.read_into(offset, buffer)
            except (OSError, BlockError) as e:
                self._read_failed(e, offset, length)
                raise
        elif not self._source.read_cached(offset, buffer):
            return False
        elif clusters.done[first]:  # the same second look as in `read_into`
            self.copier.figures.read_again()
            self.read_into(offset, buffer)
            return True
        if clusters.broken is not None or not clusters.access[first]:
            clusters.check_readable(offset, length)
        return True

    def _read_clusters(self, offset: int, buffer: memoryview) -> None:
        clusters = self.clusters
        length = len(buffer)
        clusters.check_readable(offset, length)
        first, end = clusters_touched(offset, length, clusters.cluster_size)
        try:
            for start, stop, done in bit_runs(clusters.done, first, end):
                if not done:
                    self._read_run(self._source, start, stop, offset, buffer)
                    for again, until, done_now in bit_runs(clusters.done, start, stop):
                        if done_now:
                            self.copier.figures.read_again()
                            self._read_run(self.temp, again, until, offset, buffer)
                else:
                    self._read_run(self.temp, start, stop, offset, buffer)
        except (OSError, BlockError) as e:
            self._read_failed(e, offset, length)
            raise
        clusters.check_readable(offset, length)

    def _read_failed(self, error: Exception, offset: int, length: int) -> None:
        """Raise the break, the trim or the end that this error of a file comes from, if it does."""
        if isinstance(error, WritesLost):
            self._lost(error)
        self.clusters.check_readable(offset, length)

    def _lost(self, error: WritesLost) -> None:
        self.clusters.break_(f"{TEMP_LOST}{error.strerror}")

    def check_written(self) -> None:
        """Break the snapshot where the disk below it did not take what was written. Waits for nothing, call it often.

        The next process would not learn of it, and a reader only when it reads from the disk.
        """
        if self.clusters.broken is not None or not self._users_lock.acquire(blocking=False):
            return
        try:
            if not self._removed:
                self.temp.check_written()
        except WritesLost as e:
            self._lost(e)
        finally:
            self._users_lock.release()

    def _read_run(self, node: Node | TempImage, start: int, stop: int, offset: int, buffer: memoryview) -> None:
        """Read what clusters [start, stop) have of the range at `offset` that `buffer` stands for."""
        shift = self.clusters.shift
        begin = max(start << shift, offset)
        end = min(stop << shift, offset + len(buffer))
        node.read_into(begin, buffer[begin - offset : end - offset])

    def prefetch(self, offset: int, length: int) -> None:
        """Announce the read to the active image, where most of a snapshot lies."""
        self.clusters.check_readable(offset, length)
        self._source.prefetch(offset, length)

    # Status.

    def block_status(self, offset: int, length: int, max_runs: int = MAX_RUNS) -> Runs:
        """Zeroes and holes of the frozen bytes. Raises SnapshotBroken or ClusterUnreadable as a read does."""
        clusters = self.clusters
        clusters.check_readable(offset, length)
        runs: Runs = []
        position, end = offset, offset + length
        looks = STATUS_STEP
        while position < end and len(runs) <= max_runs and looks:
            if len(runs) == max_runs:
                looks -= 1  # the last run may go on in the next cluster, which lies in the other file
            cluster = position >> clusters.shift
            last = clusters_touched(position, end - position, clusters.cluster_size)[1]
            if clusters.done[cluster]:
                not_done = clusters.done.find(0, cluster + 1, last)  # temp knows nothing of what lies behind
                is_zero, count = self.temp.next_change(cluster, last if not_done < 0 else not_done)
                if not count:  # trimmed since
                    clusters.check_readable(offset, length)
                    raise ImageError(self.temp.file.path, -1, f"cluster {cluster} is not linked")
                stop = min(end, cluster + count << clusters.shift)
                append_run(runs, stop - position, Allocation.HOLE_ZERO if is_zero else Allocation.DATA)
                position = stop
            else:
                position = self._source_status(position, end, runs, min(STATUS_STEP, max_runs))
        clusters.check_readable(offset, length)
        return runs[:max_runs]

    def _source_status(self, position: int, end: int, runs: Runs, max_runs: int) -> int:
        """Add runs of the active image from `position` on, up to the next cluster that is `done`; returns their end."""
        clusters = self.clusters
        cluster = position >> clusters.shift
        stop = self._next_done(cluster, end)
        found = self._source.block_status(position, stop - position, max_runs)
        valid = self._next_done(cluster, stop)  # the guest may have gone on meanwhile
        if found and position + total_length(found) <= valid:
            append_run(runs, *found[0])
            runs.extend(found[1:])
            return position + total_length(found)
        for length, state in found:
            length = min(length, valid - position)
            if length <= 0:
                break
            append_run(runs, length, state)
            position += length
        return position

    def _next_done(self, cluster: int, end: int) -> int:
        """The offset, at most `end`, where the first `done` cluster from `cluster` on starts."""
        shift = self.clusters.shift
        found = self.clusters.done.find(1, cluster, (end - 1 >> shift) + 1)
        return end if found < 0 else min(end, found << shift)

    def allocation_depth(self, offset: int, length: int, max_runs: int = MAX_RUNS) -> Runs:
        """1 = in temp, 2 = in the active image, as `qemu:allocation-depth` counts layers from the top."""
        self.clusters.check_readable(offset, length)
        states = self.cluster_state(offset, length, max_runs)
        self.clusters.check_readable(offset, length)
        return merge_runs((count, 1 if state == ClusterState.COPIED else 2) for count, state in states)

    def cluster_state(self, offset: int, length: int, max_runs: int = MAX_RUNS) -> Runs:
        """`ClusterState` of the range; unlike a read, also where it is trimmed or not in the bitmap."""
        clusters = self.clusters
        if clusters.broken is not None:
            raise SnapshotBroken(clusters.broken)
        runs: Runs = []
        position, end = offset, offset + length
        cluster, last = clusters_touched(offset, length, clusters.cluster_size)
        while position < end and len(runs) < max_runs:
            state, cluster = clusters.state_run(cluster, last)
            until = min(end, cluster << clusters.shift)
            append_run(runs, until - position, state)
            position = until
        return runs

    def counts(self) -> dict[ClusterState, int]:
        """Clusters by state."""
        return self.clusters.counts()

    # Changes.

    def discard(self, offset: int, length: int) -> None:
        """Give up the clusters that lie whole in the range: they cannot be read any more, their temp space is free.

        Rounded inwards; the last cluster of the image counts as whole where the range reaches the end. Repeating it
        does no harm. When this returns, nothing copies these clusters any more and their host space is punched. Of a
        durable snapshot it waits for the disk (see `submit_discard`).
        """
        if self._durability is not None:
            wait_for(lambda done: self.submit_discard(offset, length, done))
        else:
            self._trim(*clusters_within(offset, length, self.cluster_size, self.size))

    def discard_clusters(self, runs: Sequence[tuple[int, int]]) -> None:
        """`discard` of the clusters [first, end) of each run; of a durable snapshot, all for one wait for the disk."""
        if self._durability is not None:
            wait_for(lambda done: self._submit_trim(runs, done))
        else:
            for first, end in runs:
                self._trim(first, end)

    def submit_discard(self, offset: int, length: int, done: Done) -> None:
        """`discard`, of a durable snapshot: returns at once and calls `done` with None or the error when it is over."""
        self._submit_trim([clusters_within(offset, length, self.cluster_size, self.size)], done)

    def _submit_trim(self, runs: Sequence[tuple[int, int]], done: Done) -> None:
        clusters = self.clusters
        trimmed = clusters.trimmed
        assert self._durability is not None
        assert trimmed is not None
        with clusters.lock:
            broken = clusters.broken
            for first, end in runs:
                if broken is None and first < end:
                    trimmed.bits[first:end] = 1
        if broken is not None:
            done(SnapshotBroken(broken))
            return

        def when_durable(error: Exception | None) -> None:
            if clusters.broken is not None:  # deleted meanwhile, too: its files are closed
                error = SnapshotBroken(clusters.broken)
            elif error is None:
                try:
                    for first, end in runs:
                        self._trim(first, end)
                except Exception as e:
                    error = e
            done(error)

        self._durability.submit_trim(when_durable)

    def _trim(self, first: int, end: int) -> None:
        clusters = self.clusters
        for start in range(first, end, TRIM_STEP):
            stop = min(end, start + TRIM_STEP)
            with clusters.lock:
                if clusters.broken is not None:
                    raise SnapshotBroken(clusters.broken)
                clusters.trim(start, stop)
                freed = self.temp.unlink(start, stop - start)
                clusters.done[start:stop] = 0
            self.temp.release(freed)

    def finish_trims(self) -> None:
        """Free what is linked in temp and may not be read: trims that an earlier process did not get through with."""
        clusters = self.clusters
        for start, stop, readable in bit_runs(clusters.access, 0, clusters.count):
            if not readable:
                with clusters.lock:
                    freed = self.temp.unlink(start, stop - start)
                self.temp.release(freed)

    def write(self, offset: int, data: Buffer) -> None:
        raise OSError(errno.EROFS, "a snapshot cannot be written")

    def write_zeroes(self, offset: int, length: int, *, may_unmap: bool = True, fast_only: bool = False) -> None:
        raise OSError(errno.EROFS, "a snapshot cannot be written")

    def flush(self) -> None:
        """Nothing of a client's waits here: a trim is done when it returns."""

    # Its end.

    def retain(self) -> None:
        """A client starts to use the node: its files stay open until `release`."""
        with self._users_lock:
            self._users += 1

    def release(self) -> None:
        """The client is gone."""
        with self._users_lock:
            self._users -= 1
            self._close_if_unused()

    def remove(self, timeout: float) -> None:
        """End the snapshot and free all of its temp space; clients that still read get errors.

        Raises TimeoutError where a copy under way is not over within `timeout` seconds; to be tried again then. Again
        after it succeeded does nothing.
        """
        self._ends = True
        self.clusters.break_("deleted")
        self.disk.detach(self)
        if not self.copier.wait_idle(timeout):
            raise TimeoutError(errno.ETIMEDOUT, f"temp has a copy under way for more than {timeout:g} s")
        if self._durability is not None:
            self._durability.close(timeout)
        with self._users_lock:
            if self._removed:
                return
            with self.clusters.lock:  # no trim is half-way, and none starts any more
                self.temp.drop()
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.temp.file.path)
            if self.clusters.trimmed is not None:
                self.clusters.trimmed.remove()
            if self._durability is not None:
                self._durability.remove()
            self.disk.copies.close(self.copier.figures)
            self._removed = True
            self._close_if_unused()

    def _close_if_unused(self) -> None:
        if self._removed and not self._users:
            self.temp.close()

    def facts(self) -> Iterator[bytes]:
        """What the snapshot's files say besides the bits of what is trimmed, for the seal."""
        yield from self.temp.facts()
        yield from self.clusters.facts()

    def suspend(self) -> None:
        """Make all of the snapshot durable and give its files back, sealed, for the next process to go on with.

        Only when no guest change and no client is left. Raises OSError where it could not be made durable.
        """
        self.disk.detach(self)
        try:
            if self._durability is not None:
                self._durability.sync()
            else:
                self.temp.sync()
            if self.clusters.trimmed is not None:
                self.clusters.trimmed.seal(self.facts())
                self.clusters.trimmed.sync()
        except OSError as e:
            # The system tells it once; what it lost, the next process would take for the disk of the instant.
            self.clusters.break_(f"{FILES_NOT_SYNCED}{e.strerror}")
            raise
        finally:
            self.temp.close()
            if self.clusters.trimmed is not None:
                self.clusters.trimmed.close()
            if self._durability is not None:
                self._durability.close(0)
