"""All that must hold when nothing is in flight."""

from __future__ import annotations

from fleecing.units import KiB, MiB, div_up
from tests.peers import run
from tests.server.burst import Burst
from tests.server.model import CLUSTER
from tests.server.world import SIZE, View, World

TABLES = 64 * KiB
"""More than the header and the tables of a temp image for a disk of this size."""


def check_view(world: World, view: View) -> None:
    """Every byte of a snapshot that was not trimmed, the state of every cluster, and what the control API counts."""
    burst = Burst(world)
    burst.status(view, 0, SIZE, line=1)
    for offset, length in readable_runs(view.frozen.trimmed):
        burst.read(view, offset, length, line=offset // CLUSTER % 3)
    burst.finish()
    check_counts(world, view)


def check_counts(world: World, view: View) -> None:
    """Clusters that were trimmed take no temp space, and those that nobody changed never did."""
    shown, frozen = world.server.show(view.frozen.export), view.frozen
    assert sum(shown["clusters"].values()) == div_up(SIZE, CLUSTER)
    assert shown["clusters"]["trimmed"] == len(frozen.trimmed)
    may_be_there = (frozen.saved | frozen.maybe_saved) - frozen.trimmed
    assert len(frozen.saved - frozen.trimmed) <= shown["clusters"]["copied"] <= len(may_be_there)
    assert shown["temp"]["used"] <= len(may_be_there) * CLUSTER + TABLES


def check_world(world: World) -> None:
    """All of it: the disk, each snapshot, each temp file by QEMU's own check; and that a deletion leaves nothing."""
    assert world.guests[1].read(0, SIZE) == world.active
    for view in world.views:
        check_view(world, view)
        temp = world.server.temp(view.frozen.export)
        run("qemu-img", "check", "-U", "-q", "-f", "qcow2", str(temp))
        assert world.server.delete(view.frozen.export)
        assert not temp.exists()


def readable_runs(trimmed: set[int]) -> list[tuple[int, int]]:
    """(offset, length) of the runs of clusters that can be read, at most 1 MiB each."""
    runs, start = [], None
    end = div_up(SIZE, CLUSTER)
    for cluster in range(end + 1):
        readable = cluster < end and cluster not in trimmed
        if start is not None and (not readable or cluster - start == MiB // CLUSTER):
            runs.append((start * CLUSTER, min(cluster * CLUSTER, SIZE) - start * CLUSTER))
            start = None
        if readable and start is None:
            start = cluster
    return runs
