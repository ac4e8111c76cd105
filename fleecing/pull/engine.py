"""Copies an export into a target: several connections, bounded requests in flight, TRIM behind the read head.

    Plan.take() --> READ in flight --> target.write --> TRIM in flight --> slot free again
                (zero: no READ)        target.zero

Each connection has its thread and its slots; a slot is a piece on its way and, for data, the buffer it is read into. So
memory is connections x depth x piece. A piece is trimmed only when the target has it, and counted only then as done.
The first error anywhere stops everything: all connections are cut, the target is abandoned, the error is raised.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from enum import Enum
from threading import Lock
from typing import Final

from fleecing.client.connection import Connection
from fleecing.client.dial import connect
from fleecing.client.request import Extents, Request
from fleecing.errors import RequestError
from fleecing.nbd.constants import BASE_ALLOCATION, Cmd, NbdError, TransmissionFlag
from fleecing.nbd.uri import NbdUri
from fleecing.pull.plan import Piece, Plan
from fleecing.pull.target import Target
from fleecing.units import KiB, align_down

log = logging.getLogger(__name__)

CLUSTER_STATE: Final = "fleecing:cluster-state"
"""The meta context that only snapshots of Fleecing have."""


class Trim(Enum):
    """Which exports are trimmed behind the read head. TRIM destroys what it trims."""

    NEVER = "never"
    SNAPSHOT = "snapshot"
    """Only an export that says, by the context `fleecing:cluster-state`, that it is a snapshot and no disk in use."""
    ALWAYS = "always"
    """Any export; RequestError where it has no TRIM."""


@dataclass(frozen=True)
class PullOptions:
    """`piece` in bytes, `timeout` in seconds for each answer; `connections` only where the export can share them."""

    connections: int = 4
    depth: int = 4
    piece: int = 512 * KiB
    trim: Trim = Trim.SNAPSHOT
    timeout: float = 60.0


@dataclass(frozen=True)
class Progress:
    """`done` of `total` bytes, zeroes among them; `rate` is bytes of data a second since the start."""

    done: int
    total: int
    rate: float


@dataclass(frozen=True)
class PullReport:
    """What a pull did, in bytes and seconds; data + zeroes = size."""

    size: int
    data: int
    zeroes: int
    trimmed: int
    seconds: float

    @property
    def rate(self) -> float:
        """Bytes of data a second."""
        return self.data / self.seconds if self.seconds else 0.0


ProgressCall = Callable[[Progress], None]
"""Called in the thread that pulls, every `interval` seconds and once at the end; what it raises stops the pull."""


def pull(
    uri: NbdUri,
    open_target: Callable[[int], Target],
    options: PullOptions | None = None,
    *,
    progress: ProgressCall | None = None,
    interval: float = 0.2,
) -> PullReport:
    """Copy the whole export; `open_target` gets its size in bytes once the server has told it.

    Raises RequestError with the server's text, ProtocolError, ImageError or OSError; the target is abandoned then.
    """
    options = options or PullOptions()
    connections = _connect_all(uri, options)
    try:
        target = open_target(connections[0].size)
        try:
            report = _Pull(connections, target, options).run(progress, interval)
            target.finish()
        except BaseException:
            target.abandon()
            raise
    finally:
        for connection in connections:
            connection.close()
    return report


def _connect_all(uri: NbdUri, options: PullOptions) -> list[Connection]:
    """One connection, and more where "CAN_MULTI_CONN" says that they see the same."""
    connections: list[Connection] = []
    try:
        wanted = options.connections
        while len(connections) < wanted:
            contexts = (BASE_ALLOCATION, CLUSTER_STATE)
            connections.append(connect(uri, contexts=contexts, timeout=options.timeout))
            if not connections[0].can(TransmissionFlag.CAN_MULTI_CONN):
                wanted = 1
    except BaseException:
        for connection in connections:
            connection.close()
        raise
    return connections


class _Pull:
    """One run over connections that are open. The counters are changed under the lock."""

    def __init__(self, connections: list[Connection], target: Target, options: PullOptions) -> None:
        first = connections[0]
        cluster = min(first.preferred_block, align_down(first.maximum_payload, first.minimum_block))
        self.connections = connections
        self.target = target
        self.depth = options.depth
        self.plan = Plan(first.size, cluster=cluster, data_piece=min(options.piece, first.maximum_payload))
        self.piece = self.plan.data_piece
        self.trims = _may_trim(first, options.trim)
        self._lock = Lock()
        self._data = 0
        self._zeroes = 0
        self._trimmed = 0

    def run(self, progress: ProgressCall | None, interval: float) -> PullReport:
        """Start a thread for each connection, tell progress until all are through. Raises the first error of any."""
        started = time.monotonic()
        with ThreadPoolExecutor(len(self.connections), thread_name_prefix="pull") as pool:
            try:
                running = {pool.submit(_Worker(self, connection).run) for connection in self.connections}
                while running:
                    ended, running = wait(running, timeout=interval, return_when=FIRST_EXCEPTION)
                    for future in ended:
                        future.result()
                    if progress is not None and running:
                        progress(self._progress(started))
            except BaseException:
                for connection in self.connections:
                    connection.abort()
                raise
        if progress is not None:
            progress(self._progress(started))
        seconds = time.monotonic() - started
        return PullReport(self.plan.size, self._data, self._zeroes, self._trimmed, seconds)

    def _progress(self, started: float) -> Progress:
        elapsed = time.monotonic() - started
        return Progress(self._data + self._zeroes, self.plan.size, self._data / elapsed if elapsed else 0.0)

    def count(self, piece: Piece, *, trimmed: bool) -> None:
        """The target has the piece, and the server does not need it any more."""
        with self._lock:
            if piece.is_zero:
                self._zeroes += piece.length
            else:
                self._data += piece.length
            if trimmed:
                self._trimmed += piece.length


class _Worker:
    """One connection's thread: keeps its slots full until the plan is empty."""

    def __init__(self, pull: _Pull, connection: Connection) -> None:
        self._pull = pull
        self._connection = connection
        self._buffers = [bytearray(pull.piece) for _ in range(pull.depth)]
        self._on_the_way: dict[int, tuple[Piece, bytearray]] = {}
        self._ask = self._allocation if BASE_ALLOCATION in connection.contexts else None

    def run(self) -> None:
        while True:
            while self._buffers:
                piece = self._pull.plan.take(self._ask)
                if piece is None:
                    break
                self._start(piece, self._buffers.pop())
            if not self._on_the_way:
                return
            request = self._connection.next_finished()
            if request.error is not None:
                raise request.error
            self._answered(request)

    def _allocation(self, offset: int, length: int) -> Extents:
        return self._connection.block_status(offset, length)[BASE_ALLOCATION]

    def _start(self, piece: Piece, buffer: bytearray) -> None:
        if piece.is_zero:
            self._pull.target.zero(piece.offset, piece.length)
            self._kept(piece, buffer)
        else:
            view = memoryview(buffer)[: piece.length]
            request = self._connection.submit_read(piece.offset, view)
            self._on_the_way[request.cookie] = piece, buffer

    def _answered(self, request: Request) -> None:
        piece, buffer = self._on_the_way.pop(request.cookie)
        if request.command is Cmd.READ:
            self._pull.target.write(piece.offset, memoryview(buffer)[: piece.length])
            self._kept(piece, buffer)
        else:
            self._pull.count(piece, trimmed=True)
            self._buffers.append(buffer)

    def _kept(self, piece: Piece, buffer: bytearray) -> None:
        """The target has the piece: trim it, or be done with it."""
        if self._pull.trims:
            request = self._connection.submit_trim(piece.offset, piece.length)
            self._on_the_way[request.cookie] = piece, buffer
        else:
            self._pull.count(piece, trimmed=False)
            self._buffers.append(buffer)


def _may_trim(connection: Connection, trim: Trim) -> bool:
    if trim is Trim.SNAPSHOT:
        return CLUSTER_STATE in connection.contexts and connection.can(TransmissionFlag.SEND_TRIM)
    if trim is Trim.ALWAYS and not connection.can(TransmissionFlag.SEND_TRIM):
        raise RequestError(NbdError.ENOTSUP, f"{connection.peer} offers no TRIM")
    return trim is Trim.ALWAYS
