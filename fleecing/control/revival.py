"""Snapshots that an earlier server left: gone on with, or listed as broken with a reason. Before the disk is served.

Whatever is not gone on with is marked on disk first: the guest's next writes will not be saved for it, so no later
server may find it and think that it is whole.
"""

from __future__ import annotations

import logging
import os
from datetime import UTC, datetime

from bitarray import bitarray

from fleecing.block.bitfile import BitFile
from fleecing.block.breakage import Breakage, kind_of
from fleecing.block.copy_before_write import OnCbwError
from fleecing.block.graph import NOT_DURABLE, OnBroken, SnapshotSpec, revive
from fleecing.block.lost_snapshot import LostSnapshot
from fleecing.block.snapshot_access import SnapshotAccess
from fleecing.control.disk import Disk, Snapshot
from fleecing.control.identity import Verdict
from fleecing.control.names import export_name
from fleecing.control.state import SnapshotMode, SnapshotRecord, boot_id, read_json
from fleecing.control.store import BITMAP_NAME, COPIED_NAME, RECORD_NAME, SCOPE_NAME, TEMP_NAME, TRIMMED_NAME
from fleecing.errors import BlockError, ImageError, SnapshotBroken, sentence
from fleecing.events import Event, of_export, tell
from fleecing.server.export import Bitmap, lost_export, snapshot_export
from fleecing.units import format_size

log = logging.getLogger(__name__)

_DELETED = "deleted"


def revive_all(disk: Disk, verdict: Verdict, on_broken: OnBroken) -> list[Snapshot]:
    """All snapshots of the disk. Raises OSError where the state folder cannot be written."""
    found = [_revive(disk, name, verdict, on_broken) for name in list(disk.folder.kept_snapshots())]
    for snapshot in found:
        if snapshot is not None and isinstance(snapshot.node, LostSnapshot):
            disk.node.breakages.add(kind_of(snapshot.node.broken, Breakage.REVIVAL))
    return [snapshot for snapshot in found if snapshot is not None]


def _revive(disk: Disk, name: str, verdict: Verdict, on_broken: OnBroken) -> Snapshot | None:
    path = disk.folder.snapshot_file(name, RECORD_NAME)
    note = _note(disk, name)
    if not os.path.exists(path) or note == _DELETED:
        _clear(disk, name)
        return None
    record = None
    try:
        read = read_json(path, SnapshotRecord)
        if (read.disk, read.name) != (disk.name, name):
            raise ImageError(path, -1, f"is of {export_name(read.disk, read.name)}")
        record = read
        reason = disk.folder.broken_mark(name) or note or _distrust(record, verdict)
        if reason is None:
            snapshot = _go_on(disk, record, on_broken, power_lost=verdict.power_lost)
            snapshot.tell(log, Event.SNAPSHOT_RESUMED, "snapshot %s goes on, temp %s", snapshot.node.temp_path)
            return snapshot
    except (OSError, BlockError) as e:
        cause = e.cause if isinstance(e, SnapshotBroken) else sentence(e)
        reason = disk.folder.broken_mark(name) or note or cause
    disk.folder.mark_broken(name, reason)
    export, text = export_name(disk.name, name), "snapshot %s is broken: %s"
    tell(log, logging.WARNING, Event.SNAPSHOT_BROKEN, text, export, reason, reason=reason, **of_export(export))
    return _lost(disk, name, record, reason)


def _note(disk: Disk, name: str) -> str:
    """Why the snapshot broke, as the bits of what was trimmed have it; "" = it did not, or nobody knows."""
    try:
        bits = BitFile.open(disk.folder.snapshot_file(name, TRIMMED_NAME))
    except (OSError, ImageError):
        return ""
    note = bits.note
    bits.close()
    return note


def _distrust(record: SnapshotRecord, verdict: Verdict) -> str | None:
    if verdict.changed is not None:
        return verdict.changed
    return NOT_DURABLE if verdict.power_lost and not record.durable else None


def _clear(disk: Disk, name: str) -> None:
    """A creation or deletion that a killed server did not finish."""
    what = f"leftover of an earlier run: snapshot {export_name(disk.name, name)}"
    try:
        log.warning("%s, %s of temp space freed", what, format_size(disk.folder.remove_snapshot(name)))
    except OSError as e:
        log.error("%s could not be removed: %s", what, e)


