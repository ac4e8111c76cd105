"""Small files of the state folder: JSON, written whole, and durable when `write_json` returns.

Each says its version first. What is written: the new text beside the old file, synced, renamed over it, and the folder
synced. So a reader finds the old file or the new one, whatever happens in between.
"""

from __future__ import annotations

import contextlib
import json
import os
from datetime import datetime
from enum import StrEnum
from typing import Literal, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from fleecing.block.copy_before_write import OnCbwError
from fleecing.control.fields import Name
from fleecing.errors import ImageError

VERSION = 1

_BOOT_ID = "/proc/sys/kernel/random/boot_id"


class Kept(BaseModel):
    """What is kept in one file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: Literal[1] = 1


class DiskRecord(Kept):
    """disk.json: the image as the server knew it. `clean`: only between a stop that ended well and the next start."""

    path: str
    size: int
    regular: bool
    device: int
    inode: int
    mtime_ns: int
    clean: bool
    boot_id: str
    cluster_size: int


class SnapshotMode(StrEnum):
    """FULL shows the whole disk, INCREMENTAL only what changed since a checkpoint."""

    FULL = "full"
    INCREMENTAL = "incremental"


class SnapshotRecord(Kept):
    """snapshot.json: all that the next server needs besides temp and the bit files. Written last: then it exists.

    `bitmap`: the name of the dirty bitmap that the export offers, None = none. Its bits are those of the scope where
    the snapshot is incremental. `read_once_grace`: bytes, None = reading trims nothing. What was sent of a cluster is
    known to one server only: the next one trims it when all of it was sent again.
    """

    disk: Name
    name: Name
    created: datetime
    size: int
    cluster_size: int
    temp_limit: int | None
    on_cbw_error: OnCbwError
    cbw_timeout: float
    durable: bool = False
    boot_id: str
    mode: SnapshotMode = SnapshotMode.FULL
    reason: str | None = None
    since: str | None = None
    checkpoint: str | None = None
    bitmap: str | None = None
    read_once_grace: int | None = None
    quiesced: bool = False


class CheckpointState(StrEnum):
    """PENDING: its creation is under way. DELETING: its deletion is; both are ended at the next start if need be."""

    ACTIVE = "active"
    PENDING = "pending"
    DELETING = "deleting"


class CheckpointEntry(BaseModel):
    """One checkpoint. `synced`: its bits are durable and change no more. `inconsistent`: why it can never be used."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Name
    created: datetime
    state: CheckpointState
    synced: bool = False
    inconsistent: str | None = None


class CheckpointIndex(Kept):
    """checkpoints/index.json: the chain, the oldest first; the last one records."""

    checkpoints: tuple[CheckpointEntry, ...] = ()


class CreationRecord(Kept):
    """A creation that is under way: found at a start, all of it is undone."""

    disks: tuple[Name, ...]
    snapshot: Name
    checkpoint: Name | None


class FrozenRecord(Kept):
    """A guest that is being frozen, is frozen or is being thawed: found at a start, it is thawed with this."""

    guest: Name
    disks: tuple[Name, ...]
    agent: str | None
    after: str | None
    hook_seconds: float


AnyKept = TypeVar("AnyKept", bound=Kept)


def write_json(path: str, content: Kept, *, draft: str | None = None) -> None:
    """Put it in the place of what is there. Raises OSError; then the old file is as it was.

    `draft` is where the file is made first, on the same file system; else that is beside it. A kill may leave it there.
    """
    temp = draft or f"{path}.new"
    fd = os.open(temp, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(content.model_dump_json(indent=1).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(temp, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temp)
        raise
    sync_folder(os.path.dirname(path))


def read_json(path: str, kind: type[AnyKept]) -> AnyKept:
    """What `write_json` wrote. Raises FileNotFoundError and other OSErrors, and ImageError where it makes no sense."""
    with open(path, "rb") as file:
        text = file.read()
    try:
        found = json.loads(text)
        version = found["version"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ImageError(path, -1, "is damaged") from None
    if isinstance(version, int) and version > VERSION:
        raise ImageError(path, -1, f"has version {version}, and this release knows {VERSION} only")
    try:
        return kind.model_validate(found)
    except ValidationError as e:
        where = ".".join(map(str, e.errors()[0]["loc"]))
        raise ImageError(path, -1, f"is damaged at '{where}'") from None


def remove(path: str) -> None:
    """Take the file away, durably; missing is no error."""
    try:
        os.unlink(path)
    except FileNotFoundError:
        return
    sync_folder(os.path.dirname(path))


def sync_folder(path: str) -> None:
    """Names that were made or removed in the folder before this call are durable when it returns."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def boot_id() -> str:
    """Names the time since the machine was started: what was in memory then still is."""
    with open(_BOOT_ID, encoding="ascii") as file:
        return file.read().strip()
