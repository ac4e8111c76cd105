"""What a copy wants of the thing that it reads: an export over NBD (source.py), or a snapshot's node (node_source.py).

Neither of the two is imported here, so that a client does without the block layer of a server.
"""

from __future__ import annotations

from typing import Protocol

from fleecing.client.request import MakeBuffer, Request
from fleecing.nbd.constants import TransmissionFlag
from fleecing.pull.plan import StatusCall


class AnyConnection(Protocol):
    """One thread's way to it. Only `abort` may be called by another thread."""

    @property
    def peer(self) -> str: ...
    @property
    def size(self) -> int: ...
    @property
    def minimum_block(self) -> int: ...
    @property
    def preferred_block(self) -> int: ...
    @property
    def maximum_payload(self) -> int: ...

    @property
    def is_lost(self) -> bool:
        """Another connection may mend what failed here."""

    @property
    def waited(self) -> float:
        """Seconds in which it had nothing to do but wait for the other end, until now."""

    def can(self, flag: TransmissionFlag) -> bool: ...

    def share_memory(self, count: int, length: int) -> None:
        """Have reads come into `count` buffers of `length` bytes that the other end fills by itself, if it can."""

    def submit_late_read(self, offset: int, length: int, make_buffer: MakeBuffer) -> Request:
        """Ask for `length` bytes; the buffer that they come in is made when they come, or has a `position`."""

    def release(self, request: Request) -> None:
        """Nobody uses the buffer of this read any more, which has a `position`."""

    def submit_trim(self, offset: int, length: int) -> Request:
        """Tell that the range is not needed any more."""

    def next_finished(self) -> Request:
        """Whichever request finishes first; look at its `error`."""

    def abort(self) -> None:
        """Make whatever call is running, and all later ones, fail at once."""

    def close(self) -> None: ...


class AnySource(Protocol):
    """Where connections come from."""

    @property
    def uri(self) -> object:
        """Its name in errors."""

    @property
    def first(self) -> AnyConnection: ...
    @property
    def size(self) -> int: ...

    @property
    def bitmap(self) -> str | None:
        """The dirty bitmap that it goes by."""

    @property
    def is_snapshot(self) -> bool:
        """It may be trimmed: nobody else has any use for what was read."""

    @property
    def may_share(self) -> bool:
        """Several connections see the same."""

    @property
    def takes_cpus(self) -> bool:
        """Its server, another process on this host, has a machine to serve: who copies steps back for it."""

    def connect(self) -> AnyConnection:
        """One more."""

    def status_call(self, connection: AnyConnection) -> StatusCall | None:
        """How to ask for the contents over this connection; None where it cannot be asked."""
