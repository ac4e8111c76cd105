"""Requests are counted, each once, whoever answers them, and whatever becomes of the client."""

from __future__ import annotations

import threading
from functools import partial

import pytest

from fleecing.nbd.constants import Cmd, CmdFlag, ReplyMode
from fleecing.server.export import active_export, snapshot_export
from fleecing.server.meter import KINDS, Tally, Traffic
from fleecing.units import KiB, MiB
from tests.block.rig import SECONDS, Rig, in_thread, pattern
from tests.server.rig import CLUSTER, Disk, MakeDisk, MakeLine

SIZE = 2 * MiB
SIMPLE, STRUCTURED = ReplyMode.SIMPLE, ReplyMode.STRUCTURED


@pytest.fixture
def disk(make_disk: MakeDisk) -> Disk:
    return make_disk(pattern(SIZE))


def counted(tally: Tally) -> dict[str, tuple[int, int, int]]:
    """(requests, errors, bytes) of each kind that there was."""
    return {
        name: (tally.requests[kind], tally.errors[kind], tally.bytes[kind])
        for kind, name in KINDS.items()
        if tally.requests[kind]
    }


def timed(tally: Tally) -> dict[str, int]:
    """How many of each kind are in the histograms."""
    return {name: found.count for kind, name in KINDS.items() if (found := tally.latencies[kind]) is not None}


def test_every_kind_is_counted_when_its_reply_is_there(disk: Disk, line: MakeLine, mode: ReplyMode) -> None:
    client = line(disk.export, mode, ["base:allocation"] if mode is not SIMPLE else ())
    expected: dict[str, tuple[int, int, int]] = {}
    for command, length, moved in (
        (Cmd.READ, 4 * KiB, 4 * KiB),
        (Cmd.READ, SIZE, SIZE),
        (Cmd.WRITE, 5000, 5000),
        (Cmd.TRIM, CLUSTER, CLUSTER),
        (Cmd.WRITE_ZEROES, 100, 100),
        (Cmd.CACHE, CLUSTER, 0),
        (Cmd.FLUSH, 0, 0),
        *([(Cmd.BLOCK_STATUS, CLUSTER, 0)] if mode is not SIMPLE else []),
    ):
        payload = {"payload": b"x" * length} if command is Cmd.WRITE else {"length": length}
        assert client.ask(command, 0, **payload).error == 0
        name = KINDS[command]
        requests, errors, before = expected.get(name, (0, 0, 0))
        expected[name] = (requests + 1, errors, before + moved)
        assert counted(disk.export.traffic.total()) == expected
    client.end()
    assert counted(disk.export.traffic.total()) == expected
    assert timed(disk.export.traffic.total()) == {name: requests for name, (requests, _, _) in expected.items()}


def test_a_batch_is_timed_as_a_whole_and_each_of_its_requests_once(disk: Disk, line: MakeLine, mode: ReplyMode) -> None:
    client = line(disk.export, mode)
    client.send(
        *(client.request(Cmd.READ, n * 512, 512, cookie=n) for n in range(40)),
        *(client.request(Cmd.WRITE, n * 512, payload=b"x" * 512, cookie=100 + n) for n in range(100)),
        *(client.request(Cmd.READ, n * 512, 512, cookie=200 + n) for n in range(7)),
        client.request(Cmd.CACHE, 0, 10, cookie=300),
    )
    for _ in range(148):
        assert client.reply().error == 0
    client.end()
    assert timed(disk.export.traffic.total()) == {"read": 47, "write": 100, "cache": 1}


def test_errors_are_counted_apart_and_move_no_bytes(disk: Disk, line: MakeLine, mode: ReplyMode) -> None:
    disk.host.bad = range(8 * CLUSTER, 9 * CLUSTER)
    client = line(disk.export, mode)
    for command, offset, length in (
        (Cmd.READ, 8 * CLUSTER, 10),
        (Cmd.READ, SIZE, 10),
        (Cmd.READ, 0, SIZE),  # half-way, where replies are structured
        (Cmd.TRIM, SIZE, 10),
        (Cmd.WRITE_ZEROES, 8 * CLUSTER, 10),
    ):
        assert client.ask(command, offset, length).error
    assert client.ask(Cmd.WRITE, 8 * CLUSTER, payload=b"x" * 10).error
    assert client.ask(Cmd.WRITE, SIZE, payload=b"x" * 10).error
    client.send(client.request(Cmd.WRITE, SIZE - 10, payload=b"x" * 3 * MiB))  # longer than the receive buffer
    assert client.reply().error
    client.send(client.request(99, 0, 0))
    assert client.reply().error
    expected = {"read": (3, 3, 0), "write": (3, 3, 0), "write_zeroes": (1, 1, 0), "trim": (1, 1, 0), "other": (1, 1, 0)}
    assert counted(disk.export.traffic.total()) == expected
    client.end()
    assert timed(disk.export.traffic.total()) == {name: requests for name, (requests, _, _) in expected.items()}


