"""Requests that wait in other threads: answered late, limited in number, and never at another client's cost."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

import pytest

from fleecing.block.copy_before_write import CopyBeforeWrite
from fleecing.block.node import Buffer
from fleecing.nbd.constants import Cmd, CmdFlag, NbdError, ReplyMode
from fleecing.server.connection import LONGEST_WHOLE
from fleecing.server.export import active_export
from fleecing.server.limits import LEAST_IN_FLIGHT, Limits
from fleecing.server.outbox import BACKLOG, GATHER
from fleecing.units import KiB, MiB
from tests.block.rig import SECONDS, Rig, in_thread, pattern
from tests.server.rig import CLUSTER, Disk, MakeDisk, MakeLine

SIZE = 2 * MiB
HELD_REQUESTS, HELD_BYTES = Limits().requests_in_flight, Limits().bytes_in_flight
Done = Callable[[Exception | None], None]

SIMPLE, STRUCTURED = ReplyMode.SIMPLE, ReplyMode.STRUCTURED


@pytest.fixture
def disk(make_disk: MakeDisk) -> Disk:
    return make_disk(pattern(SIZE))


class Pool(CopyBeforeWrite):
    """A disk whose changes all wait, until the test ends them one by one, or end `at_once`."""

    def __init__(self, disk: Disk, *, at_once: bool = False) -> None:
        super().__init__(disk.node.file)
        self.export = active_export("held", "", self, cluster_size=CLUSTER)
        self.waiting: list[tuple[Done, int]] = []
        self.most = 0
        self.most_bytes = 0
        self._at_once = at_once
        self._came = threading.Condition()

    def write_now(self, offset: int, data: Buffer) -> bool:
        return False

    def write_many(self, writes: Sequence[tuple[int, memoryview]]) -> list[bool | Exception]:
        return [False] * len(writes)

    def write_saving(self, offset: int, data: memoryview, hand_over: Callable[[], Done]) -> bool:
        return False

    def submit_write(self, offset: int, data: Buffer, done: Done) -> None:
        self._take(done, len(data))

    def submit_flush(self, done: Done) -> None:
        self._take(done, 0)

    def _take(self, done: Done, length: int) -> None:
        if self._at_once:
            done(None)
            return
        with self._came:
            self.waiting.append((done, length))
            self.most = max(self.most, len(self.waiting))
            self.most_bytes = max(self.most_bytes, sum(length for _, length in self.waiting))
            self._came.notify_all()

    def wait_for(self, count: int) -> None:
        """Until so many are under way."""
        with self._came:
            assert self._came.wait_for(lambda: len(self.waiting) >= count, SECONDS)

    def finish(self, count: int, error: Exception | None = None) -> None:
        """End the next `count`, in a thread of the pool: it must come back at once, whatever the client does."""
        for _ in range(count):
            self.wait_for(1)
            with self._came:
                done, _ = self.waiting.pop(0)
            in_thread(partial(done, error)).wait()


def test_a_flush_is_answered_when_it_is_done_and_holds_up_nothing(disk: Disk, line: MakeLine, mode: ReplyMode) -> None:
    disk.host.syncs.close()
    client = line(disk.export, mode)
    client.send(client.request(Cmd.FLUSH, cookie=1))
    disk.host.syncs.wait_for_one()
    assert client.ask(Cmd.READ, 5, 1000).data == pattern(SIZE)[5:1005]
    assert client.ask(Cmd.WRITE, 0, payload=b"new").error == 0
    disk.host.syncs.open()
    assert client.reply().cookie == 1
    assert disk.host.synced == 1


def test_a_flush_of_one_client_holds_up_no_other(disk: Disk, line: MakeLine) -> None:
    disk.host.syncs.close()
    slow, other = line(disk.export, SIMPLE), line(disk.export, SIMPLE)
    slow.send(slow.request(Cmd.FLUSH))
    disk.host.syncs.wait_for_one()
    assert other.ask(Cmd.WRITE, 0, payload=b"new").error == 0
    assert other.ask(Cmd.READ, 0, 3).data == b"new"


@pytest.mark.parametrize("command", [Cmd.WRITE, Cmd.WRITE_ZEROES, Cmd.TRIM])
def test_a_change_with_fua_is_answered_after_a_flush(disk: Disk, line: MakeLine, mode: ReplyMode, command: Cmd) -> None:
    disk.host.syncs.close()
    client = line(disk.export, mode)
    payload = b"x" * 4096 if command is Cmd.WRITE else b""
    client.send(client.request(command, 0, 4096, payload=payload, flags=CmdFlag.FUA, cookie=1))
    disk.host.syncs.wait_for_one()
    assert client.ask(Cmd.READ, 0, 4096).data == (payload or bytes(4096))
    disk.host.syncs.open()
    assert client.reply().cookie == 1


def test_a_long_write_with_fua_is_answered_after_a_flush(disk: Disk, line: MakeLine, mode: ReplyMode) -> None:
    disk.host.syncs.close()
    client = line(disk.export, mode)
    client.send(client.request(Cmd.WRITE, 0, payload=b"x" * (MiB + 1), flags=CmdFlag.FUA, cookie=1))
    disk.host.syncs.wait_for_one()
    assert client.ask(Cmd.READ, MiB, 1).data == b"x"
    disk.host.syncs.open()
    assert client.reply().cookie == 1


@pytest.mark.parametrize("command", [Cmd.READ, Cmd.CACHE, Cmd.FLUSH])
def test_fua_is_accepted_where_it_changes_nothing(disk: Disk, line: MakeLine, mode: ReplyMode, command: Cmd) -> None:
    assert line(disk.export, mode).ask(command, 0, 512, flags=CmdFlag.FUA).error == 0


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    rig = Rig(tmp_path, pattern(SIZE))
    yield rig
    rig.close()


def test_a_write_that_hangs_in_a_temp_holds_up_nothing(rig: Rig, line: MakeLine, mode: ReplyMode) -> None:
    """Copies are made by the connection's own thread: while it hangs, another serves the client."""
    snapshot, temp = rig.snapshot()
    temp.hold = threading.Event()
    client = line(active_export("vda", "", rig.disk, cluster_size=CLUSTER), mode)
    client.send(
        client.request(Cmd.READ, 1, 10, cookie=1),
        client.request(Cmd.WRITE, 0, payload=b"a" * 4096, cookie=2),
        client.request(Cmd.READ, 2, 10, cookie=3),
    )
    old = pattern(SIZE)
    assert [client.reply().cookie for _ in range(2)] == [1, 3]
    # Into the memory that the first payload came in, and all to the pool: a second thread must not hang so.
    client.send(*(client.request(Cmd.WRITE, n * CLUSTER, payload=b"b" * 9000, cookie=3 + n) for n in range(1, 9)))
    client.send(client.request(Cmd.READ, 0, 4096, cookie=99))
    assert client.reply().data == old[:4096]
    temp.hold.set()
    assert {client.reply().cookie for _ in range(9)} == {2, *range(4, 12)}
    assert client.ask(Cmd.READ, 0, 5000).data == b"a" * 4096 + old[4096:5000]
    assert client.ask(Cmd.READ, CLUSTER, 9001).data == b"b" * 9000 + old[CLUSTER + 9000 : CLUSTER + 9001]
    assert snapshot.read(0, SIZE) == old
    assert client.ask(Cmd.WRITE, 10 * CLUSTER, payload=b"c" * 10).error == 0


