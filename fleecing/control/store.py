"""A disk's folder below the state folder, and where the temp files of its snapshots lie.

    STATE/DISK/                         locked (flock on the folder itself) by the one server that uses it
      disk.json  alive                  whether the image is the one that was served (identity.py)
      checkpoints/                      changed blocks (checkpoint.py)
      snapshots/NAME/snapshot.json      written last: without it the snapshot does not exist
                     temp.qcow2         the temp file, or with a temp folder a link to
    TEMP/DISK@NAME-RANDOM.qcow2
                     trimmed.bits       clusters that were trimmed, and why the snapshot broke
                     copied.bits        copies that survive the loss of power, where it is durable
                     scope.bits         clusters that belong to it, where it is incremental
                     bitmap.bits        the dirty bitmap that a full one offers
                     broken             why it can never be gone on with

The link is made before the file: whatever a killed server leaves behind is found from the state folder alone, also when
the next server has another temp folder. Only files that this module knows by name are ever removed.
"""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import stat
from collections.abc import Iterator, Sequence

from fleecing.control.names import check_name
from fleecing.control.paths import make_folder
from fleecing.control.state import remove, sync_folder
from fleecing.errors import ConfigError

TEMP_NAME = "temp.qcow2"
RECORD_NAME = "snapshot.json"
TRIMMED_NAME = "trimmed.bits"
COPIED_NAME = "copied.bits"
SCOPE_NAME = "scope.bits"
BITMAP_NAME = "bitmap.bits"
BROKEN_NAME = "broken"

_FILES = (RECORD_NAME, f"{RECORD_NAME}.new", TRIMMED_NAME, COPIED_NAME, SCOPE_NAME, BITMAP_NAME, BROKEN_NAME)

# Host file names have at most 255 bytes: both names of 128 would not fit
_NAME_PART = 64


class DiskFolder:
    """STATE/DISK, held for as long as the server runs."""

    def __init__(self, state_dir: str, disk: str, temp_dirs: Sequence[str]) -> None:
        """Make and lock it; no `temp_dirs` = temp files lie in the snapshots' folders.

        Raises ConfigError where it cannot be made or written, or another server holds it.
        """
        self.disk = disk
        self.path = os.path.join(state_dir, disk)
        self.snapshots = os.path.join(self.path, "snapshots")
        self.checkpoints = os.path.join(self.path, "checkpoints")
        self._temp_dirs = [os.path.abspath(path) for path in temp_dirs]
        make_folder(self.snapshots, "state folder")
        make_folder(self.checkpoints, "state folder")
        for path in self._temp_dirs:
            make_folder(path, "temp folder")
        self._fd = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.close()
            raise ConfigError(
                f"state folder {self.path} is in use by another server: "
                f"give the disk another name than '{disk}', or another --state-dir"
            ) from None

    def close(self) -> None:
        """Let the next server have it; twice does no harm."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def temp_location(self) -> str:
        """The folder where the next temp file goes: the one with the most free space.

        One that does not tell (its disk is gone) is passed over; where none does it is the first.
        """
        return max(self._temp_dirs, key=_free, default=self.snapshots)

    def add_snapshot(self, name: str) -> str:
        """Make the snapshot's folder; returns the path where its temp file may be made. Raises OSError."""
        folder = os.path.join(self.snapshots, name)
        os.mkdir(folder, 0o700)
        path = os.path.join(folder, TEMP_NAME)
        if not self._temp_dirs:
            return path
        file_name = f"{self.disk[:_NAME_PART]}@{name[:_NAME_PART]}-{secrets.token_hex(4)}.qcow2"
        target = os.path.join(self.temp_location(), file_name)
        try:
            os.symlink(target, path)
        except OSError:
            os.rmdir(folder)
            raise
        return target

    def snapshot_file(self, name: str, file: str) -> str:
        """The path of a file of the snapshot; `file` is one of this module's names."""
        return os.path.join(self.snapshots, name, file)

    def sync_snapshot(self, name: str) -> None:
        """The names of all that was made for the snapshot are durable when this returns."""
        sync_folder(os.path.join(self.snapshots, name))
        sync_folder(self.snapshots)

    def mark_broken(self, name: str, reason: str) -> None:
        """No server will go on with the snapshot; durable when this returns. The first reason stays."""
        path = self.snapshot_file(name, BROKEN_NAME)
        try:
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except FileExistsError:
            return
        with os.fdopen(fd, "w", encoding="utf-8") as file:
            file.write(reason)
            file.flush()
            os.fsync(file.fileno())
        sync_folder(os.path.dirname(path))

    def broken_mark(self, name: str) -> str | None:
        """What `mark_broken` wrote, or None. A server that died while it wrote leaves a mark without a reason."""
        try:
            with open(self.snapshot_file(name, BROKEN_NAME), encoding="utf-8", errors="replace") as file:
                return file.read() or "nothing is known of the reason"
        except FileNotFoundError:
            return None

    def forget_snapshot(self, name: str) -> None:
        """The snapshot does not exist any more, durably; what is left of it is only space to be freed."""
        remove(self.snapshot_file(name, RECORD_NAME))

    def remove_snapshot(self, name: str) -> int:
        """Take the snapshot's folder and temp file away; returns the bytes of disk space that this freed.

        What is gone already is no error. Raises OSError where something cannot be removed.
        """
        folder = os.path.join(self.snapshots, name)
        path = os.path.join(folder, TEMP_NAME)
        freed = 0
        try:
            self.forget_snapshot(name)
            if os.path.islink(path):
                freed = _unlink_regular(os.readlink(path))
                os.unlink(path)
            else:
                freed = _unlink_regular(path)
            freed += sum(_unlink_regular(os.path.join(folder, file)) for file in _FILES)
            os.rmdir(folder)
        except FileNotFoundError:
            pass
        except OSError as e:
            if e.errno != errno.ENOTEMPTY:
                raise
        return freed

    def kept_snapshots(self) -> Iterator[str]:
        """Names of the snapshots that an earlier server left; folders with foreign names are not ours."""
        for entry in sorted(os.scandir(self.snapshots), key=lambda entry: entry.name):
            if not entry.is_dir(follow_symlinks=False):
                continue
            try:
                yield check_name(entry.name)
            except ValueError:
                continue


def _free(folder: str) -> int:
    """Bytes that this user may take there, -1 = nobody knows."""
    try:
        space = os.statvfs(folder)
    except OSError:
        return -1
    return space.f_bavail * space.f_frsize


def _unlink_regular(path: str) -> int:
    """Remove a regular file; returns the bytes of disk space it took. Anything else stays, missing is no error."""
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        return 0
    if not stat.S_ISREG(status.st_mode):
        return 0
    os.unlink(path)
    return status.st_blocks * 512
