"""Connections that cannot come back: others do the rest, and a pull fails only where none is left.

The moments are chosen by connections in memory. Of each source the first connection is number 0, and so on.
"""

from __future__ import annotations

import random
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleecing.client.request import MakeBuffer, Request
from fleecing.nbd.constants import Cmd, TransmissionFlag
from fleecing.pull import plan, worker
from fleecing.pull.any_source import AnyConnection
from fleecing.pull.engine import copy
from fleecing.pull.options import PullOptions, PullReport
from fleecing.pull.plan import StatusCall
from fleecing.pull.target import RawTarget
from fleecing.units import KiB, MiB

SIZE = 4 * MiB
PIECE = 256 * KiB
DATA = random.Random(1).randbytes(SIZE)


class Way:
    """A connection in memory; `source.answer(self)` is called before each answer."""

    peer = "memory"
    minimum_block, preferred_block, maximum_payload = 1, 64 * KiB, 32 * MiB
    size = SIZE
    waited = 0.0

    def __init__(self, source: Disk, number: int) -> None:
        self.number = number
        self.is_lost = False
        self.aborted = threading.Event()
        self.closed = False
        self._source = source
        self._cookie = 0
        self.answers: deque[Request] = deque()

    def can(self, flag: TransmissionFlag) -> bool:
        return flag in (TransmissionFlag.CAN_MULTI_CONN, TransmissionFlag.SEND_TRIM)

    def lose(self) -> None:
        self.is_lost = True
        raise ConnectionError(f"connection {self.number} is lost")

    def _submit(self, command: Cmd, offset: int, length: int) -> Request:
        if self.is_lost or self.aborted.is_set():
            self.lose()
        self._cookie += 1
        self.answers.append(Request(command, self._cookie, offset, length))
        return self.answers[-1]

    def share_memory(self, count: int, length: int) -> None:
        pass

    def release(self, request: Request) -> None:
        raise AssertionError("no memory is shared")

    def submit_late_read(self, offset: int, length: int, make_buffer: MakeBuffer) -> Request:
        request = self._submit(Cmd.READ, offset, length)
        request.buffer = make_buffer(length)
        request.buffer[:] = DATA[offset : offset + length]
        return request

    def submit_trim(self, offset: int, length: int) -> Request:
        return self._submit(Cmd.TRIM, offset, length)

    def next_finished(self) -> Request:
        if self.aborted.is_set():
            self.lose()
        self._source.answer(self)
        answer = self.answers.popleft()
        if answer.command is Cmd.TRIM:
            self._source.trimmed.append((answer.offset, answer.length))
        return answer

    def abort(self) -> None:
        self.aborted.set()

    def close(self) -> None:
        self.closed = True


class Disk:
    """Two connections at once, and what `again` gives after that."""

    uri = "memory"
    bitmap = None
    may_share = True
    takes_cpus = False
    size = SIZE

    def __init__(
        self,
        answer: Callable[[Way], None],
        again: Callable[[], None],
        *,
        ask: Callable[[Way, int, int], list[tuple[int, int]]] | None = None,
        is_snapshot: bool = False,
    ) -> None:
        self.answer = answer
        self.is_snapshot = is_snapshot
        self.trimmed: list[tuple[int, int]] = []
        self.ways: list[Way] = []
        self._again = again
        self._ask = ask
        self._numbers = count()
        self.first: AnyConnection = self.connect()

    def connect(self) -> AnyConnection:
        number = next(self._numbers)
        if number >= 2:
            self._again()
        self.ways.append(Way(self, number))
        return self.ways[-1]

    def status_call(self, connection: AnyConnection) -> StatusCall | None:
        ask = self._ask
        assert isinstance(connection, Way)
        return None if ask is None else lambda offset, length: ask(connection, offset, length)


def copied(folder: Path, disk: Disk, *, reconnect: float, **words: Any) -> PullReport:
    options = PullOptions(connections=2, piece=PIECE, depth=2, reconnect=reconnect)
    report = copy(disk, lambda size: RawTarget.create(str(folder / "copy"), size), options, interval=0.05, **words)
    assert (folder / "copy").read_bytes() == DATA
    return report


def refused() -> None:
    raise ConnectionRefusedError("refused")


@contextmanager
def silence() -> Iterator[Callable[[], None]]:
    """Whoever connects waits until this ends."""
    over = threading.Event()

    def wait() -> None:
        assert over.wait(60)
        raise ConnectionError("too late")

    try:
        yield wait
    finally:
        over.set()


