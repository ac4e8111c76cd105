"""An export on which reading trims: what counts as sent, what can be asked for again, and who shares it."""

from __future__ import annotations

import random
import socket
import sys
import threading
from functools import partial

import pytest

from fleecing.block.extent import ClusterState
from fleecing.block.snapshot_access import SnapshotAccess
from fleecing.nbd.constants import BASE_ALLOCATION, READ_ONCE, Cmd, CmdFlag, NbdError, ReplyMode
from fleecing.server.export import Export, snapshot_export
from fleecing.units import KiB, MiB
from tests.block.rig import CLUSTER, Rig, in_thread, pattern
from tests.server.rig import MakeLine

SIZE = 4 * MiB + 5
COUNT = SIZE // CLUSTER + 1
OLD = pattern(SIZE)


@pytest.fixture
def export(snapshot: SnapshotAccess) -> Export:
    """Without any grace: what was sent is trimmed before the next request is looked at."""
    return snapshot_export("vda@s", "", snapshot, read_once_grace=0)


def trimmed(snapshot: SnapshotAccess) -> list[int]:
    """The clusters that were."""
    return [n for n in range(COUNT) if not snapshot.clusters.access[n]]


@pytest.mark.parametrize(
    ("step", "start", "end", "gone"),
    [
        (997, 10, 3 * CLUSTER, [1, 2]),
        (4096, 0, 4 * CLUSTER + 4096, [0, 1, 2, 3]),
        (100_000, 5, SIZE, list(range(1, COUNT))),
        (300_000, 0, SIZE, list(range(COUNT))),
        (SIZE, 0, SIZE, list(range(COUNT))),
    ],
)
def test_clusters_go_when_all_of_their_bytes_were_sent(
    snapshot: SnapshotAccess, export: Export, line: MakeLine, mode: ReplyMode, step: int, start: int, end: int,
    gone: list[int],
) -> None:  # fmt: skip
    client = line(export, mode)
    for offset in range(start, end, step):
        length = min(step, end - offset)
        assert client.ask(Cmd.READ, offset, length).data == OLD[offset : offset + length]
    client.end()
    assert trimmed(snapshot) == gone


def test_pieces_in_any_order_count_together_and_temp_is_free(
    rig: Rig, snapshot: SnapshotAccess, export: Export, line: MakeLine
) -> None:
    rig.disk.write(0, b"new")
    copied = snapshot.temp_used()
    client = line(export, ReplyMode.STRUCTURED)
    for offset in (32 * KiB, 8 * KiB, 32 * KiB, 16 * KiB, 24 * KiB, 48 * KiB):
        assert client.ask(Cmd.READ, offset, 16 * KiB).data == OLD[offset : offset + 16 * KiB]
    assert client.ask(Cmd.READ, 0, 8 * KiB - 1).error == 0
    assert trimmed(snapshot) == []
    assert client.ask(Cmd.READ, 8 * KiB - 1, 1).data == OLD[8 * KiB - 1 : 8 * KiB]
    reply = client.ask(Cmd.READ, 0, 1)
    assert (reply.error, reply.text) == (NbdError.EINVAL, "cluster at offset 0: trimmed")
    assert snapshot.temp_used() == copied - CLUSTER


def test_the_last_cluster_is_short(snapshot: SnapshotAccess, export: Export, line: MakeLine) -> None:
    client = line(export, ReplyMode.SIMPLE)
    assert client.ask(Cmd.READ, SIZE - 5, 4).data == OLD[-5:-1]
    assert client.ask(Cmd.READ, SIZE - 1, 1).data == OLD[-1:]
    client.end()
    assert trimmed(snapshot) == [COUNT - 1]


