"""What there is to tell of disks, snapshots and clients, as the API's models."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict
from datetime import UTC, datetime

from bitarray import bitarray

import fleecing
from fleecing.block.bitfile import header
from fleecing.block.bitmap import bit_runs
from fleecing.block.extent import ClusterState
from fleecing.control.addresses import Addresses
from fleecing.control.checkpoint import Checkpoint, Untracked, state_name
from fleecing.control.disk import Disk, Snapshot
from fleecing.control.manager import Manager
from fleecing.control.models import (
    CheckpointInfo,
    ClientInfo,
    ClusterCounts,
    DiskInfo,
    Extent,
    ExtentPage,
    GuestLatency,
    KindLatency,
    MapPage,
    MapRun,
    SnapshotInfo,
    SnapshotState,
    Status,
    TempInfo,
)
from fleecing.errors import ControlError, ImageError, SnapshotBroken, sentence
from fleecing.server.listener import NbdServer
from fleecing.units import div_up

MAP_WINDOW = 1 << 16
"""Clusters looked at in one go for a map: what bounds the memory of one step."""

STATE_NAMES = {state: state.name.lower() for state in ClusterState}


class Reporter:
    """Reads the manager, the NBD server and its addresses; changes nothing."""

    def __init__(self, manager: Manager, server: NbdServer, addresses: Addresses) -> None:
        self.manager = manager
        self.server = server
        self.addresses = addresses
        self._started = datetime.now(UTC)

    def status(self) -> Status:
        """All of the server at this moment."""
        return Status(
            version=fleecing.__version__,
            pid=os.getpid(),
            started=self._started,
            listeners=self.addresses.listeners(),
            control=self.addresses.control,
            disks=self.disks(),
            snapshots=self.snapshots(),
            clients=self.clients(),
        )

    def disks(self) -> list[DiskInfo]:
        users = self._users()
        return [self._disk(disk, users[disk.name]) for disk in self.manager.disks.values()]

    def snapshots(self, which: Iterable[Snapshot] | None = None) -> list[SnapshotInfo]:
        """All snapshots, or the given ones."""
        users = self._users()
        chosen = self.manager.snapshots() if which is None else which
        return [self._snapshot(snapshot, users[snapshot.export.name]) for snapshot in chosen]

    def snapshot(self, disk: str, name: str) -> SnapshotInfo:
        """Raises ControlError where there is none of that name."""
        return self.snapshots([self.manager.snapshot(disk, name)])[0]

    def checkpoints(self, disk: str | None = None) -> list[CheckpointInfo]:
        """All checkpoints, or those of one disk. Raises ControlError where there is no such disk."""
        disks = list(self.manager.disks.values()) if disk is None else [self.manager.disk(disk)]
        return [_checkpoint(disk, *found) for disk in disks for found in disk.chain.infos()]

    def extent_page(self, disk: str, name: str, offset: int, limit: int) -> ExtentPage:
        """Up to `limit` ranges that changed since the checkpoint, from `offset` on, rounded down to a cluster.

        Raises ControlError where that is not known, and for an offset beyond the end.
        """
        node, size = self.manager.disk(disk).node, self.manager.disk(disk).chain.cluster_size
        if not 0 <= offset < node.size:
            raise ControlError(400, f"offset {offset} is outside of the {node.size} bytes of disk '{disk}'")
        bits = self._changed(disk, name)
        extents: list[Extent] = []
        following = None
        for start, stop, dirty in bit_runs(bits, offset // size, div_up(node.size, size)):
            if dirty and len(extents) == limit:
                following = start * size
                break
            if dirty:
                extents.append(Extent(offset=start * size, length=min(stop * size, node.size) - start * size))
        return ExtentPage(disk=disk, name=name, size=node.size, granularity=size, extents=extents, next=following)

    def bitmap_file(self, disk: str, name: str) -> bytes:
        """What changed since the checkpoint, as a bit file. Raises ControlError where that is not known."""
        chain = self.manager.disk(disk).chain
        return header(chain.disk.size, chain.cluster_size) + self._changed(disk, name).tobytes()

    def _changed(self, disk: str, name: str) -> bitarray:
        chain = self.manager.disk(disk).chain
        try:
            return chain.changes(name).now()
        except Untracked as e:
            status = 409 if any(checkpoint.name == name for checkpoint in chain.checkpoints) else 404
            raise ControlError(status, f"{e}; `fleecing checkpoint list` shows them all") from None

    def clients(self) -> list[ClientInfo]:
        return [
            ClientInfo(
                peer=c.peer,
                export=c.export_name,
                requests=c.requests,
                bytes_read=c.bytes_read,
                bytes_written=c.bytes_written,
            )
            for c in self.server.connections
        ]

    def snapshot_clients(self) -> list[tuple[str, int]]:
        """(export name, connections) of each snapshot."""
        users = self._users()
        return [(snapshot.export.name, users[snapshot.export.name]) for snapshot in self.manager.snapshots()]

    def _users(self) -> Counter[str]:
        return Counter(c.export_name for c in self.server.connections)

    def _disk(self, disk: Disk, clients: int) -> DiskInfo:
        problem = None
        free = size = 0
        folder = disk.folder.temp_location()
        try:
            space = os.statvfs(folder)
            free, size = space.f_bavail * space.f_frsize, space.f_blocks * space.f_frsize
            disk.node.file.check_size()
        except (ImageError, OSError) as e:
            problem = sentence(e)
        return DiskInfo(
            name=disk.name,
            path=disk.node.file.path,
            format="raw",
            size=disk.node.size,
            cluster_size=disk.settings.cluster_size,
            problem=problem,
            snapshots=[snapshot.name for snapshot in self.manager.snapshots(disk.name)],
            clients=clients,
            temp_folder=folder,
            temp_free=free,
            temp_size=size,
            guest_latency=_latency(disk),
            uris=self.addresses.uris(disk.name),
        )

    def _snapshot(self, snapshot: Snapshot, clients: int) -> SnapshotInfo:
        node = snapshot.node
        counts = node.counts()
        return SnapshotInfo(
            disk=snapshot.disk.name,
            name=snapshot.name,
            export=snapshot.export.name,
            state=_state(snapshot),
            broken=node.broken,
            created=snapshot.record.created,
            durable=snapshot.record.durable,
            quiesced=snapshot.record.quiesced,
            mode=snapshot.record.mode,
            reason=snapshot.record.reason,
            since=snapshot.record.since,
            checkpoint=snapshot.record.checkpoint,
            bitmap=snapshot.record.bitmap,
            read_once=snapshot.record.read_once_grace is not None,
            read_once_grace=snapshot.record.read_once_grace,
            size=node.size,
            cluster_size=node.cluster_size,
            clusters=ClusterCounts(**{STATE_NAMES[state]: count for state, count in counts.items()}),
            copied_total=node.clusters_copied_total,
            temp=TempInfo(path=node.temp_path, used=node.temp_used(), peak=node.temp_peak(), limit=node.temp_limit),
            on_cbw_error=snapshot.record.on_cbw_error,
            cbw_timeout=snapshot.record.cbw_timeout,
            clients=clients,
            guest_latency=_latency(snapshot.disk),
            uris=self.addresses.uris(snapshot.export.name),
        )

    def map_page(self, disk: str, name: str, offset: int, limit: int) -> MapPage:
        """Up to `limit` runs (and one window's more) from `offset` on, rounded down to a cluster.

        Raises ControlError for a snapshot that is not there or broken, and an offset beyond its end.
        """
        snapshot = self.manager.snapshot(disk, name)
        node = snapshot.node
        if not 0 <= offset < node.size:
            raise ControlError(400, f"offset {offset} is outside of the {node.size} bytes of {snapshot.export.name}")
        position = offset - offset % node.cluster_size
        runs: list[MapRun] = []
        try:
            while position < node.size and len(runs) < limit:
                window = min(MAP_WINDOW * node.cluster_size, node.size - position)
                for length, state in node.cluster_state(position, window):
                    if runs and runs[-1].state == STATE_NAMES[ClusterState(state)]:
                        runs[-1].length += length
                    else:
                        runs.append(MapRun(offset=position, length=length, state=STATE_NAMES[ClusterState(state)]))
                    position += length
        except SnapshotBroken as e:
            raise ControlError(409, f"{snapshot.export.name} has no map any more: {e}") from None
        return MapPage(
            disk=disk,
            name=name,
            size=node.size,
            cluster_size=node.cluster_size,
            runs=runs,
            next=position if position < node.size else None,
        )


def _checkpoint(disk: Disk, checkpoint: Checkpoint, reason: str | None, changed: bitarray | None) -> CheckpointInfo:
    entry, size = checkpoint.entry, disk.chain.cluster_size
    count = None
    if changed is not None:
        beyond = div_up(disk.node.size, size) * size - disk.node.size
        last = disk.node.size // size if beyond else -1
        count = changed.count() * size - (beyond if last >= 0 and changed[last] else 0)
    return CheckpointInfo(
        disk=disk.name,
        name=entry.name,
        created=entry.created,
        state=state_name(checkpoint, reason),
        inconsistent=reason,
        changed=count,
        recording=checkpoint.tracker is not None and checkpoint.tracker is disk.node.tracker,
        granularity=size,
    )


def _latency(disk: Disk) -> GuestLatency:
    every, kinds = disk.latency.look()
    return GuestLatency(
        **asdict(every),
        kinds={kind: KindLatency(**asdict(recent)) for kind, recent in kinds.items()},
    )


def _state(snapshot: Snapshot) -> SnapshotState:
    if snapshot.deleting:
        return SnapshotState.DELETING
    return SnapshotState.READY if snapshot.node.broken is None else SnapshotState.BROKEN
