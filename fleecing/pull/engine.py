"""Copies an export into a target: several connections, bounded requests in flight, TRIM behind the read head.

    Plan.take() --> READ in flight --> target.write --> journal --> TRIM in flight --> slot free again
                (zero: no READ)        target.zero

Each connection has its thread (worker.py) and its slots; a slot is a piece on its way. A buffer is taken when the data
comes: memory is connections x depth x piece at most, and a piece or two for each connection to a server that answers
one request after the other; with a server on the same host it is shared with that, and taken at the beginning, up to
MOST_SHARED a connection. A piece is trimmed only when the target has it. The first error that no new connection
mends stops everything: all connections are cut, the target is abandoned, or suspended where a journal can bring it
back, and the error is raised.
"""

from __future__ import annotations

import hashlib
import logging
import os
import time
import zlib
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import suppress
from threading import Condition, Event, Lock
from typing import Final

from fleecing.errors import BlockError, FleecingError, ImageError, ProtocolError, RequestError
from fleecing.nbd.client_handshake import ExportRefused
from fleecing.nbd.constants import NbdError, TransmissionFlag
from fleecing.nbd.uri import NbdUri
from fleecing.pull.any_source import AnyConnection, AnySource
from fleecing.pull.connecting import connect_unless
from fleecing.pull.journal import CHECK_BYTES, NO_CHECK, Journal
from fleecing.pull.need import Crowd
from fleecing.pull.options import Check, Progress, PullOptions, PullReport, Trim
from fleecing.pull.plan import Piece, Plan
from fleecing.pull.source import Source
from fleecing.pull.target import Target
from fleecing.pull.worker import CheckCall, Worker
from fleecing.units import MiB, align_down

log = logging.getLogger(__name__)

MOST_MEMORY: Final = 64 * MiB
"""Bytes of buffers that are added as more requests help: at 100 ms to the server and back they carry 640 MiB/s."""

GROW_SECONDS: Final = 1.0
"""How long is measured before another connection is tried."""

NICENESS: Final = 10
"""Of the threads that copy a snapshot on the same host. A guest that writes 1000 times a second on two CPUs had p99
2.3 to 2.7 ms beside them where it had 2.9 to 3.7 ms, and a median of 0.2 ms for 0.35; the copy lost 3 to 8 %, and
nothing where the guest did nothing."""

SYNC_SECONDS: Final = 5.0
"""How often the target is made durable where there is a journal: what a power cut may cost."""


_CHECKS: Final[dict[Check, CheckCall | None]] = {
    Check.NONE: None,
    Check.CRC32: lambda data: zlib.crc32(data).to_bytes(4, "big").ljust(CHECK_BYTES, b"\1"),
    Check.SHA256: lambda data: hashlib.sha256(data).digest(),
}


ProgressCall = Callable[[Progress], None]
"""Called in the thread that pulls, every `interval` seconds and once at the end; what it raises stops the pull."""


def pull(
    uri: NbdUri,
    open_target: Callable[[int], Target],
    options: PullOptions | None = None,
    *,
    journal: Journal | None = None,
    progress: ProgressCall | None = None,
    interval: float = 0.2,
) -> PullReport:
    """Copy the whole export, or what its dirty bitmap says; `open_target` gets its size in bytes, told by the server.

    With a `journal` a failure suspends the target, if it has anything that its disk has taken; else the target is
    abandoned. The journal is its owner's to close, or to remove when all is well. Raises RequestError with the server's
    text, ProtocolError, ImageError or OSError.
    """
    options = options or PullOptions()
    source = Source(uri, timeout=options.timeout, bitmap=options.bitmap)
    return copy(source, open_target, options, journal=journal, progress=progress, interval=interval)


