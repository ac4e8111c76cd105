"""--micro: what a request costs the server, and what its stages cost, in ns of CPU time.

The smallest of many rounds is taken: other programs make a round longer, never shorter, so that a change is seen on a
machine that is not quiet, too. Whole requests are asked of a real server, whose time the kernel counts in ns.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from urllib.parse import parse_qs, unquote, urlsplit

from fleecing.nbd.constants import (
    IHAVEOPT,
    REQUEST_MAGIC,
    ClientFlag,
    Cmd,
    Opt,
    ReplyMode,
)
from fleecing.nbd.transmission import REQUEST, data_header, done_reply
from fleecing.units import KiB, MiB
from scripts.benchmark.contenders import ours
from scripts.benchmark.house import House, make_dirty
from scripts.benchmark.model import Transport

ROUNDS = 9
REQUESTS = 1600
"""Requests of one round."""

CLUSTER = 64 * KiB

CPUCLOCK_SCHED = 2
"""linux/posix-timers.h: with a process's number above it, the clock of all of that process's CPU time."""


@dataclass(frozen=True)
class Kind:
    """A kind of request, `together` of them sent at once."""

    title: str
    command: Cmd
    length: int
    together: int
    mode: ReplyMode = ReplyMode.SIMPLE
    step: int = 4 * KiB
    """Bytes from one request's offset to the next one's."""

    def batches(self, size: int) -> list[bytes]:
        """What to send, batch by batch, until the whole disk was asked for, or for REQUESTS requests."""
        payload = os.urandom(self.length) if self.command is Cmd.WRITE else b""
        count = min(REQUESTS, size // self.step) // self.together * self.together
        requests = [
            REQUEST.pack(REQUEST_MAGIC, 0, self.command, i, i * self.step % (size - self.length + 1), self.length)
            + payload
            for i in range(count)
        ]
        return [b"".join(requests[i : i + self.together]) for i in range(0, count, self.together)]

    @property
    def reply_length(self) -> int:
        """Bytes of the replies to a batch."""
        if self.command is Cmd.READ:
            return self.together * (len(data_header(self.mode, 0, 0, self.length)) + self.length)
        return self.together * len(done_reply(self.mode, 0, 0))


ON_THE_DISK = (
    Kind("READ 4 KiB, 1 in flight", Cmd.READ, 4 * KiB, 1),
    Kind("READ 4 KiB, 16 in flight", Cmd.READ, 4 * KiB, 16),
    Kind("READ 4 KiB, 16 in flight, structured replies", Cmd.READ, 4 * KiB, 16, ReplyMode.STRUCTURED),
    Kind("READ 256 KiB, 4 in flight", Cmd.READ, 256 * KiB, 4, step=256 * KiB),
    Kind("WRITE 4 KiB, 16 in flight", Cmd.WRITE, 4 * KiB, 16),
)
ON_A_SNAPSHOT = (
    Kind("READ 4 KiB of a snapshot, 16 in flight, {state}", Cmd.READ, 4 * KiB, 16, ReplyMode.STRUCTURED),
    Kind("READ 256 KiB of a snapshot, 4 in flight, {state}", Cmd.READ, 256 * KiB, 4, step=256 * KiB),
)
WITH_A_COPY = Kind("WRITE 4 KiB, 16 in flight, each with a cluster to save", Cmd.WRITE, 4 * KiB, 16, step=CLUSTER)


class RawClient:
    """A client that sends bytes made beforehand, and only counts what comes back."""

    def __init__(self, uri: str, mode: ReplyMode) -> None:
        parts = urlsplit(uri)
        self._sock = socket.socket(socket.AF_UNIX)
        self._sock.connect(parse_qs(parts.query)["socket"][0])
        self._buffer = bytearray(4 * MiB)
        self._take(18)  # NBDMAGIC, IHAVEOPT, handshake flags
        self._sock.sendall((ClientFlag.C_FIXED_NEWSTYLE | ClientFlag.C_NO_ZEROES).to_bytes(4, "big"))
        if mode is ReplyMode.STRUCTURED:
            self._option(Opt.STRUCTURED_REPLY, b"")
            self._take(20)
        self._option(Opt.EXPORT_NAME, unquote(parts.path.lstrip("/")).encode())
        self._take(10)  # size, transmission flags

    def _option(self, option: Opt, data: bytes) -> None:
        head = IHAVEOPT.to_bytes(8, "big") + int(option).to_bytes(4, "big")
        self._sock.sendall(head + len(data).to_bytes(4, "big") + data)

    def _take(self, count: int) -> None:
        while count:
            got = self._sock.recv_into(self._buffer, min(count, len(self._buffer)))
            if not got:
                raise ConnectionError("the server hung up")
            count -= got

    def exchange(self, batch: bytes, reply_length: int) -> None:
        """Send a batch, take all of its replies."""
        self._sock.sendall(batch)
        self._take(reply_length)

    def close(self) -> None:
        """Hang up."""
        self._sock.close()


def process_nanoseconds(pid: int) -> int:
    """CPU time of a process, to the ns, with that of threads that have ended."""
    return time.clock_gettime_ns(~pid << 3 | CPUCLOCK_SCHED)


def requests(house: House) -> Iterator[tuple[str, float]]:
    """(title, ns of CPU a request) of each kind."""
    size = house.settings.size
    with ours.serve(house, house.image, Transport.UNIX) as server:
        for kind in ON_THE_DISK:
            if kind.command is Cmd.WRITE:
                make_dirty(house.image)
            yield kind.title, _smallest(server.child.pid, server.uri, kind, size)
        with server.snapshot() as offer:
            for state in ("untouched", "copied"):
                for kind in ON_A_SNAPSHOT:
                    yield kind.title.format(state=state), _smallest(server.child.pid, offer.snapshot, kind, size)
                if state == "untouched":
                    with _client(server.uri, ReplyMode.SIMPLE) as client:
                        _round(server.child.pid, client, WITH_A_COPY, size)
        yield WITH_A_COPY.title, min(_copying(server, size) for _ in range(3))


def _copying(server: ours.Ours, size: int) -> float:
    with server.snapshot(), _client(server.uri, ReplyMode.SIMPLE) as client:
        return _round(server.child.pid, client, WITH_A_COPY, size)


def _smallest(pid: int, uri: str, kind: Kind, size: int) -> float:
    with _client(uri, kind.mode) as client:
        return min(_round(pid, client, kind, size) for _ in range(ROUNDS))


@contextmanager
def _client(uri: str, mode: ReplyMode) -> Iterator[RawClient]:
    client = RawClient(uri, mode)
    try:
        yield client
    finally:
        client.close()


def _round(pid: int, client: RawClient, kind: Kind, size: int) -> float:
    batches, reply_length = kind.batches(size), kind.reply_length
    before = process_nanoseconds(pid)
    for batch in batches:
        client.exchange(batch, reply_length)
    return (process_nanoseconds(pid) - before) / (len(batches) * kind.together)
