"""READ_ONCE: a READ whose clusters are given up when its reply has left (docs/read-once.md)."""

from __future__ import annotations

import pytest
from bitarray import bitarray

from fleecing.block.extent import ClusterState
from fleecing.block.snapshot_access import SnapshotAccess
from fleecing.nbd.constants import READ_ONCE, Cmd, CmdFlag, NbdError, ReplyMode
from fleecing.server.export import Export, active_export, snapshot_export
from fleecing.units import KiB, MiB
from tests.block.rig import CLUSTER, Rig, pattern
from tests.server.rig import MakeLine

SIZE = 2 * MiB + 5
COUNT = SIZE // CLUSTER + 1
ONCE = CmdFlag.READ_ONCE
MODES = pytest.mark.parametrize("mode", [ReplyMode.STRUCTURED, ReplyMode.EXTENDED], ids=lambda mode: mode.value)


@pytest.fixture
def export(snapshot: SnapshotAccess) -> Export:
    return snapshot_export("vda@s", "", snapshot)


def trimmed(snapshot: SnapshotAccess) -> list[int]:
    """The clusters that were."""
    return [n for n in range(COUNT) if not snapshot.clusters.access[n]]


@MODES
@pytest.mark.parametrize(
    ("offset", "length", "gone"),
    [
        (0, CLUSTER, [0]),
        (0, CLUSTER - 1, []),
        (1, CLUSTER, []),
        (CLUSTER - 1, 2 * CLUSTER, [1]),
        (SIZE - 5, 5, [COUNT - 1]),
        (SIZE - 5, 4, []),
        (0, SIZE, list(range(COUNT))),
    ],
)
def test_the_whole_clusters_of_the_range_are_trimmed(
    snapshot: SnapshotAccess, export: Export, line: MakeLine, mode: ReplyMode, offset: int, length: int, gone: list[int]
) -> None:
    client = line(export, mode, [READ_ONCE])
    assert client.ask(Cmd.READ, offset, length, flags=ONCE).data == pattern(SIZE)[offset : offset + length]
    client.end()
    assert trimmed(snapshot) == gone


def test_the_next_request_is_refused_and_temp_is_free(
    rig: Rig, snapshot: SnapshotAccess, export: Export, line: MakeLine
) -> None:
    rig.disk.write(0, b"new")
    copied = snapshot.temp_used()
    client = line(export, ReplyMode.STRUCTURED, [READ_ONCE])
    assert client.ask(Cmd.READ, 0, CLUSTER, flags=ONCE).data == pattern(SIZE)[:CLUSTER]
    reply = client.ask(Cmd.READ, 0, 1)
    assert (reply.error, reply.text) == (NbdError.EINVAL, "cluster at offset 0: trimmed")
    assert snapshot.temp_used() == copied - CLUSTER
    assert client.ask(Cmd.READ, CLUSTER, CLUSTER).error == 0  # without the flag it stays
    assert client.ask(Cmd.READ, CLUSTER, CLUSTER).error == 0


def test_without_the_context_the_flag_is_refused(rig: Rig, export: Export, line: MakeLine, mode: ReplyMode) -> None:
    active = active_export("vda", "", rig.disk, cluster_size=CLUSTER)
    for one in (export, active):
        client = line(one, mode)
        assert client.ask(Cmd.READ, 0, CLUSTER, flags=ONCE).error == NbdError.EINVAL
        assert client.ask(Cmd.READ, 0, CLUSTER).data == pattern(SIZE)[:CLUSTER]
    assert READ_ONCE not in active.info.contexts


@pytest.mark.parametrize("command", [Cmd.TRIM, Cmd.FLUSH, Cmd.CACHE, Cmd.BLOCK_STATUS])
def test_no_other_request_takes_the_flag(
    snapshot: SnapshotAccess, export: Export, line: MakeLine, command: Cmd
) -> None:
    client = line(export, ReplyMode.STRUCTURED, [READ_ONCE])
    assert client.ask(command, 0, CLUSTER, flags=ONCE).error == NbdError.EINVAL
    assert trimmed(snapshot) == []