def copy(
    source: AnySource,
    open_target: Callable[[int], Target],
    options: PullOptions,
    *,
    journal: Journal | None = None,
    progress: ProgressCall | None = None,
    interval: float = 0.2,
) -> PullReport:
    """The same of a source that is open; it is closed in the end. Raises what its node does, where it is one."""
    connections: list[AnyConnection] = [source.first]
    try:
        _connect_more(source, connections, options.connections)
        if journal is not None:
            assert isinstance(source, Source), "what is copied inside the server is not resumed"
            _begin(journal, source, options)
        target = open_target(source.size)
        try:
            report = _Pull(source, connections, target, journal, options).run(progress, interval)
            if journal is not None:
                journal.is_of_use = True  # it lists what the target has, be it nothing
                _make_durable(target, journal)  # before the target has its name, for a chain lists what the journal has
            target.finish()
        except BaseException:
            _give_up(target, journal)
            raise
    finally:
        for connection in connections:
            connection.close()
    return report


def _connect_more(source: AnySource, connections: list[AnyConnection], wanted: int) -> None:
    """As many as the export can share and the server takes; the first one alone will do."""
    while source.may_share and len(connections) < wanted:
        try:
            connections.append(source.connect())
        except (OSError, ProtocolError, ExportRefused) as e:
            if isinstance(e, ExportRefused) and e.reply is not None:
                raise
            log.info("%s; going on with %d connections", e, len(connections))
            return


def _begin(journal: Journal, source: Source, options: PullOptions) -> None:
    journal.begin(
        {
            "export": source.uri.export,
            "server": None if source.is_snapshot else source.server,  # a snapshot's description is its own
            "size": source.size,
            "description": source.description,
            "bitmap": source.bitmap,
            "check": options.check.value,
        }
    )


def _make_durable(target: Target, journal: Journal) -> None:
    """Raises OSError where the target's disk did not take something, also where nobody waits for it."""
    position = journal.position
    target.sync()
    if target.waits:
        journal.durable(position)


def _give_up(target: Target, journal: Journal | None) -> None:
    """Another run can go on with what was kept, as far as the disk has taken it.

    What it has not still is in memory, reads right, and is told once: that run would take it for good.
    """
    if journal is not None and journal.is_of_use:
        try:
            with suppress(OSError, FleecingError):  # no space for a record, or the target is gone
                if target.has_lost:
                    target.sync()  # to hear of the rest, which the next run would be told otherwise
                else:
                    _make_durable(target, journal)
        finally:
            if target.has_lost:
                with suppress(OSError):
                    journal.lose()
    if journal is not None and journal.is_of_use:
        target.suspend()
    else:
        target.abandon()


