"""Many clients at the same bytes at the same time: what can go wrong between two steps of the server, does."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from random import Random

from fleecing.units import KiB, MiB
from tests.server.burst import Burst
from tests.server.checks import check_view
from tests.server.model import CLUSTER
from tests.server.world import SIZE, START, View, World

KINDS = ["write", "write", "fua", "zeroes", "no_hole", "trim"]


def striped(data: bytes) -> bytes:
    """The same with every second cluster zero: saving it takes a step for each."""
    zero, made = bytes(CLUSTER), bytearray(data)
    for at in range(0, len(data) - CLUSTER, 2 * CLUSTER):
        made[at : at + CLUSTER] = zero
    return bytes(made)


class Duel:
    """One group of clusters after the other: saved while it is read, then trimmed while it is read.

    Every second cluster is zero, so saving a group takes several steps, with calls to the operating system in between.
    """

    GROUP = 8
    CLUSTERS = 16 * GROUP

    def __init__(self, world: World, start: int, *, cold: bool) -> None:
        """`start` in bytes is where it is; `cold`: nothing of it is in memory in the beginning."""
        self.world = world
        self.start = start
        self.cold = cold

    def run(self) -> None:
        """On a fresh snapshot."""
        self._prepare()
        view = self.world.snapshot()
        starts = range(self.start, self.start + self.CLUSTERS * CLUSTER, self.GROUP * CLUSTER)
        for number, start in enumerate(starts):
            self._write(view, start, and_trim=number % 3 == 0)
        for start in starts:
            self._trim(view, start)

    def _prepare(self) -> None:
        length = self.CLUSTERS * CLUSTER
        data = striped(Random(self.world.number()).randbytes(length))
        self.world.write(self.start, data)
        if self.cold:
            self.world.guests[0].flush()
            with open(self.world.image, "rb") as image:
                os.posix_fadvise(image.fileno(), self.start, length, os.POSIX_FADV_DONTNEED)

    def _write(self, view: View, start: int, *, and_trim: bool) -> None:
        """One guest writes from the middle of the first cluster to the middle of the last, others beside it there.

        `and_trim`: what lies between is trimmed while it is being saved.
        """
        burst, half, last = Burst(self.world), CLUSTER // 2, start + (self.GROUP - 1) * CLUSTER
        for turn in range(24):
            burst.read(view, start, CLUSTER, line=0)
            burst.change(self.world.new_change("write", start + turn * 64, 64), 1)
            if turn == 2:
                burst.change(self.world.new_change("write", start + half, (self.GROUP - 1) * CLUSTER), 0)
                if and_trim:
                    burst.trim(view, start + CLUSTER, (self.GROUP - 2) * CLUSTER, line=1)
            burst.change(self.world.new_change("write", last + half + turn * 64, 64), 2)
            burst.read(view, last, CLUSTER, line=2)
            if turn % 4 == 0 and not and_trim:
                burst.read(view, start, self.GROUP * CLUSTER, line=1)
        burst.finish()
        after = Burst(self.world)
        after.status(view, start, self.GROUP * CLUSTER, line=1)
        after.finish()

    def _trim(self, view: View, start: int) -> None:
        """Read cluster by cluster, and trimmed at once as a whole."""
        burst = Burst(self.world)
        for turn in range(3 * self.GROUP):
            for line in (0, 2):
                burst.read(view, start + turn % self.GROUP * CLUSTER, CLUSTER, line=line)
            if turn == self.GROUP:
                burst.trim(view, start, self.GROUP * CLUSTER, line=1)
        burst.finish()


class Storm:
    """Changes in one part of the disk while every snapshot is read and trimmed there."""

    def __init__(self, world: World, random: Random, *, hot: bool) -> None:
        """`hot`: all of it happens within one MiB."""
        self.world = world
        self.random = random
        self.length = MiB if hot else SIZE
        self.start = random.randrange(SIZE - self.length + 1)
        self.hot = hot
        self.burst = Burst(world)

    def run(self) -> None:
        """Send everything in any order."""
        if self.hot and self.random.random() < 0.5:
            self._have_it_saved()
        views = self.world.views
        duels = [partial(self._trim, self.random.choice(views)) for _ in range(30 if self.hot else 3)] if views else []
        steps: list[Callable[[], None]] = [*map(self._change, self._places()), *duels]
        self.random.shuffle(steps)
        for step in steps:
            step()
        self.burst.finish()

    def _have_it_saved(self) -> None:
        before = Burst(self.world)
        before.change(self.world.new_change("write", self.start, self.length - CLUSTER))
        before.finish()

    def _places(self) -> list[tuple[int, int]]:
        """Disjoint ranges, in any order."""
        random, found, offset = self.random, [], self.start
        stride = 16 * KiB if self.hot else random.choice([32 * KiB, 128 * KiB])
        while (offset := offset + random.randrange(1, 2 * stride)) < self.start + self.length:
            length = min(random.choice([1, 512, CLUSTER, 5 * CLUSTER, 20 * CLUSTER]), SIZE - offset)
            found.append((offset, length))
            offset += length
        random.shuffle(found)
        return found[:200]

    def _change(self, where: tuple[int, int]) -> Callable[[], None]:
        def send() -> None:
            self._look(*where)
            change = self.world.new_change(self.random.choice(KINDS), *where)
            self.burst.change(change, self.random.randrange(3))
            self._look(*where)

        return send

    def _trim(self, view: View) -> None:
        first = (self.start + self.random.randrange(self.length)) // CLUSTER * CLUSTER
        where = self._place(first, self.random.choice([1, 1, 4]) * CLUSTER)
        self.burst.read(view, *where, line=0)
        self.burst.trim(view, *where, line=1)
        self.burst.read(view, *where, line=2)

    def _look(self, offset: int, length: int) -> None:
        """At the place itself, or at more around it, in one of the snapshots."""
        random, views = self.random, self.world.views
        if not views:
            return
        view, more = random.choice(views), random.choice([0, 0, CLUSTER, 16 * CLUSTER, 128 * CLUSTER])
        begin = max(0, offset - more)
        where = self._place(begin, offset - begin + length + more)
        if random.random() < 0.1:
            self.burst.status(view, *where, line=random.randrange(2))
        else:
            self.burst.read(view, *where, line=random.randrange(3))

    def _place(self, offset: int, length: int) -> tuple[int, int]:
        return offset, min(length, SIZE - offset)


def long_copies(world: World, kind: str) -> None:
    """A snapshot made during changes that take their time, for all that they overwrite is saved for others first.

    It is read as soon as it is there; what it gives then it must give for ever.
    """
    world.write(0, striped(START))
    world.snapshot()
    world.snapshot()
    burst = Burst(world)
    step = MiB // 2 if kind == "write" else SIZE
    for number, offset in enumerate(range(0, SIZE, step)):
        burst.change(world.new_change(kind, offset, min(step, SIZE - offset)), number % 3)
    view = burst.create_and_wait()
    for offset in range(0, SIZE, MiB // 2):
        burst.read(view, offset, 1, line=2)
    burst.finish()
    check_view(world, view)


def trim_everything(world: World) -> None:
    """All of a snapshot is in temp, and all of it is given up at once while it is read."""
    world.write(0, START)
    view = world.snapshot()
    world.write(0, bytes(SIZE))
    burst = Burst(world)
    for turn in range(150):
        for line in (0, 2):
            burst.read(view, turn * CLUSTER, CLUSTER, line=line)
        if turn == 25:
            burst.trim(view, 0, SIZE, line=1)
    burst.finish()
    check_view(world, view)
