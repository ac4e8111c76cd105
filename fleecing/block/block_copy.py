"""The copy engine: saves clusters of the source in temp before somebody changes them.

`save` is called by whoever is about to change a range of the source, and returns when nothing in it needs saving any
more. The work is cut into tasks: a run of clusters, at most MAX_TASK bytes, read at once, written at once. A task owns
its run: whoever needs a cluster of it waits for the task, and if the task failed tries the copy itself.

    lock held:     find the first cluster to save, see that no task has it, register a task
    no lock:       read the source, find the zeroes, place the rest in temp and write it
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

from fleecing.block.bitmap import bit_runs
from fleecing.block.cluster_map import ClusterMap
from fleecing.block.durability import Durability
from fleecing.block.extent import Allocation
from fleecing.block.node import Node
from fleecing.block.qcow2.node import TempImage
from fleecing.units import MiB, align_down, div_up

MAX_TASK = MiB
"""Bytes that one task copies at most (one cluster where that is larger); runs of holes may be longer."""

MAX_TASKS = 16
"""Tasks of one snapshot at a time: what bounds its memory, and the threads that a hanging temp can hold."""

NO_DEADLINE = float("inf")

_scratch = threading.local()


class _Task:
    """Clusters [first, end) being saved; `end` may come down once the task runs."""

    __slots__ = ("_latch", "_waited_for", "end", "first")

    def __init__(self, first: int, end: int) -> None:
        self.first = first
        self.end = end
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
        self.clusters_copied = 0  # ever, zero clusters too; changed under the map's lock
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
            with clusters.lock:
                first = clusters.copy.find(1, first, end)
                if first < 0:
                    return True
                task = self._in_the_way(first)
                own = task is None
                if task is None:
                    task = _Task(first, self._end_of_task(first, end))
                    self._tasks.append(task)
            if own:
                if not self._run(task, waiting=waiting):
                    return False
            elif not waiting:
                return False
            elif not task.wait(deadline):
                raise TimeoutError(errno.ETIMEDOUT, "temp did not take a copy in time")
        return True

    def _in_the_way(self, cluster: int) -> _Task | None:
        """The task to wait for before this cluster can be saved."""
        for task in self._tasks:
            if task.first <= cluster < task.end:
                return task
        return self._tasks[0] if len(self._tasks) >= MAX_TASKS else None

    def _end_of_task(self, first: int, end: int) -> int:
        """The end of the dirty run, short of the next task's clusters."""
        for task in self._tasks:
            if first < task.first < end:
                end = task.first
        stop = self.clusters.copy.find(0, first, end)
        return end if stop < 0 else stop

    def _run(self, task: _Task, *, waiting: bool) -> bool:
        """Save the task's run, or its beginning; False where it would have to be read from a disk without `waiting`."""
        try:
            if self.durability is not None:
                self.durability.check()
            # A long run may be a hole, of any length; then nothing needs reading.
            if task.end - task.first > self._task_clusters and self._save_hole(task):
                return True
            task.end = min(task.end, task.first + self._task_clusters)
            return self._save_data(task, waiting=waiting)
        finally:
            with self.clusters.lock:
                self._tasks.remove(task)
                self._idle.notify_all()
            task.finish()

    def _save_hole(self, task: _Task) -> bool:
        """Link zero clusters for the hole that the task's run starts with, if it starts with one."""
        shift, size = self.clusters.shift, self.clusters.size
        offset = task.first << shift
        length, state = self.source.block_status(offset, min(task.end << shift, size) - offset, 1)[0]
        end = offset + length
        stop = div_up(end, 1 << shift) if end == size else align_down(end, 1 << shift) >> shift
        if not state & Allocation.ZERO or stop <= task.first:
            return False
        self._link([(task.first, stop - task.first, 0)])
        return True

    def _save_data(self, task: _Task, *, waiting: bool) -> bool:
        cluster_size = self.clusters.cluster_size
        count = task.end - task.first
        buffer = _buffer(count * cluster_size)
        offset = task.first * cluster_size
        length = min(task.end * cluster_size, self.clusters.size) - offset
        with memoryview(buffer) as view:
            if waiting:
                self.source.read_into(offset, view[:length])
            elif not self.source.read_cached(offset, view[:length]):
                return self._save_hole(task)  # no page of it is in memory where nothing is on the disk either
            if length < count * cluster_size:  # the short tail cluster of the image
                view[length : count * cluster_size] = bytes(count * cluster_size - length)
            pieces = self._place(task.first, count, buffer)
            try:
                for first, clusters, host in pieces:
                    if host:
                        start = (first - task.first) * cluster_size
                        self.target.file.write(host, view[start : start + clusters * cluster_size])
            except BaseException:
                self.target.release([(host, clusters) for _, clusters, host in pieces if host])
                raise
        self._link(pieces)
        return True

    def _place(self, first: int, count: int, buffer: bytearray) -> list[tuple[int, int, int]]:
        """(first cluster, clusters, host offset) for each run, with space in temp for what is not zero; zeroes: 0."""
        zero = _zero_cluster(self.clusters.cluster_size)
        size = self.clusters.cluster_size
        is_zero = [buffer.startswith(zero, i * size, (i + 1) * size) for i in range(count)]
        hosts = self.target.place(count - sum(is_zero)) if not all(is_zero) else []
        pieces: list[tuple[int, int, int]] = []
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

    def _link(self, pieces: list[tuple[int, int, int]]) -> None:
        """The last step: what is still wanted becomes part of temp; the rest is given back."""
        clusters, size = self.clusters, self.clusters.cluster_size
        to_release: list[tuple[int, int]] = []
        linked: list[tuple[int, int]] = []
        try:
            with clusters.lock:
                runs = [
                    (start, stop - start, host and host + (start - first) * size, wanted)
                    for first, count, host in pieces
                    for start, stop, wanted in bit_runs(clusters.copy, first, first + count)
                ]
                to_release = [(host, count) for _, count, host, _ in runs if host]
                for start, count, host, wanted in runs:
                    if not wanted or clusters.broken is not None:
                        continue
                    if host:
                        self.target.link(start, host, count)
                        to_release.remove((host, count))
                    else:
                        self.target.link_zero(start, count)
                    if self.durability is None:
                        self._is_copied(start, count)
                    else:
                        linked.append((start, count))
        finally:
            if to_release:  # unwanted by now, or a link that failed and those after it
                self.target.release(to_release)
            if linked:
                self._make_durable(linked)

    def _is_copied(self, first: int, count: int) -> None:
        """Under the map's lock."""
        self.clusters.done[first : first + count] = 1
        self.clusters.copy[first : first + count] = 0
        self.clusters_copied += count

    def _make_durable(self, linked: list[tuple[int, int]]) -> None:
        """What is linked counts as copied when it is durable; what was trimmed meanwhile is not linked any more."""
        assert self.durability is not None
        self.durability.commit(linked)
        with self.clusters.lock:
            for first, count in linked:
                for start, stop, wanted in bit_runs(self.clusters.copy, first, first + count):
                    if wanted:
                        self._is_copied(start, stop - start)

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


def _buffer(size: int) -> bytearray:
    """This thread's scratch memory, `size` bytes or more."""
    buffer: bytearray | None = getattr(_scratch, "buffer", None)
    if buffer is None or len(buffer) < size:
        buffer = _scratch.buffer = bytearray(size)
    return buffer


@functools.cache
def _zero_cluster(cluster_size: int) -> bytes:
    return bytes(cluster_size)
