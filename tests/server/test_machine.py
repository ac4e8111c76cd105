"""A state machine over the real server, on real sockets: guests, backups and an operator in any order, all at once."""

from __future__ import annotations

from random import Random

from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from fleecing.units import KiB
from tests.server.burst import Burst
from tests.server.checks import check_view, check_world
from tests.server.fights import KINDS, Duel, Storm, long_copies
from tests.server.model import CLUSTER
from tests.server.world import SIZE, Served, View, World

MAX_SNAPSHOTS = 3

offsets = st.integers(0, SIZE - 1) | st.integers(0, SIZE // CLUSTER).map(lambda n: n * CLUSTER)
lengths = st.integers(1, 3 * CLUSTER) | st.sampled_from([CLUSTER, 16 * CLUSTER, 256 * KiB + 1])
long_lengths = lengths | st.integers(1, SIZE)


def place(offset: int, length: int) -> tuple[int, int]:
    return offset, min(length, SIZE - offset)


at_the_end = st.integers(1, 3 * CLUSTER).map(lambda back: (SIZE - back, back))
places = st.builds(place, offsets, lengths) | at_the_end
long_places = st.builds(place, offsets, long_lengths) | at_the_end
lines = st.integers(0, 2)
change_kinds = st.sampled_from(KINDS).flatmap(
    lambda kind: st.tuples(st.just(kind), long_places if kind in ("zeroes", "trim") else places, lines)
)
change_lists = st.lists(change_kinds, min_size=1, max_size=6)
Wanted = tuple[str, tuple[int, int], int]
"""(kind, (offset, length), line) of a change."""

SETTINGS = settings(max_examples=10, stateful_step_count=20, phases=(Phase.explicit, Phase.reuse, Phase.generate))
"""Without shrinking: a race that was lost once is not lost again on demand, and a fault takes seconds to show."""


class ServerMachine(RuleBasedStateMachine):
    def __init__(self, served: Served) -> None:
        super().__init__()
        self.world = World(served)

    def send_changes(self, burst: Burst, wanted: list[Wanted]) -> None:
        """Those that do not overlap what the burst has already."""
        for kind, where, line in wanted:
            change = self.world.new_change(kind, *where)
            if not change.overlaps(burst.changes):
                burst.change(change, line)

    def view(self, number: int) -> View:
        return self.world.views[number % len(self.world.views)]

    @initialize(holes=st.lists(long_places, max_size=3))
    def reset(self, holes: list[tuple[int, int]]) -> None:
        for offset, length in holes:
            self.world.guests[0].trim(offset, length)
            self.world.active[offset : offset + length] = bytes(length)

    # The guest

    @rule(wanted=change_lists, read=places, status=long_places)
    def guest_changes(self, wanted: list[Wanted], read: tuple[int, int], status: tuple[int, int]) -> None:
        burst = Burst(self.world)
        self.send_changes(burst, wanted)
        burst.guest_read(*read, line=2)
        burst.guest_status(*status, line=1)
        burst.finish()

    @rule(where=long_places, line=lines)
    def guest_reads(self, where: tuple[int, int], line: int) -> None:
        offset, length = where
        assert self.world.guests[line].read(offset, length) == self.world.active[offset : offset + length]
        self.world.guests[line].flush()

    # Snapshots

    @precondition(lambda self: len(self.world.views) < MAX_SNAPSHOTS)
    @rule(wanted=st.just([]) | change_lists)
    def create(self, wanted: list[Wanted]) -> None:
        """All of `wanted` is in flight while the snapshot is made."""
        burst = Burst(self.world)
        self.send_changes(burst, wanted[:2])
        burst.create()
        self.send_changes(burst, wanted[2:])
        burst.finish()
        check_view(self.world, self.world.views[-1])

    @precondition(lambda self: len(self.world.views) < MAX_SNAPSHOTS)
    @rule(before=change_lists, after=change_lists)
    def create_between(self, before: list[Wanted], after: list[Wanted]) -> None:
        """`before` is in flight at the instant, `after` is sent when the snapshot is there; it is read meanwhile."""
        burst = Burst(self.world)
        self.send_changes(burst, before)
        view = burst.create_and_wait()
        self.send_changes(burst, after)
        for number, change in enumerate(burst.changes):
            burst.read(view, change.offset, change.length, line=number % 3)
        burst.finish()
        check_view(self.world, view)

    @precondition(lambda self: not self.world.views)
    @rule(kind=st.sampled_from(["zeroes", "no_hole", "trim", "write"]))
    def create_during_long_copies(self, kind: str) -> None:
        """Changes that take their time, for all that they overwrite is saved for an earlier snapshot first."""
        long_copies(self.world, kind)

    @precondition(lambda self: self.world.views)
    @rule(which=st.integers(0, 5), reads=st.lists(long_places, max_size=4), wanted=change_lists)
    def delete(self, which: int, reads: list[tuple[int, int]], wanted: list[Wanted]) -> None:
        burst, view = Burst(self.world), self.view(which)
        for number, where in enumerate(reads):
            burst.read(view, *where, line=number % 3)
        burst.delete(view)
        self.send_changes(burst, wanted)
        for number, where in enumerate(reads):
            burst.read(view, *where, line=number % 3)
        burst.finish()

    @precondition(lambda self: self.world.views)
    @rule(which=st.integers(0, 5), where=long_places, line=lines)
    def read(self, which: int, where: tuple[int, int], line: int) -> None:
        burst = Burst(self.world)
        burst.read(self.view(which), *where, line=line)
        burst.finish()

    @precondition(lambda self: self.world.views)
    @rule(which=st.integers(0, 5), where=long_places, line=lines)
    def trim(self, which: int, where: tuple[int, int], line: int) -> None:
        burst = Burst(self.world)
        burst.trim(self.view(which), *where, line=line)
        burst.finish()

    @precondition(lambda self: self.world.views)
    @rule(which=st.integers(0, 5), where=long_places, line=st.integers(0, 1))
    def status(self, which: int, where: tuple[int, int], line: int) -> None:
        burst = Burst(self.world)
        burst.status(self.view(which), *where, line=line)
        burst.finish()

    @precondition(lambda self: self.world.views)
    @rule(which=st.integers(0, 5), where=places, wanted=change_lists, trims=st.lists(places, max_size=2))
    def everything_at_one_place(
        self,
        which: int,
        where: tuple[int, int],
        wanted: list[Wanted],
        trims: list[tuple[int, int]],
    ) -> None:
        """Changes, reads, status and trims near each other, all in flight at once."""
        burst, view, base = Burst(self.world), self.view(which), where[0]
        burst.read(view, *where, line=0)
        near = [(kind, place((base + offset) % SIZE, length), line) for kind, (offset, length), line in wanted]
        self.send_changes(burst, near)
        burst.read(view, *where, line=2)
        burst.status(view, *where, line=1)
        for offset, length in trims:
            burst.trim(view, *place((base + offset % CLUSTER) % SIZE, length), line=1)
        burst.read(view, *where, line=0)
        burst.finish()

    @rule(seed=st.integers(0, 2**32), create=st.booleans(), hot=st.booleans())
    def storm(self, seed: int, create: bool, hot: bool) -> None:
        """Hundreds of requests in flight, all over the disk or all in one `hot` place."""
        if create and len(self.world.views) < MAX_SNAPSHOTS:
            self.world.snapshot()
        Storm(self.world, Random(seed), hot=hot).run()

    @rule(where=st.integers(0, SIZE // CLUSTER - Duel.CLUSTERS), cold=st.booleans())
    def duel(self, where: int, cold: bool) -> None:
        """Everybody wants the same few clusters."""
        if len(self.world.views) >= MAX_SNAPSHOTS:
            burst = Burst(self.world)
            burst.delete(self.world.views[0])
            burst.finish()
        Duel(self.world, where * CLUSTER, cold=cold).run()

    def teardown(self) -> None:
        try:
            if not self.world.failed:
                check_world(self.world)
        finally:
            self.world.close()


def test_the_server_does_as_the_model_says(served: Served) -> None:
    class Machine(ServerMachine):
        def __init__(self) -> None:
            super().__init__(served)

    run_state_machine_as_test(Machine, settings=SETTINGS)
