"""Requests and connections by measured need: the rules, and a pull from servers that are far away or do one thing."""

from __future__ import annotations

import errno
import os
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleecing.client.connection import Connection
from fleecing.nbd.uri import NbdUri
from fleecing.pull import engine
from fleecing.pull.engine import pull
from fleecing.pull.limiter import Bandwidth
from fleecing.pull.need import Crowd, Depth
from fleecing.pull.options import Progress, PullOptions, PullReport
from fleecing.pull.source import Source
from fleecing.pull.target import RawTarget
from tests.client.servers import nbdkit

MiB = 1 << 20


def grown(depth: Depth, answer: Callable[[int, float], float], *, answers: int) -> int:
    """How many requests are in flight after `answers`; `answer(in flight, time sent)` is when each is answered."""
    waiting: deque[tuple[float, float]] = deque()
    now = 0.0
    for _ in range(answers):
        while len(waiting) < depth.now:
            waiting.append((now, answer(len(waiting), now)))
        sent_at, at = waiting.popleft()
        now = max(now, at)
        if more := depth.answered("READ", sent_at, now):
            depth.grow(more)
    return depth.now


def test_a_long_way_takes_all_the_requests_there_may_be() -> None:
    assert grown(Depth(4, 64), lambda _, sent: sent + 0.1, answers=1000) == 64


@pytest.mark.parametrize("service", [0.0003, 0.01, 1.0])
def test_a_server_that_takes_one_after_the_other_gets_no_more(service: float) -> None:
    free_at = 0.0

    def answer(_: int, sent: float) -> float:
        nonlocal free_at
        free_at = max(free_at, sent) + service
        return free_at

    assert grown(Depth(4, 64), answer, answers=1000) == 4


def test_requests_end_where_the_way_is_full() -> None:
    """100 ms away, and 2.5 ms for each answer on the way: 40 requests are all that it holds."""
    free_at = 0.0

    def answer(_: int, sent: float) -> float:
        nonlocal free_at
        free_at = max(free_at + 0.0025, sent + 0.1)
        return free_at

    assert grown(Depth(4, 1024), answer, answers=5000) == 64


def test_a_trim_that_is_answered_at_once_is_no_reason_for_less() -> None:
    """READ takes 100 ms, the TRIM behind it none: all slots wait for READs, nearly all of the time."""
    depth = Depth(4, 16)
    for step in range(100):
        for _ in range(depth.now):
            for kind, since in (("READ", 0.1), ("TRIM", 0.001)):
                if more := depth.answered(kind, step * 0.101 + 0.1 - since, step * 0.101 + 0.1):
                    depth.grow(more)
    assert depth.now == 16


def test_what_is_measured_across_a_pause_says_nothing() -> None:
    depth = Depth(4, 64)
    for step in range(1000):
        assert depth.answered("READ", float(step), step + 1.0) == 0
        depth.paused()


def test_no_room_is_no_room_for_good() -> None:
    depth = Depth(1, 64)
    assert not depth.answered("READ", 0.0, 1.0)
    assert not depth.answered("READ", 1.0, 2.0)
    assert depth.answered("READ", 2.0, 3.0) == 1
    depth.grow(0)
    assert depth.most == depth.now == 1


@given(st.lists(st.tuples(st.sampled_from("RT"), st.floats(0, 10), st.floats(0, 10)), max_size=200), st.integers(0, 40))
def test_never_more_than_there_may_be(answers: list[tuple[str, float, float]], most: int) -> None:
    depth = Depth(4, most)
    now = 0.0
    for kind, took, since in answers:
        now += since
        if more := depth.answered(kind, now - took, now):
            depth.grow(more)
        assert 4 <= depth.now <= max(4, most)


def test_connections_as_long_as_they_help() -> None:
    crowd = Crowd(16)
    assert crowd.wants_more(2, 100.0, 0.9)
    assert crowd.wants_more(3, 150.0, 0.9)
    assert not crowd.wants_more(4, 151.0, 0.9)
    assert not crowd.wants_more(4, 1000.0, 0.9)


def test_no_connection_for_a_copy_that_is_busy_itself() -> None:
    crowd = Crowd(16)
    assert not crowd.wants_more(2, 100.0, 0.1)
    assert crowd.wants_more(2, 100.0, 0.9)


def test_no_connection_beyond_the_most() -> None:
    assert not Crowd(2).wants_more(2, 100.0, 1.0)
    assert not Crowd(0).wants_more(1, 100.0, 1.0)


