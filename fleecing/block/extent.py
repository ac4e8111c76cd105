"""What is known of a range of a node without reading it."""

from __future__ import annotations

from collections.abc import Iterable
from enum import IntEnum, IntFlag


class Allocation(IntFlag):
    """How the bytes of a run are held. DATA promises nothing; it is always a safe answer."""

    DATA = 0
    HOLE = 1
    ZERO = 2
    HOLE_ZERO = 3


class ClusterState(IntEnum):
    """What became of a cluster of a snapshot."""

    UNTOUCHED = 0
    COPIED = 1
    TRIMMED = 2
    NOT_IN_BITMAP = 3


MAX_RUNS = 1 << 20
"""The most runs that one answer holds: bounded memory (NBD document, "NBD_CMD_BLOCK_STATUS": 2^20 descriptors)."""

Runs = list[tuple[int, int]]
"""(length in bytes, state) pairs, in order, without gaps, lengths above 0. The first starts at the offset asked for."""


def append_run(runs: Runs, length: int, state: int) -> None:
    """Add a run at the end; equal neighbours become one."""
    if runs and runs[-1][1] == state:
        runs[-1] = (runs[-1][0] + length, state)
    else:
        runs.append((length, state))


def merge_runs(pieces: Iterable[tuple[int, int]]) -> Runs:
    """The same runs with equal neighbours merged and empty ones dropped."""
    runs: Runs = []
    for length, state in pieces:
        if length:
            append_run(runs, length, state)
    return runs


def total_length(runs: Runs) -> int:
    """Bytes that the runs cover."""
    return sum(length for length, _ in runs)
