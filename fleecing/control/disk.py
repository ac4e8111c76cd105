"""A configured disk and its snapshots, as everything in the control plane passes them around."""

from __future__ import annotations

import logging
import os
import threading
from dataclasses import dataclass, field

from fleecing.block.copy_before_write import CopyBeforeWrite
from fleecing.block.graph import open_disk
from fleecing.block.hostfile import HostFile
from fleecing.block.lost_snapshot import LostSnapshot
from fleecing.block.snapshot_access import SnapshotAccess
from fleecing.control.checkpoint import CheckpointChain
from fleecing.control.config import DiskSettings, ServerSettings
from fleecing.control.identity import Keeper
from fleecing.control.recent import RecentLatency
from fleecing.control.state import SnapshotRecord, write_json
from fleecing.control.store import RECORD_NAME, DiskFolder
from fleecing.errors import ConfigError, ImageError
from fleecing.events import Event, Value, of_export, tell
from fleecing.server.export import Export, active_export
from fleecing.server.meter import Traffic

log = logging.getLogger(__name__)


@dataclass(eq=False)
class Disk:
    """A configured active image."""

    name: str
    settings: DiskSettings
    node: CopyBeforeWrite
    folder: DiskFolder
    keeper: Keeper
    chain: CheckpointChain
    export: Export
    temp_watermark: int
    """Percent of a temp limit."""
    backups: Traffic
    """All clients of its snapshots; those of the disk itself are counted by `export`."""
    latency: RecentLatency
    """Of the disk's clients."""
    problem: str | None = None
    """What `watch_image` found wrong last."""

    def watch_image(self) -> None:
        """Tell, once each time, that the image is not what it was at the start, or is so again. By one thread only."""
        try:
            self.node.file.check_size()
            problem = None
        except (ImageError, OSError) as e:
            problem = str(e)
        if problem == self.problem:
            return
        self.problem = problem
        fields = {"disk": self.name, "path": self.settings.path}
        if problem is None:
            text = "disk %s: its image is as it was again"
            tell(log, logging.INFO, Event.IMAGE_OK, text, self.name, **fields)
        else:
            text = "disk %s: %s"
            tell(log, logging.ERROR, Event.IMAGE_PROBLEM, text, self.name, problem, reason=problem, **fields)

    def close(self) -> None:
        """Give image and folder back; what they hold stays as it is."""
        self.node.close()
        self.chain.close()
        self.keeper.close()
        self.folder.close()


@dataclass(eq=False)
class Snapshot:
    """A frozen view of one disk."""

    disk: Disk
    record: SnapshotRecord
    node: SnapshotAccess | LostSnapshot
    export: Export
    deletion: threading.Lock = field(default_factory=threading.Lock)
    """Held while a deletion runs, so that a second one waits for the first."""
    deleting: bool = False
    """Set under `deletion`, never unset: a deletion that failed can only be asked for again."""

    @property
    def name(self) -> str:
        return self.record.name

    def tell(
        self, log: logging.Logger, event: Event, text: str, *args: object, level: int = logging.INFO, **fields: Value
    ) -> None:
        """An event of it; the first argument of the text is its export's name."""
        name = self.export.name
        tell(log, level, event, text, name, *args, **of_export(name), temp=self.node.temp_path, **fields)

    def set_temp_limit(self, limit: int | None) -> None:
        """From now on and for later servers; bytes, None = no limit. Under `deletion`.

        Raises ImageError where more is in use, and OSError; then all is as it was.
        """
        assert isinstance(self.node, SnapshotAccess)
        record = self.record.model_copy(update={"temp_limit": limit})
        path = self.disk.folder.snapshot_file(self.name, RECORD_NAME)
        old = self.record.temp_limit
        grows = limit is None or (old is not None and limit >= old)
        if grows:
            write_json(path, record)
            self.node.set_temp_limit(limit)
        else:
            self.node.set_temp_limit(limit)  # looks whether it can be, and nothing grows beyond it meanwhile
            try:
                write_json(path, record)
            except OSError:
                self.node.set_temp_limit(old)
                raise
        self.record = record


def open_image(name: str, settings: DiskSettings, server: ServerSettings) -> Disk:
    """Open and lock image and folder; the image first: a name that is misspelt makes no state folder.

    Raises ConfigError.
    """
    start = f"image {settings.path} of disk '{name}'"
    try:
        _refuse_qcow2(settings)
        node = open_disk(settings.path, image_lock=settings.image_lock)
    except OSError as e:
        raise ConfigError(f"{start} cannot be opened: {e.strerror}") from None
    except ImageError as e:
        raise ConfigError(f"{start} {e.text}") from None
    try:
        folder = DiskFolder(server.state_dir, name, server.temp_dir)
    except BaseException:
        node.close()
        raise
    export = active_export(name, "active disk, read-write", node, cluster_size=settings.cluster_size)
    keeper = Keeper(folder.path, node.file, settings.cluster_size)
    chain = CheckpointChain(name, folder.checkpoints, node, settings.cluster_size)
    latency = RecentLatency(export.traffic.total)
    return Disk(name, settings, node, folder, keeper, chain, export, server.temp_watermark, Traffic(), latency)


def _refuse_qcow2(settings: DiskSettings) -> None:
    """Nobody who names a qcow2 file without its format wants its raw bytes served."""
    if settings.format is None:
        image = HostFile.open(settings.path, writable=False)  # does not wait for the other end of a pipe
        try:
            magic = os.pread(image.fd, 4, 0)
        finally:
            image.close()
        if magic == b"QFI\xfb":
            raise ImageError(
                settings.path,
                -1,
                "is a qcow2 image and this release serves raw ones only: convert it with "
                "`qemu-img convert -O raw`, or give the format raw to serve the bytes of the file as they are",
            )
