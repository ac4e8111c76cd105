"""An export: a node under a name, with what a client is told of it."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from bitarray import bitarray

from fleecing.block.copy_before_write import CopyBeforeWrite
from fleecing.block.extent import Allocation
from fleecing.block.flusher import Done
from fleecing.block.lost_snapshot import LostSnapshot
from fleecing.block.node import Node
from fleecing.block.snapshot_access import SnapshotAccess
from fleecing.block.turns import Turns
from fleecing.errors import BlockError, ClusterUnreadable, RequestError, SnapshotBroken, TempLimitReached
from fleecing.nbd.constants import BASE_ALLOCATION, READ_ONCE, SHARED_MEMORY, NbdError, TransmissionFlag
from fleecing.nbd.handshake import ExportInfo
from fleecing.nbd.transmission import nbd_error
from fleecing.server.meta_context import (
    ALLOCATION_DEPTH,
    CLUSTER_STATE,
    DIRTY_BITMAP,
    Context,
    beside_bitmap,
    despite_trims,
    dirty_bitmap,
    everything_allocated,
    nothing_to_tell,
    readable,
    whole_clusters,
)
from fleecing.server.meter import Traffic
from fleecing.server.read_once import ReadOnce, Receipts
from fleecing.units import MiB

log = logging.getLogger(__name__)

MAXIMUM_PAYLOAD = 64 * MiB
"""Bytes of the longest READ or WRITE that is served; the preferred size is the cluster, the minimum one byte."""

_BOTH = (
    TransmissionFlag.HAS_FLAGS
    | TransmissionFlag.SEND_FLUSH
    | TransmissionFlag.SEND_FUA
    | TransmissionFlag.SEND_TRIM
    | TransmissionFlag.SEND_CACHE
    | TransmissionFlag.CAN_MULTI_CONN
)
_ACTIVE = _BOTH | TransmissionFlag.SEND_WRITE_ZEROES | TransmissionFlag.SEND_FAST_ZERO
_SNAPSHOT = _BOTH
"""Not READ_ONLY: clients (libnbd, QEMU) send no TRIM to an export that says so. Writes are answered with EPERM all the
same, for its info says that it is not writable."""


@dataclass(frozen=True)
class Bitmap:
    """A dirty bitmap that an export offers: one bit for each `granularity` bytes, 1 = changed."""

    name: str
    bits: bitarray
    granularity: int


SubmitTrim = Callable[[int, int, Done], None]
"""(offset, length, what to call when it is over)"""


class Export:
    """What a connection serves. `changes` is the node as a filter whose changes may have to wait; None = read-only."""

    def __init__(
        self,
        info: ExportInfo,
        node: Node,
        contexts: Mapping[str, Context],
        *,
        beside_bitmap: Mapping[str, Context] | None = None,
        changes: CopyBeforeWrite | None = None,
        submit_trim: SubmitTrim | None = None,
        snapshot: SnapshotAccess | None = None,
        read_once: ReadOnce | None = None,
        retain: Callable[[], None] | None = None,
        release: Callable[[], None] | None = None,
        turns: Turns | None = None,
        give_way: Callable[[], None] | None = None,
        traffic: Traffic | None = None,
    ) -> None:
        """`traffic`: where its clients are counted, may be shared with other exports."""
        self.info = info
        self.node = node
        self._contexts = contexts
        self._beside_bitmap = beside_bitmap or {}
        self.changes = changes
        self.submit_trim = submit_trim  # where a trim has to wait for the disk
        self._snapshot = snapshot  # what READ_ONCE trims
        self._read_once = read_once  # what every READ trims in the end
        self._retain = retain
        self._release = release
        self.turns = turns or Turns()  # where its connections tell that they are served; a snapshot's tell nobody
        self.give_way = give_way  # what they call before they send much; None = they go first
        self.traffic = traffic or Traffic()

    @property
    def name(self) -> str:
        return self.info.name

    @property
    def description(self) -> str:
        return self.info.description

    def contexts(self, names: Iterable[str]) -> list[Context]:
        """Those that a client selected, in its order; some answer otherwise where a dirty bitmap is among them."""
        chosen = list(names)
        with_bitmap = any(name.startswith(DIRTY_BITMAP) for name in chosen)
        known = {**self._contexts, **self._beside_bitmap} if with_bitmap else self._contexts
        return [known[name] for name in chosen]

    def receipts(self, contexts: Iterable[str]) -> Receipts | None:
        """What a connection with these contexts has to keep of its READs; None = nothing, as nearly always."""
        if self._snapshot is None or (self._read_once is None and READ_ONCE not in contexts):
            return None
        return Receipts(self._snapshot, self._read_once)

    def described(self, info: ExportInfo) -> Export:
        """The same under another description, which may allow less: contexts that it does not name, requests.

        Where it allows no TRIM, reading trims nothing either.
        """
        other = copy.copy(self)
        other.info = info
        if not info.trimmable:
            other._snapshot = None
        return other

    def retain(self) -> None:
        """A connection starts to use the node."""
        if self._retain is not None:
            self._retain()

    def release(self) -> None:
        """That connection is over."""
        if self._release is not None:
            self._release()


def active_export(
    name: str, description: str, disk: CopyBeforeWrite, *, cluster_size: int, traffic: Traffic | None = None
) -> Export:
    """The export that a machine has as its disk. `cluster_size` (bytes) is the preferred block size."""
    contexts: dict[str, Context] = {
        BASE_ALLOCATION: disk.block_status,
        ALLOCATION_DEPTH: everything_allocated,
        SHARED_MEMORY: nothing_to_tell,
    }
    info = _info(name, description, disk.size, _ACTIVE, cluster_size, contexts)
    return Export(info, disk, contexts, changes=disk, turns=disk.turns, traffic=traffic)


def snapshot_export(
    name: str,
    description: str,
    snapshot: SnapshotAccess,
    bitmap: Bitmap | None = None,
    *,
    read_once_grace: int | None = None,
    traffic: Traffic | None = None,
) -> Export:
    """The export that a backup tool reads and trims; `bitmap` is the one dirty bitmap that it offers.

    With `read_once_grace` reading trims, but for the bytes that were sent last, so many at least.
    """
    contexts: dict[str, Context] = {
        BASE_ALLOCATION: snapshot.block_status,
        ALLOCATION_DEPTH: snapshot.allocation_depth,
        CLUSTER_STATE: snapshot.cluster_state,
        READ_ONCE: readable(snapshot.cluster_state),
        SHARED_MEMORY: nothing_to_tell,
    }
    lenient: dict[str, Context] = {}
    scope, cluster_size = snapshot.clusters.scope, snapshot.cluster_size

    def check() -> None:
        if snapshot.broken is not None:
            raise SnapshotBroken(snapshot.broken)

    if read_once_grace is not None:
        for context, otherwise in ((BASE_ALLOCATION, Allocation.DATA), (ALLOCATION_DEPTH, 2)):
            contexts[context] = despite_trims(contexts[context], snapshot.clusters, otherwise)
        contexts[BASE_ALLOCATION] = whole_clusters(contexts[BASE_ALLOCATION], cluster_size, snapshot.size)
    if bitmap is not None:
        contexts[DIRTY_BITMAP + bitmap.name] = dirty_bitmap(bitmap.bits, bitmap.granularity, check)
        if scope is not None:
            for context, outside in ((BASE_ALLOCATION, Allocation.DATA), (ALLOCATION_DEPTH, 2)):
                lenient[context] = beside_bitmap(contexts[context], scope, cluster_size, outside, check)
    return Export(
        _info(name, description, snapshot.size, _SNAPSHOT, cluster_size, contexts),
        snapshot,
        contexts,
        beside_bitmap=lenient,
        submit_trim=snapshot.submit_discard if snapshot.durable else None,
        snapshot=snapshot,
        read_once=None if read_once_grace is None else ReadOnce(snapshot, read_once_grace),
        retain=snapshot.retain,
        release=snapshot.release,
        give_way=snapshot.disk.turns.give_way,
        traffic=traffic,
    )


def lost_export(
    name: str, description: str, lost: LostSnapshot, bitmap: str | None, *, traffic: Traffic | None = None
) -> Export:
    """The export of a snapshot that can never be read again: who comes back to it is told why."""
    contexts: dict[str, Context] = {
        BASE_ALLOCATION: lost.block_status,
        ALLOCATION_DEPTH: lost.allocation_depth,
        CLUSTER_STATE: lost.cluster_state,
        READ_ONCE: lost.cluster_state,
        SHARED_MEMORY: nothing_to_tell,
    }
    if bitmap is not None:
        contexts[DIRTY_BITMAP + bitmap] = lost.block_status
    info = _info(name, description, lost.size, _SNAPSHOT, lost.cluster_size, contexts)
    return Export(info, lost, contexts, traffic=traffic)


def _info(
    name: str, description: str, size: int, flags: TransmissionFlag, cluster_size: int, contexts: Mapping[str, Context]
) -> ExportInfo:
    return ExportInfo(
        name=name,
        description=description,
        size=size,
        flags=flags,
        minimum_block=1,
        preferred_block=cluster_size,
        maximum_payload=MAXIMUM_PAYLOAD,
        contexts=tuple(contexts),
        writable=TransmissionFlag.SEND_WRITE_ZEROES in flags,
    )


def answer_to(error: Exception, doing: str) -> RequestError:
    """The one map from whatever a node raised to what the client is told: an NBD error and a sentence.

    What a reader may not have is EINVAL, as QEMU answers it; the text tells trimmed from broken.
    """
    if isinstance(error, RequestError):
        return error
    if isinstance(error, SnapshotBroken | ClusterUnreadable):
        return RequestError(NbdError.EINVAL, str(error))
    if isinstance(error, TempLimitReached):
        return RequestError(NbdError.ENOSPC, str(error))
    if isinstance(error, BlockError):
        return RequestError(NbdError.EIO, str(error))
    if isinstance(error, OSError):
        return RequestError(nbd_error(error.errno), f"{doing}: {error.strerror or error}")
    log.error("%s ended in an error that nobody expected", doing, exc_info=error)
    return RequestError(NbdError.EIO, f"{doing}: internal error")
