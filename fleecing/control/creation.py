"""One snapshot of each of several disks, all of the same instant: all of them, or no trace of any.

    STATE/.creation-ID.json    there while it is under way; found at a start, all of it is undone (`undo_unfinished`)
    files, instant, records    of each disk
    the file is removed        from here on the snapshots exist

The disks' folders are locked by the server that works on them, so several servers may share a state folder: a server
looks only after those disks of a record that are its own.
"""

from __future__ import annotations

import errno
import functools
import glob
import logging
import os
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime

from fleecing.block.graph import OnBroken, freeze
from fleecing.block.snapshot_access import SnapshotAccess
from fleecing.control.disk import Disk, Snapshot
from fleecing.control.models import SnapshotRequest
from fleecing.control.names import export_name
from fleecing.control.revival import make_snapshot, snapshot_spec
from fleecing.control.state import CreationRecord, SnapshotRecord, boot_id, read_json, remove, write_json
from fleecing.control.store import RECORD_NAME
from fleecing.errors import BlockError, ControlError, ImageError

log = logging.getLogger(__name__)

REMOVE_SECONDS = 30.0
"""How long the end of a snapshot waits for reads and copies in flight."""

LEAST_FREE_CLUSTERS = 16
"""Free space below this many clusters is a full temp folder."""

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
_NOT_ALLOWED = (errno.EACCES, errno.EPERM, errno.EROFS)
_RECORDS = ".creation-*.json"  # no disk's folder begins with a dot


class Creation:
    """The work of one creation; `run` once. Only one may be under way on a disk."""

    def __init__(
        self,
        state_dir: str,
        disks: Sequence[Disk],
        name: str,
        request: SnapshotRequest,
        *,
        drain_seconds: float,
        on_broken: OnBroken,
    ) -> None:
        self._state_dir = state_dir
        self._path = os.path.join(state_dir, f".creation-{secrets.token_hex(8)}.json")
        self._disks = disks
        self._name = name
        self._request = request
        self._drain_seconds = drain_seconds
        self._on_broken = on_broken
        self._undo: list[Callable[[], object]] = []

    def run(self) -> list[Snapshot]:
        """Raises ControlError; then nothing is left behind."""
        for disk in self._disks:
            _check_image(disk)
            _check_space(disk, self._name)
        names = tuple(disk.name for disk in self._disks)
        with _blaming(f"state folder {self._state_dir}", self._name):
            write_json(self._path, CreationRecord(disks=names, snapshot=self._name, checkpoint=None))
        try:
            made = self._make()
            with _blaming(f"state folder {self._state_dir}", self._name):
                remove(self._path)
        except BaseException:
            self._undo_all()
            raise
        return made

    def _undo_all(self) -> None:
        """Where something cannot be undone now, the next start does it."""
        try:
            with ExitStack() as steps:  # the last one first, and all of them
                for undo in self._undo:
                    steps.callback(undo)
            remove(self._path)
        except OSError as e:
            log.error("snapshot '%s' was not made, and not all of it could be undone: %s", self._name, e)

    def _make(self) -> list[Snapshot]:
        created = datetime.now(UTC)
        records = [self._record(disk, created) for disk in self._disks]
        pairs = []
        for disk, record in zip(self._disks, records, strict=True):
            with _blaming(_temp_folder(disk), export_name(disk.name, self._name)):
                temp_path = disk.folder.add_snapshot(self._name)
            self._undo.append(functools.partial(disk.folder.remove_snapshot, self._name))
            pairs.append((disk.node, snapshot_spec(disk, record, temp_path)))
        try:
            nodes = freeze(pairs, drain_timeout=self._drain_seconds, on_broken=self._on_broken)
        except TimeoutError:
            raise ControlError(
                503,
                f"snapshot '{self._name}' was not made: writes of the guest took longer than "
                f"{self._drain_seconds:g} s to end; look at the disk's health and try again",
            ) from None
        except OSError as e:
            raise _creation_error(_temp_folder(self._disks[0]), self._name, e) from e
        except BlockError as e:
            reason = e.text if isinstance(e, ImageError) else str(e)
            raise ControlError(409, f"snapshot '{self._name}' was not made: {reason}") from e
        for node in nodes:
            self._undo.append(functools.partial(node.remove, REMOVE_SECONDS))
        return [self._keep(disk, record, node) for disk, record, node in zip(self._disks, records, nodes, strict=True)]

    def _record(self, disk: Disk, created: datetime) -> SnapshotRecord:
        request = self._request
        return SnapshotRecord(
            disk=disk.name,
            name=self._name,
            created=created,
            size=disk.node.size,
            cluster_size=disk.settings.cluster_size,
            temp_limit=request.temp_limit,
            on_cbw_error=request.on_cbw_error,
            cbw_timeout=request.cbw_timeout,
            boot_id=boot_id(),
        )

    def _keep(self, disk: Disk, record: SnapshotRecord, node: SnapshotAccess) -> Snapshot:
        """Write down what the next server needs."""
        with _blaming(f"state folder {disk.folder.path}", export_name(disk.name, self._name)):
            write_json(disk.folder.snapshot_file(self._name, RECORD_NAME), record)
            disk.folder.sync_snapshot(self._name)
        return make_snapshot(disk, record, node, None)


