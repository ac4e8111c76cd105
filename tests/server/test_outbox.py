"""What goes out to a client: order, whole messages, and threads that never wait for one who does not read."""

from __future__ import annotations

import random
import socket
import struct
import threading
from collections.abc import Iterator
from functools import partial

import pytest

from fleecing.server import outbox
from fleecing.server.meter import Meter
from fleecing.server.outbox import Outbox
from fleecing.units import KiB, MiB
from tests.block.rig import SECONDS, in_thread

HEAD = struct.Struct(">II")
"""A message of these tests: its sender's number, its length, and that many bytes that all name the sender."""


def message(sender: int, length: int) -> bytes:
    return HEAD.pack(sender, length) + bytes([sender]) * length


def take(sock: socket.socket, count: int) -> bytes:
    data = bytearray()
    while len(data) < count:
        piece = sock.recv(count - len(data))
        assert piece, f"the end came after {len(data)} of {count} bytes"
        data += piece
    return bytes(data)


def next_message(sock: socket.socket) -> tuple[int, int]:
    """(sender, length) of a message; it must be whole."""
    sender, length = HEAD.unpack(take(sock, HEAD.size))
    assert take(sock, length) == bytes([sender]) * length
    return sender, length


class Pair:
    """An outbox and the client that it sends to."""

    def __init__(self) -> None:
        self.client, self.server = socket.socketpair()
        self.client.settimeout(SECONDS)
        self.server.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 32 * KiB)
        self.out = Outbox(self.server, Meter())

    def fill(self, sender: int = 9) -> int:
        """Send until the kernel takes no more; gives the number of whole messages, the last of which may be under way.

        What it leaves is what a client leaves that does not read.
        """
        piece = message(sender, 4 * KiB - HEAD.size)
        count = 0
        while True:
            try:
                sent = self.server.send(piece, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return count
            count += 1
            if sent < len(piece):
                self.out.late(piece[sent:])
                return count


@pytest.fixture
def pair() -> Iterator[Pair]:
    made = Pair()
    yield made
    made.client.close()
    made.server.close()


def test_replies_are_gathered_and_go_out_in_order(pair: Pair) -> None:
    for sender in (1, 2, 3):
        pair.out.put(message(sender, 100))
    pair.client.setblocking(False)
    with pytest.raises(BlockingIOError):
        pair.client.recv(1)
    pair.client.settimeout(SECONDS)
    pair.out.send()
    assert [next_message(pair.client) for _ in range(3)] == [(1, 100), (2, 100), (3, 100)]


def test_what_does_not_fit_beside_the_others_sends_them_first(pair: Pair) -> None:
    sizes = [100, outbox._SIZE - 100, outbox._SIZE + 1, 7]

    def serve() -> None:
        for sender, size in enumerate(sizes):
            pair.out.put(message(sender, size))
        pair.out.send()

    server = in_thread(serve)
    assert [next_message(pair.client) for _ in sizes] == list(enumerate(sizes))
    server.wait()


def test_parts_are_sent_behind_what_was_gathered(pair: Pair) -> None:
    pair.out.put(message(1, 10))
    whole = message(2, 20)
    pair.out.send_now([whole[:5], memoryview(whole)[5:]])
    assert [next_message(pair.client) for _ in range(2)] == [(1, 10), (2, 20)]


def test_a_late_reply_goes_out_at_once(pair: Pair) -> None:
    pair.out.put(message(1, 10))  # gathered, and nobody has said `send`
    pair.out.late(message(2, 20))
    assert next_message(pair.client) == (2, 20)


def test_a_late_reply_never_waits_for_a_client_that_does_not_read(pair: Pair) -> None:
    before = pair.fill()
    for _ in range(100):
        in_thread(partial(pair.out.late, message(1, 1000))).wait()
    assert [next_message(pair.client)[0] for _ in range(before + 100)] == [9] * before + [1] * 100


def test_a_late_reply_does_not_wait_for_the_connections_own_sending(pair: Pair) -> None:
    before = pair.fill()
    pair.out.put(message(1, 64 * KiB))
    own = in_thread(pair.out.send)
    for _ in range(10):
        pair.out.late(message(2, 10))
    assert not own.over.is_set()  # the client has read nothing: it cannot be through
    got = [next_message(pair.client)[0] for _ in range(before + 11)]
    own.wait()
    assert got[:before] == [9] * before
    assert sorted(got[before:]) == [1] + [2] * 10


def test_late_replies_larger_than_the_sockets_buffer_stay_whole_and_in_order(pair: Pair) -> None:
    sizes = [MiB, 10, 300 * KiB, 0]
    for sender, size in enumerate(sizes):
        pair.out.late(message(sender, size))
    assert [next_message(pair.client) for _ in sizes] == list(enumerate(sizes))


def test_settling_waits_until_every_late_reply_is_out(pair: Pair) -> None:
    before = pair.fill()
    for _ in range(5):
        pair.out.late(message(1, 100))
    settled = in_thread(pair.out.settle)
    assert not settled.over.is_set()
    for _ in range(before + 5):
        next_message(pair.client)
    settled.wait()
    pair.server.close()
    assert pair.client.recv(1) == b""


@pytest.mark.parametrize("seed", range(4))
def test_messages_of_many_threads_are_never_mixed(pair: Pair, seed: int) -> None:
    late_senders, count = 4, 150
    chance = random.Random(seed)
    sizes = [[int(chance.paretovariate(0.5)) % 70_000 for _ in range(count)] for _ in range(late_senders + 1)]

    def send_late(sender: int) -> None:
        for size in sizes[sender]:
            pair.out.late(message(sender, size))

    def send_own() -> None:
        for number, size in enumerate(sizes[late_senders]):
            if number % 5 == 0:
                whole = message(late_senders, size)
                pair.out.send_now([whole[:3], whole[3:]])
            else:
                pair.out.put(message(late_senders, size))
            if number % 3 == 0:
                pair.out.send()
        pair.out.send()
        pair.out.settle()

    running = [in_thread(partial(send_late, sender)) for sender in range(late_senders)]
    running.append(in_thread(send_own))
    got: list[list[int]] = [[] for _ in range(late_senders + 1)]
    for _ in range(count * (late_senders + 1)):
        sender, size = next_message(pair.client)
        got[sender].append(size)
    for thread in running:
        thread.wait()
    assert got == sizes


def test_a_client_that_is_gone_loses_late_replies_and_nobody_notices(pair: Pair) -> None:
    pair.fill()
    pair.client.close()
    for _ in range(3):
        pair.out.late(message(1, 100))
    pair.out.settle()
    assert not pair.out._late
    pair.out.put(message(1, 10))
    with pytest.raises(OSError):
        pair.out.send()


def test_a_client_that_goes_while_a_late_reply_is_under_way_frees_the_outbox(pair: Pair) -> None:
    pair.fill()
    for _ in range(3):
        pair.out.late(message(1, MiB))
    pair.client.close()
    pair.out.settle()
    assert not pair.out._late


def test_threads_that_send_the_rest_of_a_late_reply_end(pair: Pair) -> None:
    before = pair.fill()
    pair.out.late(message(1, MiB))
    for _ in range(before + 1):
        next_message(pair.client)
    pair.out.settle()
    for thread in threading.enumerate():
        if thread.name == "late reply":
            thread.join(SECONDS)
            assert not thread.is_alive()


def test_without_a_thread_for_the_rest_the_client_is_given_up(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    before = pair.fill()
    monkeypatch.setattr(threading.Thread, "start", no_thread)
    pair.out.late(message(1, 10))  # the caller notices nothing
    monkeypatch.undo()
    assert not pair.out._late
    for _ in range(before - 1):
        next_message(pair.client)
    with pytest.raises(AssertionError, match="the end came"):
        next_message(pair.client)
        next_message(pair.client)
    with pytest.raises(OSError):
        pair.out.send_now([b"more"])


def no_thread(thread: threading.Thread) -> None:
    raise RuntimeError("can't start new thread")


def impatient(pair: Pair) -> None:
    pair.server.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", 0, 100_000))


@pytest.mark.parametrize("how", ["send", "send_now", "settle", "late"])
def test_after_a_reply_that_was_not_taken_in_time_nothing_follows(pair: Pair, how: str) -> None:
    """Half a message and then another one would be read as garbage."""
    impatient(pair)
    long = message(1, 64 * KiB)
    if how == "late":
        pair.fill()
        pair.out.late(long)
        with pair.out._sending:  # the thread that sends it has given up
            pass
    elif how == "settle":
        pair.fill()
        pair.out._late.append(long)
        pair.out.settle()
    else:
        with pytest.raises(BlockingIOError):
            for _ in range(100):
                pair.out.send_now([long]) if how == "send_now" else put_and_send(pair.out, long)
    data = rest_of(pair.client)
    assert pair.out.stuck
    with pytest.raises(OSError):
        pair.out.send_now([message(2, 10)])
    assert not pair.client.recv(1)
    assert bytes([2]) * 10 not in data


def put_and_send(out: Outbox, piece: bytes) -> None:
    out.put(piece)
    out.send()


def rest_of(sock: socket.socket) -> bytes:
    """All that comes before the end."""
    data = bytearray()
    while piece := sock.recv(MiB):
        data += piece
    return bytes(data)
