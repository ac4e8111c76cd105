"""What the demo's disk holds: every sector says which one it is and which write it is from.

So the contents of the whole disk are known from one number a sector (its version), and a sector that is from another
place or another time than it should be cannot look right.
"""

from __future__ import annotations

import random
import struct
from array import array
from collections.abc import Iterator
from typing import Final, TypeAlias

from fleecing.units import KiB, MiB, align_up, div_up

SECTOR: Final = 512
"""Bytes; the unit in which the demo's guest writes."""

_HEAD: Final = struct.Struct(">QQ")
"""sector, version."""
_POOL: Final = 64 * KiB
_PIECE: Final = MiB

Versions: TypeAlias = "array[int]"
"""The version of each sector from some first one on: 0 = as it was made, else the number of the write it is from."""


def new_versions(count: int) -> Versions:
    """`count` sectors as they were made."""
    return array("I", bytes(4 * count))


class Contents:
    """The disk of `size` bytes, at most a sector of it incomplete, for one `seed`.

    A quarter of its MiB is zeroes (holes in the image) in version 0; all the rest is random data behind a head.
    """

    def __init__(self, size: int, seed: int) -> None:
        chance = random.Random(seed)
        self.size = size
        self.sectors = div_up(size, SECTOR)
        self._pool = chance.randbytes(_POOL + SECTOR)
        self._zeroes = frozenset(area for area in range(div_up(size, MiB)) if chance.random() < 0.25)

    def data(self, first: int, versions: Versions) -> bytes:
        """The bytes of len(versions) sectors from the sector `first` on, cut at the end of the disk."""
        pool, pack, zero = self._pool, _HEAD.pack, bytes(SECTOR)
        parts = []
        for sector, version in enumerate(versions, first):
            if not version and sector * SECTOR // MiB in self._zeroes:
                parts.append(zero)
            else:
                at = (sector * 31 + version * 7919) % _POOL
                parts.append(pack(sector, version) + pool[at : at + SECTOR - _HEAD.size])
        return b"".join(parts)[: self.size - first * SECTOR]

    def written(self, first: int, count: int, version: int) -> bytes:
        """The payload of a guest's write."""
        return self.data(first, array("I", [version]) * count)

    def pieces(self, versions: Versions) -> Iterator[tuple[int, bytes]]:
        """(offset, bytes) of the whole disk in these versions, a MiB at a time."""
        step = _PIECE // SECTOR
        for first in range(0, self.sectors, step):
            yield first * SECTOR, self.data(first, versions[first : first + step])

    def make(self, path: str) -> None:
        """A new image file of version 0; zeroes are left as holes."""
        with open(path, "xb") as image:
            for offset, data in self.pieces(new_versions(self.sectors)):
                if offset // MiB not in self._zeroes:
                    image.seek(offset)
                    image.write(data)
            image.truncate(self.size)


def version_of(sector: bytes) -> int:
    """The version that a sector itself tells; 0 for what is too short to tell one."""
    if len(sector) < _HEAD.size:
        return 0
    version: int = _HEAD.unpack_from(sector)[1]
    return version


def differing_sectors(expected: bytes, found: bytes) -> list[int]:
    """Which sectors of a piece differ, counted from its start; missing bytes differ."""
    if expected == found:
        return []
    length = align_up(max(len(expected), len(found)), SECTOR)
    return [at // SECTOR for at in range(0, length, SECTOR) if expected[at : at + SECTOR] != found[at : at + SECTOR]]
