"""The table of patterns: what lies on a disk, what the guest does to it, and what the backup gives up.

Grown out of QEMU's own test of fleecing (tests/qemu-iotests/tests/image-fleecing): patterns at 0, at 1 MiB, in the
middle and at the end; overwrites that hit a pattern whole, in its left or right part, or just beside it. What is
expected comes from a model in memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

KIB, MIB = 1 << 10, 1 << 20


@dataclass(frozen=True)
class Step:
    """One change: qemu-io's command, the range, and the byte that it reads as afterwards."""

    command: str
    offset: int
    length: int
    value: int = 0

    def qemu_io(self) -> str:
        """The command line for qemu-io."""
        pattern = f"-P {self.value} " if self.command.startswith("write") and "-z" not in self.command else ""
        return f"{self.command} {pattern}{self.offset} {self.length}"

    def apply(self, contents: bytearray) -> None:
        """The same on a model."""
        contents[self.offset : self.offset + self.length] = bytes([self.value]) * self.length


@dataclass(frozen=True)
class Scenario:
    """The tables for a disk of `size` bytes with clusters of `cluster` bytes."""

    size: int
    cluster: int

    @property
    def piece(self) -> int:
        """Bytes of a pattern."""
        return min(self.cluster, 64 * KIB)

    @property
    def middle(self) -> int:
        return self.size // 2 // self.cluster * self.cluster

    @property
    def last(self) -> int:
        """Where the last cluster starts, a short one or not."""
        return (self.size - 1) // self.cluster * self.cluster

    def patterns(self) -> list[Step]:
        """What lies on the disk at the instant of the snapshot; holes elsewhere."""
        tail = min(self.piece, self.size - self.last)
        return [
            Step("write", 0, self.piece, 0x5D),
            Step("write", MIB, self.piece, 0xD5),
            Step("write", self.middle, self.piece, 0xDC),
            Step("write", self.size - tail, tail, 0xCD),
        ]

    def overwrites(self) -> Iterator[Step]:
        """What the guest does afterwards."""
        piece, half = self.piece, self.piece // 2
        yield Step("write", 0, piece, 0xAB)  # the whole pattern
        yield Step("write", MIB - half, piece, 0xAD)  # its left part
        yield Step("write", self.middle + half, piece, 0x1D)  # its right part
        yield Step("write", self.last - piece, piece, 0xEA)  # just beside it
        yield Step("write -f", self.last - 1, 2, 0x1F)  # over the boundary of two clusters
        yield Step("write", self.size - 1, 1, 0x2F)  # the last byte
        yield Step("write", 3 * MIB - 3, 2 * self.cluster + 5, 0x3C)  # more than a cluster on both sides
        yield Step("write -z", MIB, half, 0)  # zeroes
        yield Step("write -z -u", self.middle + half + 1, half, 0)  # zeroes, and the space is given back
        yield Step("write -z -u", self.middle - 2 * self.cluster, self.cluster, 0)  # over a hole
        yield Step("discard", self.middle, self.piece, 0)
        yield Step("discard", 2 * MIB, self.cluster, 0)

    def rewrite(self) -> Iterator[Step]:
        """The guest writes the whole disk, in pieces that fit no cluster."""
        step = 300 * KIB + 77
        for offset in range(0, self.size, step):
            yield Step("write", offset, min(step, self.size - offset), 0x77)

    def trims(self, *, aligned: bool) -> list[tuple[int, int]]:
        """(offset, length) of what the backup gives up; `aligned` leaves out all that fits no clusters."""
        cluster = self.cluster
        fitting = [(0, cluster), (self.middle, 2 * cluster), (self.middle, cluster)]
        if aligned:
            return fitting
        return [
            *fitting,
            (MIB + 1, 3 * cluster),
            (3 * MIB + 5, cluster - 6),
            (self.last - cluster - 1, 2),
            (self.size - 1, 1),
            (self.last, self.size - self.last),
        ]

    def unreadable(self, trims: list[tuple[int, int]]) -> set[int]:
        """The clusters that lie whole in a trim; the last one is whole where its bytes on the disk are."""
        gone = set()
        for number in range(self.last // self.cluster + 1):
            start, end = number * self.cluster, min((number + 1) * self.cluster, self.size)
            if any(offset <= start and end <= offset + length for offset, length in trims):
                gone.add(number)
        return gone

    def runs(self, gone: set[int]) -> Iterator[tuple[int, int, bool]]:
        """(offset, length, readable) of clusters in a row that are alike, at most 1 MiB or one cluster each."""
        most = max(self.cluster, MIB)
        offset = 0
        while offset < self.size:
            readable = offset // self.cluster not in gone
            end = offset
            while end < self.size and end - offset < most and (end // self.cluster not in gone) is readable:
                end += self.cluster
            yield offset, min(end, self.size) - offset, readable
            offset = end
