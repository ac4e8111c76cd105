"""Clusters of a snapshot that are given up because they were read (docs/read-once.md).

    READ_ONCE            a request says that nobody will ask again: its clusters are trimmed when it was answered
    a read-once export   every READ counts: a cluster of which all bytes were sent comes into the grace window, and is
                         trimmed when that is too long

What a connection's thread has read lies in its outbox for a while. It is noted here, and counts when the outbox was
handed to the socket completely. So a READ that failed, also half-way, and one whose client vanished before that, gives
nothing up. What the socket took may still be lost on its way: READ_ONCE is for clients that never ask twice, and the
window for those that do.

Connections that have none of the two have no receipts, and do not pay for them.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable

from fleecing.block.bitmap import clusters_within
from fleecing.block.snapshot_access import SnapshotAccess
from fleecing.errors import BlockError, SnapshotBroken
from fleecing.server.sent_clusters import SentClusters

log = logging.getLogger(__name__)

ReadCached = Callable[[int, memoryview], bool]


class ReadOnce:
    """What all connections to a read-once export have sent of it. From any thread."""

    def __init__(self, snapshot: SnapshotAccess, grace: int) -> None:
        """`grace`: bytes, those that were sent last and can be read again."""
        clusters = snapshot.clusters
        self._sent = SentClusters(clusters.size, clusters.cluster_size, grace, clusters.access)
        self._lock = threading.Lock()  # for _sent

    def add(self, reads: Iterable[tuple[int, int]]) -> list[int]:
        """Bytes [start, end) of each of these have left. Returns the clusters that are to be trimmed."""
        with self._lock:
            return self._sent.add(reads)


class Receipts:
    """What one connection has read and not yet sent. For its thread alone."""

    def __init__(self, snapshot: SnapshotAccess, read_once: ReadOnce | None) -> None:
        """`read_once`, where the export is one, counts all READs; else those with READ_ONCE are noted only."""
        self._snapshot = snapshot
        self._read_once = read_once
        self._reads: list[tuple[int, int]] = []  # bytes [start, end) that count
        self._clusters: set[int] = set()  # read with READ_ONCE
        self._complained = False

    def counting(self, read_cached: ReadCached) -> ReadCached:
        """The node's `read_cached` as the connection's hot path is to call it."""
        if self._read_once is None:
            return read_cached
        count = self._reads.append

        def read_and_count(offset: int, buffer: memoryview) -> bool:
            if not read_cached(offset, buffer):
                return False
            count((offset, offset + len(buffer)))
            return True

        return read_and_count

    def note(self, offset: int, length: int, *, once: bool = False) -> None:
        """The reply of this READ, with all of its bytes, is in the outbox or has left. `once`: it had READ_ONCE."""
        snapshot = self._snapshot
        if once:
            self._clusters.update(range(*clusters_within(offset, length, snapshot.cluster_size, snapshot.size)))
        if self._read_once is not None:
            self._reads.append((offset, offset + length))

    def sent(self) -> None:
        """All that was noted has left: trim what may go."""
        if self._clusters:
            self._trim(self._clusters)
            self._clusters.clear()
        if self._reads and self._read_once is not None:
            leaving = self._read_once.add(self._reads)
            self._reads.clear()
            if leaving:
                self._trim(leaving)

    def _trim(self, clusters: Iterable[int]) -> None:
        """An error can be told to the log only, once."""
        try:
            self._snapshot.discard_clusters(cluster_runs(clusters))
        except SnapshotBroken:
            pass  # every further request says so
        except (OSError, BlockError) as e:
            if not self._complained:
                self._complained = True
                log.warning("what was read of %s cannot be trimmed: %s", self._snapshot.name, e)


def cluster_runs(clusters: Iterable[int]) -> list[tuple[int, int]]:
    """[first, end) of each run of neighbours among these clusters."""
    runs: list[tuple[int, int]] = []
    for cluster in sorted(clusters):
        if runs and runs[-1][1] == cluster:
            runs[-1] = (runs[-1][0], cluster + 1)
        else:
            runs.append((cluster, cluster + 1))
    return runs
