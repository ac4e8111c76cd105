"""What the control API takes and answers (JSON). All sizes, offsets and lengths are bytes, all times UTC."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from fleecing.block.copy_before_write import OnCbwError
from fleecing.control.fields import ExportName, Name, Size, TempLimit
from fleecing.control.logs import LogFormat, LogLevel
from fleecing.control.state import SnapshotMode
from fleecing.pull.destination import Format
from fleecing.units import MiB

DEFAULT_CBW_TIMEOUT = 45.0
"""Seconds; below the 60 s after which guests' drivers reset the disk."""

DEFAULT_READ_ONCE_GRACE = 32 * MiB
"""Bytes; what QEMU has in flight at most, 16 requests of 2 MiB."""


class SnapshotState(StrEnum):
    """READY can be read; BROKEN reports its reason to every read; DELETING is on its way out."""

    READY = "ready"
    BROKEN = "broken"
    DELETING = "deleting"


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid")


class SnapshotRequest(_Model):
    """Make one snapshot of each disk, all at the same instant, or none at all."""

    disks: list[Name] = Field(min_length=1, description="the disks to freeze at the same instant")
    name: Name | None = Field(default=None, description="none: the time of creation, as in 20261123-063000")
    temp_limit: TempLimit | None = Field(default=None, description="most bytes of temp space a disk, or text as '10G'")
    on_cbw_error: OnCbwError = Field(
        default=OnCbwError.BREAK_SNAPSHOT,
        description="what to give up when old contents cannot be saved: the snapshot, or the guest's write",
    )
    cbw_timeout: float = Field(
        default=DEFAULT_CBW_TIMEOUT,
        ge=0,
        le=86400,
        allow_inf_nan=False,
        description="seconds that a guest write may wait for its copy; 0 = no limit",
    )

    quiesce: bool = Field(
        default=False, description="freeze the disks' guests around the instant, as the server is configured to"
    )
    durable: bool = Field(
        default=False, description="outlive the loss of power, at the price of a sync before a guest write that copies"
    )
    checkpoint: Name | None = Field(default=None, description="make this checkpoint at the same instant")
    since: Name | None = Field(default=None, description="incremental: only what changed since this checkpoint")
    or_full: bool = Field(
        default=False, description="a full snapshot where what changed since the checkpoint is not known"
    )
    bitmap: Name | None = Field(
        default=None, description="a full snapshot that offers what changed since this checkpoint as a dirty bitmap"
    )
    bitmap_name: Name | None = Field(
        default=None, description="the context is qemu:dirty-bitmap:BITMAP_NAME; none: the name of the checkpoint"
    )

    read_once: bool = Field(default=False, description="trim what was read, for clients that send no TRIM")
    read_once_grace: Size | None = Field(
        default=None,
        description="bytes that were read last and can be read again, or text as '64M'; null = "
        f"{DEFAULT_READ_ONCE_GRACE}; goes with read_once",
    )

    @property
    def grace(self) -> int | None:
        """What `read_once_grace` comes to, None = reading trims nothing."""
        if not self.read_once:
            return None
        return DEFAULT_READ_ONCE_GRACE if self.read_once_grace is None else self.read_once_grace

    @model_validator(mode="after")
    def _options_go_together(self) -> Self:
        if self.read_once_grace is not None and not self.read_once:
            raise ValueError("read_once_grace goes with read_once only: reading trims nothing otherwise")
        if self.since is not None and self.bitmap is not None:
            raise ValueError("since and bitmap do not go together: an incremental snapshot offers its bitmap anyway")
        if self.or_full and self.since is None:
            raise ValueError("or_full goes with since only: a snapshot is full anyway")
        if self.bitmap_name is not None and self.since is None and self.bitmap is None:
            raise ValueError("bitmap_name goes with since or bitmap only: there is no bitmap otherwise")
        return self

    @field_validator("disks")
    @classmethod
    def _each_once(cls, disks: list[str]) -> list[str]:
        for disk in disks:
            if disks.count(disk) > 1:
                raise ValueError(f"disk '{disk}' is named twice")
        return disks


class SnapshotChange(_Model):
    """Change a snapshot while it is in use."""

    temp_limit: TempLimit | None = Field(
        description="most bytes of temp space, or text as '10G', not below what is in use; null = no limit"
    )


class JobState(StrEnum):
    """RUNNING, or how it ended."""

    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"


class PushRequest(_Model):
    """Copy a snapshot, or a disk as it is at this moment, to a target that the server writes."""

    source: str = Field(description="DISK@SNAPSHOT; DISK: a snapshot is made for it, and deleted in the end")
    target: str = Field(description="absolute path of a new file or of a block device, or an NBD URI")
    format: Format = Field(default=Format.RAW, description="of a new file")
    compress: Literal["none", "deflate", "zstd"] = Field(default="none", description="clusters of a qcow2 file")
    bandwidth: Size | None = Field(default=None, gt=0, description="most bytes a second")
    quiesce: bool = Field(default=False, description="of a disk: freeze its guest for the snapshot")
    trim: bool = Field(default=True, description="give up what the target has: temp space is free at once")


class JobChange(_Model):
    """Change a push while it runs."""

    bandwidth: Size | None = Field(gt=0, description="most bytes a second, or text as '50M'; null = no limit")


class JobInfo(_Model):
    """A push."""

    id: int
    source: str = Field(description="the snapshot's export name")
    target: str
    state: JobState
    error: str | None
    done: int = Field(description="bytes, zeroes among them")
    total: int | None
    data: int = Field(description="bytes that were read")
    rate: int = Field(description="bytes of data a second")
    bandwidth: int | None = Field(description="most bytes a second that it may take")
    started: datetime
    ended: datetime | None


