"""Free runs against a plain set of clusters."""

from __future__ import annotations

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from fleecing.block.qcow2.free_runs import FreeRuns


class FreeRunsMachine(RuleBasedStateMachine):
    """Adds and takes; the model is the set of free clusters."""

    def __init__(self) -> None:
        super().__init__()
        self.runs = FreeRuns()
        self.free: set[int] = set()

    @rule(start=st.integers(0, 60), count=st.integers(1, 12))
    def add(self, start: int, count: int) -> None:
        """Free clusters that are not free yet."""
        for cluster in range(start, start + count):
            if cluster not in self.free:
                self.runs.add(cluster, 1)
                self.free.add(cluster)

    @rule(count=st.integers(1, 16))
    def take(self, count: int) -> None:
        """Take a run that exists."""
        start = self.runs.take(count)
        if start is not None:
            assert self.free >= set(range(start, start + count))
            self.free -= set(range(start, start + count))

    @precondition(lambda self: self.free)
    @rule(count=st.integers(1, 16))
    def take_longest(self, count: int) -> None:
        """Take from one of the longest runs."""
        start, n = self.runs.take_longest(count)
        assert 1 <= n <= count and self.free >= set(range(start, start + n))
        self.free -= set(range(start, start + n))

    @invariant()
    def same_clusters(self) -> None:
        """The runs are the set, and as long as they can be."""
        runs = self.runs.runs()
        assert {cluster for start, n in runs for cluster in range(start, start + n)} == self.free
        assert self.runs.total == len(self.free)
        assert all(start + n not in self.free for start, n in runs)


TestFreeRuns = FreeRunsMachine.TestCase


def test_neighbours_become_one_run() -> None:
    runs = FreeRuns()
    for start in (4, 8, 6, 2):
        runs.add(start, 2)
    assert runs.runs() == [(2, 8)]


def test_no_run_is_cut_where_one_fits() -> None:
    runs = FreeRuns()
    runs.add(0, 100)
    runs.add(200, 4)
    assert runs.take(4) == 200


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8])
def test_longer_run_is_found_in_any_class(count: int) -> None:
    runs = FreeRuns()
    runs.add(10, 9)
    assert runs.take(count) == 10
    assert runs.total == 9 - count


def test_nothing_is_taken_where_no_run_is_long_enough() -> None:
    runs = FreeRuns()
    runs.add(0, 3)
    runs.add(10, 3)
    assert runs.take(4) is None
    assert runs.runs() == [(0, 3), (10, 3)]
