"""Requests under way of all clients together: bounded, shared out fairly, machines first, and nobody waits for ever."""

from __future__ import annotations

import threading
from functools import partial
from random import Random

import pytest

from fleecing.nbd.constants import Cmd, ReplyMode
from fleecing.server.limits import LEAST_IN_FLIGHT
from fleecing.server.shares import Share, Shares
from fleecing.units import KiB, MiB
from tests.block.rig import SECONDS, Running, in_thread, pattern
from tests.server.rig import Disk, MakeDisk, MakeLine
from tests.server.test_waiting import Pool

MUCH = 1000


def client(shares: Shares, requests: int = MUCH, size: int = MUCH * MiB, *, machine: bool = True) -> Share:
    return shares.share(requests, size, machine=machine)


def take_all(share: Share, count: int = 0) -> int:
    """How many requests with `count` bytes it gets without waiting."""
    taken = 0
    while share.try_take(count):
        taken += 1
    return taken


class Watched(Shares):
    """A test can wait for somebody who stands in the queue."""

    def __init__(self, requests: int, size: int) -> None:
        super().__init__(requests, size)
        self.queued = threading.Semaphore(0)

    def queue(self, share: Share) -> None:
        super().queue(share)
        self.queued.release()

    def wait_for_one(self) -> None:
        """Until one more waits."""
        assert self.queued.acquire(timeout=SECONDS)


def waiting(shares: Watched, share: Share, count: int = 0) -> Running:
    """The client takes a request that it must wait for; returns when it stands in the queue."""
    running = in_thread(partial(share.take, count))
    shares.wait_for_one()
    return running


def test_a_client_has_its_own_limits() -> None:
    shares = Shares(1000, 100 * MiB)
    one = client(shares, requests=5)
    assert take_all(one) == 5
    other = client(shares, size=3 * MiB)
    assert take_all(other, MiB) == 3
    running = in_thread(partial(other.take, MiB))
    assert not running.over.is_set()
    other.give_back(MiB)
    running.wait()
    assert not other.try_take(MiB)
    assert other.try_take(0)


def test_nobody_takes_more_than_it_leaves_free() -> None:
    shares = Shares(60, 60 * MiB)
    first, second, third = client(shares), client(shares), client(shares)
    assert [take_all(share) for share in (first, second, third)] == [30, 15, 8]
    for share, count in ((first, 30), (second, 15), (third, 8)):
        for _ in range(count):
            share.give_back(0)
    assert [take_all(share, MiB) for share in (first, second, third)] == [30, 15, 8]


def test_what_all_have_is_bounded() -> None:
    shares = Shares(10, 10 * MiB)
    taken = [take_all(client(shares)) for _ in range(20)]
    assert sum(taken) == 10
    assert shares.requests == 0


def test_a_quarter_is_kept_for_machines() -> None:
    shares = Shares(100, 100 * MiB)
    assert sum(take_all(client(shares, machine=False)) for _ in range(200)) == 75
    assert take_all(client(shares)) > 0


def test_machines_come_first_then_who_has_least_then_who_waited_longest() -> None:
    shares = Watched(8, 8 * MiB)
    holder, backup, busy, early, late = (client(shares, machine=number != 1) for number in range(5))
    busy.take_now(0)
    for _ in range(7):
        holder.take_now(0)
    order = {
        name: waiting(shares, share)
        for name, share in (("backup", backup), ("busy", busy), ("early", early), ("late", late))
    }
    for name in ("early", "late"):
        assert not order[name].over.is_set()
        holder.give_back(0)
        order[name].wait()
    holder.give_back(0)
    assert not order["busy"].over.is_set()  # it has one already, so two must be free
    holder.give_back(0)
    order["busy"].wait()
    for _ in range(2):
        assert not order["backup"].over.is_set()
        holder.give_back(0)
    order["backup"].wait()


def test_nobody_overtakes_who_waits_with_a_large_request() -> None:
    shares = Watched(MUCH, 4 * MiB)
    holder, large, small = client(shares), client(shares), client(shares)
    holder.take_now(3 * MiB + 512 * KiB)
    running = waiting(shares, large, MiB)
    assert not small.try_take(4 * KiB)  # it would fit
    holder.give_back(3 * MiB + 512 * KiB)
    running.wait()
    assert small.try_take(4 * KiB)


