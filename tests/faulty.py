"""A disk that fails or hangs when it is told to: a real file and a real file system, with real errors of the kernel.

    file system (ext4)          `faulty_folder`: what it has taken, it loses when the disk fails
    loop device
    a file (FUSE, nbdfuse)      `faulty_file`: its reads and writes fail at once
    nbdkit with its filters error and pause
    a plain file

All of it takes root and /dev/fuse; `CAN_FAIL` chooses tests at their collection.
"""

from __future__ import annotations

import os
import select
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.images import IS_ROOT, loop_device
from tests.peers import DEADLINE, Child, listen_unix, run

CAN_FAIL = IS_ROOT
"""Whether this user can have such disks; where root has no /dev/fuse, the tests that want one fail."""

_CHANGES = ("pwrite", "trim", "zero")


@dataclass(frozen=True)
class Faults:
    """What the disk does from now on. Of the file system on it only what reaches the disk fails."""

    path: Path
    """The file, or the folder."""
    _folder: Path

    def fail_reads(self) -> None:
        """With EIO; what is in memory still can be read."""
        (self._folder / "pread").touch()

    def fail_writes(self) -> None:
        """With EIO, zeroing and trims too."""
        for change in _CHANGES:
            (self._folder / change).touch()

    def heal(self) -> None:
        """Nothing fails any more."""
        for what in ("pread", *_CHANGES):
            (self._folder / what).unlink(missing_ok=True)

    def hang(self) -> None:
        """Until `resume`; returns when no request is under way any more."""
        self._control(b"p", b"P")

    def resume(self) -> None:
        """What hangs goes on. Twice does no harm."""
        self._control(b"r", b"R")

    def _control(self, order: bytes, answer: bytes) -> None:
        """The protocol of nbdkit's pause filter."""
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(DEADLINE)
            sock.connect(str(self._folder / "pause"))
            sock.sendall(order)
            assert sock.recv(1) == answer


@contextmanager
def faulty_file(folder: Path, image: Path) -> Iterator[Faults]:
    """`image` through a disk that may fail. `folder` is made."""
    folder.mkdir()
    mounted, sock, ready = folder / "disk", folder / "nbd", folder / "ready"
    mounted.touch()
    os.mkfifo(ready)
    faults = Faults(mounted, folder)
    errors = [f"error-{what}=EIO" for what in ("pread", *_CHANGES)]
    errors += [f"error-{what}-rate=100%" for what in ("pread", *_CHANGES)]
    errors += [f"error-{what}-file={folder / what}" for what in ("pread", *_CHANGES)]
    kit = ["nbdkit", "-f", "--filter=pause", "--filter=error", "file", str(image), f"pause-control={folder / 'pause'}"]
    with ExitStack() as stack:
        stack.enter_context(Child([*kit, *errors], folder, activate=listen_unix(sock)))
        pipe = os.open(ready, os.O_RDWR)
        stack.callback(os.close, pipe)
        fuse = ["nbdfuse", "--pidfile", str(ready), str(mounted), f"nbd+unix:///?socket={sock}"]
        stack.enter_context(Child(fuse, folder))
        assert select.select([pipe], [], [], DEADLINE)[0], "nbdfuse does not mount"
        stack.callback(_let_go, faults)
        yield faults


@contextmanager
def faulty_folder(folder: Path, size: int) -> Iterator[Faults]:
    """A folder on a file system of `size` bytes, on a disk that may fail. `folder` is made."""
    folder.mkdir()
    image, mounted = folder / "image", folder / "mounted"
    with image.open("wb") as file:
        file.truncate(size)
    mounted.mkdir()
    # Without a journal: its thread would find the errors first, and remount the file system read-only.
    run("mke2fs", "-q", "-t", "ext4", "-O", "^has_journal", "-E", "lazy_itable_init=0", str(image))
    with faulty_file(folder / "disk", image) as disk, loop_device(disk.path) as device:
        run("mount", "-t", "ext4", str(device), str(mounted))
        try:
            yield Faults(mounted, folder / "disk")
        finally:
            _let_go(disk)
            run("umount", "--lazy", str(mounted))  # whoever still has files there


def forget(path: Path) -> None:
    """What the system has in memory of a file goes, and comes from the disk with the next read. Dirty pages stay."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


def _let_go(faults: Faults) -> None:
    """Whoever waits for the disk gets an end."""
    faults.heal()
    faults.resume()
