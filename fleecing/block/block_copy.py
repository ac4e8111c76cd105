"""The copy engine: saves clusters of the source in temp before somebody changes them.

`save` is called by whoever is about to change a range of the source, and returns when nothing in it needs saving any
more. The work is cut into tasks: a run of clusters, at most MAX_TASK bytes, read at once, written at once. A task owns
its run: whoever needs a cluster of it waits for the task, and if the task failed tries the copy itself.

    lock held:     find the first cluster to save, see that no task has it, register a task
    no lock:       read the source, find the zeroes, place the rest in temp and write it, or have it copied there
    lock held:     link what is still wanted, set `done`, clear `copy`; drop the task; wake those who wait

A trim needs to know nothing of this: it clears `copy` under the lock, and the task that comes to its last step finds
the cluster unwanted and gives its space back. Nothing is ever marked again.

Of a durable snapshot what is linked is made durable, without the lock, before `done` is set (durability.py).
"""

from __future__ import annotations

import errno
import functools
import threading
import time
from collections.abc import Sequence

from fleecing.block.bitmap import bit_runs
from fleecing.block.breakage import SOURCE_FAILED
from fleecing.block.cluster_map import ClusterMap
from fleecing.block.copy_figures import CopyFigures
from fleecing.block.direct_copy import Piece, Run, copy_direct, placed
from fleecing.block.durability import Durability
from fleecing.block.extent import Allocation
from fleecing.block.node import Node
from fleecing.block.qcow2.node import TempImage
from fleecing.errors import BlockError
from fleecing.units import MiB, align_down, div_up

MAX_TASK = MiB
"""Bytes that one task copies at most (one cluster where that is larger); runs of holes may be longer."""

MAX_TASKS = 16
"""Tasks of one snapshot at a time: what bounds its memory, and the threads that a hanging temp can hold."""

NO_DEADLINE = float("inf")

_scratch = threading.local()


class _Task:
    """Clusters being saved."""

    __slots__ = ("_latch", "_waited_for", "runs")

    def __init__(self, runs: Sequence[Run]) -> None:
        self.runs = runs  # replaced by shorter ones once the task runs
        self._latch = threading.Lock()
        self._latch.acquire()
        self._waited_for = [True]

    def finish(self) -> None:
        """Let go those who wait; once is enough, twice does no harm, from any thread."""
        try:
            self._waited_for.pop()
        except IndexError:
            return
        self._latch.release()

    def wait(self, deadline: float) -> bool:
        """False where the task was not finished at `deadline` (time.monotonic)."""
        timeout = -1 if deadline == NO_DEADLINE else max(0.0, deadline - time.monotonic())
        if not self._latch.acquire(timeout=timeout):
            return False
        self._latch.release()
        return True


