"""Block status over several contexts: all cover the same bytes, whole where they can."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleecing.block.extent import MAX_RUNS, Runs, merge_runs, total_length
from fleecing.nbd.constants import BASE_ALLOCATION, Cmd, CmdFlag, NbdError, ReplyMode
from fleecing.server.export import Export
from fleecing.server.meta_context import ALLOCATION_DEPTH, Context, block_status, everything_allocated
from fleecing.units import KiB, MiB
from tests.block.rig import pattern
from tests.server.rig import Disk, MakeDisk, MakeLine

SIZE = 1000


def told(states: bytes) -> Context:
    """A context whose answer is cut from one state a byte."""

    def context(offset: int, length: int, max_runs: int) -> Runs:
        return merge_runs((1, state) for state in states[offset : offset + length])[:max_runs]

    return context


def generous(context: Context) -> Context:
    """One that answers with more runs than asked for."""
    return lambda offset, length, max_runs: context(offset, length, MAX_RUNS)


disks = st.lists(
    st.binary(min_size=SIZE, max_size=SIZE).map(lambda raw: bytes(b % 3 for b in raw)), min_size=1, max_size=4
)
places = st.tuples(st.integers(0, SIZE - 1), st.integers(1, SIZE)).map(lambda p: (p[0], min(p[1], SIZE - p[0])))


@given(disks=disks, place=places, one=st.booleans())
def test_every_context_covers_the_same_bytes_with_its_own_states(
    disks: list[bytes], place: tuple[int, int], one: bool
) -> None:
    offset, length = place
    contexts = [generous(told(disk)) if number % 2 else told(disk) for number, disk in enumerate(disks)]
    answers = block_status(contexts, offset, length, one=one)
    (covered,) = {total_length(runs) for runs in answers}
    assert covered == length or one
    for disk, runs in zip(disks, answers, strict=True):
        said = b"".join(bytes([state]) * count for count, state in runs)
        assert said == disk[offset : offset + covered]
        assert not one or len(runs) == 1


def test_one_run_is_the_shortest_of_all() -> None:
    contexts = [told(bytes(600) + bytes([1] * 400)), everything_allocated, told(bytes(300) + bytes([1] * 700))]
    assert block_status(contexts, 100, 900, one=True) == [[(200, 0)], [(200, 1)], [(200, 0)]]


def test_a_context_with_too_many_runs_cuts_them_all() -> None:
    def stripes(offset: int, length: int, max_runs: int) -> Runs:
        return [(1, number % 2) for number in range(min(length, max_runs))]

    one, other = block_status([stripes, everything_allocated], 0, 3 * MAX_RUNS, one=False)
    assert len(one) == MAX_RUNS == 1 << 20
    assert total_length(one) == total_length(other) == MAX_RUNS


# Over the wire

CONTEXTS = [BASE_ALLOCATION, ALLOCATION_DEPTH]
MODES = [ReplyMode.STRUCTURED, ReplyMode.EXTENDED]


@pytest.fixture
def disk(make_disk: MakeDisk) -> Disk:
    """Data, a hole of 64 KiB, data."""
    made = make_disk(pattern(256 * KiB + 7))
    made.node.discard(128 * KiB, 64 * KiB)
    return made


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_the_reply_covers_the_whole_request(disk: Disk, line: MakeLine, mode: ReplyMode) -> None:
    client = line(disk.export, mode, CONTEXTS)
    status = client.ask(Cmd.BLOCK_STATUS, 100 * KiB, 156 * KiB + 7).status
    assert status == {1: [(28 * KiB, 0), (64 * KiB, 3), (64 * KiB + 7, 0)], 2: [(156 * KiB + 7, 1)]}
    one = client.ask(Cmd.BLOCK_STATUS, 100 * KiB, 156 * KiB, flags=CmdFlag.REQ_ONE).status
    assert one == {1: [(28 * KiB, 0)], 2: [(28 * KiB, 1)]}


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_only_the_contexts_selected_are_told(disk: Disk, line: MakeLine, mode: ReplyMode) -> None:
    assert line(disk.export, mode, [ALLOCATION_DEPTH]).ask(Cmd.BLOCK_STATUS, 0, 4096).status == {1: [(4096, 1)]}
    reply = line(disk.export, mode).ask(Cmd.BLOCK_STATUS, 0, 4096)
    assert (reply.error, reply.status) == (NbdError.EINVAL, {})


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("place", [(256 * KiB, 8), (256 * KiB + 7, 1), (0, 256 * KiB + 8), (2**64 - 1, 1), (0, 0)])
def test_a_range_that_is_not_there_is_refused(
    disk: Disk, line: MakeLine, mode: ReplyMode, place: tuple[int, int]
) -> None:
    assert line(disk.export, mode, CONTEXTS).ask(Cmd.BLOCK_STATUS, *place).error == NbdError.EINVAL


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_a_context_that_fails_gives_one_error_and_nothing_behind_it(
    disk: Disk, line: MakeLine, mode: ReplyMode
) -> None:
    """QEMU sends an error with DONE and then the other contexts' chunks (PEERS.md 1, fault 2)."""

    def fails(offset: int, length: int, max_runs: int) -> Runs:
        raise OSError(5, "Input/output error")

    for contexts in ({"x-a:ok": everything_allocated, "x-b:bad": fails}, {"x-b:bad": fails, "x-a:ok": told(b"")}):
        info = disk.export.info
        export = Export(replace(info, contexts=tuple(contexts)), disk.node, contexts, changes=disk.node)
        client = line(export, mode, list(contexts))
        reply = client.ask(Cmd.BLOCK_STATUS, 0, 4096)
        assert (reply.error, reply.status) == (NbdError.EIO, {})
        assert "BLOCK_STATUS of 4096 bytes at 0: Input/output error" in reply.text
        assert client.ask(Cmd.READ, 0, 10).error == 0


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_a_disk_in_very_many_pieces_is_told_up_to_the_limit(
    make_disk: MakeDisk, line: MakeLine, mode: ReplyMode
) -> None:
    disk = make_disk(pattern(4 * MiB))

    def stripes(offset: int, length: int, max_runs: int) -> Runs:
        return [(1, number % 2) for number in range(min(length, max_runs))]

    contexts: dict[str, Context] = {"x-a:stripes": stripes, "x-b:plain": everything_allocated}
    export = Export(replace(disk.export.info, contexts=tuple(contexts)), disk.node, contexts, changes=disk.node)
    client = line(export, mode, list(contexts))
    status = client.ask(Cmd.BLOCK_STATUS, 5, 4 * MiB - 5).status
    assert len(status[1]) == MAX_RUNS
    assert status[2] == [(MAX_RUNS, 1)]