def test_other_connections_may_do_without_the_context(snapshot: SnapshotAccess, export: Export, line: MakeLine) -> None:
    with_it, without = line(export, ReplyMode.STRUCTURED, [READ_ONCE]), line(export, ReplyMode.SIMPLE)
    assert without.ask(Cmd.READ, 0, SIZE).data == pattern(SIZE)
    assert with_it.ask(Cmd.READ, 0, CLUSTER, flags=ONCE).error == 0
    assert with_it.ask(Cmd.READ, 3 * CLUSTER, CLUSTER, flags=ONCE).error == 0
    with_it.end()
    assert without.ask(Cmd.READ, 0, 1).error == NbdError.EINVAL
    assert without.ask(Cmd.READ, CLUSTER, 2 * CLUSTER).data == pattern(SIZE)[CLUSTER : 3 * CLUSTER]


def test_many_in_flight_are_answered_and_trimmed(snapshot: SnapshotAccess, export: Export, line: MakeLine) -> None:
    client = line(export, ReplyMode.EXTENDED, [READ_ONCE])
    client.send(*[client.request(Cmd.READ, n * CLUSTER, CLUSTER, flags=ONCE) for n in range(COUNT - 1)])
    for reply in client.replies(COUNT - 1).values():
        assert reply.data == pattern(SIZE)[reply.offset : reply.offset + CLUSTER]
    client.end()
    assert trimmed(snapshot) == list(range(COUNT - 1))


def test_an_error_in_the_middle_trims_nothing(snapshot: SnapshotAccess, export: Export, line: MakeLine) -> None:
    client = line(export, ReplyMode.STRUCTURED, [READ_ONCE])
    assert client.ask(Cmd.TRIM, MiB, CLUSTER).error == 0
    reply = client.ask(Cmd.READ, 0, SIZE, flags=ONCE)
    assert (reply.error, reply.at) == (NbdError.EINVAL, MiB)
    client.end()
    assert trimmed(snapshot) == [MiB // CLUSTER]


def test_df_goes_with_it_and_too_long_a_read_trims_nothing(
    snapshot: SnapshotAccess, export: Export, line: MakeLine
) -> None:
    client = line(export, ReplyMode.STRUCTURED, [READ_ONCE])
    assert client.ask(Cmd.READ, 0, SIZE, flags=ONCE | CmdFlag.DF).error == NbdError.EOVERFLOW
    assert client.ask(Cmd.READ, 0, 0, flags=ONCE).error == 0
    assert trimmed(snapshot) == []
    assert len(client.ask(Cmd.READ, 0, 256 * KiB, flags=ONCE | CmdFlag.DF).pieces) == 1
    client.end()
    assert trimmed(snapshot) == list(range(256 * KiB // CLUSTER))


def test_a_client_that_vanishes_before_its_reply_left_trims_nothing(
    snapshot: SnapshotAccess, export: Export, line: MakeLine
) -> None:
    client = line(export, ReplyMode.STRUCTURED, [READ_ONCE], buffer=4 * KiB)
    client.send(client.request(Cmd.READ, 0, SIZE, flags=ONCE))
    assert client.sock.recv(1)  # the reply is on its way, and longer than what the kernel holds
    client.hang_up()
    assert trimmed(snapshot) == []


def test_the_context_tells_what_can_be_read(rig: Rig, line: MakeLine) -> None:
    scope = bitarray("1101" + "1" * (COUNT - 4))
    export = snapshot_export("vda@s", "", rig.snapshot(bitmap=scope)[0])
    client = line(export, ReplyMode.STRUCTURED, [READ_ONCE])
    rig.disk.write(3 * CLUSTER, b"copied, and readable as before")
    assert client.ask(Cmd.READ, 0, CLUSTER, flags=ONCE).error == 0
    status = client.ask(Cmd.BLOCK_STATUS, 0, SIZE).status
    assert status == {1: [(CLUSTER, 1), (CLUSTER, 0), (CLUSTER, 2), (SIZE - 3 * CLUSTER, 0)]}


def test_a_snapshot_that_breaks_tells_so_and_nothing_else_happens(
    snapshot: SnapshotAccess, export: Export, line: MakeLine
) -> None:
    client = line(export, ReplyMode.STRUCTURED, [READ_ONCE])
    snapshot.clusters.break_("for a test")
    assert client.ask(Cmd.READ, 0, CLUSTER, flags=ONCE).text == "snapshot broken: for a test"
    assert client.ask(Cmd.BLOCK_STATUS, 0, CLUSTER).text == "snapshot broken: for a test"
    client.end()
    assert snapshot.counts()[ClusterState.TRIMMED] == 0