def test_connections_share_what_they_sent(snapshot: SnapshotAccess, export: Export, line: MakeLine) -> None:
    clients = [line(export, mode) for mode in ReplyMode]
    for n, offset in enumerate(range(0, 6 * CLUSTER, CLUSTER // 2)):
        assert clients[n % 3].ask(Cmd.READ, offset, CLUSTER // 2).data == OLD[offset : offset + CLUSTER // 2]
    for client in clients:
        client.end()
    assert trimmed(snapshot) == list(range(6))


def test_many_in_flight_on_several_connections(snapshot: SnapshotAccess, export: Export, line: MakeLine) -> None:
    clients = [line(export, ReplyMode.EXTENDED) for _ in range(4)]
    step = 5000
    requests = list(range(0, SIZE, step))
    for n, client in enumerate(clients):
        client.send(*[client.request(Cmd.READ, at, min(step, SIZE - at)) for at in requests[n::4]])
    for n, client in enumerate(clients):
        for reply in client.replies(len(requests[n::4])).values():
            assert reply.data == OLD[reply.offset : reply.offset + reply.length]
        client.end()
    assert trimmed(snapshot) == list(range(COUNT))


@pytest.mark.parametrize("grace", [0, 3 * CLUSTER])
def test_what_is_trimmed_was_sent_whatever_comes_in_between(
    rig: Rig, snapshot: SnapshotAccess, line: MakeLine, grace: int
) -> None:
    """Four clients read anything anywhere while the guest writes; what each got is kept byte by byte."""
    export = snapshot_export("vda@s", "", snapshot, read_once_grace=grace)
    clients = [line(export, mode) for mode in (*ReplyMode, ReplyMode.STRUCTURED)]
    got = [bytearray(SIZE) for _ in clients]
    over = threading.Event()

    def read(number: int) -> None:
        chance, client = random.Random(number), clients[number]
        for _ in range(300):
            offset = chance.randrange(SIZE)
            length = min(SIZE - offset, chance.choice((1, 4096, 30_000, 200_000)))
            reply = client.ask(Cmd.READ, offset, length)
            if reply.error:
                assert reply.error == NbdError.EINVAL
            else:
                assert reply.data == OLD[offset : offset + length]
                got[number][offset : offset + length] = b"\1" * length
        client.end()

    def write() -> None:
        chance = random.Random(99)
        while not over.is_set():
            rig.disk.write(chance.randrange(SIZE - 5000), chance.randbytes(5000))

    guest = in_thread(write)
    switching = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        readers = [in_thread(partial(read, number)) for number in range(len(clients))]
        for reader in readers:
            reader.wait()
    finally:
        sys.setswitchinterval(switching)
        over.set()
        guest.wait()
    sent = [all(map(any, zip(*(g[n * CLUSTER : (n + 1) * CLUSTER] for g in got), strict=True))) for n in range(COUNT)]
    complete = [n for n in range(COUNT) if sent[n]]
    assert len(complete) > 10
    gone = trimmed(snapshot)
    assert set(gone) <= set(complete)
    assert len(gone) == len(complete) - grace // CLUSTER


def test_the_window_stays_readable_for_clients_that_ask_again(
    rig: Rig, snapshot: SnapshotAccess, line: MakeLine
) -> None:
    export = snapshot_export("vda@s", "", snapshot, read_once_grace=4 * CLUSTER)
    client = line(export, ReplyMode.STRUCTURED)
    for n in range(10):
        assert client.ask(Cmd.READ, n * CLUSTER, CLUSTER).error == 0
    client.end()
    rig.disk.write(0, bytes(SIZE))
    assert trimmed(snapshot) == list(range(6))
    again = line(export, ReplyMode.STRUCTURED)
    for _ in range(3):  # however often
        for n in range(6, 10):
            assert again.ask(Cmd.READ, n * CLUSTER, CLUSTER).data == OLD[n * CLUSTER : (n + 1) * CLUSTER]
    assert again.ask(Cmd.READ, 5 * CLUSTER, CLUSTER).text == f"cluster at offset {5 * CLUSTER}: trimmed"
    again.end()
    assert trimmed(snapshot) == list(range(6))


def sent_and_gone(export: Export, line: MakeLine, requests: list[tuple[int, int]]) -> None:
    """A client whose replies are all handed to its socket, and that vanishes without having taken any of them."""
    client = line(export, ReplyMode.STRUCTURED, buffer=MiB)
    client.send(*[client.request(Cmd.READ, offset, length) for offset, length in requests])
    client.sock.shutdown(socket.SHUT_WR)  # the server answers what it has, and hangs up
    client.wait_closed()
    client.sock.close()


def test_a_client_that_vanishes_with_replies_in_flight_comes_back(
    rig: Rig, snapshot: SnapshotAccess, line: MakeLine
) -> None:
    export = snapshot_export("vda@s", "", snapshot, read_once_grace=3 * CLUSTER)
    half = CLUSTER // 2
    sent_and_gone(export, line, [(n * half, half) for n in range(6)])
    rig.disk.write(0, bytes(SIZE))
    again = line(export, ReplyMode.STRUCTURED)
    for n in range(6):
        assert again.ask(Cmd.READ, n * half, half).data == OLD[n * half : (n + 1) * half]
    again.end()
    assert trimmed(snapshot) == []


def test_a_client_that_comes_back_beyond_the_window_is_refused_and_gets_nothing_wrong(
    rig: Rig, snapshot: SnapshotAccess, line: MakeLine
) -> None:
    export = snapshot_export("vda@s", "", snapshot, read_once_grace=CLUSTER)
    sent_and_gone(export, line, [(n * CLUSTER, CLUSTER) for n in range(3)])
    rig.disk.write(0, bytes(SIZE))
    again = line(export, ReplyMode.STRUCTURED)
    for n in range(2):
        assert again.ask(Cmd.READ, n * CLUSTER, CLUSTER).error == NbdError.EINVAL
    for n in range(2, COUNT - 1):
        assert again.ask(Cmd.READ, n * CLUSTER, CLUSTER).data == OLD[n * CLUSTER : (n + 1) * CLUSTER]


@pytest.mark.parametrize("length", [CLUSTER, SIZE], ids=["gathered", "long"])
def test_replies_that_did_not_leave_do_not_count(
    snapshot: SnapshotAccess, export: Export, line: MakeLine, mode: ReplyMode, length: int
) -> None:
    client = line(export, mode, buffer=4 * KiB)
    client.send(client.request(Cmd.READ, 0, length))
    assert client.sock.recv(1)  # it is on its way, and longer than what the kernel holds
    client.hang_up()
    assert trimmed(snapshot) == []


def test_a_read_that_fails_counts_for_nothing(snapshot: SnapshotAccess, export: Export, line: MakeLine) -> None:
    client = line(export, ReplyMode.STRUCTURED)
    assert client.ask(Cmd.TRIM, 2 * MiB, CLUSTER).error == 0
    reply = client.ask(Cmd.READ, 0, SIZE)
    assert (reply.error, reply.at) == (NbdError.EINVAL, 2 * MiB)
    assert client.ask(Cmd.READ, 0, SIZE, flags=CmdFlag.DF).error == NbdError.EOVERFLOW
    assert client.ask(Cmd.READ, 0, 0).error == 0
    client.end()
    assert trimmed(snapshot) == [2 * MiB // CLUSTER]


def test_reads_that_wait_for_the_disk_count(
    rig: Rig, snapshot: SnapshotAccess, export: Export, line: MakeLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rig.file, "read_cached", lambda offset, buffer: False)
    client = line(export, ReplyMode.STRUCTURED)
    client.send(*[client.request(Cmd.READ, n * CLUSTER // 2, CLUSTER // 2) for n in range(9)])
    for reply in client.replies(9).values():
        assert reply.data == OLD[reply.offset : reply.offset + reply.length]
    client.end()
    assert trimmed(snapshot) == list(range(4))


def test_only_reads_count(snapshot: SnapshotAccess, export: Export, line: MakeLine) -> None:
    client = line(export, ReplyMode.STRUCTURED, [BASE_ALLOCATION])
    assert client.ask(Cmd.BLOCK_STATUS, 0, SIZE).status == {1: [(SIZE, 0)]}
    assert client.ask(Cmd.CACHE, 0, SIZE).error == 0
    assert client.ask(Cmd.FLUSH).error == 0
    client.end()
    assert trimmed(snapshot) == []


def test_trim_and_read_once_take_effect_at_once_whatever_the_window(snapshot: SnapshotAccess, line: MakeLine) -> None:
    export = snapshot_export("vda@s", "", snapshot, read_once_grace=SIZE)
    client = line(export, ReplyMode.STRUCTURED, [READ_ONCE])
    assert client.ask(Cmd.READ, 0, 3 * CLUSTER).error == 0
    assert client.ask(Cmd.READ, CLUSTER, CLUSTER + 1, flags=CmdFlag.READ_ONCE).error == 0
    assert client.ask(Cmd.TRIM, 5 * CLUSTER, CLUSTER).error == 0
    client.end()
    assert trimmed(snapshot) == [1, 5]


def test_a_snapshot_that_breaks_says_so(snapshot: SnapshotAccess, export: Export, line: MakeLine) -> None:
    client = line(export, ReplyMode.STRUCTURED)
    assert client.ask(Cmd.READ, 0, CLUSTER - 1).error == 0
    snapshot.clusters.break_("for a test")
    assert client.ask(Cmd.READ, CLUSTER - 1, 1).text == "snapshot broken: for a test"
    client.end()
    assert snapshot.counts()[ClusterState.TRIMMED] == 0


def test_other_exports_of_the_same_snapshot_count_nothing(snapshot: SnapshotAccess, line: MakeLine) -> None:
    client = line(snapshot_export("vda@s", "", snapshot), ReplyMode.STRUCTURED)
    assert client.ask(Cmd.READ, 0, SIZE).error == 0
    client.end()
    assert trimmed(snapshot) == []


def test_a_trim_that_fails_is_told_to_the_log_once(
    snapshot: SnapshotAccess,
    export: Export,
    line: MakeLine,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fails(runs: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(snapshot, "discard_clusters", fails)
    client = line(export, ReplyMode.STRUCTURED)
    for n in range(3):
        assert client.ask(Cmd.READ, n * CLUSTER, CLUSTER).data == OLD[n * CLUSTER : (n + 1) * CLUSTER]
    client.end()
    said = [record.getMessage() for record in caplog.records if "trimmed" in record.getMessage()]
    assert said == ["what was read of s cannot be trimmed: [Errno 5] Input/output error"]