def test_a_long_write_is_counted_once_and_when_it_is_done(disk: Disk, line: MakeLine, mode: ReplyMode) -> None:
    client = line(disk.export, mode)
    length = SIZE - 100
    for flags in (CmdFlag(0), CmdFlag.FUA):
        assert client.ask(Cmd.WRITE, 50, payload=b"x" * length, flags=flags).error == 0
    assert counted(disk.export.traffic.total()) == {"write": (2, 0, 2 * length)}
    assert client.connection.bytes_written == 2 * length
    client.end()
    assert timed(disk.export.traffic.total()) == {"write": 2}


def test_a_write_whose_flush_fails_has_moved_nothing(
    disk: Disk, line: MakeLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(disk.host, "sync", fail)
    client = line(disk.export, STRUCTURED)
    assert client.ask(Cmd.WRITE, 0, payload=b"x" * 10, flags=CmdFlag.FUA).error
    assert counted(disk.export.traffic.total()) == {"write": (1, 1, 0)}


def test_what_hangs_and_is_handed_over_is_counted_once(rig: Rig, line: MakeLine, mode: ReplyMode) -> None:
    """Another thread goes on in the place of the one that hangs: both count, neither twice."""
    _, temp = rig.snapshot()
    temp.hold = threading.Event()
    export = active_export("vda", "", rig.disk, cluster_size=CLUSTER)
    client = line(export, mode)
    client.send(
        client.request(Cmd.READ, 1, 10, cookie=1),
        *(client.request(Cmd.WRITE, 2 * n * CLUSTER, payload=b"a" * 100, cookie=2 + n) for n in range(4)),
        client.request(Cmd.READ, 2, 10, cookie=6),
    )
    assert [client.reply().cookie for _ in range(2)] == [1, 6]
    client.send(client.request(Cmd.WRITE, 9 * CLUSTER, payload=b"b" * 100, cookie=7))
    client.send(client.request(Cmd.READ, 0, 10, cookie=8))
    assert client.reply().cookie == 8
    assert counted(export.traffic.total()) == {"read": (3, 0, 30)}
    temp.hold.set()
    assert {client.reply().cookie for _ in range(5)} == {2, 3, 4, 5, 7}
    assert counted(export.traffic.total()) == {"read": (3, 0, 30), "write": (5, 0, 500)}
    client.end()
    assert timed(export.traffic.total()) == {"read": 3, "write": 5}


def test_a_client_that_vanishes_has_had_no_error(disk: Disk, line: MakeLine, mode: ReplyMode) -> None:
    """It asked for more than the sockets hold, and takes nothing of it."""
    client = line(disk.export, mode, buffer=4 * KiB)
    client.send(*(client.request(Cmd.READ, 0, SIZE, cookie=n) for n in range(4)))
    client.sock.recv(1)
    client.hang_up()
    tally = disk.export.traffic.total()
    requests, errors, moved = counted(tally).get("read", (0, 0, 0))
    assert errors == 0
    assert moved == requests * SIZE
    assert timed(tally).get("read", 0) == requests


def test_four_connections_at_once_are_counted_exactly(rig: Rig, line: MakeLine) -> None:
    """Each with batches of its own, while somebody looks all the time: no number ever goes down."""
    rig.snapshot()
    traffic = Traffic()
    export = active_export("vda", "", rig.disk, cluster_size=CLUSTER, traffic=traffic)
    clients = [line(export, SIMPLE) for _ in range(4)]

    def work(number: int) -> None:
        client = clients[number]
        for turn in range(30):
            at = (number * 7 + turn) % 32 * CLUSTER
            client.send(
                *(client.request(Cmd.WRITE, at + 512 * n, payload=b"x" * 512, cookie=n) for n in range(5)),
                *(client.request(Cmd.READ, at + 512 * n, 512, cookie=10 + n) for n in range(6)),
                client.request(Cmd.FLUSH, 0, 0, cookie=20),
            )
            for _ in range(12):
                assert client.reply().error == 0
        client.end()

    running = [in_thread(partial(work, number)) for number in range(4)]
    last = traffic.total().requests
    while not all(thread.over.is_set() for thread in running):
        now = traffic.total().requests
        assert all(new >= old for new, old in zip(now, last, strict=True))
        last = now
    for thread in running:
        thread.wait()
    expected = {"read": (720, 0, 720 * 512), "write": (600, 0, 600 * 512), "flush": (120, 0, 0)}
    assert counted(traffic.total()) == expected
    assert timed(traffic.total()) == {"read": 720, "write": 600, "flush": 120}
    assert traffic.opened == 4


def test_snapshots_of_a_disk_are_counted_together(rig: Rig, line: MakeLine, mode: ReplyMode) -> None:
    traffic = Traffic()
    for name in ("one", "two"):
        snapshot, _ = rig.snapshot(name)
        client = line(snapshot_export(f"vda@{name}", "", snapshot, traffic=traffic), mode)
        assert client.ask(Cmd.READ, 0, 100).error == 0
        assert client.ask(Cmd.TRIM, 0, CLUSTER).error == 0
        assert client.ask(Cmd.READ, 0, 100).error
        client.end()
        snapshot.remove(SECONDS)
    assert counted(traffic.total()) == {"read": (4, 2, 200), "trim": (2, 0, 2 * CLUSTER)}
