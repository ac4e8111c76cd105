"""What was sent of each cluster, counted byte for byte: against a model that keeps every byte by itself."""

from __future__ import annotations

import pytest
from bitarray import bitarray
from hypothesis import given
from hypothesis import strategies as st

from fleecing.block.bitmap import ones
from fleecing.server.sent_clusters import MOST_RANGES, SentClusters
from fleecing.units import KiB, div_up

Read = tuple[int, int]
"""Bytes [start, end)."""

CLUSTER = 16
SIZE = 10 * CLUSTER + 5
COUNT = 11


class Model:
    """The rules as the documentation has them, with no thought of memory."""

    def __init__(self, window: int) -> None:
        self.room = div_up(window, CLUSTER)
        self.missing = [set(range(n * CLUSTER, min(SIZE, (n + 1) * CLUSTER))) for n in range(COUNT)]
        self.window: list[int] = []
        self.left: set[int] = set()

    def add(self, reads: list[Read]) -> list[int]:
        for start, end in reads:
            for cluster in range(start // CLUSTER, div_up(end, CLUSTER)):
                self.missing[cluster] -= set(range(start, end))
                if cluster in self.window:
                    self.window.remove(cluster)
                if not self.missing[cluster] and cluster not in self.left:
                    self.window.append(cluster)
        leaving = []
        if len(self.window) > self.room + self.room // 8:
            while len(self.window) > self.room:
                leaving.append(self.window.pop(0))
        self.left.update(leaving)
        return leaving


def made(window: int = 0, *, most_ranges: int = MOST_RANGES) -> tuple[SentClusters, bitarray]:
    access = ones(COUNT)
    return SentClusters(SIZE, CLUSTER, window, access, most_ranges=most_ranges), access


places = st.tuples(st.integers(0, SIZE - 1), st.integers(1, 3 * CLUSTER)).map(lambda p: (p[0], min(SIZE, p[0] + p[1])))
rows = st.integers(1, CLUSTER).map(lambda step: [(at, min(SIZE, at + step)) for at in range(0, SIZE, step)])
batches = st.lists(st.lists(places, max_size=6) | rows, max_size=30)


@given(window=st.integers(0, SIZE), reads=batches)
def test_what_leaves_is_what_the_model_says(window: int, reads: list[list[Read]]) -> None:
    sent, access = made(window)
    model = Model(window)
    for batch in reads:
        leaving = sent.add(batch)
        assert leaving == model.add(batch)
        for cluster in leaving:
            access[cluster] = 0


@given(most=st.integers(0, 6), reads=batches)
def test_with_little_memory_nothing_leaves_that_was_not_sent_and_whole_reads_do(
    most: int, reads: list[list[Read]]
) -> None:
    sent, access = made(most_ranges=most)
    model = Model(0)
    left: set[int] = set()
    for batch in reads:
        model.add(batch)
        leaving = sent.add(batch)
        left.update(leaving)
        assert left <= model.left
        for cluster in leaving:
            access[cluster] = 0
    rest = [n for n in range(COUNT) if n not in left]
    assert sent.add([(n * CLUSTER, min(SIZE, (n + 1) * CLUSTER)) for n in rest]) == rest


def test_what_was_longest_without_a_read_is_forgotten_first() -> None:
    sent, _ = made(most_ranges=2)
    assert sent.add([(0, 8)]) == []
    assert sent.add([(16, 24)]) == []
    assert sent.add([(1, 2)]) == []
    assert sent.add([(32, 40)]) == []  # a third: the second goes
    assert sent.add([(8, 16), (24, 32), (40, 48)]) == [0, 2]


def test_one_cluster_in_too_many_pieces_is_forgotten() -> None:
    sent, _ = made(most_ranges=3)
    sent.add([(0, 1), (2, 3), (4, 5), (6, 7)])
    assert sent.add([(0, 0 + CLUSTER - 1)]) == []
    assert sent.add([(CLUSTER - 1, CLUSTER)]) == [0]


def test_a_trim_by_somebody_else_is_respected() -> None:
    sent, access = made(window=2 * CLUSTER)
    sent.add([(0, 8)])
    access[0] = access[1] = 0
    assert sent.add([(8, 16), (16, 32), (32, 80)]) == [2]  # 0 and 1 take no room


def test_clusters_that_are_complete_or_trimmed_take_no_memory() -> None:
    sent, access = made(most_ranges=1)
    assert sent.add([(0, 8)]) == []
    assert sent.add([(0, CLUSTER)]) == [0]
    access[0] = 0
    assert sent.add([(16, 24)]) == []
    assert sent.add([(0, 8)]) == []
    assert sent.add([(24, 32)]) == [1]


@pytest.mark.parametrize(("window", "stay"), [(0, 0), (1, 1), (CLUSTER, 1), (CLUSTER + 1, 2)])
def test_the_window_is_rounded_up_to_clusters(window: int, stay: int) -> None:
    sent, _ = made(window)
    assert sent.add([(0, SIZE)]) == list(range(COUNT - stay))


def test_a_large_window_gives_many_at_a_time() -> None:
    sent = SentClusters(100 * CLUSTER, CLUSTER, 16 * CLUSTER, ones(100))
    found = [sent.add([(n * CLUSTER, (n + 1) * CLUSTER)]) for n in range(22)]
    assert found == [[]] * 18 + [[0, 1, 2], [], [], [3, 4, 5]]


def test_a_read_within_the_window_starts_it_anew() -> None:
    sent, _ = made(window=2 * CLUSTER)
    assert sent.add([(0, CLUSTER), (CLUSTER, 2 * CLUSTER)]) == []
    assert sent.add([(3, 4)]) == []
    assert sent.add([(2 * CLUSTER, 3 * CLUSTER)]) == [1]


def test_byte_by_byte_backwards_takes_one_range() -> None:
    size = 64 * KiB
    sent = SentClusters(size, size, 0, ones(1), most_ranges=1)
    for at in range(size - 1, 0, -1):
        assert sent.add([(at, at + 1)]) == []
    assert sent.add([(0, 1)]) == [0]
