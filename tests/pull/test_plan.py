"""The plan: from block status to pieces of whole clusters."""

from __future__ import annotations

import threading
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleecing.pull import plan as plan_module
from fleecing.pull.plan import Piece, Plan

HOLE, DATA, ZERO = 1, 0, 3
Extents = list[tuple[int, int]]


class Status:
    """A disk's block status, answered at most `most` bytes at a time; notes what it was asked."""

    def __init__(self, extents: Extents, most: int = 1 << 62) -> None:
        self.extents = extents
        self.most = most
        self.asked: list[tuple[int, int]] = []

    def __call__(self, offset: int, length: int) -> Extents:
        self.asked.append((offset, length))
        end = offset + min(length, self.most)
        found, start = [], 0
        for size, status in self.extents:
            a, b = max(start, offset), min(start + size, end)
            if a < b:
                found.append((b - a, status))
            start += size
        return found


def pieces(
    size: int, extents: Extents | None, *, cluster: int = 64, data_piece: int = 256, most: int = 1 << 62
) -> list[Piece]:
    plan = Plan(size, cluster=cluster, data_piece=data_piece)
    status = None if extents is None else Status(extents, most)
    return list(iter(lambda: plan.take(status), None))


def test_without_block_status_everything_is_data() -> None:
    assert pieces(600, None) == [Piece(0, 256, False), Piece(256, 256, False), Piece(512, 88, False)]


def test_zero_and_data_come_apart_at_clusters() -> None:
    assert pieces(512, [(128, ZERO), (64, DATA), (320, ZERO)]) == [
        Piece(0, 128, True),
        Piece(128, 64, False),
        Piece(192, 320, True),
    ]


def test_a_cluster_with_any_data_is_data() -> None:
    assert pieces(256, [(65, ZERO), (1, DATA), (190, ZERO)]) == [
        Piece(0, 64, True),
        Piece(64, 64, False),
        Piece(128, 128, True),
    ]


def test_data_of_two_neighbouring_clusters_is_one_piece() -> None:
    assert pieces(256, [(63, ZERO), (2, DATA), (191, ZERO)]) == [Piece(0, 128, False), Piece(128, 128, True)]


def test_a_hole_that_is_not_known_to_be_zero_is_data() -> None:
    assert pieces(64, [(64, HOLE)]) == [Piece(0, 64, False)]


def test_a_tail_shorter_than_a_cluster_is_a_piece_like_any_other() -> None:
    assert pieces(131, [(128, DATA), (3, ZERO)]) == [Piece(0, 128, False), Piece(128, 3, True)]
    assert pieces(131, [(128, ZERO), (2, ZERO), (1, DATA)]) == [Piece(0, 128, True), Piece(128, 3, False)]


def test_an_empty_disk_has_no_pieces() -> None:
    assert pieces(0, []) == []


def test_answers_that_end_inside_a_cluster_are_put_together() -> None:
    extents = [(100, ZERO), (10, DATA), (402, ZERO)]
    assert pieces(512, extents, most=7) == pieces(512, extents)


def test_pieces_are_at_least_a_cluster() -> None:
    assert pieces(128, None, cluster=64, data_piece=10) == [Piece(0, 64, False), Piece(64, 64, False)]


def test_long_zeroes_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_module, "ZERO_PIECE", 1000)
    assert pieces(2000, [(2000, ZERO)]) == [Piece(0, 960, True), Piece(960, 960, True), Piece(1920, 80, True)]


def test_block_status_is_asked_one_window_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_module, "WINDOW_CLUSTERS", 4)
    status = Status([(200, DATA), (400, ZERO)])
    plan = Plan(600, cluster=64, data_piece=64)
    assert plan.take(status) == Piece(0, 64, False)
    assert status.asked == [(0, 256)]
    while plan.take(status):
        pass
    assert status.asked == [(0, 256), (256, 256), (512, 88)]


def test_an_error_of_block_status_goes_to_who_asked_and_nothing_is_lost() -> None:
    def fail(offset: int, length: int) -> Extents:
        raise OSError("gone")

    plan = Plan(128, cluster=64, data_piece=64)
    with pytest.raises(OSError, match="gone"):
        plan.take(fail)
    assert plan.take(None) == Piece(0, 64, False)


def test_threads_share_the_pieces_without_gap_or_overlap() -> None:
    plan = Plan(64 * 4000, cluster=64, data_piece=64)
    status = Status([(64 * 4000, DATA)])
    taken: list[list[Piece]] = [[] for _ in range(4)]

    def work(mine: list[Piece]) -> None:
        while piece := plan.take(status):
            mine.append(piece)

    threads = [threading.Thread(target=work, args=(mine,)) for mine in taken]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert Counter(piece.offset for mine in taken for piece in mine) == Counter(range(0, 64 * 4000, 64))


@given(
    st.lists(st.tuples(st.integers(1, 300), st.sampled_from([HOLE, DATA, ZERO])), max_size=30),
    st.sampled_from([1, 16, 64]),
    st.integers(1, 300),
    st.integers(1, 500),
)
def test_pieces_cover_the_disk_and_no_data_is_called_zero(
    extents: Extents, cluster: int, piece: int, most: int
) -> None:
    size = sum(length for length, _ in extents)
    known = b"".join(bytes([status == ZERO]) * length for length, status in extents)
    position = 0
    for offset, length, is_zero, _ in pieces(size, extents, cluster=cluster, data_piece=piece, most=most):
        assert offset == position
        assert not offset % cluster
        position += length
        assert not length % cluster or position == size
        clusters = [known[at : at + cluster] for at in range(offset, position, cluster)]
        assert all(all(one) == is_zero for one in clusters)
    assert position == size


# What is left out


def test_what_is_done_is_neither_handed_out_nor_asked_for() -> None:
    """A trimmed cluster's block status is an error."""
    status = Status([(1024, DATA)])
    plan = Plan(1024, cluster=64, data_piece=128, done=[(0, 64), (256, 512), (960, 1024)])
    found = [(piece.offset, piece.length) for piece in iter(lambda: plan.take(status), None)]
    assert found == [(64, 128), (192, 64), (512, 128), (640, 128), (768, 128), (896, 64)]
    assert status.asked == [(64, 192), (512, 448)]


def test_clean_clusters_are_left_out_and_counted() -> None:
    extents = [
        (64, plan_module.CLEAN),
        (10, plan_module.CLEAN | ZERO),
        (54, DATA),
        (64, ZERO),
        (128, plan_module.CLEAN),
    ]
    plan = Plan(320, cluster=64, data_piece=256)
    status = Status(extents)
    assert list(iter(lambda: plan.take(status), None)) == [Piece(64, 64, False), Piece(128, 64, True)]
    assert plan.clean == 192


def test_a_question_that_fails_can_be_asked_again() -> None:
    plan = Plan(256, cluster=64, data_piece=64)
    good = Status([(256, DATA)], most=64)
    calls = 0

    def fails_late(offset: int, length: int) -> Extents:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise ConnectionError
        return good(offset, length)

    with pytest.raises(ConnectionError):
        plan.take(fails_late)
    assert [piece.offset for piece in iter(lambda: plan.take(good), None)] == [0, 64, 128, 192]


def test_what_is_put_back_comes_first_even_beyond_the_limit() -> None:
    plan = Plan(256, cluster=64, data_piece=64)
    first = plan.take(None, before=64)
    assert first == Piece(0, 64, False)
    assert plan.take(None, before=64) is None and not plan.exhausted
    assert plan.next_offset() == 64
    plan.put_back(Piece(192, 64, False, is_kept=True))
    assert plan.take(None, before=64) == Piece(192, 64, False, True)
