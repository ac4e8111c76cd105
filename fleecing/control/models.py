"""What the control API takes and answers (JSON). All sizes, offsets and lengths are bytes, all times UTC."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum

from pydantic import BaseModel, ConfigDict, Field, field_validator

from fleecing.block.copy_before_write import OnCbwError
from fleecing.control.fields import Name, TempLimit

DEFAULT_CBW_TIMEOUT = 45.0
"""Seconds; below the 60 s after which guests' drivers reset the disk."""


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

    @field_validator("disks")
    @classmethod
    def _each_once(cls, disks: list[str]) -> list[str]:
        for disk in disks:
            if disks.count(disk) > 1:
                raise ValueError(f"disk '{disk}' is named twice")
        return disks


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


class SnapshotInfo(_Model):
    """A snapshot of one disk."""

    disk: str
    name: str
    export: str = Field(description="the name of its NBD export")
    state: SnapshotState
    broken: str | None = Field(description="why it can never be read again")
    created: datetime
    size: int
    cluster_size: int
    clusters: ClusterCounts
    copied_total: int = Field(description="clusters copied since the creation, trimmed ones included")
    temp: TempInfo
    on_cbw_error: OnCbwError
    cbw_timeout: float
    clients: int = Field(description="connections to its export")
    uris: list[str] = Field(description="NBD URIs, those over Unix sockets first")


class SnapshotList(_Model):
    """Snapshots, ordered by disk and time of creation."""

    snapshots: list[SnapshotInfo]


class Deleted(_Model):
    """The snapshot is gone and its temp space is free."""

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
