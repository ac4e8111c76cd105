"""The disks and their snapshots: what may be asked for by name.

Called from the loop's thread, from worker threads (creation and deletion wait for the guest's writes and for readers)
and from connections' threads. Two dictionaries are all the shared state: `disks` never changes between start and end;
`_snapshots` is changed under `_lock`, and read without it by single operations (`get`, `list(values())`).
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime

from fleecing.block.snapshot_access import SnapshotAccess
from fleecing.control.checkpoint_load import load_chain
from fleecing.control.config import ServerSettings
from fleecing.control.creation import REMOVE_SECONDS, Creation, forget_unfinished, undo_unfinished
from fleecing.control.disk import Disk, Snapshot, open_image
from fleecing.control.identity import TOUCH_SECONDS
from fleecing.control.models import SnapshotRequest
from fleecing.control.quiesce import Guests
from fleecing.control.revival import revive_all
from fleecing.control.store import RECORD_NAME
from fleecing.control.ticker import Ticker
from fleecing.errors import ConfigError, ControlError, ImageError
from fleecing.events import Event, of_export, tell
from fleecing.nbd.handshake import ExportInfo
from fleecing.server.export import Export
from fleecing.units import format_size

log = logging.getLogger(__name__)

DRAIN_SECONDS = 30.0
"""How long a creation waits for the guest's writes in flight."""

END_SECONDS = 5.0
"""How long the end waits for guest changes that nobody waits for any more."""

SETTLE_SECONDS = 30.0
"""How often what was recorded in memory is made durable."""


