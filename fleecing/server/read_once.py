"""Clusters of a snapshot that are given up because they were read with READ_ONCE (docs/read-once.md).

What a connection's thread has read lies in its outbox for a while. It is noted here, and trimmed when the outbox was
handed to the socket completely. So a READ that failed, also half-way, and one whose client vanished before that, gives
nothing up. What the socket took may still be lost on its way: READ_ONCE is for clients that never ask twice.

Only connections that selected the context have receipts; all others do not pay for them.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable

from fleecing.block.bitmap import clusters_within
from fleecing.block.snapshot_access import SnapshotAccess
from fleecing.errors import BlockError, SnapshotBroken

log = logging.getLogger(__name__)


class Receipts:
    """What one connection has read with READ_ONCE and not yet sent. For its thread alone."""

    def __init__(self, snapshot: SnapshotAccess) -> None:
        self._snapshot = snapshot
        self._clusters: set[int] = set()
        self._complained = False

    def note(self, offset: int, length: int) -> None:
        """The reply of this READ, with all of its bytes, is in the outbox or has left."""
        snapshot = self._snapshot
        self._clusters.update(range(*clusters_within(offset, length, snapshot.cluster_size, snapshot.size)))

    def sent(self) -> None:
        """All that was noted has left: trim it. An error can be told to the log only, once."""
        if not self._clusters:
            return
        runs = cluster_runs(self._clusters)
        self._clusters.clear()
        try:
            self._snapshot.discard_clusters(runs)
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
