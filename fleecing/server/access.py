"""What a client may do with an export, and the catalog as one client sees it.

Decided while the client haggles, by a policy that is asked for the client and a name. The connection then serves an
export that has the right flags and takes the right requests: no request is slower for it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import replace
from enum import Flag, auto
from typing import Protocol

from fleecing.nbd.constants import READ_ONCE
from fleecing.nbd.handshake import ExportCatalog, ExportInfo
from fleecing.server.export import Export
from fleecing.server.peer import Certificate, Peer

log = logging.getLogger(__name__)


class Access(Flag):
    """What may be allowed. Whoever makes a policy adds READ to the last two, and SEE to READ."""

    SEE = auto()
    """It is listed and described."""
    READ = auto()
    """It can be opened: READ, CACHE, BLOCK_STATUS, FLUSH."""
    WRITE = auto()
    """An active disk: WRITE, WRITE_ZEROES."""
    TRIM = auto()
    """A snapshot: TRIM and READ_ONCE. An active disk loses its contents to a TRIM, so that takes WRITE as well."""

    def __str__(self) -> str:
        return ", ".join(one.name.lower() for one in self if one.name) or "nothing"


Policy = Callable[[Peer, str], Access]
"""What this client may do with the export of this name, whether there is one or not."""


class Catalog(ExportCatalog, Protocol):
    """What the handshake asks, and the export itself."""

    def open(self, name: str) -> Export | None:
        """The export of that name, or None where it is gone by now."""

    def defaults(self) -> Iterable[str]:
        """The exports that the empty name may stand for: it is the only one of them that a client sees."""


class ClientCatalog:
    """A catalog as one client may see it.

    What it may not see is not there: the policy is asked first, and where it says no, nobody looks whether there is an
    export of that name. So all answers are those that a name gets that nothing has.
    """

    def __init__(self, catalog: Catalog, policy: Policy, client: Peer, name: str) -> None:
        """`name` is the client's in the log."""
        self._catalog = catalog
        self._policy = policy
        self.client = client
        self._name = name
        self._told = False

    def identify(self, certificate: Certificate) -> None:
        """TLS has verified who the client is: from here on it is that one."""
        self.client = replace(self.client, certificate=certificate)

    def names(self) -> Iterable[tuple[str, str]]:
        for name, _ in self._catalog.names():
            if self.access(name) and (export := self.open(name)) is not None:
                yield name, export.description

    def find(self, name: str) -> ExportInfo | None:
        export = self.open(name)
        return None if export is None else export.info

    def defaults(self) -> Iterable[str]:
        return [name for name in self._catalog.defaults() if self.access(name)]

    def open(self, name: str) -> Export | None:
        if not name:
            seen = list(self.defaults())
            if len(seen) != 1:
                return None
            name = seen[0]
        access = self.access(name)
        if not access:
            self._tell(name)
            return None
        export = self._catalog.open(name)
        return None if export is None else limited(export, access)

    def access(self, name: str) -> Access:
        """What the client may do with the export of this name."""
        return self._policy(self.client, name)

    def _tell(self, name: str) -> None:
        if not self._told:  # one line a client, however many names it tries
            self._told = True
            log.info("client %s (%s) may not see %.140r", self._name, self.client, name)


def limited(export: Export, access: Access) -> Export:
    """The export for a client that may do so much with it.

    READ_ONLY is said where nothing at all can be changed: clients send no TRIM to an export that says it.
    """
    if access == ~Access(0):
        return export
    info = export.info
    may_write = info.writable and Access.WRITE in access
    may_trim = Access.TRIM in access and (may_write or not info.writable)
    contexts = info.contexts if may_trim else tuple(name for name in info.contexts if name != READ_ONCE)
    told = info.description if may_write else info.description.replace("read-write", "read-only")
    narrow = replace(
        info.without_changes(write=not may_write, trim=not may_trim),
        description=told,
        contexts=contexts,
        enterable=Access.READ in access,
    )
    return export.described(narrow)
