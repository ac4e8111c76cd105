"""A server's disk, its snapshots, and what all of them must hold."""

from __future__ import annotations

import itertools
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from random import Random

from fleecing.client.connection import Connection
from fleecing.client.dial import connect
from fleecing.nbd.constants import BASE_ALLOCATION
from fleecing.nbd.uri import NbdUri
from fleecing.server.meta_context import CLUSTER_STATE
from fleecing.units import MiB
from tests.server.model import Change, Doubt, Frozen
from tests.serving import Server

SIZE = 12 * MiB + 777
"""Bytes of the disk. Its clusters are of 4 KiB."""

START = Random(0).randbytes(SIZE)
"""What it holds in the beginning."""

TIMEOUT = 30.0
"""Seconds that one call of a connection may take; a server that hangs fails the test."""


@dataclass(frozen=True)
class Served:
    """A running server and the image of its only disk, `vda`."""

    server: Server
    image: Path


class Lines:
    """Three connections to an export, one for each kind of reply, opened when they are needed.

    The first tells of holes and, of a snapshot, of its clusters; the second of one of them; the last of nothing.
    """

    def __init__(self, uri: str, stack: ExitStack) -> None:
        self._uri = NbdUri.parse(uri)
        self._contexts = [CLUSTER_STATE, BASE_ALLOCATION] if "@" in uri else [BASE_ALLOCATION]
        self._stack = stack
        self._open: dict[int, Connection] = {}

    def __getitem__(self, number: int) -> Connection:
        if number not in self._open:
            self._open[number] = self._stack.enter_context(self._connect(number))
        return self._open[number]

    def _connect(self, number: int) -> Connection:
        match number:
            case 0:
                return connect(self._uri, contexts=self._contexts, timeout=TIMEOUT)
            case 1:
                return connect(self._uri, contexts=self._contexts[:1], extended=False, timeout=TIMEOUT)
            case _:
                return connect(self._uri, structured=False, extended=False, timeout=TIMEOUT)


@dataclass(eq=False)
class View:
    """A snapshot with the connections that read it."""

    frozen: Frozen
    lines: Lines


class World:
    """Everything about one disk; a new one starts with the disk as it was in the beginning."""

    def __init__(self, served: Served) -> None:
        self.server = served.server
        self.image = served.image
        self.active = bytearray(START)
        self.failed = False
        """Something was not as the model says; what follows from it is no news."""
        self.views: list[View] = []
        self.stack = ExitStack()
        self._numbers = itertools.count(1)
        for snapshot in self.server.status()["snapshots"]:  # of a test that failed
            self.server.delete(snapshot["export"])
        self.guests = Lines(self.server.uri(), self.stack)
        self.guests[0].write(0, START)

    def number(self) -> int:
        """One that no change had yet."""
        return next(self._numbers)

    def new_change(self, kind: str, offset: int, length: int) -> Change:
        return Change(kind, offset, length, self.number())

    def write(self, offset: int, data: bytes) -> None:
        """A guest's write, with nothing else in flight."""
        self.guests[0].write(offset, data)
        self.active[offset : offset + len(data)] = data
        for view in self.views:
            view.frozen.touched(Change("write", offset, len(data), 0), for_sure=True)

    def freeze(self) -> str:
        """Take a snapshot; the name of its export."""
        export: str = self.server.freeze("vda")[0]["export"]
        return export

    def add(self, export: str, contents: bytearray, doubts: list[Doubt]) -> View:
        """A snapshot that was made."""
        self.views.append(View(Frozen(export, contents, doubts), Lines(self.server.uri(export), self.stack)))
        return self.views[-1]

    def snapshot(self) -> View:
        """Take one, with nothing in flight."""
        return self.add(self.freeze(), bytearray(self.active), [])

    def close(self) -> None:
        """Hang up everywhere."""
        self.stack.close()
