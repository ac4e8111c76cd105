"""Meta contexts: block status for several contexts at once, all covering the same bytes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from bitarray import bitarray

from fleecing.block.bitmap import bit_runs, clusters_touched
from fleecing.block.cluster_map import ClusterMap
from fleecing.block.extent import MAX_RUNS, Allocation, ClusterState, Runs, append_run, merge_runs, total_length
from fleecing.errors import ClusterUnreadable, SnapshotBroken
from fleecing.units import align_down, align_up

ALLOCATION_DEPTH = "qemu:allocation-depth"
"""0 = not allocated, 1 = in the top layer, 2 = in the layer below it (QEMU, docs/interop/nbd.rst)."""

CLUSTER_STATE = "fleecing:cluster-state"
"""0 = untouched, 1 = copied, 2 = trimmed, 3 = not in the bitmap. Answered where a read is refused, too."""

READ_ONCE_STATUS = {ClusterState.TRIMMED: 1, ClusterState.NOT_IN_BITMAP: 2}
"""What fleecing:read-once says of a cluster: 0 = can be read. Answered where a read is refused, too."""

DIRTY_BITMAP = "qemu:dirty-bitmap:"
"""Begins the name of a dirty bitmap's context: 1 = changed since the checkpoint, 0 = not."""

_LOOK_RUNS = 1 << 10
"""Most runs of one look at the context below one that is told in whole clusters."""

Context = Callable[[int, int, int], Runs]
"""(offset, length, most runs) -> runs from `offset` on; the whole range unless that takes more runs."""


def everything_allocated(offset: int, length: int, max_runs: int) -> Runs:
    """A raw image has one layer, and all of it is there."""
    return [(length, 1)]


def nothing_to_tell(offset: int, length: int, max_runs: int) -> Runs:
    """Of a context that is there for a client to select it."""
    return [(length, 0)]


def readable(cluster_state: Context) -> Context:
    """The context fleecing:read-once (docs/read-once.md), made of the cluster states."""

    def status(offset: int, length: int, max_runs: int) -> Runs:
        runs = cluster_state(offset, length, max_runs)
        return merge_runs((count, READ_ONCE_STATUS.get(ClusterState(state), 0)) for count, state in runs)

    return status


def dirty_bitmap(bits: bitarray, granularity: int, check: Callable[[], None]) -> Context:
    """The bitmap as a context; `bits` change no more. `check` raises where the snapshot is of no use any more."""

    def status(offset: int, length: int, max_runs: int) -> Runs:
        check()
        runs: Runs = []
        position, end = offset, offset + length
        for _, stop, bit in bit_runs(bits, *clusters_touched(offset, length, granularity)):
            until = min(end, stop * granularity)
            append_run(runs, until - position, bit)
            position = until
            if len(runs) >= max_runs:
                break
        return runs

    return status


def beside_bitmap(
    context: Context, scope: bitarray, granularity: int, outside: int, check: Callable[[], None]
) -> Context:
    """The context for a client that has the dirty bitmap, too: what is not in the `scope` is `outside`, no error.

    virtnbdbackup walks over the whole disk with base:allocation and the bitmap together, and reads only what is dirty.
    """

    def status(offset: int, length: int, max_runs: int) -> Runs:
        check()
        runs: Runs = []
        position, end = offset, offset + length
        for _, stop, inside in bit_runs(scope, *clusters_touched(offset, length, granularity)):
            until = min(end, stop * granularity)
            if not inside:
                append_run(runs, until - position, outside)
            else:
                for count, state in context(position, until - position, max_runs):
                    append_run(runs, count, state)
                    position += count
                if position < until:
                    break
            position = until
            if len(runs) >= max_runs:
                break
        return runs

    return status


def despite_trims(context: Context, clusters: ClusterMap, trimmed: int) -> Context:
    """The context for clients that do not know that reading trims: what they have read already is `trimmed`, no error.

    What is not in the bitmap is an error still.
    """

    def status(offset: int, length: int, max_runs: int) -> Runs:
        if clusters.broken is not None:
            raise SnapshotBroken(clusters.broken)
        runs: Runs = []
        position, end = offset, offset + length
        while position < end and len(runs) < max_runs:
            touched = clusters_touched(position, end - position, clusters.cluster_size)
            first, stop, readable = next(bit_runs(clusters.access, *touched))
            if not readable and clusters.scope is not None:
                outside = clusters.scope.find(0, first, stop)
                if outside == first:
                    raise ClusterUnreadable(position, "not in bitmap")
                stop = stop if outside < 0 else outside
            until = min(end, stop << clusters.shift)
            if readable:
                try:
                    found = context(position, until - position, max_runs)
                except ClusterUnreadable:  # trimmed since the look, and never readable again
                    continue
            else:
                found = [(until - position, trimmed)]
            for count, state in found:
                append_run(runs, count, state)
                position += count
            if position < until:
                break
        return runs[:max_runs]

    return status


def whole_clusters(context: Context, cluster_size: int, size: int) -> Context:
    """Zeroes and holes where they fill whole clusters; a cluster that has anything else is data.

    For exports that trim what was read: clients do not read what they are told is zero, and what they do not read of a
    cluster keeps it from being trimmed.
    """

    def status(offset: int, length: int, max_runs: int) -> Runs:
        begin, end = align_down(offset, cluster_size), min(size, align_up(offset + length, cluster_size))
        runs: Runs = []
        told = zeroes = position = begin  # where `runs` end, and where the zeroes that end at `position` begin

        def tell_zeroes() -> None:
            nonlocal told
            first = align_up(zeroes, cluster_size)
            stop = position if position == size else align_down(position, cluster_size)
            if first < stop:
                if told < first:
                    append_run(runs, first - told, Allocation.DATA)
                append_run(runs, stop - first, Allocation.HOLE_ZERO)
                told = stop

        ask, looks = min(max_runs + 1, _LOOK_RUNS), MAX_RUNS // _LOOK_RUNS
        # Where it looks at too many runs it ends early, but never before it has a cluster.
        while position < end and len(runs) <= max_runs and (looks > 0 or position - begin < cluster_size):
            for count, state in context(position, end - position, ask):
                if state != Allocation.HOLE_ZERO:
                    tell_zeroes()
                    zeroes = position + count
                position += count
            ask, looks = min(2 * ask, _LOOK_RUNS), looks - 1
        tell_zeroes()
        covered = position if position == end else align_down(position, cluster_size)
        if told < covered:
            append_run(runs, covered - told, Allocation.DATA)
        runs[0] = runs[0][0] - (offset - begin), runs[0][1]
        return _cut(runs[:max_runs], length)

    return status


def block_status(contexts: Sequence[Context], offset: int, length: int, *, one: bool) -> list[Runs]:
    """The runs of each context. All cover the same number of bytes: the whole range where they can.

    Clients rely on it: one that walks the contexts side by side would lose what the shorter one leaves out. Only where
    a context takes more than 2^20 runs, the most that one chunk should hold, all are cut to what that one covers;
    `one` (REQ_ONE) cuts them to what is one run in every context.
    """
    most = 1 if one else MAX_RUNS
    answers = [context(offset, length, most)[:most] for context in contexts]
    covered = min(total_length(runs) for runs in answers)
    return [_cut(runs, covered) for runs in answers]


def _cut(runs: Runs, length: int) -> Runs:
    """The runs up to `length` bytes, or all where they cover less."""
    if total_length(runs) <= length:
        return runs
    kept: Runs = []
    for count, state in runs:
        kept.append((min(count, length), state))
        length -= kept[-1][0]
        if not length:
            break
    return kept
