"""One snapshot of each of several disks, all of the same instant: all of them, or no trace of any.

    STATE/.creation-ID.json    there while it is under way; found at a start, all of it is undone (`undo_unfinished`)
    files, instant, records    of each disk
    the file is removed        from here on the snapshots exist

The disks' folders are locked by the server that works on them, so several servers may share a state folder: a server
looks only after those disks of a record that are its own.
"""

from __future__ import annotations

import dataclasses
import errno
import functools
import glob
import logging
import os
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime

from bitarray import bitarray

from fleecing.block.bitfile import BitFile
from fleecing.block.copy_before_write import CopyBeforeWrite
from fleecing.block.graph import OnBroken, SnapshotSpec, freeze
from fleecing.block.snapshot_access import SnapshotAccess
from fleecing.control.checkpoint import Changes, Untracked
from fleecing.control.disk import Disk, Snapshot
from fleecing.control.models import SnapshotRequest
from fleecing.control.names import export_name
from fleecing.control.quiesce import Quiesce
from fleecing.control.revival import make_snapshot, snapshot_spec
from fleecing.control.state import (
    CreationRecord,
    SnapshotMode,
    SnapshotRecord,
    boot_id,
    read_json,
    remove,
    write_json,
)
from fleecing.control.store import BITMAP_NAME, RECORD_NAME, SCOPE_NAME
from fleecing.errors import BlockError, ControlError, ImageError
from fleecing.server.sent_clusters import MOST_WINDOW
from fleecing.units import format_size

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
        quiesce: Quiesce | None = None,
    ) -> None:
        """`quiesce` freezes the guests around the instant."""
        self._quiesce = quiesce
        self._state_dir = state_dir
        self._path = os.path.join(state_dir, f".creation-{secrets.token_hex(8)}.json")
        self._disks = disks
        self._name = name
        self._request = request
        self._drain_seconds = drain_seconds
        self._on_broken = on_broken
        self._undo: list[Callable[[], object]] = []

    def run(self) -> list[Snapshot]:
        """Raises ControlError; then nothing is left behind, or `undo` returns False."""
        for disk in self._disks:
            _check_image(disk)
            _check_grace(disk, self._name, self._request)
            _check_space(disk, self._name)
            if self._request.checkpoint is not None:
                disk.chain.check_free(self._request.checkpoint)
        created = datetime.now(UTC)
        parts = [_Part(disk, self._name, self._request, created) for disk in self._disks]
        names = tuple(disk.name for disk in self._disks)
        content = CreationRecord(disks=names, snapshot=self._name, checkpoint=self._request.checkpoint)
        with _blaming(f"state folder {self._state_dir}", self._name):
            write_json(self._path, content, draft=_draft(self._disks[0]))
        try:
            made = self._make(parts)
            with _blaming(f"state folder {self._state_dir}", self._name):
                remove(self._path)
        except BaseException:
            self.undo()
            raise
        return made

    def undo(self) -> bool:
        """Take back what was made; False where not all of it could be: to be tried again, the next start does."""
        try:
            with ExitStack() as steps:  # the last one first, and all of them
                for undo in self._undo:
                    steps.callback(undo)
            remove(self._path)
            self._undo.clear()
        except OSError as e:
            log.error("snapshot '%s' was not made, and not all of it could be undone: %s", self._name, e)
            return False
        return True

    def _make(self, parts: Sequence[_Part]) -> list[Snapshot]:
        pairs = []
        for part in parts:
            with _blaming(_temp_folder(part.disk), part.export):
                temp_path = part.disk.folder.add_snapshot(self._name)
            self._undo.append(functools.partial(part.disk.folder.remove_snapshot, self._name))
            pairs.append((part.disk.node, self._spec(part, temp_path)))
        nodes = self._freeze(parts, pairs)
        for node in nodes:
            self._undo.append(functools.partial(node.remove, REMOVE_SECONDS))
        if self._quiesce is not None:
            self._quiesce.check()
        made = [part.keep(node) for part, node in zip(parts, nodes, strict=True)]
        if self._request.checkpoint is not None:
            for part in parts:
                with _blaming(f"state folder {part.disk.folder.path}", part.export):
                    part.disk.chain.commit(self._request.checkpoint)
        return made

    def _spec(self, part: _Part, temp_path: str) -> SnapshotSpec:
        checkpoint, chain = self._request.checkpoint, part.disk.chain
        tracker = None
        if checkpoint is not None:
            with _blaming(f"state folder {part.disk.folder.path}", part.export):
                tracker = chain.begin(checkpoint, part.record.created)
            self._undo.append(functools.partial(chain.undo, checkpoint, self._drain_seconds))
        spec = snapshot_spec(part.disk, part.record, temp_path)
        return dataclasses.replace(spec, scope=part.scope, tracker=tracker)

    def _freeze(
        self, parts: Sequence[_Part], pairs: Sequence[tuple[CopyBeforeWrite, SnapshotSpec]]
    ) -> list[SnapshotAccess]:
        try:
            return freeze(pairs, drain_timeout=self._drain_seconds, on_broken=self._on_broken, around=self._quiesce)
        except TimeoutError:
            raise ControlError(
                503,
                f"snapshot '{self._name}' was not made: writes of the guest took longer than "
                f"{self._drain_seconds:g} s to end; look at the disk's health and try again",
            ) from None
        except OSError as e:
            raise _creation_error(_temp_folder(parts[0].disk), self._name, e) from e
        except BlockError as e:
            reason = e.text if isinstance(e, ImageError) else str(e)
            raise ControlError(409, f"snapshot '{self._name}' was not made: {reason}") from e


