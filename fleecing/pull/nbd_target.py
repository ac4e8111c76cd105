"""A pull into another NBD export."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Final

from fleecing.client.connection import Connection
from fleecing.client.dial import connect
from fleecing.errors import ImageError, ProtocolError, RequestError
from fleecing.nbd.client_handshake import ExportRefused
from fleecing.nbd.constants import NbdError, TransmissionFlag
from fleecing.nbd.uri import NbdUri
from fleecing.pull.connecting import connect_unless
from fleecing.pull.target import Target, zero_runs
from fleecing.units import GiB, MiB, align_down

_ZEROES: Final = memoryview(bytes(MiB))


class NbdTarget(Target):
    """An export that is written over, on one connection, or on one for each thread where it can share them.

    A connection that is lost is the end of the pull: what the export had not made durable may be lost with it.
    """

    def __init__(self, uri: NbdUri, size: int, *, timeout: float = 60.0) -> None:
        """Raises ImageError where it is too small or read-only, and what `connect` raises."""
        self._uri = uri
        self._timeout = timeout
        self._name = str(uri)
        with _naming(self._name):
            first = connect(uri, timeout=timeout)
        problem = "is read-only" if first.can(TransmissionFlag.READ_ONLY) else ""
        if first.size < size:
            problem = f"has {first.size} bytes, {size} are needed"
        if problem:
            first.close()
            raise ImageError(self._name, -1, problem)
        self.granularity = first.minimum_block
        self._size = size
        self._most = align_down(first.maximum_payload, first.minimum_block)
        self._can_zero = first.can(TransmissionFlag.SEND_WRITE_ZEROES)
        self._first = first
        self._connections = [first]
        self._cancelled = threading.Event()
        self._lock = threading.Lock()  # of these two
        self._local = threading.local()
        shared = first.can(TransmissionFlag.CAN_MULTI_CONN)
        self._one_at_a_time: AbstractContextManager[object] = nullcontext() if shared else threading.Lock()
        self._shared = shared
        self._has_lost = False

    def _connection(self) -> Connection:
        if not self._shared:
            return self._first
        connection: Connection | None = getattr(self._local, "connection", None)
        if connection is None:
            connection = connect_unless(self._cancelled.is_set, lambda: connect(self._uri, timeout=self._timeout))
            self._local.connection = connection
            with self._lock:
                self._connections.append(connection)
                if self._cancelled.is_set():
                    connection.abort()
        return connection

    def write(self, offset: int, data: memoryview) -> None:
        self.is_half_written = True
        with self._one_at_a_time, _naming(self._name):
            connection = self._connection()
            for start, end, is_zero in zero_runs(data, self._unit()):
                if is_zero:
                    self._zero(connection, offset + start, end - start)
                    continue
                for at in range(start, end, self._most):
                    connection.write(offset + at, data[at : min(at + self._most, end)])

    def _unit(self) -> int:
        """The smallest run of zeroes that is told apart."""
        return max(64 * 1024, self.granularity)

    def zero(self, offset: int, length: int) -> None:
        self.is_half_written = True
        with self._one_at_a_time, _naming(self._name):
            self._zero(self._connection(), offset, length)

    def _zero(self, connection: Connection, offset: int, length: int) -> None:
        step = GiB if self._can_zero else min(self._most, len(_ZEROES))
        for at in range(offset, offset + length, step):
            count = min(step, offset + length - at)
            if self._can_zero:
                connection.write_zeroes(at, count)
            else:
                connection.write(at, _ZEROES[:count])

    def read(self, offset: int, length: int) -> bytes:
        with self._one_at_a_time, _naming(self._name):
            connection = self._connection()
            parts = [
                connection.read(at, min(self._most, offset + length - at))
                for at in range(offset, offset + length, self._most)
            ]
        return b"".join(parts)

    def cancel(self) -> None:
        with self._lock:
            self._cancelled.set()
            for connection in self._connections:
                connection.abort()

    def sync(self) -> None:
        """ "CAN_MULTI_CONN": a flush on one connection covers what the others have written.

        The first connection is no worker's where each has its own.
        """
        if self.waits and self._first.can(TransmissionFlag.SEND_FLUSH):
            try:
                with self._one_at_a_time, _naming(self._name):
                    self._first.flush()
            except RequestError as e:
                self._has_lost = e.error in (NbdError.EIO, NbdError.ENOSPC)  # others: it was not done
                raise

    @property
    def has_lost(self) -> bool:
        return self._has_lost

    def look_again(self) -> None:
        """What the server has in memory cannot be told from what its disk has."""
        self.sync()

    def finish(self) -> None:
        self.sync()
        self.is_half_written = False
        self.abandon()

    def abandon(self) -> None:
        """What was written stays."""
        for connection in self._connections:
            connection.close()


@contextmanager
def _naming(target: str) -> Iterator[None]:
    """Errors say that they are the target's: the source may be an export of the same name."""
    try:
        yield
    except (OSError, ExportRefused, ProtocolError, RequestError) as e:
        if target in str(e):
            raise
        if isinstance(e, OSError):
            raise (OSError(e.errno, e.strerror, target) if e.errno else type(e)(f"{target}: {e}")) from e
        if isinstance(e, RequestError):
            raise RequestError(e.error, f"{target}: {e}") from e
        if isinstance(e, ExportRefused):
            raise ExportRefused(f"{target}: {e}", e.reply) from e
        raise ProtocolError(f"{target}: {e}") from e
