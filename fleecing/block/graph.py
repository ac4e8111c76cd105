"""Builds and joins the nodes: opens disks, and freezes one or several of them at the same instant."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

from bitarray import bitarray

from fleecing.block.bitfile import BitFile
from fleecing.block.breakage import SOURCE_NOT_SYNCED
from fleecing.block.copy_before_write import CopyBeforeWrite, OnCbwError, same_instant
from fleecing.block.durability import Durability, sync_folders, sync_note
from fleecing.block.file import FileNode
from fleecing.block.hostfile import HostFile
from fleecing.block.qcow2.node import TempImage
from fleecing.block.snapshot_access import SnapshotAccess
from fleecing.block.tracking import Tracker
from fleecing.errors import BlockError, ImageError, SnapshotBroken, sentence
from fleecing.units import align_up

OnBroken = Callable[[SnapshotAccess, str], None]

NOT_DURABLE = "the machine lost power or was reset while this snapshot was not durable"

_freezing = threading.Lock()  # gates are closed by one at a time, or two freezes of the same disks might wait for ever


REMOVE_SECONDS = 5.0
"""How long a creation that failed waits for copies that have begun meanwhile."""


@dataclass(frozen=True)
class SnapshotSpec:
    """What a snapshot of one disk is to be. Sizes in bytes, times in seconds; `cbw_timeout` 0 = none.

    `temp_path` and `trimmed_path` must not exist yet; without the latter the snapshot does not outlive the process.
    `scope`: called at the very instant, gives the clusters that belong to the snapshot; None, or giving None = all.
    `durable`: it outlives the loss of power, at the price of syncs before a guest write that saves something, and
    before a trim; needs `trimmed_path`, and `copied_path` in the same way.
    `tracker`: records changes from the instant on, in the place of the one that did so before.
    """

    name: str
    temp_path: str
    cluster_size: int
    temp_limit: int | None = None
    on_cbw_error: OnCbwError = OnCbwError.BREAK_SNAPSHOT
    cbw_timeout: float = 45.0
    trimmed_path: str | None = None
    durable: bool = False
    copied_path: str | None = None
    scope: Callable[[], bitarray | None] | None = None
    tracker: Tracker | None = None


def open_disk(path: str, *, image_lock: bool = True) -> CopyBeforeWrite:
    """Open a raw image as an active disk. Raises OSError, or ImageError where it is no image or is in use.

    `image_lock`: QEMU's programs are kept from writing to it.
    """
    return CopyBeforeWrite(FileNode.open(path, image_lock=image_lock))


def freeze(
    pairs: Sequence[tuple[CopyBeforeWrite, SnapshotSpec]],
    *,
    drain_timeout: float,
    on_broken: OnBroken,
    around: AbstractContextManager[object] | None = None,
) -> list[SnapshotAccess]:
    """Take one snapshot of each disk, all of the same instant: all of them, or none and nothing left behind.

    All that takes time is prepared first; then `around` is entered, new guest changes wait until those under way are
    over, the snapshots are put in place, the changes go on, and `around` is left. `on_broken` is called once, from any
    thread, for a snapshot that breaks later. A durable one is so when this returns, with what the guest wrote before;
    where that cannot be made durable it breaks at once. Raises OSError, ImageError, TimeoutError where the changes
    under way are not over in `drain_timeout` seconds, and what entering `around` raises.
    """
    snapshots: list[SnapshotAccess] = []

    def install() -> None:
        for snapshot, (_, spec) in zip(snapshots, pairs, strict=True):
            if spec.scope is not None:
                snapshot.clusters.set_scope(spec.scope())
        for snapshot, (disk, spec) in zip(snapshots, pairs, strict=True):
            disk.attach(snapshot)
            if spec.tracker is not None:
                disk.tracker = spec.tracker

    try:
        for disk, spec in pairs:
            disk.file.check_size()
            snapshots.append(_prepare(disk, spec, on_broken))
        with around or contextlib.nullcontext(), _freezing:
            same_instant([disk for disk, _ in pairs], install, timeout=drain_timeout)
    except BaseException:
        for snapshot in snapshots:
            # A copy for a change that is under way may hold it up; the others go all the same.
            with contextlib.suppress(TimeoutError):
                snapshot.remove(REMOVE_SECONDS)
        raise
    for snapshot in snapshots:
        if snapshot.durable:
            _flush_source(snapshot)
    return snapshots


def _flush_source(snapshot: SnapshotAccess) -> None:
    """What the guest wrote before the instant is part of a durable snapshot, so it must be durable, too."""
    try:
        snapshot.disk.file.flush()
    except OSError as e:
        snapshot.clusters.break_(f"{SOURCE_NOT_SYNCED}{e.strerror}")


def at_instant(disk: CopyBeforeWrite, install: Callable[[], None], *, drain_timeout: float) -> None:
    """Call `install` while no guest change is under way, for instance to put another tracker in place.

    Raises TimeoutError, with nothing done, where the changes under way are not over in `drain_timeout` seconds.
    """
    with _freezing:
        same_instant([disk], install, timeout=drain_timeout)


def _prepare(disk: CopyBeforeWrite, spec: SnapshotSpec, on_broken: OnBroken) -> SnapshotAccess:
    with contextlib.ExitStack() as undo:
        host = HostFile.create(spec.temp_path)
        undo.callback(_unlink, spec.temp_path)
        undo.callback(host.close)
        temp = TempImage.create(
            host,
            size=disk.size,
            cluster_size=spec.cluster_size,
            backing_file=disk.file.path,
            backing_format="raw",
            limit=spec.temp_limit,
        )
        trimmed = durability = None
        if spec.trimmed_path is not None:
            trimmed = BitFile.create(spec.trimmed_path, size=disk.size, granularity=spec.cluster_size)
            undo.callback(trimmed.remove)
        if spec.durable:
            assert trimmed is not None
            assert spec.copied_path is not None
            copied = BitFile.create(spec.copied_path, size=disk.size, granularity=spec.cluster_size)
            undo.callback(copied.remove)
            disk.expect_syncs()
            temp.sync()
            sync_folders([spec.temp_path, trimmed.path, copied.path])
            durability = Durability(temp, copied, trimmed)
        snapshot = _snapshot(disk, spec, temp, trimmed, durability, None, None, on_broken)
        undo.pop_all()
    return snapshot


def revive(
    disk: CopyBeforeWrite,
    spec: SnapshotSpec,
    scope: bitarray | None,
    *,
    on_broken: OnBroken,
    power_lost: bool = False,
) -> SnapshotAccess:
    """Go on with the snapshot that an earlier process left in `spec`'s files; before anybody writes to the disk.

    What temp has linked is copied; a trim that was under way is finished. After a loss of power only what is known to
    be durable counts. A snapshot that broke comes back broken, with its reason. Raises OSError, ImageError, or
    SnapshotBroken where it cannot go on; that is for good, since nobody saves what the guest changes from now on.
    """
    assert spec.trimmed_path is not None
    with contextlib.ExitStack() as undo:
        trimmed = _open_bits(spec.trimmed_path, disk, spec)
        undo.callback(trimmed.close)
        try:
            if power_lost and not spec.durable and not trimmed.note:
                raise SnapshotBroken(NOT_DURABLE)
            snapshot = _revive(disk, spec, trimmed, scope, on_broken, power_lost=power_lost)
        except (OSError, BlockError) as e:
            if trimmed.note:
                raise SnapshotBroken(trimmed.note) from e
            trimmed.note = e.cause if isinstance(e, SnapshotBroken) else sentence(e)
            sync_note(trimmed)
            raise
        undo.pop_all()
    return snapshot


def _revive(
    disk: CopyBeforeWrite,
    spec: SnapshotSpec,
    trimmed: BitFile,
    scope: bitarray | None,
    on_broken: OnBroken,
    *,
    power_lost: bool,
) -> SnapshotAccess:
    with contextlib.ExitStack() as undo:
        seal = trimmed.take_seal()  # before anything is synced: from here on the files change
        host = HostFile.open(spec.temp_path)
        undo.callback(host.close)
        copied = trusted = durability = None
        if spec.durable:
            assert spec.copied_path is not None
            copied = _open_bits(spec.copied_path, disk, spec)
            undo.callback(copied.close)
            if copied.note and not trimmed.note:
                raise SnapshotBroken(copied.note)
            trimmed.sync()  # what an earlier process set and did not sync takes effect now
            trusted = copied.bits & ~trimmed.bits
        temp = TempImage.open(host, spec.temp_limit, trusted=trusted if power_lost else None)
        if temp.cluster_size != spec.cluster_size or temp.size != align_up(disk.size, 512):
            raise ImageError(spec.temp_path, -1, f"is a temp of {temp.size} bytes, not of this disk")
        temp.check_written()  # what was found above may be what the disk had before: see HostFile.check_written
        linked = temp.linked()
        if copied is not None and trusted is not None:
            if (trusted & ~linked).any():
                raise ImageError(spec.temp_path, -1, "does not have all copies that were durable once")
            disk.expect_syncs()
            temp.sync()  # of copies that are complete and were not synced, too: they count as copied from now on
            copied.bits |= linked
            copied.sync()
            durability = Durability(temp, copied, trimmed)
        snapshot = _snapshot(disk, spec, temp, trimmed, durability, scope, linked, on_broken)
        if seal is not None and not power_lost and seal != trimmed.checksum(snapshot.facts()):
            raise ImageError(
                os.path.dirname(trimmed.path), -1, "its files are not as the last server left them: damaged, or changed"
            )
        snapshot.finish_trims()
        if trimmed.note:
            snapshot.clusters.broken = trimmed.note
        else:
            disk.attach(snapshot)
        undo.pop_all()
    return snapshot


def _open_bits(path: str, disk: CopyBeforeWrite, spec: SnapshotSpec) -> BitFile:
    bits = BitFile.open(path)
    if (bits.size, bits.granularity) != (disk.size, spec.cluster_size):
        bits.close()
        raise ImageError(
            path,
            -1,
            f"is of a disk of {bits.size} bytes in clusters of {bits.granularity}, and this one has {disk.size}",
        )
    return bits


def _snapshot(
    disk: CopyBeforeWrite,
    spec: SnapshotSpec,
    temp: TempImage,
    trimmed: BitFile | None,
    durability: Durability | None,
    scope: bitarray | None,
    done: bitarray | None,
    on_broken: OnBroken,
) -> SnapshotAccess:
    return SnapshotAccess(
        spec.name,
        disk,
        temp,
        cluster_size=spec.cluster_size,
        on_cbw_error=spec.on_cbw_error,
        cbw_timeout=spec.cbw_timeout,
        temp_limit=spec.temp_limit,
        bitmap=scope,
        trimmed=trimmed,
        durability=durability,
        done=done,
        on_broken=on_broken,
    )


def _unlink(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
