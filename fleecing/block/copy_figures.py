"""What saving clusters for a snapshot costs, counted where it happens."""

from __future__ import annotations

import threading

from fleecing.block.latency import Latency


class CopyFigures:
    """Of one snapshot, or the sum over several. Changed under the cluster map's lock, but for the waits and rereads."""

    __slots__ = (
        "_waits",
        "bytes_data",
        "bytes_zeroes",
        "clusters",
        "failures",
        "latency",
        "lock_wait_seconds",
        "lock_waits",
        "rereads",
        "task_wait_seconds",
        "task_waits",
    )

    def __init__(self) -> None:
        self.latency = Latency()
        """Of each copy that saved something: look, read, write, link, and the sync of a durable one."""
        self.failures = 0
        self.clusters = 0
        """Saved, those of zeroes, too."""
        self.bytes_data = 0
        """Written to temp."""
        self.bytes_zeroes = 0
        """Saved without being written: holes and zeroes."""
        self.lock_waits = 0
        self.lock_wait_seconds = 0.0
        self.task_waits = 0
        """A guest change waited for another one's copy."""
        self.task_wait_seconds = 0.0
        self.rereads = 0
        """Runs that a reader had to read again, from temp, because the guest had come before it."""
        # Of these three: the map's lock may be held by a thread that hangs, and they are about those that wait.
        self._waits = threading.Lock()

    def waited_for_task(self, seconds: float) -> None:
        """A guest change was held up by another one's copy. From any thread."""
        with self._waits:
            self.task_waits += 1
            self.task_wait_seconds += seconds

    def read_again(self) -> None:
        """A run was read again, from temp. From any thread."""
        with self._waits:
            self.rereads += 1

    def figures(self) -> CopyFigures:
        """Itself: see `ledger.Counting`."""
        return self

    def add(self, other: CopyFigures, /) -> None:
        """Take the other's figures into these."""
        self.latency.add(other.latency)
        self.failures += other.failures
        self.clusters += other.clusters
        self.bytes_data += other.bytes_data
        self.bytes_zeroes += other.bytes_zeroes
        self.lock_waits += other.lock_waits
        self.lock_wait_seconds += other.lock_wait_seconds
        self.task_waits += other.task_waits
        self.task_wait_seconds += other.task_wait_seconds
        self.rereads += other.rereads
