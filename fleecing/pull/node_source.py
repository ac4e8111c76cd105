"""A snapshot's node as the source of a copy: the same calls as an export over NBD, without a socket.

Each call reads or trims at once, in the thread that makes it; what it raises is the copy's end.
"""

from __future__ import annotations

from collections import deque
from typing import Final

from fleecing.block.extent import Runs
from fleecing.block.snapshot_access import SnapshotAccess
from fleecing.client.request import MakeBuffer, Request
from fleecing.nbd.constants import Cmd, TransmissionFlag
from fleecing.pull.any_source import AnyConnection
from fleecing.pull.plan import StatusCall
from fleecing.units import MiB

_LARGEST: Final = 32 * MiB
"""Bytes of the longest read."""

_STATUS_RUNS: Final = 1 << 14
"""Runs that one look at the contents gives at most."""


class NodeConnection:
    """One thread's way to the node. Only `abort` may be called by another one."""

    def __init__(self, node: SnapshotAccess) -> None:
        self._node = node
        self._finished: deque[Request] = deque()
        self._cookie = 0
        self._aborted = False
        self.peer = node.name
        self.size = node.size
        self.minimum_block = 1
        self.preferred_block = node.cluster_size
        self.maximum_payload = _LARGEST
        self.waited = 0.0  # a call does the work itself
        self.is_lost = False  # a node is never lost: what fails here fails for good

    def can(self, flag: TransmissionFlag) -> bool:
        return flag in (TransmissionFlag.SEND_TRIM, TransmissionFlag.CAN_MULTI_CONN)

    def share_memory(self, count: int, length: int) -> None:
        """There is no other end."""

    def release(self, request: Request) -> None:
        """No buffer has a position."""

    def submit_late_read(self, offset: int, length: int, make_buffer: MakeBuffer) -> Request:
        """Read at once. Raises what the node raises."""
        request = self._begin(Cmd.READ, offset, length)
        request.buffer = make_buffer(length)
        self._node.disk.turns.give_way()
        self._node.read_into(offset, request.buffer)
        return self._end(request)

    def submit_trim(self, offset: int, length: int) -> Request:
        """Give the range up. Raises what the node raises."""
        request = self._begin(Cmd.TRIM, offset, length)
        self._node.discard(offset, length)
        return self._end(request)

    def _begin(self, command: Cmd, offset: int, length: int) -> Request:
        if self._aborted:
            raise ConnectionError("the copy was stopped")
        self._cookie += 1
        return Request(command, self._cookie, offset, length)

    def _end(self, request: Request) -> Request:
        request.finished = True
        self._finished.append(request)
        return request

    def next_finished(self) -> Request:
        return self._finished.popleft()

    def status(self, offset: int, length: int) -> Runs:
        """base:allocation; it may cover less."""
        return self._node.block_status(offset, length, _STATUS_RUNS)

    def abort(self) -> None:
        self._aborted = True

    def close(self) -> None:
        """Nothing is held here."""


class NodeSource:
    """What a copy knows of the snapshot that it reads; `name` is for errors."""

    may_share = True
    is_snapshot = True
    takes_cpus = False
    """The server's own threads hold its interpreter's lock: with a lower priority they would hold up the machine."""
    bitmap: str | None = None
    """Whole disks only."""

    def __init__(self, node: SnapshotAccess, name: str) -> None:
        self.uri = name
        self.size = node.size
        self._node = node
        self.first = self.connect()

    def connect(self) -> NodeConnection:
        return NodeConnection(self._node)

    def status_call(self, connection: AnyConnection) -> StatusCall:
        assert isinstance(connection, NodeConnection)
        return connection.status