class _Pull:
    """One run over connections that are open. The counters and the list of connections are changed under the lock."""

    def __init__(
        self,
        source: AnySource,
        connections: list[AnyConnection],
        target: Target,
        journal: Journal | None,
        options: PullOptions,
    ) -> None:
        first = source.first
        self.source = source
        self.target = target
        self.depth = options.depth
        self.most_depth = 0 if options.bandwidth is not None else options.most_depth
        # A snapshot's server has a machine to serve as well: each connection more is a thread that takes of its time.
        # A guest that writes all it can got 14.2 k/s where it gets 16.8 k/s beside the two that a pull begins with.
        stays = options.bandwidth is not None or source.is_snapshot
        self._most_connections = 0 if stays else options.most_connections
        self._workers: list[Worker] = []
        self._present = len(connections)  # workers whose connections are there, or may come back
        self.reconnect = options.reconnect
        self.bandwidth = options.bandwidth
        self.check = _CHECKS[options.check]
        self.trims = _may_trim(source, options.trim)
        self.changed = Condition()
        self.stopped = Event()
        self._is_enough = Event()  # another connection would find nothing to do
        self._connections = connections
        self._journal = journal
        if target.needs_all and source.bitmap is not None:
            raise RequestError(
                NbdError.ENOTSUP,
                f"{source.uri} is an increment since {source.bitmap}: a stream takes whole disks only",
            )
        cluster = _cluster(first, target)
        if journal is not None:
            _compare(journal, target, self.check)
        done = [] if journal is None else journal.ranges()
        self.plan = Plan(first.size, cluster=cluster, data_piece=min(_piece(options), first.maximum_payload), done=done)
        self.piece = self.plan.data_piece
        self._resumed = sum(end - start for start, end in done)
        if journal is not None and self.trims:
            for piece in journal.untrimmed():
                self.plan.add(piece)
        self._room = MOST_MEMORY // self.piece
        self._lock = Lock()
        self._data = 0
        self._zeroes = 0
        self._trimmed = 0
        self._reconnects = 0

    def run(self, progress: ProgressCall | None, interval: float) -> PullReport:
        """Start a thread for each connection, tell progress until all are through. Raises the first error of any."""
        started = synced = time.monotonic()
        threads = max(len(self._connections), self._most_connections)
        crowd = _Growth(self, self._most_connections)
        manners = _step_back if self.source.takes_cpus else None
        with ThreadPoolExecutor(threads, thread_name_prefix="pull", initializer=manners) as pool:
            try:
                self._workers += [Worker(self, connection) for connection in self._connections]
                running = {pool.submit(worker.run) for worker in self._workers}
                while running:
                    ended, running = wait(running, timeout=interval, return_when=FIRST_EXCEPTION)
                    for future in ended:
                        future.result()
                    if running and self._journal is not None and time.monotonic() - synced > SYNC_SECONDS:
                        _make_durable(self.target, self._journal)
                        synced = time.monotonic()
                    if self.plan.exhausted:
                        self._is_enough.set()
                    elif self.source.may_share and crowd.wants_more():
                        running.add(pool.submit(self._join))
                    if progress is not None and running:
                        progress(self._progress(started))
            except BaseException:
                self._stop()
                raise
        self._check_all_is_there()
        if progress is not None:
            progress(self._progress(started))
        seconds = time.monotonic() - started
        return PullReport(
            self.plan.size,
            self._data,
            self._zeroes,
            self._trimmed,
            seconds,
            self.plan.clean,
            self._resumed,
            self._reconnects,
            self.source.bitmap,
            len(self._workers),
            sum(worker.depth for worker in self._workers),
        )

    def _join(self) -> None:
        """One more connection, and its work; where there is none to be had, the others do it all."""
        try:
            connection = connect_unless(self._is_enough.is_set, self.source.connect)
        except (OSError, FleecingError) as e:
            log.info("no further connection: %s", e)
            return
        with self._lock:
            self._connections.append(connection)
            if self.stopped.is_set():
                connection.abort()
            worker = Worker(self, connection)
            self._workers.append(worker)
            self._present += 1
        log.info("%s: %d connections", self.source.uri, len(self._workers))
        worker.run()

    @property
    def data(self) -> int:
        """Bytes of data that the target has."""
        return self._data

    @property
    def workers(self) -> tuple[Worker, ...]:
        return tuple(self._workers)

    def _check_all_is_there(self) -> None:
        """A copy with a hole that nobody wanted must never look whole."""
        done = self._data + self._zeroes + self._resumed + self.plan.clean
        if done != self.plan.size:
            raise BlockError(f"{self.source.uri}: {done} of {self.plan.size} bytes were dealt with; nothing is kept")

    def _stop(self) -> None:
        with self._lock:
            self.stopped.set()
            self._is_enough.set()
            for connection in self._connections:
                connection.abort()
        if self.bandwidth is not None:
            self.bandwidth.stop()
        self.target.cancel()
        with self.changed:
            self.changed.notify_all()

    def _progress(self, started: float) -> Progress:
        elapsed = time.monotonic() - started
        return Progress(
            done=self._data + self._zeroes + self._resumed,
            total=self.plan.size - self.plan.clean,
            rate=self._data / elapsed if elapsed else 0.0,
            data=self._data,
            seconds=elapsed,
            reconnects=self._reconnects,
            resumed=self._resumed,
        )

    # Called by the workers

    def room(self, wanted: int) -> int:
        """For how many more buffers there is memory, at most `wanted`; they are the caller's from now on."""
        with self._lock:
            given = min(wanted, self._room)
            self._room -= given
        return given

    def leave(self) -> bool:
        """A worker that has nothing in hand may go, for others do the rest. False: it is the last one."""
        with self._lock:
            if self._present == 1:
                return False
            self._present -= 1
            return True

    def adopt(self, old: AnyConnection, new: AnyConnection) -> None:
        """`new` takes the place of `old`; when the pull has been stopped meanwhile, it is cut at once."""
        old.close()
        with self._lock:
            self._connections[self._connections.index(old)] = new
            self._reconnects += 1
            if self.stopped.is_set():
                new.abort()

    def kept(self, piece: Piece, check: bytes) -> None:
        """The target has the piece."""
        if self._journal is not None:
            self._journal.keep(piece, check)
        with self._lock:
            if piece.is_zero:
                self._zeroes += piece.length
            else:
                self._data += piece.length
        if self.target.limit() is not None:
            with self.changed:
                self.changed.notify_all()

    def trimmed(self, piece: Piece) -> None:
        """The server does not need it any more."""
        if self._journal is not None:
            self._journal.trim(piece)
        with self._lock:
            self._trimmed += piece.length


