"""What a snapshot knows of each cluster, and who may change it.

    state           access  copy  done
    untouched          1      1     0     reads go to the active image; a guest change must save it first
    copied             1      0     1     reads go to temp
    trimmed            0      0     0     nobody reads it any more, nothing is saved
    not in bitmap      0      0     0     never was part of this snapshot (its `scope` bit is clear)

A `copy` bit stays set while a task copies the cluster and falls when the copy is complete. So a task that fails has
nothing to set again, a cluster trimmed in the meantime is never marked anew, and a guest write learns from one look at
`copy` that it may go ahead.

Readers hold no lock. They look at these bits, read, and look again, so what guards bytes changes before the bytes do:
`done` is set, and `copy` cleared after it, before the guest changes the active image; `access` is cleared before a
trim frees the cluster in temp; `broken` is set before a guest change goes ahead without its copy.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

from bitarray import bitarray

from fleecing.block.bitfile import BitFile
from fleecing.block.bitmap import clusters_touched, little, ones, zeroes
from fleecing.block.durability import sync_note
from fleecing.block.extent import ClusterState
from fleecing.errors import ClusterUnreadable, SnapshotBroken
from fleecing.units import div_up

LOOK_SECONDS = 0.05
"""How long a look at the numbers waits for the lock."""


class ClusterMap:
    """The clusters of one snapshot. `cluster_size`: a power of two; `size`: bytes; the last cluster may be short."""

    def __init__(
        self,
        size: int,
        cluster_size: int,
        *,
        scope: bitarray | None = None,
        trimmed: BitFile | None = None,
        done: bitarray | None = None,
        durable: bool = False,
        on_broken: Callable[[str], None],
    ) -> None:
        """`trimmed` keeps what is trimmed, and why the snapshot broke, for the next process; `done`: copied by now.

        `durable`: also for the time after a loss of power.
        """
        self.size = size
        self.cluster_size = cluster_size
        self.shift = cluster_size.bit_length() - 1
        self.count = div_up(size, cluster_size)
        self.trimmed = trimmed  # its bits are changed under `lock`, those of a durable snapshot also before
        self.durable = durable
        # The three are changed under `lock` only, and read without it.
        self.access, self.copy, self.done = ones(self.count), ones(self.count), zeroes(self.count)
        self.scope: bitarray | None = None
        self.set_scope(scope)
        if done is not None:  # a snapshot that is gone on with; of a new one nothing is trimmed, and all is to copy
            if trimmed is not None:
                self.access &= ~trimmed.bits
            self.done |= done & self.access
            self.copy = self.access & ~self.done
        self.lock = threading.Lock()
        # Why the snapshot is dead, or None. Set once, from any thread, under `_break_lock`; never unset.
        self.broken: str | None = None
        self._break_lock = threading.Lock()
        self._on_broken = on_broken

    def set_scope(self, scope: bitarray | None) -> None:
        """The clusters that belong to the snapshot at all, None = every one. Once, before anybody uses the map.

        The guest may be waiting, so bits as `zeroes` makes them are taken over, and nothing is done in new memory.
        """
        if scope is None:
            return
        self.scope = scope if len(scope) == len(self.access) and scope.endian == "little" else little(scope, self.count)
        self.scope[self.count :] = 0
        self.access &= self.scope
        self.copy &= self.scope

    def facts(self) -> Iterator[bytes]:
        """Which clusters belong to the snapshot, for a checksum."""
        yield b"all" if self.scope is None else self.scope.tobytes()

    def trim(self, first: int, end: int) -> None:
        """Nobody may read clusters [first, end) any more, and nobody needs to save them. Under `lock`."""
        if self.trimmed is not None:
            self.trimmed.bits[first:end] = 1
        self.access[first:end] = 0
        self.copy[first:end] = 0

    def break_(self, cause: str) -> None:
        """The snapshot is dead from here on, for good; the first cause stays.

        Takes no lock that a hanging temp could hold, and NOTE_SECONDS at most.
        """
        with self._break_lock:
            if self.broken is not None:
                return
            if self.trimmed is not None:
                self.trimmed.note = cause  # in mapped memory: known to the next process before the guest goes on
                if self.durable:
                    sync_note(self.trimmed)
            self.broken = cause
        # Called once. Who is told holds this map: without the way back both go, and with them the descriptors and the
        # space of the bit files, when the last user lets go, and not only when a search for circles comes by.
        on_broken, self._on_broken = self._on_broken, _told_already
        on_broken(cause)

    def is_broken(self) -> bool:
        """Whether it is by now: another thread may have broken it since the last look."""
        return self.broken is not None

    def needs_copy(self, offset: int, length: int) -> bool:
        """Whether a change of these bytes must save a cluster first. One look, no lock."""
        shift = self.shift
        return self.copy.find(1, offset >> shift, (offset + length - 1 >> shift) + 1) >= 0

    def check_readable(self, offset: int, length: int) -> None:
        """Raise SnapshotBroken or ClusterUnreadable where a reader may not have these bytes."""
        if self.broken is not None:
            raise SnapshotBroken(self.broken)
        first, end = clusters_touched(offset, length, self.cluster_size)
        cluster = self.access.find(0, first, end)
        if cluster >= 0:
            trimmed = self.scope is None or self.scope[cluster]
            raise ClusterUnreadable(cluster << self.shift, "trimmed" if trimmed else "not in bitmap")

    def state_run(self, cluster: int, end: int) -> tuple[ClusterState, int]:
        """The state of a cluster, and where the run of clusters that share it ends (at most `end`)."""
        access, done = self.access[cluster], self.done[cluster]
        known = [(self.access, access), (self.done, done)]
        in_scope = 1
        if self.scope is not None:
            in_scope = self.scope[cluster]
            known.append((self.scope, in_scope))
        for bits, bit in known:
            stop = bits.find(1 - bit, cluster, end)
            if stop >= 0:
                end = max(stop, cluster + 1)  # its own bit may have changed since the look above
        if done:
            return ClusterState.COPIED, end
        if access:
            return ClusterState.UNTOUCHED, end
        return (ClusterState.TRIMMED if in_scope else ClusterState.NOT_IN_BITMAP), end

    def counts(self) -> dict[ClusterState, int]:
        """Clusters by state; they add up to all clusters when nothing changes meanwhile.

        A temp that hangs can hold the lock for good, and whoever asks wants to know just then: so the lock is waited
        for LOOK_SECONDS at most, and without it a trim in between may make the numbers disagree by what it trims.
        """
        in_scope = self.count if self.scope is None else self.scope.count(1)
        locked = self.lock.acquire(timeout=LOOK_SECONDS)
        try:
            copied, readable = self.done.count(), self.access.count()
        finally:
            if locked:
                self.lock.release()
        return {
            ClusterState.UNTOUCHED: max(0, readable - copied),
            ClusterState.COPIED: copied,
            ClusterState.TRIMMED: in_scope - readable,
            ClusterState.NOT_IN_BITMAP: self.count - in_scope,
        }


def _told_already(cause: str) -> None:
    raise AssertionError(f"a snapshot breaks once, and this is the second time: {cause}")
