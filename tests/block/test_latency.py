"""Histograms of time, percentiles out of them, and sums that do not go backwards."""

from __future__ import annotations

import threading
from bisect import bisect_left
from itertools import pairwise

import pytest

from fleecing.block.latency import BOUNDS, Latency, percentile
from fleecing.block.ledger import Ledger


def test_bounds_are_round_numbers_that_prometheus_tells_too() -> None:
    assert list(BOUNDS) == sorted(set(BOUNDS))
    assert (BOUNDS[0], BOUNDS[-1]) == (1e-6, 80.0)
    assert {0.0001, 0.00025, 0.0005, 0.001, 0.5, 1.0, 2.5} <= set(BOUNDS)
    assert max(after / before for before, after in pairwise(BOUNDS)) < 1.3


@pytest.mark.parametrize("place", [0, 1, 40, len(BOUNDS) - 1])
def test_a_bound_belongs_to_its_bucket(place: int) -> None:
    latency = Latency()
    latency.record(BOUNDS[place], 3)
    assert latency.buckets[place] == latency.count == 3
    assert latency.seconds == 3 * BOUNDS[place]


def test_what_is_too_long_for_all_buckets_is_in_the_last() -> None:
    latency = Latency()
    latency.record(1000.0)
    assert latency.buckets[-1] == 1
    assert percentile(latency.buckets, 0.5) == BOUNDS[-1]


@pytest.mark.parametrize("share", [0.01, 0.5, 0.9, 0.99, 1.0])
def test_percentiles_are_right_to_a_quarter(share: float) -> None:
    times = sorted(1e-5 * 1.01**i for i in range(1500))
    latency = Latency()
    for seconds in times:
        latency.record(seconds)
    found = percentile(latency.buckets, share)
    right = times[max(0, round(share * len(times)) - 1)]
    assert found is not None
    assert right / 1.26 <= found <= right * 1.26


def test_of_nothing_there_is_no_percentile() -> None:
    assert percentile(Latency().buckets, 0.5) is None


def test_one_in_a_hundred_is_not_in_the_99th_percentile_and_two_are() -> None:
    for slow, is_slow in ((1, False), (2, True)):
        latency = Latency()
        latency.record(0.0001, 100 - slow)
        latency.record(1.0, slow)
        found = percentile(latency.buckets, 0.99)
        assert found is not None
        assert (found > 0.5) is is_slow
        assert bisect_left(BOUNDS, percentile(latency.buckets, 0.5) or 0) == bisect_left(BOUNDS, 0.0001)


class Counter:
    """Counts for itself."""

    def __init__(self) -> None:
        self.latency = Latency()

    def figures(self) -> Latency:
        return self.latency


def test_a_sum_never_goes_back_while_those_that_count_come_and_go() -> None:
    ledger = Ledger(Latency)
    over = threading.Event()

    def come_and_go() -> None:
        for _ in range(300):
            counter = Counter()
            ledger.open(counter)
            for _ in range(10):
                counter.latency.record(0.001)
            ledger.close(counter)
            ledger.close(counter)
        over.set()

    threads = [threading.Thread(target=come_and_go) for _ in range(3)]
    for thread in threads:
        thread.start()
    last = 0
    while not over.is_set():
        now = ledger.total().count
        assert now >= last
        last = now
    for thread in threads:
        thread.join()
    assert (ledger.total().count, ledger.opened) == (9000, 900)
