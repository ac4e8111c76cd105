"""The disks and their snapshots: what may be asked for by name.

Called from the loop's thread, from worker threads (creation and deletion wait for the guest's writes and for readers)
and from connections' threads. Two dictionaries are all the shared state: `disks` never changes between start and end;
`_snapshots` is changed under `_lock`, and read without it by single operations (`get`, `list(values())`).
"""

from __future__ import annotations

import errno
import logging
import os
import threading
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime

from fleecing.block.copy_before_write import CopyBeforeWrite
from fleecing.block.graph import SnapshotSpec, freeze, open_disk
from fleecing.block.snapshot_access import SnapshotAccess
from fleecing.control.config import DiskSettings, ServerSettings
from fleecing.control.models import SnapshotRequest
from fleecing.control.names import export_name
from fleecing.control.store import DiskFolder
from fleecing.errors import BlockError, ConfigError, ControlError, ImageError
from fleecing.nbd.handshake import ExportInfo
from fleecing.server.export import Export, active_export, snapshot_export
from fleecing.units import format_size

log = logging.getLogger(__name__)

DRAIN_SECONDS = 30.0
"""How long a creation waits for the guest's writes in flight."""

REMOVE_SECONDS = 30.0
"""How long a deletion waits for reads and copies in flight."""

LEAST_FREE_CLUSTERS = 16
"""Free space below this many clusters is a full temp folder."""

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
_NOT_ALLOWED = (errno.EACCES, errno.EPERM, errno.EROFS)


@dataclass(frozen=True, eq=False)
class Disk:
    """A configured active image."""

    name: str
    settings: DiskSettings
    node: CopyBeforeWrite
    folder: DiskFolder
    export: Export


@dataclass(eq=False)
class Snapshot:
    """A frozen view of one disk."""

    disk: Disk
    name: str
    created: datetime
    request: SnapshotRequest
    node: SnapshotAccess
    export: Export
    deletion: threading.Lock = field(default_factory=threading.Lock)
    """Held while a deletion runs, so that a second one waits for the first."""
    deleting: bool = False
    """Set under `deletion`, never unset: a deletion that failed can only be asked for again."""