def second_is_lost(way: Way) -> None:
    if way.number == 1:
        way.lose()
    time.sleep(0.02)


def test_the_other_one_goes_on(tmp_path: Path) -> None:
    disk = Disk(second_is_lost, refused)
    assert copied(tmp_path, disk, reconnect=0.05).reconnects == 0
    assert all(way.closed for way in disk.ways)


@pytest.mark.parametrize("reconnect", [0.1, 3600], ids=["beyond its time", "within its time"])
def test_an_attempt_that_lasts_longer_than_the_pull_is_no_failure(tmp_path: Path, reconnect: float) -> None:
    with silence() as wait:
        copied(tmp_path, Disk(second_is_lost, wait), reconnect=reconnect)


def test_an_attempt_that_fails_when_the_other_one_is_through_is_no_failure(tmp_path: Path) -> None:
    ended = threading.Event()

    def again() -> None:
        assert ended.wait(60)
        refused()

    def answer(way: Way) -> None:
        second_is_lost(way)
        if (tmp_path / "copy.part").stat().st_blocks * 512 >= SIZE - 2 * PIECE:
            ended.set()

    copied(tmp_path, Disk(answer, again), reconnect=0.1)


def test_a_read_without_data_is_not_taken_for_a_trim(tmp_path: Path) -> None:
    def answer(way: Way) -> None:
        way.answers[0].buffer = None

    with pytest.raises(AssertionError, match="without its data"):
        copied(tmp_path, Disk(answer, refused), reconnect=0.1)
    assert not (tmp_path / "copy").exists()


@pytest.mark.parametrize("is_snapshot", [False, True], ids=["read", "read and trimmed"])
def test_what_is_lost_at_the_very_end_finds_a_connection(tmp_path: Path, is_snapshot: bool) -> None:
    """The other one has nothing to do any more when the server falls silent to the second one's last requests."""
    asked = threading.Event()

    def answer(way: Way) -> None:
        if way.number == 1:
            asked.set()
            time.sleep(1)
            way.lose()
        assert asked.wait(60)

    disk = Disk(answer, refused, is_snapshot=is_snapshot)
    copied(tmp_path, disk, reconnect=0.1)
    assert sum(length for _, length in set(disk.trimmed)) == (SIZE if is_snapshot else 0)


def test_when_all_are_lost_for_good_the_last_one_tells(tmp_path: Path) -> None:
    with pytest.raises(ConnectionError, match="is lost"):
        copied(tmp_path, Disk(Way.lose, refused), reconnect=0.1)
    assert not list(tmp_path.iterdir())


def test_a_server_that_answers_nothing_but_handshakes_is_given_up(tmp_path: Path) -> None:
    disk = Disk(Way.lose, lambda: None)
    with pytest.raises(ConnectionError, match="is lost"):
        copied(tmp_path, disk, reconnect=0.3)
    assert len(disk.ways) < 20


def test_a_stop_does_not_wait_for_a_block_status_that_nobody_answers(tmp_path: Path) -> None:
    """The first one asks with the plan in hand, while the second one looks whether anything is left."""
    asking = threading.Event()

    def ask(way: Way, offset: int, length: int) -> list[tuple[int, int]]:
        if offset:
            asking.set()
            assert way.aborted.wait(60)
            way.lose()
        return [(length, 0)]

    def stop(_: object) -> None:
        if asking.wait(0.01):
            time.sleep(0.3)
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "WINDOW_CLUSTERS", 32)
        with pytest.raises(KeyboardInterrupt):
            copied(tmp_path, Disk(second_is_lost, refused, ask=ask), reconnect=30, progress=stop)


@given(seed=st.integers(0, 1 << 32), is_snapshot=st.booleans(), refuses=st.sampled_from([0.0, 0.5, 1.0]))
def test_one_sound_connection_copies_all(
    tmp_path_factory: pytest.TempPathFactory, seed: int, is_snapshot: bool, refuses: float
) -> None:
    """All others are lost at random, and come back or do not."""
    chance = random.Random(seed)

    def answer(way: Way) -> None:
        if way.number and chance.random() < 0.2:
            way.lose()
        time.sleep(chance.random() * 0.002)

    def again() -> None:
        if chance.random() < refuses:
            refused()

    disk = Disk(answer, again, is_snapshot=is_snapshot)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(worker, "_FIRST_DELAY", 0.001)
        copied(tmp_path_factory.mktemp("pull"), disk, reconnect=chance.choice([0.005, 0.05, 5.0]))
    assert sum(length for _, length in set(disk.trimmed)) == (SIZE if is_snapshot else 0)
