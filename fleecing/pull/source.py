"""The export that is pulled: its connections, now and after a loss, and what it tells of its contents.

A connection that is made again must lead to the same thing. A snapshot's description names its instant, so a new
snapshot under an old name is told from the old one; for other exports it is the size that has to be the same.
"""

from __future__ import annotations

import os
from typing import Final

from fleecing.client.connection import Connection
from fleecing.client.dial import connect
from fleecing.client.request import Extents
from fleecing.errors import RequestError
from fleecing.nbd.client_handshake import ExportRefused
from fleecing.nbd.constants import BASE_ALLOCATION, SHARED_MEMORY, NbdError, TransmissionFlag
from fleecing.nbd.uri import NbdUri
from fleecing.pull.any_source import AnyConnection
from fleecing.pull.plan import CLEAN, StatusCall

CLUSTER_STATE: Final = "fleecing:cluster-state"
"""The meta context that only snapshots of Fleecing have."""

DIRTY_BITMAP: Final = "qemu:dirty-bitmap:"
"""Begins the name of a dirty bitmap's context: 1 = changed since the checkpoint, 0 = not."""


class Source:
    """An export by its URI. `bitmap`: the name of the dirty bitmap to go by, None for the only one, "" for none.

    The first connection is made at once. Raises RequestError where the bitmap is not there, or is not the only one,
    and what `connect` raises.
    """

    def __init__(self, uri: NbdUri, *, timeout: float, bitmap: str | None = None) -> None:
        self.uri = uri
        self._timeout = timeout
        self._find = () if bitmap == "" else (DIRTY_BITMAP + (bitmap or ""),)
        self._contexts: tuple[str, ...] = (BASE_ALLOCATION, CLUSTER_STATE)
        if uri.socket is not None and not uri.tls:  # else no descriptor can be sent
            self._contexts += (SHARED_MEMORY,)
        self.first = self._connect(find=self._find)
        try:
            self.bitmap = self._choose(bitmap)
            if self.bitmap is not None:
                self._contexts += (DIRTY_BITMAP + self.bitmap,)
        except BaseException:
            self.first.close()
            raise
        self.size = self.first.size
        self.description = self.first.description
        self.is_snapshot = CLUSTER_STATE in self.first.contexts

    def _connect(self, find: tuple[str, ...] = ()) -> Connection:
        return connect(self.uri, contexts=self._contexts, find_contexts=find, timeout=self._timeout)

    def _choose(self, wanted: str | None) -> str | None:
        """The name of the bitmap. Raises RequestError."""
        names = [name.removeprefix(DIRTY_BITMAP) for name in self.first.contexts if name.startswith(DIRTY_BITMAP)]
        if wanted:
            if wanted not in names:
                raise RequestError(NbdError.EINVAL, f"{self.uri} offers no dirty bitmap '{wanted}'")
            return wanted
        if len(names) > 1:
            raise RequestError(
                NbdError.EINVAL,
                f"{self.uri} offers several dirty bitmaps ({', '.join(sorted(names))}): name one, or none",
            )
        return names[0] if names else None

    def connect(self) -> Connection:
        """One more connection to the same export. Raises ExportRefused where it is another one now."""
        connection = self._connect()
        if (connection.size, connection.description) != (self.size, self.description):
            connection.close()
            raise ExportRefused(f"{self.uri} is not what it was at the start: '{connection.description}'", reply=0)
        return connection

    @property
    def server(self) -> str:
        """Who is asked, as far as an address tells."""
        socket = self.uri.socket
        if socket is None:
            return f"{self.uri.host}:{self.uri.port}"
        return socket if socket.startswith("\0") else os.path.abspath(socket)

    @property
    def may_share(self) -> bool:
        """ "CAN_MULTI_CONN": several connections see the same."""
        return self.first.can(TransmissionFlag.CAN_MULTI_CONN)

    @property
    def takes_cpus(self) -> bool:
        """A snapshot on this host."""
        return self.is_snapshot and self.uri.socket is not None

    def status_call(self, connection: AnyConnection) -> StatusCall | None:
        """How to ask for the contents over this connection; None where it cannot be asked."""
        assert isinstance(connection, Connection)
        has_allocation = BASE_ALLOCATION in connection.contexts
        bitmap = None if self.bitmap is None else DIRTY_BITMAP + self.bitmap
        if bitmap is None and not has_allocation:
            return None

        def ask(offset: int, length: int) -> Extents:
            status = connection.block_status(offset, length)
            allocation = status[BASE_ALLOCATION] if has_allocation else [(length, 0)]
            return allocation if bitmap is None else merge(allocation, status[bitmap])

        return ask


def merge(allocation: Extents, dirty: Extents) -> Extents:
    """Both side by side as far as the shorter one goes; what is not dirty gets the bit CLEAN."""
    merged: Extents = []
    first, second = iter(allocation), iter(dirty)
    left, status = next(first)
    right, changed = next(second)
    while True:
        step = min(left, right)
        merged.append((step, status if changed & 1 else status | CLEAN))
        left -= step
        right -= step
        try:
            if not left:
                left, status = next(first)
            if not right:
                right, changed = next(second)
        except StopIteration:
            return merged
