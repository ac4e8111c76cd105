"""Block status where reading trims: no errors behind the read head, and zeroes in whole clusters only."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from bitarray import bitarray
from hypothesis import given
from hypothesis import strategies as st

from fleecing.block.extent import MAX_RUNS, Allocation, Runs, merge_runs, total_length
from fleecing.block.snapshot_access import SnapshotAccess
from fleecing.errors import ClusterUnreadable, SnapshotBroken
from fleecing.nbd.constants import BASE_ALLOCATION, Cmd, CmdFlag, NbdError, ReplyMode
from fleecing.server.export import Bitmap, snapshot_export
from fleecing.server.meta_context import ALLOCATION_DEPTH, Context, despite_trims, whole_clusters
from fleecing.units import KiB, MiB, align_down, div_up
from tests.block.rig import CLUSTER, Rig, pattern
from tests.server.rig import MakeLine

SIZE = 2 * MiB + 5
COUNT = SIZE // CLUSTER + 1
DATA, ZERO = int(Allocation.DATA), int(Allocation.HOLE_ZERO)


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    made = Rig(tmp_path, pattern(SIZE))
    yield made
    made.close()


# Zeroes in whole clusters

BLOCK = 8
"""Bytes of a made-up cluster; the last one may be short."""


def below(states: bytes, most: int) -> tuple[Context, list[int]]:
    """A context with one state a byte, which answers with `most` runs at most, and how many it gave each time."""
    given_runs: list[int] = []

    def context(offset: int, length: int, max_runs: int) -> Runs:
        runs = merge_runs((1, state) for state in states[offset : offset + length])[: min(max_runs, most)]
        given_runs.append(len(runs))
        return runs

    return context, given_runs


def rounded(states: bytes) -> bytes:
    """By the rule: a cluster is zero where all of it is."""
    pieces = [states[at : at + BLOCK] for at in range(0, len(states), BLOCK)]
    return b"".join((bytes([ZERO]) if set(piece) == {ZERO} else b"\0") * len(piece) for piece in pieces)


runs_of_bytes = st.lists(st.tuples(st.integers(1, 3 * BLOCK), st.sampled_from([DATA, ZERO])), min_size=1, max_size=60)


@given(runs=runs_of_bytes, most=st.integers(1, 5), one=st.booleans(), data=st.data())
def test_a_cluster_is_zero_where_all_of_it_is(
    runs: list[tuple[int, int]], most: int, one: bool, data: st.DataObject
) -> None:
    states = b"".join(bytes([state]) * count for count, state in runs)
    offset = data.draw(st.integers(0, len(states) - 1))
    length = data.draw(st.integers(1, len(states) - offset))
    context, _ = below(states, most)
    found = whole_clusters(context, BLOCK, len(states))(offset, length, 1 if one else MAX_RUNS)
    covered = total_length(found)
    assert covered == length or (one and len(found) == 1)
    said = b"".join(bytes([state]) * count for count, state in found)
    assert said == rounded(states)[offset : offset + covered]
    assert found == merge_runs(found)


def test_one_run_costs_little_where_many_follow() -> None:
    """QEMU asks for one at a time, all through the disk."""
    states = (bytes(BLOCK) + bytes([ZERO] * BLOCK)) * 500
    context, given_runs = below(states, MAX_RUNS)
    assert whole_clusters(context, BLOCK, len(states))(0, len(states), 1) == [(BLOCK, DATA)]
    assert sum(given_runs) < 10


def test_a_look_at_very_many_runs_ends_and_is_gone_on_with() -> None:
    looks = 0

    def slivers(offset: int, length: int, max_runs: int) -> Runs:
        """A hole of half a cluster in each cluster, told one by one."""
        nonlocal looks
        looks += 1
        return [(min(length, CLUSTER // 2), ZERO if offset % CLUSTER else DATA)]

    status = whole_clusters(slivers, CLUSTER, 1 << 40)
    found = status(0, 1 << 40, MAX_RUNS)
    assert looks == MAX_RUNS >> 10
    assert found == [(looks * CLUSTER // 2, DATA)]
    assert status(found[0][0], CLUSTER, 1) == [(CLUSTER, DATA)]


# No errors behind the read head


def test_what_was_trimmed_is_told_as_data(rig: Rig) -> None:
    snapshot = rig.snapshot()[0]
    rig.disk.discard(4 * CLUSTER, 8 * CLUSTER)
    status = despite_trims(snapshot.block_status, snapshot.clusters, DATA)
    assert status(0, SIZE, MAX_RUNS) == [(SIZE, DATA)]
    snapshot.discard(0, 6 * CLUSTER)
    with pytest.raises(ClusterUnreadable, match="trimmed"):
        snapshot.block_status(0, SIZE)
    assert status(0, SIZE, MAX_RUNS) == [(SIZE, DATA)]
    depth = despite_trims(snapshot.allocation_depth, snapshot.clusters, 9)
    assert depth(CLUSTER, 10 * CLUSTER, MAX_RUNS) == [(5 * CLUSTER, 9), (5 * CLUSTER, 1)]
    assert depth(CLUSTER, 10 * CLUSTER, 1) == [(5 * CLUSTER, 9)]


def test_a_trim_in_the_middle_of_the_answer_is_no_error(rig: Rig) -> None:
    snapshot = rig.snapshot()[0]
    asked: list[tuple[int, int]] = []

    def trimming(offset: int, length: int, max_runs: int) -> Runs:
        asked.append((offset, length))
        if len(asked) == 1:
            snapshot.discard(2 * CLUSTER, CLUSTER)
        return snapshot.block_status(offset, length, max_runs)

    assert despite_trims(trimming, snapshot.clusters, 7)(0, 4 * CLUSTER, MAX_RUNS) == [
        (2 * CLUSTER, DATA), (CLUSTER, 7), (CLUSTER, DATA)]  # fmt: skip
    assert asked == [(0, 4 * CLUSTER), (0, 2 * CLUSTER), (3 * CLUSTER, CLUSTER)]


def test_what_is_not_in_the_bitmap_stays_an_error(rig: Rig) -> None:
    snapshot = rig.snapshot(bitmap=bitarray("0110" + "1" * (COUNT - 4)))[0]
    snapshot.discard(0, 5 * CLUSTER)
    status = despite_trims(snapshot.block_status, snapshot.clusters, DATA)
    assert status(CLUSTER, 2 * CLUSTER, MAX_RUNS) == [(2 * CLUSTER, DATA)]
    for offset, length in ((0, 1), (CLUSTER, 3 * CLUSTER), (3 * CLUSTER, SIZE - 3 * CLUSTER)):
        with pytest.raises(ClusterUnreadable, match="not in bitmap"):
            status(offset, length, MAX_RUNS)


def test_a_broken_snapshot_says_so_also_where_all_is_trimmed(rig: Rig) -> None:
    snapshot = rig.snapshot()[0]
    snapshot.discard(0, SIZE)
    snapshot.clusters.break_("for a test")
    with pytest.raises(SnapshotBroken, match="for a test"):
        despite_trims(snapshot.block_status, snapshot.clusters, DATA)(0, SIZE, MAX_RUNS)


# Over the wire


def small_holes(rig: Rig) -> SnapshotAccess:
    """4 KiB of data in cluster 1, cluster 2 a hole, one from the middle of cluster 3 on, and one at the end."""
    rig.disk.discard(CLUSTER + 4 * KiB, 2 * CLUSTER - 4 * KiB)
    rig.disk.discard(3 * CLUSTER + 32 * KiB, 2 * CLUSTER)
    rig.disk.discard(align_down(SIZE, CLUSTER) - CLUSTER, 2 * CLUSTER)
    return rig.snapshot()[0]


@pytest.mark.parametrize("mode", [ReplyMode.STRUCTURED, ReplyMode.EXTENDED], ids=str)
def test_a_read_once_export_tells_whole_clusters_and_others_every_hole(
    rig: Rig, line: MakeLine, mode: ReplyMode
) -> None:
    snapshot = small_holes(rig)
    plain = line(snapshot_export("vda@s", "", snapshot), mode, [BASE_ALLOCATION])
    assert plain.ask(Cmd.BLOCK_STATUS, CLUSTER, CLUSTER).status == {1: [(4 * KiB, 0), (60 * KiB, 3)]}
    once = line(snapshot_export("vda@s", "", snapshot, read_once_grace=0), mode, [BASE_ALLOCATION, ALLOCATION_DEPTH])
    whole = [(2 * CLUSTER, 0), (CLUSTER, 3), (CLUSTER, 0), (CLUSTER, 3)]
    last = SIZE - SIZE % CLUSTER - CLUSTER
    assert once.ask(Cmd.BLOCK_STATUS, 0, SIZE).status[1] == [*whole, (last - 5 * CLUSTER, 0), (CLUSTER + 5, 3)]
    assert once.ask(Cmd.BLOCK_STATUS, CLUSTER + 4 * KiB, CLUSTER).status[1] == [(60 * KiB, 0), (4 * KiB, 3)]
    one = once.ask(Cmd.BLOCK_STATUS, 100, SIZE - 100, flags=CmdFlag.REQ_ONE).status
    assert one == {1: [(2 * CLUSTER - 100, 0)], 2: [(2 * CLUSTER - 100, 2)]}


def test_the_status_of_what_was_read_is_data_and_reading_it_is_the_error(rig: Rig, line: MakeLine) -> None:
    snapshot = small_holes(rig)
    client = line(snapshot_export("vda@s", "", snapshot, read_once_grace=0), ReplyMode.STRUCTURED, [BASE_ALLOCATION])
    assert client.ask(Cmd.READ, 0, 3 * CLUSTER).error == 0
    assert client.ask(Cmd.BLOCK_STATUS, 0, 5 * CLUSTER).status == {1: [(4 * CLUSTER, 0), (CLUSTER, 3)]}
    reply = client.ask(Cmd.READ, 2 * CLUSTER, 1)
    assert (reply.error, reply.text) == (NbdError.EINVAL, f"cluster at offset {2 * CLUSTER}: trimmed")


def test_a_client_with_the_bitmap_walks_over_the_whole_disk(rig: Rig, line: MakeLine) -> None:
    scope = bitarray("0110" + "0" * (div_up(SIZE, CLUSTER) - 4))
    snapshot = rig.snapshot(bitmap=scope)[0]
    export = snapshot_export("vda@s", "", snapshot, Bitmap("b", scope, CLUSTER), read_once_grace=0)
    client = line(export, ReplyMode.STRUCTURED, [BASE_ALLOCATION, "qemu:dirty-bitmap:b"])
    assert client.ask(Cmd.READ, CLUSTER, CLUSTER).error == 0
    dirty = [(CLUSTER, 0), (2 * CLUSTER, 1), (SIZE - 3 * CLUSTER, 0)]
    assert client.ask(Cmd.BLOCK_STATUS, 0, SIZE).status == {1: [(SIZE, 0)], 2: dirty}
    without = line(export, ReplyMode.STRUCTURED, [BASE_ALLOCATION])
    assert without.ask(Cmd.BLOCK_STATUS, 0, SIZE).text == "cluster at offset 0: not in bitmap"
    assert without.ask(Cmd.BLOCK_STATUS, CLUSTER, 2 * CLUSTER).status == {1: [(2 * CLUSTER, 0)]}
