"""Builds and joins the nodes: opens disks, and freezes one or several of them at the same instant."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bitarray import bitarray

from fleecing.block.copy_before_write import CopyBeforeWrite, OnCbwError, same_instant
from fleecing.block.file import FileNode
from fleecing.block.hostfile import HostFile
from fleecing.block.qcow2.node import TempImage
from fleecing.block.snapshot_access import SnapshotAccess

_freezing = threading.Lock()  # gates are closed by one at a time, or two freezes of the same disks might wait for ever


@dataclass(frozen=True)
class SnapshotSpec:
    """What a snapshot of one disk is to be. Sizes in bytes, times in seconds; `cbw_timeout` 0 = none.

    `temp_path` must not exist yet. `bitmap`: the clusters that belong to the snapshot; None = all.
    """

    name: str
    temp_path: str
    cluster_size: int
    temp_limit: int | None = None
    on_cbw_error: OnCbwError = OnCbwError.BREAK_SNAPSHOT
    cbw_timeout: float = 45.0
    bitmap: bitarray | None = None


def open_disk(path: str) -> CopyBeforeWrite:
    """Open a raw image as an active disk. Raises OSError, or ImageError where it is no image or is served already."""
    return CopyBeforeWrite(FileNode.open(path))


def freeze(
    pairs: Sequence[tuple[CopyBeforeWrite, SnapshotSpec]],
    *,
    drain_timeout: float,
    on_broken: Callable[[SnapshotAccess, str], None],
) -> list[SnapshotAccess]:
    """Take one snapshot of each disk, all of the same instant: all of them, or none and nothing left behind.

    All that takes time is prepared first; then new guest changes wait until those under way are over, the snapshots
    are put in place, and the changes go on. `on_broken` is called once, from any thread, for a snapshot that breaks
    later. Raises OSError, ImageError, and TimeoutError where the changes under way are not over in `drain_timeout`
    seconds.
    """
    snapshots: list[SnapshotAccess] = []

    def install() -> None:
        for snapshot in snapshots:
            snapshot.disk.attach(snapshot)

    try:
        for disk, spec in pairs:
            disk.file.check_size()
            snapshots.append(_prepare(disk, spec, on_broken))
        with _freezing:
            same_instant([disk for disk, _ in pairs], install, timeout=drain_timeout)
    except BaseException:
        for snapshot in snapshots:
            snapshot.remove(0)
        raise
    return snapshots


def _prepare(
    disk: CopyBeforeWrite, spec: SnapshotSpec, on_broken: Callable[[SnapshotAccess, str], None]
) -> SnapshotAccess:
    host = HostFile.create(spec.temp_path)
    try:
        temp = TempImage.create(
            host,
            size=disk.size,
            cluster_size=spec.cluster_size,
            backing_file=disk.file.path,
            backing_format="raw",
            limit=spec.temp_limit,
        )
        return SnapshotAccess(
            spec.name,
            disk,
            temp,
            cluster_size=spec.cluster_size,
            on_cbw_error=spec.on_cbw_error,
            cbw_timeout=spec.cbw_timeout,
            temp_limit=spec.temp_limit,
            bitmap=spec.bitmap,
            on_broken=on_broken,
        )
    except BaseException:
        host.close()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(spec.temp_path)
        raise
