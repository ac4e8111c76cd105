"""Clusters of ranges, runs of bits."""

from __future__ import annotations

import itertools
import random

import pytest
from bitarray import bitarray
from hypothesis import given
from hypothesis import strategies as st

from fleecing.block.bitmap import bit_runs, clusters_touched, clusters_within, rescale, zeroes
from fleecing.units import div_up

CLUSTERS = st.sampled_from([512, 4096, 65536])


@given(CLUSTERS, st.integers(1, 1 << 20), st.data())
def test_clusters_within_and_touched_agree_with_counting_bytes(cluster: int, size: int, data: st.DataObject) -> None:
    offset = data.draw(st.integers(0, size - 1))
    length = data.draw(st.integers(1, size - offset))
    end = offset + length
    touched, whole = [], []
    for number in range(-(-size // cluster)):
        start, stop = number * cluster, min(size, (number + 1) * cluster)
        if start < end and offset < stop:
            touched.append(number)
        if offset <= start and stop <= end:
            whole.append(number)
    assert list(range(*clusters_touched(offset, length, cluster))) == touched
    assert list(range(*clusters_within(offset, length, cluster, size))) == whole


@given(st.lists(st.integers(0, 1), min_size=1, max_size=200), st.data())
def test_bit_runs_cover_the_range_and_alternate(bits: list[int], data: st.DataObject) -> None:
    first = data.draw(st.integers(0, len(bits) - 1))
    end = data.draw(st.integers(first, len(bits)))
    runs = list(bit_runs(bitarray(bits), first, end))
    assert [bit for start, stop, bit in runs for _ in range(start, stop)] == bits[first:end]
    assert all(a[1] == b[0] and a[2] != b[2] for a, b in itertools.pairwise(runs))


@pytest.mark.parametrize("size", [1, 4096, 65536, 65537, 10 * 65536 - 1, 4099 * 4096])
@pytest.mark.parametrize("granularity, wanted", [(4096, 65536), (65536, 4096), (8192, 8192), (4096, 2 << 20)])
def test_bits_of_another_granularity_cover_the_same_bytes_and_no_more_than_whole_grains(
    size: int, granularity: int, wanted: int
) -> None:
    chance = random.Random(size + granularity)
    bits = zeroes(div_up(size, granularity))
    for number in range(div_up(size, granularity)):
        bits[number] = chance.random() < 0.2
    result = rescale(bits, granularity, wanted, size)
    expected = zeroes(div_up(size, wanted))
    for number in bits.search(1):
        first, end = clusters_touched(number * granularity, min(granularity, size - number * granularity), wanted)
        expected[first:end] = 1
    assert result == expected