class Manager:
    """Disks by name, snapshots by (disk, name); also the catalog that NBD connections are served from."""

    def __init__(self, settings: ServerSettings, *, drain_seconds: float = DRAIN_SECONDS) -> None:
        """Open and lock every disk; go on with the snapshots that an earlier server left.

        Raises ConfigError for the first disk that cannot be had; the others are given back.
        """
        self._drain_seconds = drain_seconds
        self._state_dir = settings.state_dir
        self.guests = Guests(settings.guest, settings.state_dir)
        self.disks: dict[str, Disk] = {}
        self._snapshots: dict[tuple[str, str], Snapshot] = {}
        self._lock = threading.Lock()
        self._creation = threading.Lock()
        self._undoing: Creation | None = None
        self._tickers: list[Ticker] = []
        opened: dict[str, Disk] = {}
        try:
            for name, wanted in settings.disk.items():
                opened[name] = open_image(name, wanted, settings)
            self._take_over(opened)
        except BaseException:
            self.close()
            for disk in opened.values():
                disk.close()
            raise
        self._settling = Ticker(self._settle, SETTLE_SECONDS, name="settle")
        self._tickers = [self._settling, Ticker(self._touch, TOUCH_SECONDS, name="alive")]
        # One of its own: an image whose disk hangs must hold up no other disk's signs of life.
        self._tickers.append(Ticker(self._watch_images, TOUCH_SECONDS, name="images"))

    def _take_over(self, opened: dict[str, Disk]) -> None:
        """What was unfinished ends first; then one disk after the other: judged, its snapshots, and it may be served.

        A disk moves from `opened` to `disks` when all that it needs to be closed well is known of it.
        """
        try:
            unfinished = undo_unfinished(self._state_dir, opened)
            for name in list(opened):
                disk = opened[name]
                verdict = disk.keeper.judge()
                load_chain(disk.chain, verdict, unfinished.get(name))
                found = revive_all(disk, verdict, _report_broken)
                disk.keeper.begin()
                self.disks[name] = opened.pop(name)
                self._snapshots.update({(name, s.name): s for s in found})
                tell(
                    log,
                    logging.INFO,
                    Event.DISK_OPENED,
                    "disk %s opened: %s, raw, %s",
                    name,
                    disk.settings.path,
                    format_size(disk.node.size),
                    disk=name,
                    path=disk.settings.path,
                    size=disk.node.size,
                )
            forget_unfinished(self._state_dir, self.disks)
        except OSError as e:
            raise ConfigError(f"state folder {self._state_dir} cannot be used: {e}") from e

    def _watch_images(self) -> None:
        for disk in list(self.disks.values()):
            disk.watch_image()

    def _touch(self) -> None:
        for disk in list(self.disks.values()):
            disk.latency.sample()
            try:
                disk.keeper.touch()
            except OSError as e:
                log.error("disk %s: the sign of life cannot be given: %s", disk.name, e)
        for snapshot in list(self._snapshots.values()):
            snapshot.node.check_written()

    def _settle(self) -> None:
        for disk in list(self.disks.values()):
            try:
                disk.keeper.persist()
                disk.chain.settle()
            except OSError as e:
                log.error("disk %s: its state cannot be made durable: %s", disk.name, e)

    # What NBD clients may have (nbd.handshake.ExportCatalog)

    def names(self) -> Iterable[tuple[str, str]]:
        """(export name, description) of every export."""
        for disk in self.disks.values():
            yield disk.name, disk.export.description
            for snapshot in self.snapshots(disk.name):
                yield snapshot.export.name, snapshot.export.description

    def defaults(self) -> Iterable[str]:
        """The active disks: the empty name is the only one of them."""
        return list(self.disks)

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
        return sorted(found, key=lambda s: (order.index(s.disk.name), s.record.created, s.name))

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
            self._finish_undoing()
            creation = Creation(
                self._state_dir,
                disks,
                name,
                request,
                drain_seconds=self._drain_seconds,
                on_broken=_report_broken,
                quiesce=self.guests.quiesce(disks, name) if request.quiesce else None,
            )
            self._undoing = creation
            made = creation.run()
            self._undoing = None
            with self._lock:
                self._snapshots.update({(s.disk.name, s.name): s for s in made})
        if request.checkpoint is not None:
            self._settling.hurry()
        for snapshot in made:
            snapshot.tell(log, Event.SNAPSHOT_CREATED, "snapshot %s created, temp %s", snapshot.node.temp_path)
            if request.checkpoint is not None:
                _tell_checkpoint(Event.CHECKPOINT_CREATED, "created", snapshot.disk.name, request.checkpoint)
        return made

    def _finish_undoing(self) -> None:
        """What an earlier creation could not take back goes first, or the next start would undo more than that."""
        if self._undoing is not None and not self._undoing.undo():
            raise ControlError(503, "an earlier creation that failed could not be undone yet: see the log, ask again")
        self._undoing = None

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
            with self._creation:  # whoever asked for it may be gone, and it may be about to be there
                snapshot = self._snapshots.get((disk, name))
        if snapshot is None:
            return False
        with snapshot.deletion:
            if self._snapshots.get((disk, name)) is not snapshot:
                return False
            snapshot.deleting = True
            try:
                snapshot.disk.folder.forget_snapshot(name)
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
        snapshot.tell(log, Event.SNAPSHOT_DELETED, "snapshot %s deleted")
        return True

    def set_temp_limit(self, disk: str, name: str, limit: int | None) -> None:
        """From now on and for later servers; bytes, None = no limit. Raises ControlError; then all is as it was."""
        snapshot = self.snapshot(disk, name)
        export = snapshot.export.name
        with snapshot.deletion:
            if snapshot.deleting:
                raise ControlError(409, f"snapshot '{export}' is being deleted: make a new one with another limit")
            if snapshot.node.broken is not None:
                raise ControlError(
                    409, f"snapshot '{export}' is broken, no temp space helps: {snapshot.node.broken}; delete it"
                )
            try:
                snapshot.set_temp_limit(limit)
            except ImageError as e:
                raise ControlError(
                    409, f"snapshot '{export}' keeps its temp limit: {e.text}; TRIM frees some"
                ) from None
            except OSError as e:
                raise ControlError(
                    500, f"snapshot '{export}' keeps its temp limit: its state folder takes no file: {e.strerror}"
                ) from e
        text, words = "snapshot %s: temp limit %s", "none" if limit is None else format_size(limit)
        snapshot.tell(log, Event.TEMP_LIMIT_CHANGED, text, words, limit=limit)

    def delete_checkpoint(self, disk: str, name: str) -> bool:
        """Forget the checkpoint; no other one loses a change. False where there is none of that name.

        Raises ControlError where it could not be finished: ask again.
        """
        with self._creation:
            chain = self.disk(disk).chain
            try:
                deleted = chain.delete(name, self._drain_seconds)
            except TimeoutError:
                raise ControlError(
                    503,
                    f"checkpoint '{name}' of disk '{disk}' is not deleted yet: writes of the guest took longer than "
                    f"{self._drain_seconds:g} s to end; ask again",
                ) from None
            except OSError as e:
                raise ControlError(500, f"checkpoint '{name}' of disk '{disk}' is not deleted yet: {e}") from e
        if deleted:
            _tell_checkpoint(Event.CHECKPOINT_DELETED, "deleted", disk, name)
        return deleted

    def close(self) -> None:
        """Make everything durable and give the disks back; then there is none. Twice does no harm.

        Snapshots stay, for the next server to go on with. Waits for a creation that is under way; none starts any more.
        """
        with self._creation:
            while self._tickers:
                self._tickers.pop().close()
            while self.disks:
                _, disk = self.disks.popitem()
                snapshots = [s for s in self._snapshots.values() if s.disk is disk]
                _end(disk, snapshots)
                disk.close()
            self._snapshots.clear()


def _end(disk: Disk, snapshots: Sequence[Snapshot]) -> None:
    """Nobody changes the disk from here on. Where not all becomes durable, the next start takes it for killed."""
    disk.node.gate.close()
    if not disk.node.gate.wait_empty(time.monotonic() + END_SECONDS):
        log.error("disk %s: a change of the guest does not end; its snapshots are left as they are", disk.name)
        return
    try:
        for snapshot in snapshots:
            with snapshot.deletion:
                # A deletion that could not even begin on disk: the next server will find the snapshot.
                if not snapshot.deleting or os.path.exists(disk.folder.snapshot_file(snapshot.name, RECORD_NAME)):
                    snapshot.node.suspend()
        disk.chain.suspend()
        disk.node.flush()
        disk.keeper.end()
    except OSError as e:
        log.error("disk %s: not everything could be made durable: %s", disk.name, e)


def _report_broken(node: SnapshotAccess, cause: str) -> None:
    """From any thread; by then the snapshot already reports the cause to every read."""
    fields = of_export(node.name)
    text = "snapshot %s is broken: %s"
    tell(log, logging.ERROR, Event.SNAPSHOT_BROKEN, text, node.name, cause, reason=cause, **fields)


def _tell_checkpoint(event: Event, done: str, disk: str, name: str) -> None:
    tell(log, logging.INFO, event, "checkpoint %s of disk %s %s", name, disk, done, disk=disk, checkpoint=name)
