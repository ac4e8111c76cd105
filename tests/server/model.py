"""What a disk and its snapshots must hold, byte by byte, and how far that is known while requests are in flight."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass, field

from fleecing.block.extent import Allocation, ClusterState
from fleecing.client.request import Extents
from fleecing.units import KiB, MiB, div_up

CLUSTER = 4 * KiB

SKIPS_HOLES_FROM = MiB
"""A trim or zeroing of so many bytes need not save what is a hole already."""


def stamp(number: int, length: int) -> bytes:
    """Bytes that no other number gives, and that are not zero."""
    return (struct.pack(">Q", number | 1 << 63) * (length // 8 + 1))[:length]


@dataclass(frozen=True)
class Change:
    """A guest's change: `data` where it writes, else zeroes. `kind`: write, fua, zeroes, no_hole or trim."""

    kind: str
    offset: int
    length: int
    number: int

    @property
    def end(self) -> int:
        return self.offset + self.length

    @property
    def data(self) -> bytes:
        return stamp(self.number, self.length) if self.kind in ("write", "fua") else bytes(self.length)

    @property
    def clusters(self) -> range:
        return clusters(self.offset, self.length)

    def overlaps(self, others: Iterable[Change]) -> bool:
        """Whether it shares a byte with one of them."""
        return any(self.offset < other.end and other.offset < self.end for other in others)

    @property
    def saves_all(self) -> bool:
        """Whether every cluster of it that was not saved before is, holes too."""
        return self.kind not in ("zeroes", "trim") or self.length < SKIPS_HOLES_FROM


@dataclass(frozen=True)
class Doubt:
    """A change that was in flight at the instant: a snapshot has either the old bytes or the new, the same for ever."""

    offset: int
    old: bytes
    new: bytes

    @property
    def end(self) -> int:
        return self.offset + len(self.old)


def clusters(offset: int, length: int) -> range:
    """Those that the range has a byte in."""
    return range(offset // CLUSTER, div_up(offset + length, CLUSTER))


def clusters_within(offset: int, length: int, size: int) -> range:
    """Those that it holds whole; the short one at the end of the disk counts where it reaches the end."""
    end = offset + length
    return range(div_up(offset, CLUSTER), div_up(end, CLUSTER) if end == size else end // CLUSTER)


@dataclass
class Frozen:
    """A snapshot. Everything in it stays as it is, but for trims."""

    export: str
    contents: bytearray
    doubts: list[Doubt]
    trimmed: set[int] = field(default_factory=set)
    saved: set[int] = field(default_factory=set)
    """Clusters that a guest's change has made the server save, unless they were trimmed first."""
    maybe_saved: set[int] = field(default_factory=set)
    maybe_trimmed: set[int] = field(default_factory=set)
    """Touched by a request that is in flight, or whose place in time is not known."""

    def readable(self, offset: int, length: int) -> bool:
        return self.trimmed.isdisjoint(clusters(offset, length))

    def touched(self, change: Change, *, for_sure: bool) -> None:
        """A guest changes this."""
        (self.saved if for_sure and change.saves_all else self.maybe_saved).update(change.clusters)

    def check_data(self, offset: int, data: bytes | bytearray) -> None:
        """These are its bytes; where there was a doubt, it is gone now."""
        end = offset + len(data)
        for doubt in [d for d in self.doubts if d.offset < end and offset < d.end]:
            begin, stop = max(offset, doubt.offset), min(end, doubt.end)
            here, there = slice(begin - offset, stop - offset), slice(begin - doubt.offset, stop - doubt.offset)
            is_old, is_new = data[here] == doubt.old[there], data[here] == doubt.new[there]
            assert is_old or is_new, f"{self.export}: neither the old bytes nor the new at {begin} to {stop}"
            if not (is_old and is_new):
                self.contents[doubt.offset : doubt.end] = doubt.old if is_old else doubt.new
                self.doubts.remove(doubt)
        if data != self.contents[offset:end]:
            known = self._without_doubts(offset, data)
            assert known == self.contents[offset:end], f"{self.export}: {first_difference(self, offset, known)}"

    def _without_doubts(self, offset: int, data: bytes | bytearray) -> bytearray:
        """The bytes, with those in doubt replaced by what the contents have."""
        known, end = bytearray(data), offset + len(data)
        for doubt in self.doubts:
            begin, stop = max(offset, doubt.offset), min(end, doubt.end)
            if begin < stop:
                known[begin - offset : stop - offset] = self.contents[begin:stop]
        return known

    def check_states(self, offset: int, length: int, extents: Extents) -> None:
        """What the server tells of its clusters: trimmed, copied, untouched."""
        assert sum(count for count, _ in extents) == length, "the reply covers the whole request"
        for count, state in extents:
            for cluster in clusters(offset, count):
                self._check_state(cluster, ClusterState(state))
            offset += count

    def _check_state(self, cluster: int, state: ClusterState) -> None:
        if cluster in self.maybe_trimmed:
            return
        where = f"{self.export}: cluster {cluster} is {state.name}"
        assert (state is ClusterState.TRIMMED) == (cluster in self.trimmed), where
        if state is ClusterState.COPIED:
            assert cluster in self.saved | self.maybe_saved, where
        if state is ClusterState.UNTOUCHED:
            assert cluster not in self.saved, where

    def check_allocation(self, offset: int, length: int, extents: Extents) -> None:
        """What is told to be zero reads as zeroes."""
        check_zeroes(self.contents, self.doubts, offset, length, extents)


def check_zeroes(contents: bytearray, doubts: Iterable[Doubt], offset: int, length: int, extents: Extents) -> None:
    """base:allocation of a range: the whole of it, and nothing called zero that is not."""
    assert sum(count for count, _ in extents) == length, "the reply covers the whole request"
    for count, state in extents:
        if state & Allocation.ZERO and not any(d.offset < offset + count and offset < d.end for d in doubts):
            assert not any(contents[offset : offset + count]), f"{count} bytes at {offset} are not zero"
        assert state in (Allocation.DATA, Allocation.HOLE_ZERO, Allocation.ZERO)
        offset += count


def first_difference(frozen: Frozen, offset: int, data: bytes | bytearray) -> str:
    """Where, and how much of it, for the reader of a failure."""
    wanted = frozen.contents[offset : offset + len(data)]
    at = next(i for i in range(len(data)) if data[i] != wanted[i])
    found, meant = bytes(data[at : at + 16]), bytes(wanted[at : at + 16])
    cluster = (offset + at) // CLUSTER
    return (
        f"byte {offset + at} (cluster {cluster}, saved: {cluster in frozen.saved | frozen.maybe_saved}): "
        f"{found.hex()} instead of {meant.hex()}"
    )