class _Part:
    """What the creation is of one disk: its record, and the changed clusters where they are wanted."""

    def __init__(self, disk: Disk, name: str, request: SnapshotRequest, created: datetime) -> None:
        """Raises ControlError where the changes are not known and have to be."""
        self.disk = disk
        self.export = export_name(disk.name, name)
        self._request = request
        self._changes: Changes | None = None
        self._bits: bitarray | None = None
        wanted = request.since or request.bitmap
        self.record = SnapshotRecord(
            disk=disk.name,
            name=name,
            created=created,
            size=disk.node.size,
            cluster_size=disk.settings.cluster_size,
            temp_limit=request.temp_limit,
            on_cbw_error=request.on_cbw_error,
            cbw_timeout=request.cbw_timeout,
            durable=request.durable,
            quiesced=request.quiesce,
            boot_id=boot_id(),
            mode=SnapshotMode.FULL if request.since is None else SnapshotMode.INCREMENTAL,
            since=request.since,
            checkpoint=request.checkpoint,
            bitmap=None if wanted is None else request.bitmap_name or wanted,
            read_once_grace=request.grace,
        )
        if wanted is not None:
            try:
                self._changes = disk.chain.changes(wanted)
            except Untracked as e:
                self._without_changes(e)

    def _without_changes(self, cause: Untracked) -> None:
        if self._request.since is None:
            raise ControlError(409, f"snapshot '{self.export}' was not made: {cause}; leave the bitmap out")
        if not self._request.or_full:
            raise ControlError(
                409, f"snapshot '{self.export}' was not made: {cause}; take a full one, or allow for it with --or-full"
            )
        self._changes = None
        changes = {"mode": SnapshotMode.FULL, "reason": str(cause), "since": None, "bitmap": None}
        self.record = self.record.model_copy(update=changes)

    def scope(self) -> bitarray | None:
        """At the instant: the clusters that belong to the snapshot, None = all."""
        if self._changes is None:
            return None
        try:
            self._bits = self._changes.now()
        except Untracked as e:
            self._without_changes(e)
            return None
        return self._bits if self.record.mode is SnapshotMode.INCREMENTAL else None

    def keep(self, node: SnapshotAccess) -> Snapshot:
        """After the instant: write down what the next server needs."""
        if node.broken is not None:  # a durable one whose image cannot be flushed
            raise ControlError(500, f"snapshot '{self.export}' was not made: {node.broken}")
        if self.record.checkpoint is not None:
            # What was written before the checkpoint must not come back as it was before: no bitmap would know.
            image = self.disk.node.file
            try:
                image.flush()
            except OSError as e:
                raise ControlError(
                    500, f"snapshot '{self.export}' was not made: image {image.path} cannot be flushed: {e.strerror}"
                ) from e
        bits = self._bits
        incremental = self.record.mode is SnapshotMode.INCREMENTAL
        with _blaming(f"state folder {self.disk.folder.path}", self.export):
            if bits is not None:
                path = self.disk.folder.snapshot_file(self.record.name, SCOPE_NAME if incremental else BITMAP_NAME)
                size, cluster_size = self.record.size, self.record.cluster_size
                kept = BitFile.create(path, size=size, granularity=cluster_size, bits=bits)
                kept.close()
                bits = node.clusters.scope if incremental else kept.bits
            write_json(self.disk.folder.snapshot_file(self.record.name, RECORD_NAME), self.record)
            self.disk.folder.sync_snapshot(self.record.name)
        return make_snapshot(self.disk, self.record, node, bits)


def undo_unfinished(state_dir: str, disks: Mapping[str, Disk]) -> dict[str, str | None]:
    """Take the snapshots away that a killed server had not finished to make; before any of them is looked at.

    Returns the checkpoints that are to go with them, by disk. Raises OSError.
    """
    found: dict[str, str | None] = {}
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
                found[name] = record.checkpoint
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
            ours = next(disks[name] for name in record.disks if name in disks)
            write_json(path, record.model_copy(update={"disks": others}), draft=_draft(ours))


def _draft(disk: Disk) -> str:
    """Where a record is made. A kill may leave it there, where the next one takes its place; the folder of all disks
    is shared by servers, none of which could tell whose draft it found."""
    return os.path.join(disk.folder.path, "creation.json.new")


def _check_image(disk: Disk) -> None:
    """Raises ControlError where the image was grown or shrunk under us."""
    try:
        disk.node.file.check_size()
    except ImageError as e:
        raise ControlError(409, f"image {e.path} of disk '{disk.name}' {e.text}") from None


def _check_grace(disk: Disk, name: str, request: SnapshotRequest) -> None:
    """Raises ControlError where the clusters to be remembered would be too many."""
    most = MOST_WINDOW * disk.settings.cluster_size
    if request.grace is not None and request.grace > most:
        raise ControlError(
            400,
            f"snapshot '{export_name(disk.name, name)}' was not made: a read-once grace of "
            f"{format_size(request.grace)} is too much, give {format_size(most)} at most",
        )


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
