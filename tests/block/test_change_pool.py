"""The pool of guest changes: what hangs is taken over, once."""

from __future__ import annotations

import threading
import time

import pytest

from fleecing.block.change_pool import Attempt, Change, ChangePool
from fleecing.block.flusher import Flusher
from tests.block.rig import SECONDS


class Pool:
    """A pool whose changes are done when `let_go` is set, and its record."""

    def __init__(self, *, again: bool) -> None:
        self.let_go = threading.Event()
        self.again = again
        self.lost = threading.Semaphore(0)
        self.done: list[Exception | None] = []
        self.answered = threading.Semaphore(0)
        self.pool = ChangePool(self.perform, self.expired, workers=1, name="test")

    def perform(self, attempt: Attempt) -> bool:
        attempt.change.apply()
        if not attempt.take():
            self.lost.release()
            return False
        attempt.change.done(None)
        return True

    def expired(self, attempt: Attempt) -> bool:
        if self.again:
            attempt.change.apply = lambda: None
            attempt.change.deadline = float("inf")
            return True
        attempt.change.done(TimeoutError())
        return False

    def submit(self, *, hang: bool, seconds: float) -> None:
        def apply() -> None:
            if hang:
                assert self.let_go.wait(SECONDS)

        def done(error: Exception | None) -> None:
            self.done.append(error)
            self.answered.release()

        now = time.monotonic()
        self.pool.submit(Change([], apply, done, now, now + seconds))


@pytest.mark.parametrize("again", [True, False])
def test_a_change_that_hangs_is_answered_and_the_pool_goes_on(again: bool) -> None:
    pool = Pool(again=again)
    pool.submit(hang=True, seconds=0.05)
    pool.submit(hang=False, seconds=SECONDS)  # waits behind it: there is one worker
    for _ in range(2):
        assert pool.answered.acquire(timeout=SECONDS)
    assert sorted(map(str, pool.done)) == sorted(["None", "None"] if again else ["", "None"])
    pool.let_go.set()
    assert pool.lost.acquire(timeout=SECONDS)  # the thread that hung finds its change taken
    assert len(pool.done) == 2
    pool.pool.close(SECONDS)


def test_closing_does_what_was_submitted_first() -> None:
    pool = Pool(again=False)
    for _ in range(10):
        pool.submit(hang=False, seconds=SECONDS)
    pool.pool.close(SECONDS)
    assert pool.done == [None] * 10


def test_more_threads_take_what_waits_behind_one_that_hangs() -> None:
    pool = Pool(again=False)
    pool.submit(hang=True, seconds=SECONDS)
    pool.pool.grow(2)
    pool.submit(hang=False, seconds=SECONDS)
    assert pool.answered.acquire(timeout=SECONDS)
    pool.let_go.set()
    assert pool.answered.acquire(timeout=SECONDS)
    pool.pool.grow(1)  # never fewer
    pool.pool.close(SECONDS)
    assert pool.done == [None] * 2


def no_thread(self: threading.Thread) -> None:
    raise RuntimeError("can't start new thread")


def test_where_no_thread_was_to_be_had_the_next_change_finds_one(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = Pool(again=False)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", no_thread)
        with pytest.raises(RuntimeError):
            pool.submit(hang=False, seconds=SECONDS)
    pool.submit(hang=False, seconds=SECONDS)
    assert pool.answered.acquire(timeout=SECONDS)
    pool.pool.close(SECONDS)


def test_the_watch_goes_on_where_no_thread_is_to_be_had_for_one_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = Pool(again=False)
    pool.submit(hang=False, seconds=SECONDS)
    assert pool.answered.acquire(timeout=SECONDS)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", no_thread)
        pool.submit(hang=True, seconds=0.05)
        assert pool.answered.acquire(timeout=SECONDS)  # its time is over all the same
    pool.submit(hang=False, seconds=SECONDS)
    assert pool.answered.acquire(timeout=SECONDS)
    pool.let_go.set()
    assert pool.lost.acquire(timeout=SECONDS)
    pool.pool.close(SECONDS)


def test_a_flusher_that_found_no_thread_finds_one_later(monkeypatch: pytest.MonkeyPatch) -> None:
    done = threading.Semaphore(0)
    ends: list[Exception | None] = []

    def tell(error: Exception | None) -> None:
        ends.append(error)
        done.release()

    flusher = Flusher(lambda: None, name="test")
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", no_thread)
        with pytest.raises(RuntimeError):
            flusher.submit(tell)
    flusher.submit(tell)
    assert done.acquire(timeout=SECONDS)
    flusher.close(SECONDS)
    assert ends == [None]
