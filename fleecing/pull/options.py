"""What a copy is told to do, and what it tells: options, progress, the report at its end."""

from __future__ import annotations

import os
from dataclasses import dataclass
from enum import Enum
from typing import Final

from fleecing.pull.limiter import Bandwidth
from fleecing.units import MiB

CONNECTIONS: Final = min(4, os.cpu_count() or 1)
"""To begin with. More than there are CPUs take them from each other: 4 on two CPUs were slower than 2 by a tenth."""

DEPTH: Final = 4
"""Requests of a connection in flight, to begin with."""

MOST_CONNECTIONS: Final = 16
"""Where more of them are seen to help; what servers let one client have."""

MOST_DEPTH: Final = 64
"""Where more requests are seen to help."""


class Trim(Enum):
    """Which exports are trimmed behind the read head. TRIM destroys what it trims."""

    NEVER = "never"
    SNAPSHOT = "snapshot"
    """Only an export that says, by the context `fleecing:cluster-state`, that it is a snapshot and no disk in use."""
    ALWAYS = "always"
    """Any export; RequestError where it has no TRIM."""


class Check(Enum):
    """The checksum of each piece that the journal keeps."""

    NONE = "none"
    CRC32 = "crc32"
    SHA256 = "sha256"


@dataclass(frozen=True)
class PullOptions:
    """`piece` in bytes, `timeout` in seconds for each answer; `connections` only where the export can share them.

    `most_connections` and `most_depth`: how many there may be where the copy is seen to wait for lack of them; 0: no
    more than to begin with, and so it is where there is a `bandwidth`, and for connections to a snapshot of ours.
    `reconnect`: for how many seconds without an answer a lost connection is tried again; 0 = a loss is the end.
    `bandwidth` may be changed meanwhile; pieces get small where it is. `bitmap`: see Source.
    """

    connections: int = CONNECTIONS
    depth: int = DEPTH
    most_connections: int = 0
    most_depth: int = 0
    piece: int = MiB
    trim: Trim = Trim.SNAPSHOT
    timeout: float = 60.0
    reconnect: float = 0.0
    bandwidth: Bandwidth | None = None
    bitmap: str | None = None
    check: Check = Check.NONE


@dataclass(frozen=True)
class Progress:
    """`done` of `total` bytes, zeroes and the `resumed` of earlier runs among them; `rate`: data a second in this run.

    What a dirty bitmap leaves out counts neither as done nor, as soon as it is known, in the total.
    """

    done: int
    total: int
    rate: float
    data: int = 0
    seconds: float = 0.0
    reconnects: int = 0
    resumed: int = 0


@dataclass(frozen=True)
class PullReport:
    """What a pull did, in bytes and seconds; data + zeroes + clean + resumed = size."""

    size: int
    data: int
    zeroes: int
    trimmed: int
    seconds: float
    clean: int = 0
    """What the dirty bitmap says has not changed."""
    resumed: int = 0
    """What earlier runs had done."""
    reconnects: int = 0
    bitmap: str | None = None
    connections: int = 0
    """That were open at the end."""
    requests: int = 0
    """That all of them together might have in flight at the end."""

    @property
    def rate(self) -> float:
        """Bytes of data a second."""
        return self.data / self.seconds if self.seconds else 0.0