def test_writes_that_hang_together_in_a_temp_hold_up_nothing(rig: Rig, line: MakeLine, mode: ReplyMode) -> None:
    """What they overwrite is saved in one go: another thread finds all of them, and what came behind."""
    snapshot, temp = rig.snapshot()
    temp.hold = threading.Event()
    client = line(active_export("vda", "", rig.disk, cluster_size=CLUSTER), mode)
    client.send(
        client.request(Cmd.READ, 1, 10, cookie=1),
        *(client.request(Cmd.WRITE, 2 * n * CLUSTER, payload=bytes([n]) * 4096, cookie=2 + n) for n in range(8)),
        client.request(Cmd.READ, 2, 10, cookie=10),
    )
    assert [client.reply().cookie for _ in range(2)] == [1, 10]
    assert temp.held.acquire(timeout=SECONDS)
    # Into the memory that those payloads came in.
    client.send(
        *(client.request(Cmd.WRITE, (2 * n + 1) * CLUSTER, payload=b"b" * 9000, cookie=20 + n) for n in range(8))
    )
    client.send(client.request(Cmd.READ, 0, 4096, cookie=99))
    old = pattern(SIZE)
    assert client.reply().data == old[:4096]
    temp.hold.set()
    assert {client.reply().cookie for _ in range(16)} == {*range(2, 10), *range(20, 28)}
    for n in range(8):
        assert client.ask(Cmd.READ, 2 * n * CLUSTER, 4096).data == bytes([n]) * 4096
        assert client.ask(Cmd.READ, (2 * n + 1) * CLUSTER, 9000).data == b"b" * 9000
    assert snapshot.read(0, SIZE) == old
    assert client.ask(Cmd.WRITE, 20 * CLUSTER, payload=b"c" * 10).error == 0