def snapshot_spec(disk: Disk, record: SnapshotRecord, temp_path: str) -> SnapshotSpec:
    """How the block layer is to make the snapshot, or to go on with it."""
    return SnapshotSpec(
        name=export_name(disk.name, record.name),
        temp_path=temp_path,
        cluster_size=record.cluster_size,
        temp_limit=record.temp_limit,
        on_cbw_error=record.on_cbw_error,
        cbw_timeout=record.cbw_timeout,
        trimmed_path=disk.folder.snapshot_file(record.name, TRIMMED_NAME),
        durable=record.durable,
        copied_path=disk.folder.snapshot_file(record.name, COPIED_NAME) if record.durable else None,
    )


def make_snapshot(disk: Disk, record: SnapshotRecord, node: SnapshotAccess, bits: bitarray | None) -> Snapshot:
    """`bits`: the dirty bitmap that the export offers, one bit a cluster."""
    bitmap = None if bits is None or record.bitmap is None else Bitmap(record.bitmap, bits, record.cluster_size)
    name = export_name(disk.name, record.name)
    export = snapshot_export(
        name, _description(record), node, bitmap, read_once_grace=record.read_once_grace, traffic=disk.backups
    )
    node.watch_temp(_report_pressure, disk.temp_watermark)
    return Snapshot(disk, record, node, export)


def _report_pressure(node: SnapshotAccess) -> None:
    """From any thread, once each time that the watermark is reached."""
    if node.broken is None and node.temp_limit is not None:
        used, limit = node.temp_used(), node.temp_limit
        tell(
            log,
            logging.WARNING,
            Event.TEMP_PRESSURE,
            "snapshot %s: temp is nearly full, %s of its limit of %s are in use; "
            "`fleecing snapshot set %s --temp-limit SIZE` makes room",
            node.name,
            format_size(used),
            format_size(limit),
            node.name,
            used=used,
            limit=limit,
            **of_export(node.name),
        )


def _description(record: SnapshotRecord) -> str:
    """To the microsecond: a pull tells by it whether a connection leads to the same instant as the one before."""
    kind = "snapshot" if record.since is None else f"changes since {record.since}, snapshot"
    once = "" if record.read_once_grace is None else ", to be read once"
    return f"{kind} of {record.disk}, {record.created:%Y-%m-%d %H:%M:%S.%f} UTC{once}"


def _go_on(disk: Disk, record: SnapshotRecord, on_broken: OnBroken, *, power_lost: bool) -> Snapshot:
    """Raises OSError and BlockError where a file is missing or damaged."""
    scope = bits = None
    if record.mode is SnapshotMode.INCREMENTAL:
        scope = bits = _kept_bits(disk, record, SCOPE_NAME).copy()
    elif record.bitmap is not None:
        bits = _kept_bits(disk, record, BITMAP_NAME)
    temp_path = os.path.realpath(disk.folder.snapshot_file(record.name, TEMP_NAME))
    spec = snapshot_spec(disk, record, temp_path)
    node = revive(disk.node, spec, scope, on_broken=on_broken, power_lost=power_lost)
    return make_snapshot(disk, record, node, bits)


def _kept_bits(disk: Disk, record: SnapshotRecord, name: str) -> bitarray:
    file = BitFile.open(disk.folder.snapshot_file(record.name, name))
    file.close()  # its bits stay mapped as long as somebody holds them
    if (file.size, file.granularity) != (record.size, record.cluster_size):
        raise ImageError(file.path, -1, f"is of {file.size} bytes, one bit for each {file.granularity}")
    return file.bits


def _lost(disk: Disk, name: str, record: SnapshotRecord | None, reason: str) -> Snapshot:
    path = disk.folder.snapshot_file(name, RECORD_NAME)
    temp_path = os.path.realpath(disk.folder.snapshot_file(name, TEMP_NAME))
    if record is None:
        record = SnapshotRecord(
            disk=disk.name,
            name=name,
            created=datetime.fromtimestamp(os.stat(path).st_mtime, UTC),
            size=disk.node.size,
            cluster_size=disk.settings.cluster_size,
            temp_limit=None,
            on_cbw_error=OnCbwError.BREAK_SNAPSHOT,
            cbw_timeout=0,
            boot_id=boot_id(),
        )
    export = export_name(disk.name, name)
    node = LostSnapshot(
        export,
        reason,
        size=record.size,
        cluster_size=record.cluster_size,
        temp_path=temp_path,
        temp_limit=record.temp_limit,
    )
    found = lost_export(export, f"broken snapshot of {disk.name}", node, record.bitmap, traffic=disk.backups)
    return Snapshot(disk, record, node, found)
