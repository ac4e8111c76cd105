"""The real server where its clients get in each other's way most."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

import pytest

from tests.server.checks import check_world
from tests.server.fights import Duel, Storm, long_copies, trim_everything
from tests.server.model import CLUSTER
from tests.server.world import Served, World


@pytest.fixture
def world(served: Served) -> Iterator[World]:
    made = World(served)
    yield made
    if not made.failed:
        check_world(made)
    made.close()


@pytest.mark.parametrize("kind", ["zeroes", "no_hole", "trim", "write"])
def test_a_snapshot_is_made_between_two_changes_never_within_one(world: World, kind: str) -> None:
    long_copies(world, kind)


@pytest.mark.parametrize("cold", [False, True], ids=["warm", "cold"])
def test_clusters_are_right_while_they_are_saved_and_trimmed(world: World, cold: bool) -> None:
    for number in range(4):
        Duel(world, number * 300 * CLUSTER, cold=cold).run()


def test_reads_are_right_or_refused_while_everything_is_trimmed(world: World) -> None:
    for _ in range(4):
        trim_everything(world)


@pytest.mark.parametrize("hot", [False, True], ids=["wide", "hot"])
def test_storms_leave_everything_as_it_must_be(world: World, hot: bool) -> None:
    for seed in range(3):
        world.snapshot()
        Storm(world, Random(seed), hot=hot).run()
