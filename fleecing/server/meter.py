"""What clients ask for and how long it takes, counted so that a request hardly costs more for it.

A connection's thread counts in plain numbers that nobody else changes, and looks at the clock twice a batch:

    received    when the receive that brought the batch returned
    sent        when its replies were handed to the socket: all requests answered since took so long, each

So the latency of a request is what the server made of it: from the moment that all of it was there to the moment that
the system had its reply. It does not have the time that it waited in the socket, nor what the network took. What is
answered by another thread (FLUSH, FUA, TRIM, a WRITE that waits for a copy) and a WRITE that came in pieces are timed
one by one, from the receive that brought them (or their header) to their own reply.

A request counts when it is answered, also with an error, before the reply leaves: who has a reply finds it counted.
"""

from __future__ import annotations

import threading
import time
from bisect import bisect_left

from fleecing.block.latency import BOUNDS, Latency
from fleecing.block.ledger import Ledger
from fleecing.nbd.constants import Cmd

clock = time.perf_counter

OTHER = 2
"""Where commands that are none are counted: the place of DISC, which is no request that is answered."""

KINDS = {
    int(Cmd.READ): "read",
    int(Cmd.WRITE): "write",
    int(Cmd.WRITE_ZEROES): "write_zeroes",
    int(Cmd.TRIM): "trim",
    int(Cmd.FLUSH): "flush",
    int(Cmd.CACHE): "cache",
    int(Cmd.BLOCK_STATUS): "block_status",
    OTHER: "other",
}
"""The kinds of requests, by number, and how they are called."""

WITH_BYTES = (int(Cmd.READ), int(Cmd.WRITE), int(Cmd.WRITE_ZEROES), int(Cmd.TRIM))
"""Those that move or change bytes; of the others none are counted."""

_READ, _WRITE = int(Cmd.READ), int(Cmd.WRITE)
_PLACES = max(KINDS) + 1


def kind_of(command: int) -> int:
    """Its number among KINDS."""
    return command if command in KINDS else OTHER


class Tally:
    """Of one client or of many. Each list has a place for each of KINDS."""

    __slots__ = ("bytes", "errors", "latencies", "requests")

    def __init__(self) -> None:
        self.requests = [0] * _PLACES
        """Answered."""
        self.errors = [0] * _PLACES
        """Answered with an error."""
        self.bytes = [0] * _PLACES
        """Read, written, zeroed, trimmed, without those of errors."""
        self.latencies: list[Latency | None] = [None] * _PLACES
        """None = not any."""

    def latency(self, kind: int) -> Latency:
        """Of this kind, to be changed."""
        found = self.latencies[kind]
        if found is None:
            found = self.latencies[kind] = Latency()
        return found

    def add(self, other: Tally, /) -> None:
        """Take the other's figures into these."""
        for kind in KINDS:
            self.requests[kind] += other.requests[kind]
            self.errors[kind] += other.errors[kind]
            self.bytes[kind] += other.bytes[kind]
            latency = other.latencies[kind]
            if latency is not None:
                self.latency(kind).add(latency)


class Meter:
    """Counts for one connection. Its own thread calls and changes everything but `late`; any thread reads."""

    def __init__(self) -> None:
        self.received = 0.0
        """When the last receive returned, by `clock`."""
        # The two kinds of which there are many; the connection changes these in line.
        self.reads = 0
        self.writes = 0
        self.bytes_read = 0
        self.bytes_written = 0
        self._reads_sent = self._writes_sent = 0  # those of them that `sent` has seen
        self._read_latency, self._write_latency = Latency(), Latency()
        self._read_buckets, self._write_buckets = self._read_latency.buckets, self._write_latency.buckets
        self._own = Tally()  # all else that its thread answers
        self._unsent: list[int] = []  # kinds of those that are answered and not sent
        self._late = Tally()  # what other threads answer, under the lock
        self._late_lock = threading.Lock()

    @property
    def requests(self) -> int:
        """Of all kinds."""
        return self.reads + self.writes + sum(self._own.requests) + sum(self._late.requests)

    @property
    def all_bytes_written(self) -> int:
        """By WRITEs, whoever answered them."""
        return self.bytes_written + self._late.bytes[_WRITE]

    def answered(self, kind: int, length: int) -> None:
        """A request of so many bytes, without an error; its reply goes out with the batch."""
        if kind == _READ:
            self.reads += 1
            self.bytes_read += length
        elif kind == _WRITE:
            self.writes += 1
            self.bytes_written += length
        else:
            self._own.requests[kind] += 1
            if kind in WITH_BYTES:
                self._own.bytes[kind] += length
            self._unsent.append(kind)

    def refused(self, kind: int) -> None:
        """A request with an error; its reply goes out with the batch."""
        self._own.errors[kind] += 1
        self.answered(kind, 0)

    def sent(self) -> None:
        """All that was answered has been handed to the socket, or never will be."""
        seconds = clock() - self.received
        bucket = bisect_left(BOUNDS, seconds)
        count = self.reads - self._reads_sent
        if count:
            self._reads_sent += count
            self._read_buckets[bucket] += count
            self._read_latency.seconds += seconds * count
        count = self.writes - self._writes_sent
        if count:
            self._writes_sent += count
            self._write_buckets[bucket] += count
            self._write_latency.seconds += seconds * count
        if self._unsent:
            for kind in self._unsent:
                self._own.latency(kind).record(seconds)
            self._unsent.clear()

    def late(self, kind: int, length: int, since: float, *, failed: bool) -> None:
        """A request that was received at `since` is answered by itself, just now. From any thread."""
        seconds = clock() - since
        late = self._late
        with self._late_lock:
            late.requests[kind] += 1
            if failed:
                late.errors[kind] += 1
            elif kind in WITH_BYTES:
                late.bytes[kind] += length
            late.latency(kind).record(seconds)

    def figures(self) -> Tally:
        """All of it, as it is now."""
        found = Tally()
        found.add(self._own)
        with self._late_lock:
            found.add(self._late)
        for kind, requests, count, latency in (
            (_READ, self.reads, self.bytes_read, self._read_latency),
            (_WRITE, self.writes, self.bytes_written, self._write_latency),
        ):
            found.requests[kind] += requests
            found.bytes[kind] += count
            if requests:
                found.latency(kind).add(latency)
        return found


class Traffic(Ledger[Tally]):
    """All that clients of some exports ask for, and ever asked for."""

    def __init__(self) -> None:
        super().__init__(Tally)