# Real servers

GROWING = PullOptions(connections=2, depth=4, piece=256 << 10, most_connections=16, most_depth=64)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.raw"
    path.write_bytes(os.urandom(48 * MiB))
    return path


def copied(tmp_path: Path, image: Path, options: PullOptions, *words: str, limit: int = 0, **more: Any) -> PullReport:
    """`words` are options of nbdkit; `limit`: connections that it takes, 0 = any number."""
    words += ("--filter=limit", "--filter=delay", "file", str(image), "rdelay=30ms", f"limit={limit}")
    with nbdkit(tmp_path, "-r", *words) as uri:
        report = pull(uri, lambda size: RawTarget.create(str(tmp_path / "copy"), size), options, **more)
    assert (tmp_path / "copy").read_bytes() == image.read_bytes()
    return report


def test_a_pull_from_far_away_has_more_requests_in_flight(tmp_path: Path, image: Path) -> None:
    report = copied(tmp_path, image, GROWING)
    assert report.requests >= 4 * report.connections * 2


def test_memory_ends_before_the_requests(tmp_path: Path, image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "MOST_MEMORY", 5 * (256 << 10))
    monkeypatch.setattr(engine, "GROW_SECONDS", 1000.0)
    assert copied(tmp_path, image, GROWING).requests == 2 * 4 + 5


def test_a_pull_from_a_server_of_one_thread_has_more_connections(
    tmp_path: Path, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "GROW_SECONDS", 0.3)
    report = copied(tmp_path, image, GROWING, "-t", "1", interval=0.05)
    assert report.connections > 2


def test_who_asks_for_a_number_gets_it(tmp_path: Path, image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "GROW_SECONDS", 0.1)
    report = copied(tmp_path, image, PullOptions(connections=3, depth=4, piece=256 << 10), interval=0.05)
    assert (report.connections, report.requests) == (3, 12)


def test_a_limit_on_the_bandwidth_wants_no_more(tmp_path: Path, image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "GROW_SECONDS", 0.1)
    report = copied(tmp_path, image, replace(GROWING, bandwidth=Bandwidth(40 * MiB)), interval=0.05)
    assert (report.connections, report.requests) == (2, 8)


def test_a_further_connection_that_is_refused_is_no_loss(
    tmp_path: Path, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "GROW_SECONDS", 0.1)
    assert copied(tmp_path, image, GROWING, "-t", "1", limit=2, interval=0.05).connections == 2


@pytest.mark.parametrize("fails", [False, True], ids=["to its end", "until it fails"])
def test_nobody_waits_for_a_further_connection_that_is_not_answered(
    tmp_path: Path, image: Path, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    monkeypatch.setattr(engine, "GROW_SECONDS", 0.1)
    over, asked, connect = threading.Event(), threading.Event(), Source.connect
    first = [True]

    def silent(source: Source) -> Connection:
        if first and first.pop():
            return connect(source)
        asked.set()
        assert over.wait(60)
        return connect(source)

    def stop(_: Progress) -> None:
        if fails and asked.is_set():
            raise OSError(errno.ENOSPC, "no more")

    monkeypatch.setattr(Source, "connect", silent)
    words: dict[str, Any] = {"interval": 0.05, "progress": stop}
    try:
        if fails:
            with pytest.raises(OSError, match="no more"):
                copied(tmp_path, image, GROWING, "-t", "1", **words)
        else:
            assert copied(tmp_path, image, GROWING, "-t", "1", **words).connections == 2
        assert asked.is_set()
    finally:
        over.set()


class SnapshotSource(Source):
    """An export that passes for a snapshot of ours."""

    def __init__(self, uri: NbdUri, *, timeout: float, bitmap: str | None = None) -> None:
        super().__init__(uri, timeout=timeout, bitmap=bitmap)
        self.is_snapshot = True


def test_a_snapshot_s_server_has_a_machine_to_serve_and_gets_no_further_connection(
    tmp_path: Path, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing else tells: as `test_a_pull_from_a_server_of_one_thread_has_more_connections`, which gets them."""
    monkeypatch.setattr(engine, "GROW_SECONDS", 0.3)
    monkeypatch.setattr(engine, "Source", SnapshotSource)
    assert copied(tmp_path, image, GROWING, "-t", "1", interval=0.05).connections == 2