class Manager:
    """Disks by name, snapshots by (disk, name); also the catalog that NBD connections are served from."""

    def __init__(self, settings: ServerSettings, *, drain_seconds: float = DRAIN_SECONDS) -> None:
        """Open and lock every disk; free what an earlier server left behind.

        Raises ConfigError for the first disk that cannot be had; the others are given back.
        """
        self._drain_seconds = drain_seconds
        self.disks: dict[str, Disk] = {}
        self._snapshots: dict[tuple[str, str], Snapshot] = {}
        self._lock = threading.Lock()
        self._creation = threading.Lock()
        try:
            for name, disk in settings.disk.items():
                self.disks[name] = _open(name, disk, settings)
        except BaseException:
            self.close()
            raise

    # What NBD clients may have (nbd.handshake.ExportCatalog)

    def names(self) -> Iterable[tuple[str, str]]:
        """(export name, description) of every export."""
        for disk in self.disks.values():
            yield disk.name, disk.export.description
            for snapshot in self.snapshots(disk.name):
                yield snapshot.export.name, snapshot.export.description

    def find(self, name: str) -> ExportInfo | None:
        """What a client is told of the export; "" is the only disk where there is one only."""
        export = self.open(name)
        return None if export is None else export.info

    def open(self, name: str) -> Export | None:
        """The export itself, for a connection that has agreed on it."""
        if not name:
            return next(iter(self.disks.values())).export if len(self.disks) == 1 else None
        disk, at, snapshot_name = name.partition("@")
        if not at:
            return self.disks[disk].export if disk in self.disks else None
        snapshot = self._snapshots.get((disk, snapshot_name))
        return None if snapshot is None or snapshot.deleting else snapshot.export

    # What an operator may ask for

    def disk(self, name: str) -> Disk:
        """Raises ControlError where there is none of that name."""
        try:
            return self.disks[name]
        except KeyError:
            known = ", ".join(self.disks)
            raise ControlError(404, f"there is no disk '{name}': this server has {known}") from None

    def snapshots(self, disk: str | None = None) -> list[Snapshot]:
        """All snapshots, or those of one disk, by disk and time of creation."""
        order = list(self.disks)
        found = [s for s in list(self._snapshots.values()) if disk is None or s.disk.name == disk]
        return sorted(found, key=lambda s: (order.index(s.disk.name), s.created, s.name))

    def snapshot(self, disk: str, name: str) -> Snapshot:
        """Raises ControlError where there is none of that name."""
        self.disk(disk)
        found = self._snapshots.get((disk, name))
        if found is None:
            raise ControlError(404, f"disk '{disk}' has no snapshot '{name}': `fleecing snapshot list` shows them all")
        return found

    def create(self, request: SnapshotRequest) -> list[Snapshot]:
        """Freeze the disks at one instant. Raises ControlError; then there is no trace of any of the snapshots.

        May wait for the guest's writes in flight. One creation runs at a time.
        """
        with self._creation:
            disks = [self.disk(name) for name in request.disks]
            name = request.name or self._free_name(disks)
            for disk in disks:
                if (disk.name, name) in self._snapshots:
                    raise ControlError(
                        409, f"disk '{disk.name}' has a snapshot '{name}' already: delete it or take another name"
                    )
                _check_image(disk)
                _check_space(disk, name)
            made = self._freeze(disks, name, request)
            with self._lock:
                self._snapshots.update({(s.disk.name, s.name): s for s in made})
        for snapshot in made:
            log.info("snapshot %s created, temp %s", snapshot.export.name, snapshot.node.temp_path)
        return made

    def _freeze(self, disks: Sequence[Disk], name: str, request: SnapshotRequest) -> list[Snapshot]:
        with ExitStack() as undo:
            pairs = []
            for disk in disks:
                try:
                    temp_path = disk.folder.add_snapshot(name)
                except OSError as e:
                    raise _creation_error(disk, name, e) from e
                undo.callback(disk.folder.remove_snapshot, name)
                pairs.append((disk.node, _spec(disk, name, temp_path, request)))
            try:
                nodes = freeze(pairs, drain_timeout=self._drain_seconds, on_broken=_report_broken)
            except TimeoutError:
                raise ControlError(
                    503,
                    f"snapshot '{name}' was not made: writes of the guest took longer than "
                    f"{self._drain_seconds:g} s to end; look at the disk's health and try again",
                ) from None
            except OSError as e:
                raise _creation_error(disks[0], name, e) from e
            except BlockError as e:
                reason = e.text if isinstance(e, ImageError) else str(e)
                raise ControlError(409, f"snapshot '{name}' was not made: {reason}") from e
            created = datetime.now(UTC)
            made = [_snapshot(disk, name, created, request, node) for disk, node in zip(disks, nodes, strict=True)]
            undo.pop_all()
        return made

    def _free_name(self, disks: Sequence[Disk]) -> str:
        """The UTC time as a name that none of the disks has a snapshot of yet."""
        base = name = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
        number = 1
        while any((disk.name, name) in self._snapshots for disk in disks):
            number += 1
            name = f"{base}-{number}"
        return name

    def delete(self, disk: str, name: str) -> bool:
        """Make an end of the snapshot, whoever reads it; returns when its temp space is free.

        False where there is none of that name, so asking again is harmless. Raises ControlError where it could not be
        finished: ask again.
        """
        self.disk(disk)
        snapshot = self._snapshots.get((disk, name))
        if snapshot is None:
            return False
        with snapshot.deletion:
            if self._snapshots.get((disk, name)) is not snapshot:
                return False
            snapshot.deleting = True
            try:
                snapshot.node.remove(REMOVE_SECONDS)
                snapshot.disk.folder.remove_snapshot(name)
            except TimeoutError:
                raise ControlError(
                    503, f"snapshot '{snapshot.export.name}' still has requests in flight: ask again to delete it"
                ) from None
            except OSError as e:
                raise ControlError(
                    500, f"temp space of snapshot '{snapshot.export.name}' could not be freed: {e}; ask again"
                ) from e
            with self._lock:
                del self._snapshots[disk, name]
        log.info("snapshot %s deleted", snapshot.export.name)
        return True

    def close(self) -> None:
        """Delete every snapshot, flush and give back every disk; then there is none. Twice does no harm.

        Waits for a creation that is under way; none starts any more.
        """
        with self._creation:
            self._close()

    def _close(self) -> None:
        for snapshot in self.snapshots():
            try:
                self.delete(snapshot.disk.name, snapshot.name)
            except ControlError as e:
                log.error("%s", e)
        while self.disks:
            _, disk = self.disks.popitem()
            try:
                disk.node.flush()
            except OSError as e:
                log.error("disk %s: %s could not be flushed: %s", disk.name, disk.settings.path, e)
            disk.node.close()
            disk.folder.close()


