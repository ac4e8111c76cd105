"""Many clients at the same bytes at the same time: what can go wrong between two steps of the server, does."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from random import Random

from fleecing.units import KiB, MiB
from tests.server.burst import Burst, View, World
from tests.server.model import CLUSTER, Change

KINDS = ["write", "write", "fua", "zeroes", "no_hole", "trim"]


class Duel:
    """One group of clusters after the other: saved while it is read, then trimmed while it is read.

    Every second cluster is zero, so saving a group takes several steps, with calls to the operating system in between.
    """

    GROUP = 8
    CLUSTERS = 16 * GROUP

    def __init__(self, world: World, number: Callable[[], int], start: int, *, cold: bool) -> None:
        self.world = world
        self.number = number
        self.start = start
        self.cold = cold

    def run(self) -> None:
        """On a fresh snapshot."""
        self._prepare()
        view = self.world.add(self.world.freeze(), bytearray(self.world.active), [])
        starts = range(self.start, self.start + self.CLUSTERS * CLUSTER, self.GROUP * CLUSTER)
        for start in starts:
            self._write(view, start)
        for start in starts:
            self._trim(view, start)

    def _prepare(self) -> None:
        length = self.CLUSTERS * CLUSTER
        data = bytearray(Random(self.number()).randbytes(length))
        for at in range(0, length, 2 * CLUSTER):
            data[at : at + CLUSTER] = bytes(CLUSTER)
        self.world.guests[0].write(self.start, data)
        self.world.active[self.start : self.start + length] = data
        for view in self.world.views:
            view.frozen.touched(Change("write", self.start, length, 0), for_sure=True)
        if self.cold:
            self.world.guests[0].flush()
            with open(self.world.image, "rb") as image:
                os.posix_fadvise(image.fileno(), self.start, length, os.POSIX_FADV_DONTNEED)

    def _write(self, view: View, start: int) -> None:
        """One guest writes from the middle of the first cluster to the middle of the last, others beside it there."""
        burst, half, last = Burst(self.world), CLUSTER // 2, start + (self.GROUP - 1) * CLUSTER
        for turn in range(24):
            burst.read(view, start, CLUSTER, line=0)
            burst.change(Change("write", start + turn * 64, 64, self.number()), 1)
            if turn == 2:
                burst.change(Change("write", start + half, (self.GROUP - 1) * CLUSTER, self.number()), 0)
            burst.change(Change("write", last + half + turn * 64, 64, self.number()), 2)
            burst.read(view, last, CLUSTER, line=2)
            if turn % 4 == 0:
                burst.read(view, start, self.GROUP * CLUSTER, line=1)
        burst.finish()

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

    def __init__(self, world: World, number: Callable[[], int], random: Random, *, hot: bool) -> None:
        self.world = world
        self.number = number
        self.random = random
        self.length = MiB if hot else world.size
        self.start = random.randrange(world.size - self.length + 1)
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
        before.change(Change("write", self.start, self.length - CLUSTER, self.number()))
        before.finish()

    def _places(self) -> list[tuple[int, int]]:
        """Disjoint ranges, in any order."""
        random, found, offset = self.random, [], self.start
        stride = 16 * KiB if self.hot else random.choice([32 * KiB, 128 * KiB])
        while (offset := offset + random.randrange(1, 2 * stride)) < self.start + self.length:
            length = min(random.choice([1, 512, CLUSTER, 5 * CLUSTER, 20 * CLUSTER]), self.world.size - offset)
            found.append((offset, length))
            offset += length
        random.shuffle(found)
        return found[:200]

    def _change(self, where: tuple[int, int]) -> Callable[[], None]:
        def send() -> None:
            self._look(*where)
            change = Change(self.random.choice(KINDS), *where, self.number())
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
        return offset, min(length, self.world.size - offset)
