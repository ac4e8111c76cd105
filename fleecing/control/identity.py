"""Whether the image is the one that the last server left, and whether what was in memory then still is.

    STATE/DISK/disk.json    the image, rewritten with `clean` false before it is served and with true when a stop ended
    STATE/DISK/alive        touched every second while it is served

    the last server ...      the image is the same if
    stopped cleanly          size, modification time and inode are as they were; or it has another path and inode, as
                             after `cp -p`, and neither the old file nor the new one is or was that of another disk
    was killed               size and inode are, and it was not written later than the server lived
    went with the power      the same; the time is only known to about a minute

A block device has neither inode nor modification time that would tell: of it only the size is compared. Under another
path than before, which is that of the configuration, it must have the same number, in the same boot.
"""

from __future__ import annotations

import os
import stat
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from fleecing.block.file import FileNode
from fleecing.control.state import DiskRecord, boot_id, read_json, write_json
from fleecing.errors import ImageError

TOUCH_SECONDS = 1.0
"""How often `touch` is called."""

SLACK_SECONDS = 5
"""How much later than the last `touch` a killed server may have written."""

SLACK_AFTER_POWER_LOSS = 120
"""The same where the time of the last `touch` that became durable is all there is (see `Keeper.persist`)."""

NANO = 1_000_000_000


@dataclass(frozen=True)
class Verdict:
    """`changed`: why nothing that is kept of the image can be trusted, or None. `power_lost`: memory is not kept."""

    changed: str | None
    power_lost: bool


def _is_same_file(one: DiskRecord, other: DiskRecord) -> bool:
    """Numbers of devices are known until the next boot only."""
    is_same_device = one.device == other.device or one.boot_id != other.boot_id
    return one.regular and other.regular and one.inode == other.inode and is_same_device


class Keeper:
    """disk.json and alive of one disk. The owner of the disk's folder calls, from one thread at a time."""

    def __init__(self, folder: str, image: FileNode, cluster_size: int) -> None:
        self._record = os.path.join(folder, "disk.json")
        self._alive = os.path.join(folder, "alive")
        self._image = image
        self._cluster_size = cluster_size
        self._fd = -1

    def judge(self) -> Verdict:
        """Compare with what the last server left; changes nothing."""
        now = self._look(clean=False)
        try:
            then = read_json(self._record, DiskRecord)
        except FileNotFoundError:
            return Verdict(
                f"{self._record} is missing, so nothing tells whether this is the same image", power_lost=True
            )
        except (OSError, ImageError) as e:
            return Verdict(f"nothing tells whether this is the same image: {e}", power_lost=True)
        power_lost = not then.clean and then.boot_id != now.boot_id
        return Verdict(self._difference(then, now, power_lost=power_lost), power_lost)

    def _difference(self, then: DiskRecord, now: DiskRecord, *, power_lost: bool) -> str | None:
        if then.size != now.size:
            return f"the size of the image changed from {then.size} to {now.size} bytes while it was not served"
        if then.regular != now.regular:
            return "a file was replaced by a block device, or the other way round"
        same_boot = then.boot_id == now.boot_id
        if not now.regular:
            is_known = then.device != 0  # earlier releases did not note it
            if is_known and then.path != now.path and (not same_boot or then.device != now.device):
                return "another device was put in the place of the image while it was not served"
            return None
        if (then.path == now.path or not then.clean) and not _is_same_file(then, now):
            return "another file was put in the place of the image while it was not served"
        if then.clean:
            if not _is_same_file(then, now) and self._is_anothers(then, now):
                return "the file of another disk was put in the place of the image while it was not served"
            return None if then.mtime_ns == now.mtime_ns else self._written(now, "while it was not served")
        try:
            alive = os.stat(self._alive).st_mtime_ns
        except FileNotFoundError:
            return f"{self._alive} is missing, so nothing tells whether the image was written meanwhile"
        slack = SLACK_AFTER_POWER_LOSS if power_lost else SLACK_SECONDS
        if now.mtime_ns > alive + slack * NANO:
            return self._written(now, "after the server that had it had died")
        return None

    def _is_anothers(self, *files: DiskRecord) -> bool:
        """Whether the state knows one of these as the image of another disk, or of one that there was.

        Files that were written at the same moment have the same modification time, so it tells a copy of this disk's
        image from those of disks beside it no more.
        """
        for path in Path(self._record).parent.parent.glob("*/disk.json"):
            if path != Path(self._record):
                with suppress(OSError, ImageError):  # told where that disk is judged
                    other = read_json(str(path), DiskRecord)
                    if any(_is_same_file(other, file) for file in files):
                        return True
        return False

    @staticmethod
    def _written(now: DiskRecord, when: str) -> str:
        at = datetime.fromtimestamp(now.mtime_ns // NANO, UTC)
        return f"the image was written by something else {when}, the last time at {at:%Y-%m-%d %H:%M:%S} UTC"

    def begin(self) -> None:
        """The image is about to be served. Raises OSError."""
        self._fd = os.open(self._alive, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self.touch()
        self.persist()
        write_json(self._record, self._look(clean=False))

    def touch(self) -> None:
        """The server lives."""
        os.utime(self._fd)

    def persist(self) -> None:
        """Make the time of the last `touch` durable; called more often than SLACK_AFTER_POWER_LOSS asks for."""
        os.fsync(self._fd)

    def end(self) -> None:
        """All is durable, and nobody writes to the image any more. Raises OSError."""
        write_json(self._record, self._look(clean=True))

    def close(self) -> None:
        """Give the file back; twice does no harm."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def _look(self, *, clean: bool) -> DiskRecord:
        status = os.fstat(self._image.host.fd)
        regular = stat.S_ISREG(status.st_mode)
        return DiskRecord(
            path=self._image.path if regular else self._image.host.path,
            size=self._image.size,
            regular=regular,
            device=status.st_dev if regular else status.st_rdev,
            inode=status.st_ino if regular else 0,
            mtime_ns=status.st_mtime_ns if regular else 0,
            clean=clean,
            boot_id=boot_id(),
            cluster_size=self._cluster_size,
        )