class _Growth:
    """Looks every GROW_SECONDS whether the copy needs one more connection."""

    def __init__(self, copying: _Pull, most: int) -> None:
        self._copying = copying
        self._crowd = Crowd(most)
        self._before = self._look()

    def _look(self) -> tuple[float, int, float, int]:
        """When, bytes of data, seconds waited by all, requests that may be in flight."""
        workers = self._copying.workers
        waited = sum(worker.waited for worker in workers)
        return time.monotonic(), self._copying.data, waited, sum(worker.depth for worker in workers)

    def wants_more(self) -> bool:
        then, data, waited, depth = self._before
        if time.monotonic() - then < GROW_SECONDS:
            return False
        self._before = now = self._look()
        if now[1] == data or now[3] != depth:
            return False  # nothing comes at all, or more requests are being tried, or a connection is just new
        count = len(self._copying.workers)
        seconds = now[0] - then
        return self._crowd.wants_more(count, (now[1] - data) / seconds, (now[2] - waited) / seconds / count)


def _step_back() -> None:
    """For a thread of a copy beside the machine: what has been chosen for it by somebody else stays."""
    with suppress(OSError):  # a sandbox that does not allow it
        if os.getpriority(os.PRIO_PROCESS, 0) == 0:  # on Linux that is the thread
            os.setpriority(os.PRIO_PROCESS, 0, NICENESS)


def _piece(options: PullOptions) -> int:
    """Bytes of the longest piece: where there is a limit, no more than comes in a quarter of a second."""
    rate = 0 if options.bandwidth is None else options.bandwidth.rate
    return min(options.piece, rate // 4) if rate else options.piece


def _cluster(connection: AnyConnection, target: Target) -> int:
    """Bytes of the smallest piece: a cluster of the server, if it can be had at once, and what the target needs."""
    most = align_down(connection.maximum_payload, connection.minimum_block)
    cluster = max(min(connection.preferred_block, most), target.granularity)
    if cluster > most:
        raise RequestError(
            NbdError.EOVERFLOW,
            f"{connection.peer} answers at most {most} bytes at a time, the target needs {cluster}",
        )
    return cluster


def _compare(journal: Journal, target: Target, check: CheckCall | None) -> None:
    """What earlier runs kept is there, byte by byte; what is not has to be pulled again. Zeroes are made once more."""
    if not journal.kept:
        return
    target.look_again()
    for piece, wanted in list(journal.kept.values()):
        if piece.is_zero:
            target.zero(piece.offset, piece.length)
        if piece.is_zero or check is None or wanted == NO_CHECK:
            continue
        try:
            data = target.read(piece.offset, piece.length)
        except ImageError:
            data = b""
        if check(memoryview(data)) != wanted:
            journal.forget(piece.offset)


def _may_trim(source: AnySource, trim: Trim) -> bool:
    can = source.first.can(TransmissionFlag.SEND_TRIM)
    if trim is Trim.SNAPSHOT:
        return source.is_snapshot and can
    if trim is Trim.ALWAYS and not can:
        raise RequestError(NbdError.ENOTSUP, f"{source.uri} offers no TRIM")
    return trim is Trim.ALWAYS
