"""The guest's latency of the last minute."""

from __future__ import annotations

import pytest

from fleecing.control.recent import SAMPLE_SECONDS, WINDOW_SECONDS, RecentLatency
from fleecing.nbd.constants import Cmd
from fleecing.server.meter import Tally


class World:
    """A clock that a test turns, and requests that come as it wants."""

    def __init__(self) -> None:
        self.now = 100.0
        self.tally = Tally()
        self.recent = RecentLatency(self.total, clock=lambda: self.now)

    def total(self) -> Tally:
        found = Tally()
        found.add(self.tally)
        return found

    def ask(self, kind: Cmd, seconds: float, count: int) -> None:
        self.tally.latency(kind).record(seconds, count)

    def let_pass(self, seconds: float) -> None:
        """As the server does: a look every second."""
        for _ in range(round(seconds)):
            self.now += 1
            self.recent.sample()


def test_without_requests_there_is_nothing_to_tell() -> None:
    every, kinds = World().recent.look()
    assert (every.requests, every.p50, every.p99) == (0, None, None)
    assert kinds == {}


def test_all_since_the_start_counts_at_first() -> None:
    world = World()
    world.let_pass(7)
    world.ask(Cmd.READ, 0.001, 99)
    world.ask(Cmd.FLUSH, 0.1, 1)
    every, kinds = world.recent.look()
    assert every.requests == 100
    assert every.p50 == pytest.approx(0.001, rel=0.26)
    assert every.p99 == pytest.approx(0.001, rel=0.26)
    assert {kind: recent.requests for kind, recent in kinds.items()} == {"read": 99, "flush": 1}
    assert kinds["flush"].p50 == pytest.approx(0.1, rel=0.26)


def test_what_is_older_than_the_window_is_forgotten() -> None:
    world = World()
    world.let_pass(3)
    world.ask(Cmd.READ, 1.0, 50)
    world.let_pass(10)
    world.ask(Cmd.WRITE, 0.001, 50)
    assert world.recent.look()[0].requests == 100
    world.let_pass(WINDOW_SECONDS - 10 + SAMPLE_SECONDS)
    every, kinds = world.recent.look()
    assert (every.requests, list(kinds)) == (50, ["write"])
    world.let_pass(WINDOW_SECONDS)
    assert world.recent.look()[0].requests == 0


def test_the_window_is_about_as_long_as_it_says() -> None:
    """However often it is sampled, and it keeps no more than it needs."""
    world = World()
    for second in range(1000):
        world.let_pass(1)
        world.ask(Cmd.READ, 0.001, 1)
        assert min(second + 1, WINDOW_SECONDS) <= world.recent.look()[0].requests <= WINDOW_SECONDS + SAMPLE_SECONDS
    assert len(world.recent._samples) <= WINDOW_SECONDS / SAMPLE_SECONDS + 2