class JobList(_Model):
    """Pushes, the oldest first."""

    jobs: list[JobInfo]


class TempInfo(_Model):
    """The temp file of a snapshot."""

    path: str
    used: int
    peak: int
    limit: int | None = Field(description="null = none")


class ClusterCounts(_Model):
    """Clusters by state."""

    untouched: int
    copied: int
    trimmed: int
    not_in_bitmap: int


class KindLatency(_Model):
    """How long requests of one kind took, in seconds; null = there were none."""

    requests: int
    p50: float | None
    p99: float | None


class GuestLatency(_Model):
    """How long the guest's requests to the active disk took in the last minute, in seconds; null = there were none."""

    requests: int
    p50: float | None = Field(description="half of them took so long or less; wrong by a quarter at most")
    p99: float | None
    kinds: dict[str, KindLatency] = Field(description="the same for reads, writes and the others")


class SnapshotInfo(_Model):
    """A snapshot of one disk."""

    disk: str
    name: str
    export: str = Field(description="the name of its NBD export")
    state: SnapshotState
    broken: str | None = Field(description="why it can never be read again")
    created: datetime
    durable: bool = Field(description="it outlives the loss of power")
    quiesced: bool = Field(description="the guest was frozen at the instant")
    mode: SnapshotMode
    reason: str | None = Field(description="why it is full though changes only were asked for")
    since: str | None = Field(description="the checkpoint that an incremental one begins with")
    checkpoint: str | None = Field(description="the checkpoint that was made at the same instant")
    bitmap: str | None = Field(description="its export has the context qemu:dirty-bitmap:BITMAP")
    read_once: bool = Field(description="what was read is trimmed")
    read_once_grace: int | None = Field(description="bytes that were read last and can be read again")
    size: int
    cluster_size: int
    clusters: ClusterCounts
    copied_total: int = Field(description="clusters copied since the creation, trimmed ones included")
    temp: TempInfo
    on_cbw_error: OnCbwError
    cbw_timeout: float
    clients: int = Field(description="connections to its export")
    guest_latency: GuestLatency = Field(description="of the disk, which copies for it")
    uris: list[str] = Field(description="NBD URIs, those over Unix sockets first")


class SnapshotList(_Model):
    """Snapshots, ordered by disk and time of creation."""

    snapshots: list[SnapshotInfo]


class CheckpointInfo(_Model):
    """A point in time of one disk from which changed blocks are tracked."""

    disk: str
    name: str
    created: datetime
    state: str = Field(description="active, inconsistent, pending or deleting")
    inconsistent: str | None = Field(description="why nobody knows what changed since")
    changed: int | None = Field(description="bytes that changed since, in whole clusters; null = nobody knows")
    recording: bool = Field(description="changes are recorded in its bitmap now")
    granularity: int = Field(description="bytes that a bit stands for")


class CheckpointList(_Model):
    """Checkpoints, by disk, the oldest first."""

    checkpoints: list[CheckpointInfo]


class Extent(_Model):
    """A range of bytes."""

    offset: int
    length: int


class ExtentPage(_Model):
    """What changed since a checkpoint, from an offset on."""

    disk: str
    name: str
    size: int
    granularity: int
    extents: list[Extent]
    next: int | None = Field(description="the offset to ask for next; null = this was the end")


class Deleted(_Model):
    """The snapshot or checkpoint is gone, and its space is free."""

    disk: str
    name: str
    deleted: bool = Field(description="false: there was none of that name")


class MapRun(_Model):
    """Neighbouring clusters in one state."""

    offset: int
    length: int
    state: str = Field(description="untouched, copied, trimmed or not_in_bitmap")


class MapPage(_Model):
    """Cluster states from an offset on."""

    disk: str
    name: str
    size: int
    cluster_size: int
    runs: list[MapRun]
    next: int | None = Field(description="the offset to ask for next; null = this was the end")


class DiskInfo(_Model):
    """A disk and its active image."""

    name: str
    path: str
    format: str
    size: int
    cluster_size: int
    problem: str | None = Field(description="what is wrong with the image, for instance grown or shrunk")
    snapshots: list[str]
    clients: int = Field(description="connections to the active export")
    temp_folder: str
    temp_free: int = Field(description="free bytes on the temp folder's file system")
    temp_size: int = Field(description="all bytes of it")
    guest_latency: GuestLatency
    uris: list[str]


class DiskList(_Model):
    """The disks, in the order of the configuration."""

    disks: list[DiskInfo]


class ClientInfo(_Model):
    """An NBD connection that has chosen its export."""

    peer: str
    export: str
    requests: int
    bytes_read: int
    bytes_written: int


class LogInfo(_Model):
    """What is logged, and how."""

    format: LogFormat
    level: LogLevel
    debug_exports: list[str] = Field(description="exports whose every request is logged, at any level")


class LogChange(_Model):
    """Change what is logged, from now on until the server ends; null = as it is."""

    level: LogLevel | None = Field(default=None, description="lines below it are not written")
    debug_exports: list[ExportName] | None = Field(
        default=None, description="log every request of these exports and of no others, DISK or DISK@SNAPSHOT"
    )


class Status(_Model):
    """The server at this moment."""

    version: str
    pid: int
    started: datetime
    listeners: list[str] = Field(description="tcp:HOST:PORT and unix:PATH")
    control: str
    disks: list[DiskInfo]
    snapshots: list[SnapshotInfo]
    clients: list[ClientInfo]


class Problem(_Model):
    """What every failed call answers."""

    error: str = Field(description="one sentence: the thing, the value and the way out")