class BlockCopy:
    """Copies clusters from `source` to `target` as `clusters` says. `save` may be called from any thread."""

    def __init__(
        self, source: Node, target: TempImage, clusters: ClusterMap, durability: Durability | None = None
    ) -> None:
        self.source = source
        self.target = target
        self.clusters = clusters
        self.durability = durability
        self.figures = CopyFigures()
        self._tasks: list[_Task] = []  # under the map's lock
        self._idle = threading.Condition(clusters.lock)
        self._task_clusters = max(1, MAX_TASK >> clusters.shift)

    def save(self, first: int, end: int, deadline: float = NO_DEADLINE, *, waiting: bool = True) -> bool:
        """Return True when no cluster of [first, end) has to be saved any more, or the snapshot is broken.

        Without `waiting`, False as soon as that takes a wait: for a disk, for a sync, for another's task.

        Raises what the copy failed with (OSError, BlockError), and OSError(ETIMEDOUT) where another's task is not
        over at `deadline` (time.monotonic). Bits of clusters that were not saved stay set.
        """
        clusters = self.clusters
        if not waiting and self.durability is not None:
            return False
        while clusters.broken is None:
            self._take_lock()
            try:
                if clusters.is_broken():  # while the lock was waited for: who removes it has seen no task
                    break
                first = clusters.copy.find(1, first, end)
                if first < 0:
                    return True
                task = self._in_the_way(first)
                own = task is None
                if task is None:
                    task = _Task([(first, self._end_of_task(first, end))])
                    self._tasks.append(task)
            finally:
                clusters.lock.release()
            if own:
                if not self._run(task, waiting=waiting):
                    return False
            elif not waiting:
                return False
            elif not self._wait_for(task, deadline):
                raise TimeoutError(errno.ETIMEDOUT, "temp did not take a copy in time")
        return True

    def _take_lock(self) -> None:
        """Take the map's lock, and count it where that takes waiting."""
        lock = self.clusters.lock
        if not lock.acquire(blocking=False):
            start = time.perf_counter()
            lock.acquire()
            self.figures.lock_waits += 1
            self.figures.lock_wait_seconds += time.perf_counter() - start

    def _wait_for(self, task: _Task, deadline: float) -> bool:
        """False where another's task was not finished at `deadline`."""
        start = time.perf_counter()
        finished = task.wait(deadline)
        self.figures.waited_for_task(time.perf_counter() - start)
        return finished

    def _in_the_way(self, cluster: int) -> _Task | None:
        """The task to wait for before this cluster can be saved."""
        for task in self._tasks:
            for first, end in task.runs:
                if first <= cluster < end:
                    return task
        return self._tasks[0] if len(self._tasks) >= MAX_TASKS else None

    def _end_of_task(self, first: int, end: int) -> int:
        """The end of the dirty run, short of the next task's clusters."""
        for task in self._tasks:
            for start, _ in task.runs:
                if first < start < end:
                    end = start
        stop = self.clusters.copy.find(0, first, end)
        return end if stop < 0 else stop

    def save_ahead(self, runs: Sequence[Run]) -> None:
        """Save clusters that changes are going to need saved, all in one go: those that this is simple for.

        `runs` are in order and do not overlap. Left to `save` is what takes a wait (for a disk, for another's task),
        what does not fit into one task, a run with zeroes and data, the short tail of the image, and whatever fails.
        Of 16 writes of 4 KiB all over a disk each costs 30 us so, and 53 us when it saves its own cluster: one place,
        one write of temp and one count for all of them.
        """
        clusters = self.clusters
        if self.durability is not None:
            return
        self._take_lock()
        try:
            wanted = self._free_runs(runs)
            if not wanted:
                return
            task = _Task(wanted)
            self._tasks.append(task)
        finally:
            clusters.lock.release()
        start = time.perf_counter()
        saved = False
        try:
            saved = self._save_runs(wanted)
        except (OSError, BlockError):
            pass  # a change that is not saved for meets it again
        finally:
            self._end_task(task, start if saved else None)

    def _free_runs(self, runs: Sequence[Run]) -> list[Run]:
        """What of these runs nobody saves now and one task may take. Under the map's lock."""
        clusters, room = self.clusters, self._task_clusters
        whole = clusters.size >> clusters.shift
        free: list[Run] = []
        if clusters.broken is not None or len(self._tasks) >= MAX_TASKS:
            return free
        for first, end in runs:
            if end <= whole and end - first <= room and not any(map(self._in_the_way, range(first, end))):
                free.append((first, end))
                room -= end - first
        return free

    def _save_runs(self, runs: Sequence[Run]) -> bool:
        """Copy them to temp and link them; False where that was none."""
        direct, rest = copy_direct(self.source, self.target, runs)
        if direct:
            self._link(direct)
        return (bool(rest) and self._save_through_here(rest)) or bool(direct)

    def _save_through_here(self, runs: Sequence[Run]) -> bool:
        """Read them one behind the other into one buffer, write that to temp, link it; False where that was none."""
        size = self.clusters.cluster_size
        zero = _zero_cluster(size)
        buffer = _buffer(self._task_clusters * size)
        pieces: list[Piece] = []
        used = 0  # bytes of the buffer
        with memoryview(buffer) as view:
            for first, end in runs:
                stop = used + (end - first) * size
                if not self.source.read_cached(first * size, view[used:stop]):
                    continue
                zeroes = sum(buffer.startswith(zero, at, at + size) for at in range(used, stop, size))
                if not zeroes:
                    pieces.append((first, end - first, used))
                    used = stop
                elif zeroes == end - first:
                    pieces.append((first, zeroes, -1))
            hosts = self.target.place(used // size)
            try:
                at = 0
                for host, count in hosts:
                    self.target.file.write(host, view[at : at + count * size])
                    at += count * size
            except BaseException:
                self.target.release(hosts)
                raise
        self._link(placed(pieces, hosts, size))
        return bool(pieces)

    def _end_task(self, task: _Task, started: float | None, *, failed: bool = False) -> None:
        """`started` (time.perf_counter) of one that saved something, None of others."""
        with self.clusters.lock:
            self._tasks.remove(task)
            self._idle.notify_all()
            if started is not None:
                self.figures.latency.record(time.perf_counter() - started)
            elif failed:
                self.figures.failures += 1
        task.finish()

    def _run(self, task: _Task, *, waiting: bool) -> bool:
        """Save the task's run, or its beginning; False where it would have to be read from a disk without `waiting`."""
        start = time.perf_counter()
        saved = False
        failed = True
        try:
            if self.durability is not None:
                self.durability.check()
            ((first, end),) = task.runs
            # A long run may be a hole, of any length; then nothing needs reading.
            saved = end - first > self._task_clusters and self._save_hole(first, end)
            if not saved:
                end = min(end, first + self._task_clusters)
                task.runs = [(first, end)]
                saved = self._save_data(first, end, waiting=waiting)
            failed = False
        finally:
            self._end_task(task, start if saved else None, failed=failed)
        return saved

    def _save_hole(self, first: int, end: int) -> bool:
        """Link zero clusters for the hole that the run starts with, if it starts with one."""
        shift, size = self.clusters.shift, self.clusters.size
        offset = first << shift
        try:
            length, state = self.source.block_status(offset, min(end << shift, size) - offset, 1)[0]
        except (OSError, BlockError) as e:
            raise _of_the_source(e) from e
        stop_at = offset + length
        stop = div_up(stop_at, 1 << shift) if stop_at == size else align_down(stop_at, 1 << shift) >> shift
        if not state & Allocation.ZERO or stop <= first:
            return False
        self._link([(first, stop - first, 0)])
        return True

    def _save_data(self, first: int, end: int, *, waiting: bool) -> bool:
        cluster_size = self.clusters.cluster_size
        count = end - first
        if not waiting and end <= self.clusters.size // cluster_size:
            pieces, _ = copy_direct(self.source, self.target, [(first, end)])
            if pieces:
                self._link(pieces)
                return True
        buffer = _buffer(count * cluster_size)
        offset = first * cluster_size
        length = min(end * cluster_size, self.clusters.size) - offset
        with memoryview(buffer) as view:
            if not self._read_source(offset, view[:length], waiting=waiting):
                return self._save_hole(first, end)  # no page of it is in memory where nothing is on the disk either
            if length < count * cluster_size:  # the short tail cluster of the image
                view[length : count * cluster_size] = bytes(count * cluster_size - length)
            pieces = self._place(first, count, buffer)
            try:
                for start, clusters, host in pieces:
                    if host:
                        at = (start - first) * cluster_size
                        self.target.file.write(host, view[at : at + clusters * cluster_size])
            except BaseException:
                self.target.release([(host, clusters) for _, clusters, host in pieces if host])
                raise
        self._link(pieces)
        return True

    def _read_source(self, offset: int, view: memoryview, *, waiting: bool) -> bool:
        try:
            if not waiting:
                return self.source.read_cached(offset, view)
            self.source.read_into(offset, view)
        except (OSError, BlockError) as e:
            raise _of_the_source(e) from e
        return True

    def _place(self, first: int, count: int, buffer: bytearray) -> list[Piece]:
        """(first cluster, clusters, host offset) for each run, with space in temp for what is not zero; zeroes: 0."""
        zero = _zero_cluster(self.clusters.cluster_size)
        size = self.clusters.cluster_size
        is_zero = [buffer.startswith(zero, i * size, (i + 1) * size) for i in range(count)]
        hosts = self.target.place(count - sum(is_zero)) if not all(is_zero) else []
        pieces: list[Piece] = []
        i = 0
        while i < count:
            n = 1
            while i + n < count and is_zero[i + n] == is_zero[i]:
                n += 1
            if is_zero[i]:
                pieces.append((first + i, n, 0))
            else:
                host, room = hosts[0]
                n = min(n, room)
                pieces.append((first + i, n, host))
                hosts[0] = (host + n * size, room - n)
                if room == n:
                    hosts.pop(0)
            i += n
        return pieces

    def _link(self, pieces: Sequence[Piece]) -> None:
        """The last step: what is still wanted becomes part of temp; the rest is given back."""
        if len(pieces) == 1 and self._link_one(*pieces[0]):
            return
        clusters, size = self.clusters, self.clusters.cluster_size
        unlinked = [(host, count) for _, count, host in pieces if host]
        linked: list[tuple[int, int, bool]] = []  # first, end, whether it is zeroes
        try:
            self._take_lock()
            try:
                if clusters.broken is not None:
                    return
                data: list[Piece] = []
                holes: list[Run] = []
                unwanted: list[tuple[int, int]] = []
                for first, count, host in pieces:
                    for start, stop, wanted in bit_runs(clusters.copy, first, first + count):
                        at = host and host + (start - first) * size
                        if not wanted:
                            unwanted.append((at, stop - start))
                        elif host:
                            data.append((start, at, stop - start))
                        else:
                            holes.append((start, stop))
                if data:
                    self.target.link_pieces(data)
                    unlinked = [(at, count) for at, count in unwanted if at]
                    linked = [(start, start + count, False) for start, _, count in data]
                    self._are_copied(linked)
                for start, stop in holes:
                    self.target.link_zero(start, stop - start)
                    self._are_copied([(start, stop, True)])
                    linked.append((start, stop, True))
            finally:
                clusters.lock.release()
        finally:
            if unlinked:
                self.target.release(unlinked)
            if linked and self.durability is not None:
                self._make_durable(self.durability, linked)

    def _link_one(self, cluster: int, count: int, host: int) -> bool:
        """The same of one cluster of data that is still wanted, 4 us sooner; False, and nothing done, of any other."""
        clusters = self.clusters
        if count != 1 or not host or self.durability is not None:
            return False
        is_linked = False
        try:
            self._take_lock()
            try:
                if clusters.broken is not None or not clusters.copy[cluster]:
                    return False
                self.target.link(cluster, host, 1)
                is_linked = True
                self._is_copied(cluster, cluster + 1, is_zero=False)
            finally:
                clusters.lock.release()
        except BaseException:
            if not is_linked:
                self.target.release([(host, 1)])
            raise
        return True

    def _are_copied(self, runs: Sequence[tuple[int, int, bool]]) -> None:
        """Linked clusters count as copied, those of a durable snapshot later. Under the map's lock."""
        if self.durability is None:
            for first, end, is_zero in runs:
                self._is_copied(first, end, is_zero=is_zero)

    def _is_copied(self, first: int, end: int, *, is_zero: bool) -> None:
        """Under the map's lock."""
        clusters, figures = self.clusters, self.figures
        clusters.done[first:end] = 1
        clusters.copy[first:end] = 0
        figures.clusters += end - first
        length = min(end << clusters.shift, clusters.size) - (first << clusters.shift)
        if is_zero:
            figures.bytes_zeroes += length
        else:
            figures.bytes_data += length

    def _make_durable(self, durability: Durability, linked: Sequence[tuple[int, int, bool]]) -> None:
        """What is linked counts as copied when it is durable; what was trimmed meanwhile is not linked any more."""
        durability.commit([(first, end - first) for first, end, _ in linked])
        with self.clusters.lock:
            for first, end, is_zero in linked:
                for start, stop, wanted in bit_runs(self.clusters.copy, first, end):
                    if wanted:
                        self._is_copied(start, stop, is_zero=is_zero)

    def cancel_waits(self) -> None:
        """The snapshot is broken: nobody needs to wait for a task any more."""
        for task in list(self._tasks):
            task.finish()

    def wait_idle(self, timeout: float) -> bool:
        """Wait until no task runs; False where one still does, or hangs with the lock held, after `timeout` seconds."""
        deadline = time.monotonic() + timeout
        if not self.clusters.lock.acquire(timeout=timeout):
            return False
        try:
            return self._idle.wait_for(lambda: not self._tasks, max(0.0, deadline - time.monotonic()))
        finally:
            self.clusters.lock.release()


def _of_the_source(error: OSError | BlockError) -> OSError | BlockError:
    """The same error, saying that it was not temp."""
    if isinstance(error, OSError):
        return OSError(error.errno, f"{SOURCE_FAILED}{error.strerror or error}")
    return BlockError(f"{SOURCE_FAILED}{error}")


def _buffer(size: int) -> bytearray:
    """This thread's scratch memory, `size` bytes or more."""
    buffer: bytearray | None = getattr(_scratch, "buffer", None)
    if buffer is None or len(buffer) < size:
        buffer = _scratch.buffer = bytearray(size)
    return buffer


@functools.cache
def _zero_cluster(cluster_size: int) -> bytes:
    return bytes(cluster_size)