def _open(name: str, settings: DiskSettings, server: ServerSettings) -> Disk:
    """The image first: a name that is misspelt makes no state folder."""
    start = f"image {settings.path} of disk '{name}'"
    try:
        _refuse_qcow2(settings)
        node = open_disk(settings.path)
    except OSError as e:
        raise ConfigError(f"{start} cannot be opened: {e.strerror}") from None
    except ImageError as e:
        raise ConfigError(f"{start} {e.text}") from None
    try:
        folder = DiskFolder(server.state_dir, name, server.temp_dir)
    except BaseException:
        node.close()
        raise
    _free_leftovers(folder)
    log.info("disk %s opened: %s, raw, %s", name, settings.path, format_size(node.size))
    export = active_export(name, "active disk, read-write", node, cluster_size=settings.cluster_size)
    return Disk(name, settings, node, folder, export)


def _refuse_qcow2(settings: DiskSettings) -> None:
    """Nobody who names a qcow2 file without its format wants its raw bytes served."""
    if settings.format is None:
        with open(settings.path, "rb", buffering=0) as image:
            if image.read(4) == b"QFI\xfb":
                raise ImageError(
                    settings.path,
                    -1,
                    "is a qcow2 image and this release serves raw ones only: convert it with "
                    "`qemu-img convert -O raw`, or give the format raw to serve the bytes of the file as they are",
                )


def _free_leftovers(folder: DiskFolder) -> None:
    """Snapshots of a server that was killed cannot be continued; their space is freed."""
    for name in list(folder.leftovers()):
        what = f"leftover of an earlier run: snapshot {export_name(folder.disk, name)}"
        try:
            log.warning("%s, %s of temp space freed", what, format_size(folder.remove_snapshot(name)))
        except OSError as e:
            log.error("%s could not be removed: %s", what, e)


def _check_image(disk: Disk) -> None:
    """Raises ControlError where the image was grown or shrunk under us."""
    try:
        disk.node.file.check_size()
    except ImageError as e:
        raise ControlError(409, f"image {e.path} of disk '{disk.name}' {e.text}") from None


def _check_space(disk: Disk, name: str) -> None:
    """Raises ControlError where the first copies would break the snapshot.

    Making the temp file alone may not notice it: some file systems take blocks only when they write out.
    """
    try:
        space = os.statvfs(disk.folder.temp_location())
    except OSError as e:
        raise _creation_error(disk, name, e) from e
    if space.f_bavail * space.f_frsize < LEAST_FREE_CLUSTERS * disk.settings.cluster_size:
        raise _creation_error(disk, name, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))


def _spec(disk: Disk, name: str, temp_path: str, request: SnapshotRequest) -> SnapshotSpec:
    return SnapshotSpec(
        name=export_name(disk.name, name),
        temp_path=temp_path,
        cluster_size=disk.settings.cluster_size,
        temp_limit=request.temp_limit,
        on_cbw_error=request.on_cbw_error,
        cbw_timeout=request.cbw_timeout,
    )


def _snapshot(disk: Disk, name: str, created: datetime, request: SnapshotRequest, node: SnapshotAccess) -> Snapshot:
    description = f"snapshot of {disk.name}, {created:%Y-%m-%d %H:%M:%S} UTC"
    export = snapshot_export(export_name(disk.name, name), description, node)
    return Snapshot(disk, name, created, request, node, export)


def _creation_error(disk: Disk, name: str, error: OSError) -> ControlError:
    """The sentence for a temp file that cannot be made."""
    start = f"snapshot '{export_name(disk.name, name)}' was not made: temp folder {disk.folder.temp_location()}"
    if error.errno in _NO_SPACE:
        return ControlError(507, f"{start} is full: free some space there, or serve with another --temp-dir")
    if error.errno in _NOT_ALLOWED:
        return ControlError(500, f"{start} is not writable: allow it, or serve with another --temp-dir")
    if error.errno == errno.EEXIST:
        return ControlError(409, f"{start} has something of that name in the way: remove {error.filename}")
    return ControlError(500, f"{start} cannot take the temp file: {error.strerror}")


def _report_broken(node: SnapshotAccess, cause: str) -> None:
    """From any thread; by then the snapshot already reports the cause to every read."""
    log.error("snapshot %s is broken: %s", node.name, cause)
