"""The bandwidth limit, to the byte, on a clock that only moves when somebody waits."""

from __future__ import annotations

import threading
from collections import deque
from pathlib import Path

import pytest

from fleecing.client.request import MakeBuffer, Request
from fleecing.nbd.constants import Cmd, TransmissionFlag
from fleecing.pull.any_source import AnyConnection
from fleecing.pull.engine import copy
from fleecing.pull.limiter import Bandwidth
from fleecing.pull.options import PullOptions
from fleecing.pull.plan import StatusCall
from fleecing.pull.target import RawTarget
from fleecing.units import KiB, MiB
from tests.images import random_bytes

RATE = MiB


class Clock:
    """Where somebody waits until a time, it is that time."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def pause(self, changed: threading.Condition, until: float) -> None:
        self.now = max(self.now, until)

    def limit(self, rate: int = RATE) -> Bandwidth:
        return Bandwidth(rate, clock=self, pause=self.pause)


class Memory:
    """A disk in memory, as one connection to itself; `asked`: when how many bytes were."""

    uri = peer = "memory"
    bitmap = None
    is_snapshot = is_lost = False
    waited = 0.0
    may_share = True
    takes_cpus = False
    minimum_block, preferred_block, maximum_payload = 1, 64 * KiB, 32 * MiB

    def __init__(self, data: bytes, clock: Clock) -> None:
        self.data, self.clock = data, clock
        self.size = len(data)
        self.first: AnyConnection = self
        self.asked: list[tuple[float, int]] = []
        self._local = threading.local()

    def connect(self) -> AnyConnection:
        return self

    def status_call(self, connection: AnyConnection) -> StatusCall | None:
        return None

    def can(self, flag: TransmissionFlag) -> bool:
        return flag is TransmissionFlag.CAN_MULTI_CONN

    def _finished(self) -> deque[Request]:
        if not hasattr(self._local, "finished"):
            self._local.finished = deque()
        found: deque[Request] = self._local.finished
        return found

    def share_memory(self, count: int, length: int) -> None:
        pass

    def release(self, request: Request) -> None:
        raise AssertionError("no memory is shared")

    def submit_late_read(self, offset: int, length: int, make_buffer: MakeBuffer) -> Request:
        self.asked.append((self.clock.now, length))
        request = Request(Cmd.READ, len(self.asked), offset, length, make_buffer(length))
        assert request.buffer is not None
        request.buffer[:] = self.data[offset : offset + length]
        self._finished().append(request)
        return request

    def submit_trim(self, offset: int, length: int) -> Request:
        raise AssertionError("this is no snapshot")

    def next_finished(self) -> Request:
        return self._finished().popleft()

    def abort(self) -> None:
        pass

    def close(self) -> None:
        pass


@pytest.mark.parametrize("connections", [1, 4])
def test_a_copy_asks_for_no_byte_too_early_and_wastes_no_time(tmp_path: Path, connections: int) -> None:
    clock = Clock()
    source = Memory(random_bytes(5 * MiB), clock)
    options = PullOptions(connections=connections, bandwidth=clock.limit())
    copy(source, lambda size: RawTarget.create(str(tmp_path / "copy"), size), options)
    assert (tmp_path / "copy").read_bytes() == source.data
    before = 0
    for at, count in sorted(source.asked):
        assert count == RATE // 4
        assert at >= before / RATE
        before += count
    assert clock.now == (5 * MiB - RATE // 4) / RATE


def test_idle_time_is_no_credit() -> None:
    clock = Clock()
    limit = clock.limit()
    limit.wait(limit.book(MiB))
    assert clock.now == 0
    clock.now = 100.0
    for _ in range(3):
        limit.wait(limit.book(MiB))
    assert clock.now == 102.0


def test_a_change_counts_from_now_on_and_none_is_no_limit() -> None:
    clock = Clock()
    limit = clock.limit()
    limit.book(4 * MiB)
    clock.now = 2.0  # half of it is paid
    limit.set(2 * RATE)
    limit.wait(limit.book(MiB))
    assert clock.now == 3.0
    limit.set(0)
    assert limit.is_due(limit.book(MiB)) and limit.rate == 0
    limit.set(RATE)
    limit.wait(limit.book(MiB))
    assert clock.now == 3.0, "what went without a limit is not paid for later"


@pytest.mark.parametrize("free", ["set", "stop"])
def test_who_waits_is_told(free: str) -> None:
    limit = Bandwidth(1)
    limit.book(1 << 40)
    waiting = threading.Thread(target=limit.wait, args=(limit.book(1),))
    waiting.start()
    assert waiting.is_alive()
    limit.set(0) if free == "set" else limit.stop()
    waiting.join()