def undo_unfinished(state_dir: str, disks: Mapping[str, Disk]) -> dict[str, CreationRecord]:
    """Take the snapshots away that a killed server had not finished to make; before any of them is looked at.

    Returns the record by the names of the disks that were concerned. Raises OSError.
    """
    found: dict[str, CreationRecord] = {}
    for path in glob.glob(os.path.join(glob.escape(state_dir), _RECORDS)):
        try:
            record = read_json(path, CreationRecord)
        except FileNotFoundError:  # another server's, which has finished by now
            continue
        except ImageError as e:
            log.error("a creation that was not finished is left as it is: %s", e)
            continue
        for name in record.disks:
            if name in disks:
                found[name] = record
                freed = disks[name].folder.remove_snapshot(record.snapshot)
                export = export_name(name, record.snapshot)
                log.warning("leftover of an earlier run: unfinished snapshot %s, %d bytes freed", export, freed)
    return found


def forget_unfinished(state_dir: str, disks: Mapping[str, Disk]) -> None:
    """All that was unfinished of these disks is undone, durably."""
    for path in glob.glob(os.path.join(glob.escape(state_dir), _RECORDS)):
        try:
            record = read_json(path, CreationRecord)
        except (FileNotFoundError, ImageError):
            continue
        others = tuple(name for name in record.disks if name not in disks)
        if not others:
            remove(path)
        elif len(others) < len(record.disks):
            write_json(path, record.model_copy(update={"disks": others}))


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
    export = export_name(disk.name, name)
    with _blaming(_temp_folder(disk), export):
        space = os.statvfs(disk.folder.temp_location())
        if space.f_bavail * space.f_frsize < LEAST_FREE_CLUSTERS * disk.settings.cluster_size:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _temp_folder(disk: Disk) -> str:
    return f"temp folder {disk.folder.temp_location()}"


@contextmanager
def _blaming(folder: str, what: str) -> Iterator[None]:
    """An OSError becomes a sentence about the folder."""
    try:
        yield
    except OSError as e:
        raise _creation_error(folder, what, e) from e


def _creation_error(folder: str, what: str, error: OSError) -> ControlError:
    """The sentence for a file of the snapshot that cannot be made."""
    start = f"snapshot '{what}' was not made: {folder}"
    option = "--temp-dir" if folder.startswith("temp") else "--state-dir"
    if error.errno in _NO_SPACE:
        return ControlError(507, f"{start} is full: free some space there, or serve with another {option}")
    if error.errno in _NOT_ALLOWED:
        return ControlError(500, f"{start} is not writable: allow it, or serve with another {option}")
    if error.errno == errno.EEXIST:
        return ControlError(409, f"{start} has something of that name in the way: remove {error.filename}")
    return ControlError(500, f"{start} cannot take its files: {error.strerror}")