@pytest.mark.parametrize("machine", [True, False])
def test_the_least_limits_let_one_request_through(machine: bool) -> None:
    shares = Shares(1, LEAST_IN_FLIGHT)
    share = client(shares, machine=machine)
    for _ in range(3):
        assert share.try_take(LEAST_IN_FLIGHT if machine else 0)
        assert not share.try_take(0)
        share.give_back(LEAST_IN_FLIGHT if machine else 0)


def test_a_thread_that_may_not_wait_goes_above_the_limits_and_others_wait_for_it() -> None:
    shares = Watched(2, 2 * MiB)
    share, other = client(shares), client(shares)
    for _ in range(4):
        share.take_now(MiB)
    running = waiting(shares, other, MiB)
    for _ in range(2):
        share.give_back(MiB)
        assert not running.over.is_set()
    share.give_back(MiB)
    running.wait()


@pytest.mark.parametrize("requests, size", [(1, MiB), (3, MiB), (16, 4 * MiB)])
def test_many_clients_at_once_all_come_to_an_end(requests: int, size: int) -> None:
    """Whatever they ask for and whenever it ends; and the bounds hold at every moment."""
    shares = Shares(requests, size)
    ended = threading.Semaphore(0)
    worst: list[tuple[int, int]] = []

    def run(share: Share, dice: Random) -> None:
        for _ in range(60):
            count = dice.choice((0, 4096, MiB)) if share.machine else 0
            if not share.try_take(count):
                share.take(count)
            worst.append((shares.requests, shares.size))
            threading.Thread(target=share.give_back, args=(count,)).start()
        share.wait_idle()
        assert (share.requests, share.size) == (0, 0)
        ended.release()

    for number in range(8):
        share = client(shares, requests=4, size=2 * MiB, machine=number % 3 != 0)
        threading.Thread(target=run, args=(share, Random(number)), daemon=True).start()
    for _ in range(8):
        assert ended.acquire(timeout=SECONDS)
    assert (shares.requests, shares.size) == (requests, size)
    assert min(free for free, _ in worst) >= 0
    assert min(free for _, free in worst) >= 0


# Connections.


@pytest.fixture
def disk(make_disk: MakeDisk) -> Disk:
    return make_disk(pattern(2 * MiB))


def test_a_client_that_floods_leaves_room_for_the_others(disk: Disk, line: MakeLine) -> None:
    """Writes that nobody ends: another client still gets its own through, and reads are not concerned."""
    shares = Shares(8, 8 * MiB)
    greedy, other = Pool(disk), Pool(disk)
    flood, calm = (line(pool.export, ReplyMode.SIMPLE, shares=shares) for pool in (greedy, other))
    flood.send(*[flood.request(Cmd.WRITE, 0, payload=b"x" * 4096) for _ in range(20)])
    greedy.wait_for(4)
    calm.send(calm.request(Cmd.WRITE, 0, payload=b"y", cookie=1), calm.request(Cmd.READ, 0, 10, cookie=2))
    other.wait_for(1)
    assert calm.reply().data == pattern(10)
    other.finish(1)
    assert calm.reply().cookie == 1
    assert len(greedy.waiting) == 4
    greedy.finish(20)
    assert len(flood.replies(20)) == 20
    assert (shares.requests, shares.size) == (8, 8 * MiB)


def test_replies_are_sent_before_a_connection_waits_for_other_clients(disk: Disk, line: MakeLine) -> None:
    shares = Shares(1, MiB)
    full, held = Pool(disk), Pool(disk)
    first, second = (line(pool.export, ReplyMode.SIMPLE, shares=shares) for pool in (full, held))
    first.send(first.request(Cmd.FLUSH))
    full.wait_for(1)
    second.send(second.request(Cmd.READ, 0, 100, cookie=0), second.request(Cmd.FLUSH, cookie=1))
    assert second.reply().cookie == 0
    assert not held.waiting
    full.finish(1)
    held.finish(1)
    assert second.reply().cookie == 1
    first.reply()


def test_a_client_that_goes_while_it_waits_for_others_leaves_nothing_behind(disk: Disk, line: MakeLine) -> None:
    shares = Watched(1, MiB)
    full, held = Pool(disk), Pool(disk, at_once=True)
    first, second = (line(pool.export, ReplyMode.SIMPLE, shares=shares) for pool in (full, held))
    first.send(first.request(Cmd.FLUSH))
    full.wait_for(1)
    second.send(second.request(Cmd.WRITE, 0, payload=b"x"))
    shares.wait_for_one()
    second.sock.close()
    full.finish(1)
    second.wait_closed()
    first.reply()
    assert (shares.requests, shares.size) == (1, MiB)