@pytest.mark.parametrize("count", [1, 3])
def test_a_long_write_behind_writes_that_hang_in_a_temp_is_taken_from_its_header_on(
    rig: Rig, line: MakeLine, mode: ReplyMode, count: int
) -> None:
    snapshot, temp = rig.snapshot()
    client = line(active_export("vda", "", rig.disk, cluster_size=CLUSTER), mode)
    long, place = pattern(MiB + 100, seed=3), MiB + 512 * KiB
    assert client.ask(Cmd.WRITE, 0, payload=bytes(len(long))).error == 0  # so that it needs no copy below
    temp.hold = threading.Event()
    client.send(
        *(client.request(Cmd.WRITE, place + 2 * n * CLUSTER, payload=b"n" * 10, cookie=10 + n) for n in range(count)),
        client.request(Cmd.WRITE, 0, payload=long, cookie=1),
    )
    assert client.reply().cookie == 1
    assert client.ask(Cmd.READ, 0, 5000).data == long[:5000]
    temp.hold.set()
    assert set(client.replies(count)) == set(range(10, 10 + count))
    assert client.ask(Cmd.READ, 0, len(long)).data == long
    assert client.ask(Cmd.READ, place, 11).data == b"n" * 10 + pattern(SIZE)[place + 10 : place + 11]
    assert snapshot.read(0, SIZE) == pattern(SIZE)


