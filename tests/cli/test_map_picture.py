"""The picture of the clusters."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from fleecing.cli.map_command import Picture
from fleecing.units import div_up

CLUSTER = 4096


def test_a_cell_shows_the_state_that_most_of_it_is_in() -> None:
    picture = Picture(8 * CLUSTER, CLUSTER, 2)
    assert picture.cell_size == 4 * CLUSTER
    picture.add(0, CLUSTER, "copied")
    picture.add(CLUSTER, 6 * CLUSTER, "untouched")
    picture.add(7 * CLUSTER, CLUSTER, "trimmed")
    assert picture.states() == ["untouched", "untouched"]
    assert picture.totals == {"copied": CLUSTER, "untouched": 6 * CLUSTER, "trimmed": CLUSTER}


def test_a_small_disk_has_a_cell_for_each_cluster() -> None:
    picture = Picture(2 * CLUSTER + 1, CLUSTER, 1000)
    picture.add(0, CLUSTER, "copied")
    picture.add(CLUSTER, CLUSTER, "trimmed")
    picture.add(2 * CLUSTER, 1, "not_in_bitmap")
    assert picture.states() == ["copied", "trimmed", "not_in_bitmap"]


@given(st.integers(1, 1 << 40), st.integers(1, 5000))
def test_the_cells_cover_the_disk_and_are_never_too_many(size: int, most: int) -> None:
    picture = Picture(size, CLUSTER, most)
    assert len(picture.cells) <= most
    assert len(picture.cells) == div_up(size, picture.cell_size)
    assert picture.cell_size % CLUSTER == 0


@given(st.lists(st.tuples(st.integers(1, 100), st.sampled_from(["a", "b"])), min_size=1), st.integers(1, 50))
def test_every_byte_is_counted_once(runs: list[tuple[int, str]], most: int) -> None:
    picture = Picture(sum(length for length, _ in runs), 1, most)
    offset = 0
    for length, state in runs:
        picture.add(offset, length, state)
        offset += length
    for state in ("a", "b"):
        assert sum(cell.get(state, 0) for cell in picture.cells) == picture.totals.get(state, 0)
    assert all(sum(cell.values()) == picture.cell_size for cell in picture.cells[:-1])
