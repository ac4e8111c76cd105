"""A state machine over the real server, on real sockets: guests, backups and an operator in any order, all at once."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from fleecing.units import KiB, MiB
from tests.peers import run
from tests.server.burst import Burst, View, World
from tests.server.fights import KINDS, Duel, Storm
from tests.server.model import CLUSTER, Change
from tests.serving import Server

SIZE = 12 * MiB + 777
START = Random(0).randbytes(SIZE)
MAX_SNAPSHOTS = 3

NERVOUS = (
    "import sys; sys.setswitchinterval(2e-6); sys.argv[:] = ['fleecing', *sys.argv[4:]];"
    "from fleecing.cli.main import main; main()"
)
"""Runs the server with threads that take turns a thousand times as often: what can come in between, does."""


@pytest.fixture(scope="module", params=["calm", "nervous"])
def served(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[tuple[Server, Path]]:
    """One server for all examples, and its image; the disk is reset by writing."""
    folder = tmp_path_factory.mktemp("machine")
    image = folder / "disk.img"
    image.write_bytes(START)
    wrapper = (sys.executable, "-c", NERVOUS) if request.param == "nervous" else ()
    started = Server(folder / "server", image, "--cluster-size", "4K", wrapper=wrapper)
    yield started, image
    started.stop()


offsets = st.integers(0, SIZE - 1) | st.integers(0, SIZE // CLUSTER).map(lambda n: n * CLUSTER)
lengths = st.integers(1, 3 * CLUSTER) | st.sampled_from([CLUSTER, 16 * CLUSTER, 256 * KiB + 1])
long_lengths = lengths | st.integers(1, SIZE)


def place(offset: int, length: int) -> tuple[int, int]:
    return offset, min(length, SIZE - offset)


places = st.builds(place, offsets, lengths)
long_places = st.builds(place, offsets, long_lengths)
lines = st.integers(0, 2)
change_kinds = st.sampled_from(KINDS).flatmap(
    lambda kind: st.tuples(st.just(kind), long_places if kind in ("zeroes", "trim") else places, lines)
)
change_lists = st.lists(change_kinds, min_size=1, max_size=6)
Wanted = tuple[str, tuple[int, int], int]
"""(kind, (offset, length), line) of a change."""


class ServerMachine(RuleBasedStateMachine):
    def __init__(self, server: Server, image: Path) -> None:
        super().__init__()
        self.server = server
        self.number = 0
        for snapshot in server.status()["snapshots"]:  # of an example that failed
            server.delete(snapshot["export"])
        self.world = World(server, image, bytearray(START))

    def new_number(self) -> int:
        self.number += 1
        return self.number

    def new_change(self, kind: str, offset: int, length: int) -> Change:
        return Change(kind, offset, length, self.new_number())

    def send_changes(self, burst: Burst, wanted: list[Wanted]) -> None:
        """Those that do not overlap what the burst has already."""
        for kind, where, line in wanted:
            change = self.new_change(kind, *where)
            if not change.overlaps(burst.changes):
                burst.change(change, line)

    def view(self, number: int) -> View:
        return self.world.views[number % len(self.world.views)]

    @initialize(holes=st.lists(long_places, max_size=3))
    def reset(self, holes: list[tuple[int, int]]) -> None:
        guest = self.world.guests[0]
        guest.write(0, START)
        for offset, length in holes:
            guest.trim(offset, length)
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
        self.check_all(self.world.views[-1])

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
        self.check_all(view)

    @precondition(lambda self: len(self.world.views) < MAX_SNAPSHOTS - 1)
    @rule(kind=st.sampled_from(["zeroes", "no_hole", "trim", "write"]))
    def create_during_long_copies(self, kind: str) -> None:
        """Changes that take their time, for all that they overwrite is saved for an earlier snapshot first."""
        self.world.guests[0].write(0, START)
        self.world.active[:] = START
        for view in self.world.views:
            view.frozen.touched(Change("write", 0, SIZE, 0), for_sure=True)
        self.world.add(self.world.freeze(), bytearray(self.world.active), [])
        burst = Burst(self.world)
        step = 512 * KiB if kind == "write" else 6 * MiB
        for number, offset in enumerate(range(0, SIZE, step)):
            burst.change(self.new_change(kind, *place(offset, step)), number % 3)
        view = burst.create_and_wait()
        for number, offset in enumerate(range(0, SIZE, MiB)):
            burst.read(view, *place(offset, MiB), line=number % 3)
        burst.finish()
        self.check_all(view)

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
            self.world.add(self.world.freeze(), bytearray(self.world.active), [])
        Storm(self.world, self.new_number, Random(seed), hot=hot).run()

    @rule(where=st.integers(0, SIZE // CLUSTER - Duel.CLUSTERS), cold=st.booleans())
    def duel(self, where: int, cold: bool) -> None:
        """Everybody wants the same few clusters; with `cold` none of them is in memory."""
        if len(self.world.views) >= MAX_SNAPSHOTS:
            burst = Burst(self.world)
            burst.delete(self.world.views[0])
            burst.finish()
        Duel(self.world, self.new_number, where * CLUSTER, cold=cold).run()

    def check_all(self, view: View) -> None:
        """Every byte that was not trimmed, the state of every cluster, and what the control API counts."""
        burst = Burst(self.world)
        if not view.frozen.trimmed:
            burst.status(view, 0, SIZE)
        for offset, length in runs_without(view.frozen.trimmed):
            burst.read(view, offset, length, line=offset // CLUSTER % 3)
        burst.finish()
        counts = self.server.show(view.frozen.export)["clusters"]
        assert counts["trimmed"] == len(view.frozen.trimmed)
        assert sum(counts.values()) == -(-SIZE // CLUSTER)
        saved, maybe = view.frozen.saved - view.frozen.trimmed, view.frozen.saved | view.frozen.maybe_saved
        assert counts["copied"] <= len(maybe)
        assert len(saved) <= counts["copied"] + counts["trimmed"]

    def teardown(self) -> None:
        try:
            if not self.world.failed:
                self.check_end()
        finally:
            self.world.close()

    def check_end(self) -> None:
        assert self.world.guests[1].read(0, SIZE) == self.world.active
        for view in self.world.views:
            self.check_all(view)
            temp = self.server.temp(view.frozen.export)
            run("qemu-img", "check", "-q", "-f", "qcow2", str(temp))
            assert self.server.delete(view.frozen.export)
            assert not temp.exists()


def runs_without(trimmed: set[int]) -> list[tuple[int, int]]:
    """(offset, length) of the runs of clusters that can be read, at most 1 MiB each."""
    runs, start = [], None
    end = -(-SIZE // CLUSTER)
    for cluster in range(end + 1):
        readable = cluster < end and cluster not in trimmed
        if start is not None and (not readable or cluster - start == MiB // CLUSTER):
            runs.append((start * CLUSTER, min(cluster * CLUSTER, SIZE) - start * CLUSTER))
            start = None
        if readable and start is None:
            start = cluster
    return runs


def test_the_server_does_as_the_model_says(served: tuple[Server, Path]) -> None:
    class Machine(ServerMachine):
        def __init__(self) -> None:
            super().__init__(*served)

    run_state_machine_as_test(Machine, settings=settings(max_examples=20, stateful_step_count=20))