def test_writes_in_flight_are_done_before_a_long_one_takes_their_memory(disk: Disk, line: MakeLine) -> None:
    client = line(disk.export, SIMPLE)
    long = pattern(SIZE - MiB // 2, seed=3)
    client.send(
        client.request(Cmd.WRITE, 0, payload=b"first" * 800, cookie=1),
        client.request(Cmd.WRITE, MiB // 2, payload=long, cookie=2),
        client.request(Cmd.WRITE, 8000, payload=b"last!" * 800, cookie=3),
        client.request(Cmd.DISC),
    )
    assert {client.reply().cookie for _ in range(3)} == {1, 2, 3}
    client.wait_closed()
    assert (
        disk.contents
        == b"first" * 800 + pattern(SIZE)[4000:8000] + b"last!" * 800 + pattern(SIZE)[12000 : MiB // 2] + long
    )


def test_where_no_thread_can_go_on_for_one_that_hangs_the_client_is_dropped(
    rig: Rig, line: MakeLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot, temp = rig.snapshot()
    temp.hold = threading.Event()
    client = line(active_export("vda", "", rig.disk, cluster_size=CLUSTER), SIMPLE)
    client.send(client.request(Cmd.WRITE, 0, payload=b"a" * 4096))
    assert temp.held.acquire(timeout=SECONDS)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", no_thread)
        assert client.ended()
    temp.hold.set()
    assert snapshot.read(0, SIZE) == pattern(SIZE)


def no_thread(self: threading.Thread) -> None:
    raise RuntimeError("can't start new thread")


@pytest.mark.parametrize("command", [Cmd.WRITE, Cmd.FLUSH])
def test_a_request_that_no_thread_can_be_had_for_fails_and_is_over(
    disk: Disk, line: MakeLine, monkeypatch: pytest.MonkeyPatch, command: Cmd
) -> None:
    held = Pool(disk)
    client = line(held.export, SIMPLE)

    def refuse(done: Done, length: int) -> None:
        raise OSError(5, "no thread to be had")

    monkeypatch.setattr(held, "_take", refuse)
    payload = b"x" * 100 if command is Cmd.WRITE else b""
    assert client.ask(command, 0, payload=payload).error == NbdError.EIO
    client.send(client.request(Cmd.DISC))
    client.wait_closed()  # it waits for what is under way


def test_a_flush_that_fails_says_so(disk: Disk, line: MakeLine) -> None:
    held = Pool(disk)
    client = line(held.export, STRUCTURED)
    client.send(client.request(Cmd.FLUSH))
    held.finish(1, OSError(28, "No space left on device"))
    reply = client.reply()
    assert (reply.error, reply.text) == (NbdError.ENOSPC, "FLUSH: No space left on device")


@pytest.mark.parametrize("limits", [Limits(), Limits(requests_in_flight=1), Limits(requests_in_flight=100)])
def test_a_limited_number_of_requests_waits(disk: Disk, line: MakeLine, limits: Limits) -> None:
    held = Pool(disk)
    client = line(held.export, SIMPLE, limits=limits)
    count = limits.requests_in_flight + 30
    client.send(*[client.request(Cmd.FLUSH) for _ in range(count)], client.request(Cmd.READ, 0, 100, cookie=0))
    held.wait_for(limits.requests_in_flight)
    held.finish(count)
    assert len(client.replies(count + 1)) == count + 1
    assert held.most == limits.requests_in_flight


@pytest.mark.parametrize("limits", [Limits(), Limits(bytes_in_flight=LEAST_IN_FLIGHT)])
def test_a_limited_number_of_bytes_waits(disk: Disk, line: MakeLine, limits: Limits) -> None:
    held = Pool(disk)
    client = line(held.export, SIMPLE, limits=limits)
    size, most = 900 * KiB, limits.bytes_in_flight
    count = most // size + 5
    sender = in_thread(lambda: client.send(*[client.request(Cmd.WRITE, 0, payload=bytes(size)) for _ in range(count)]))
    held.wait_for(most // size)
    held.finish(count)
    sender.wait()
    assert len(client.replies(count)) == count
    assert most - size < held.most_bytes <= most


@pytest.mark.parametrize("spare", [-1, 0, 1])
def test_no_write_is_too_long_for_the_least_that_the_limits_may_be(disk: Disk, line: MakeLine, spare: int) -> None:
    limits = Limits(bytes_in_flight=LEAST_IN_FLIGHT, all_bytes_in_flight=LEAST_IN_FLIGHT)
    client = line(Pool(disk, at_once=True).export, SIMPLE, limits=limits)
    assert client.ask(Cmd.WRITE, 0, payload=bytes(LONGEST_WHOLE + spare)).error == 0


def test_replies_are_sent_before_a_connection_waits_for_others(disk: Disk, line: MakeLine) -> None:
    held = Pool(disk)
    client = line(held.export, SIMPLE)
    client.send(
        client.request(Cmd.READ, 0, 100, cookie=0), *[client.request(Cmd.FLUSH) for _ in range(HELD_REQUESTS + 1)]
    )
    assert client.reply().cookie == 0  # nothing has ended yet
    held.finish(HELD_REQUESTS + 1)
    client.replies(HELD_REQUESTS + 1)


def test_a_client_that_reads_nothing_holds_up_no_thread_that_answers(disk: Disk, line: MakeLine) -> None:
    """Its connection has reached the limit and cannot send: the pool that all clients share must not wait for it."""
    held = Pool(disk)
    client = line(held.export, SIMPLE, buffer=4 * KiB)
    # One piece that is sent and fills the socket, one that is only gathered, then more than may wait.
    client.send(
        *[client.request(Cmd.READ, 0, length) for length in (GATHER, GATHER // 2)],
        *[client.request(Cmd.FLUSH) for _ in range(HELD_REQUESTS + 1)],
    )
    reader = in_thread(lambda: client.take(16 + GATHER))  # the first goes out; then nobody reads
    reader.wait()
    held.wait_for(HELD_REQUESTS)
    held.finish(HELD_REQUESTS)
    client.take(16 + GATHER // 2)
    held.finish(1)


def test_replies_that_nobody_reads_are_limited(disk: Disk, line: MakeLine) -> None:
    """Flush after flush without reading an answer: the connection takes no more of them, so memory stays fixed."""
    client = line(Pool(disk, at_once=True).export, SIMPLE, buffer=4 * KiB)
    unsent = Unsent(client.connection._service._out._late)
    client.connection._service._out._late = unsent
    count = 30_000
    sender = in_thread(partial(client.send, *[client.request(Cmd.FLUSH) for _ in range(count)]))
    assert unsent.many.wait(SECONDS)
    client.replies(count)
    sender.wait()
    assert unsent.most <= BACKLOG


class Unsent(deque[bytes]):
    """A queue of late replies that remembers how long it was."""

    def __init__(self, replies: Iterable[bytes]) -> None:
        super().__init__(replies)
        self.most = 0
        self.many = threading.Event()

    def append(self, reply: bytes) -> None:
        super().append(reply)
        self.most = max(self.most, len(self))
        if len(self) >= BACKLOG:
            self.many.set()


def test_a_goodbye_is_obeyed_when_what_is_under_way_has_been_answered(
    disk: Disk, line: MakeLine, mode: ReplyMode
) -> None:
    disk.host.changes.close()
    disk.host.syncs.close()
    client = line(disk.export, mode)
    client.send(
        client.request(Cmd.WRITE_ZEROES, 0, 4096, cookie=1),
        client.request(Cmd.FLUSH, cookie=2),
        client.request(Cmd.READ, 8192, 100, cookie=3),
        client.request(Cmd.DISC),
    )
    assert client.reply().cookie == 3
    disk.host.changes.wait_for_one()
    assert not client.closed.is_set()
    disk.host.changes.open()
    assert client.reply().cookie == 1
    disk.host.syncs.open()
    assert client.reply().cookie == 2
    client.wait_closed()
    assert client.ended()


def test_a_client_that_reads_late_gets_every_reply_after_its_goodbye(disk: Disk, line: MakeLine) -> None:
    held = Pool(disk)
    client = line(held.export, SIMPLE, buffer=4 * KiB)
    client.send(
        client.request(Cmd.READ, 0, 64 * KiB, cookie=0),
        *[client.request(Cmd.FLUSH) for _ in range(HELD_REQUESTS)],
        client.request(Cmd.DISC),
    )
    held.wait_for(HELD_REQUESTS)
    held.finish(HELD_REQUESTS)  # into a socket that is full
    assert len(client.replies(HELD_REQUESTS + 1)) == HELD_REQUESTS + 1
    client.wait_closed()
    assert client.ended()


def test_a_client_that_goes_with_requests_under_way_is_waited_for(disk: Disk, line: MakeLine) -> None:
    disk.host.changes.close()
    client = line(disk.export, SIMPLE)
    client.send(client.request(Cmd.WRITE_ZEROES, 0, 4096))
    disk.host.changes.wait_for_one()
    client.sock.close()
    assert not client.closed.is_set()
    disk.host.changes.open()
    client.wait_closed()
    assert disk.contents[:4096] == bytes(4096)
