"""A snapshot of which there are no files that make sense: it has a name and a reason, and that is all."""

from __future__ import annotations

import errno
import os
from typing import NoReturn

from fleecing.block.extent import MAX_RUNS, ClusterState, Runs
from fleecing.block.node import Buffer, Node
from fleecing.errors import SnapshotBroken
from fleecing.units import div_up


class LostSnapshot(Node):
    """Stands where a snapshot was that cannot be gone on with; every read and trim of it says why."""

    clusters_copied_total = 0

    def __init__(
        self, name: str, reason: str, *, size: int, cluster_size: int, temp_path: str, temp_limit: int | None
    ) -> None:
        self.name = name
        self.broken = reason
        self.size = size
        self.cluster_size = cluster_size
        self.temp_path = temp_path
        self.temp_limit = temp_limit

    def _refuse(self) -> NoReturn:
        raise SnapshotBroken(self.broken)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        self._refuse()

    def read_cached(self, offset: int, buffer: memoryview) -> bool:
        self._refuse()

    def write(self, offset: int, data: Buffer) -> None:
        raise OSError(errno.EROFS, "a snapshot cannot be written")

    def write_zeroes(self, offset: int, length: int, *, may_unmap: bool = True, fast_only: bool = False) -> None:
        raise OSError(errno.EROFS, "a snapshot cannot be written")

    def discard(self, offset: int, length: int) -> None:
        self._refuse()

    def flush(self) -> None:
        """There is nothing to make durable."""

    def prefetch(self, offset: int, length: int) -> None:
        self._refuse()

    def block_status(self, offset: int, length: int, max_runs: int = MAX_RUNS) -> Runs:
        self._refuse()

    def allocation_depth(self, offset: int, length: int, max_runs: int = MAX_RUNS) -> Runs:
        self._refuse()

    def cluster_state(self, offset: int, length: int, max_runs: int = MAX_RUNS) -> Runs:
        self._refuse()

    def counts(self) -> dict[ClusterState, int]:
        """Nobody knows; a guest change saves none of them any more."""
        return dict.fromkeys(ClusterState, 0) | {ClusterState.UNTOUCHED: div_up(self.size, self.cluster_size)}

    def temp_used(self) -> int:
        """Bytes of disk space that its temp still takes, if it is there."""
        try:
            return os.stat(self.temp_path).st_blocks * 512
        except OSError:
            return 0

    def temp_peak(self) -> int:
        return self.temp_used()

    def retain(self) -> None:
        """It has no files to keep open."""

    def release(self) -> None:
        """It has no files to close."""

    def check_written(self) -> None:
        """Nothing is written to it."""

    def remove(self, timeout: float) -> None:
        """Readers are told from now on that it was deleted; its files are its folder's matter."""
        self.broken = "deleted"

    def suspend(self) -> None:
        """It has nothing to make durable."""
