"""Image locks as QEMU takes them (its block/file-posix.c): who may use an image at the same time as whom.

QEMU locks no data. It has a byte for each permission that a program may have, and one for each that it grants to
others, at fixed offsets in the file, whether the file is that long or not:

    100 + permission    held by each program that has it
    200 + permission    held by each program that does not share it: nobody else may have it

All are held shared, so that any number of programs can hold the same byte. Whoever opens an image takes its own bytes
first and then looks whether somebody else holds a byte that speaks against it: 200 + P for each P that it has, 100 + P
for each P that it does not share. So of two that come at the same moment one is refused at least, and perhaps both.

They are open file description locks (fcntl(2), F_OFD_SETLK): the kernel drops them when the last descriptor of that
opening is closed, however the process ends. They are advice: who does not ask (dd, cmp, a shell) is not refused.
"""

from __future__ import annotations

import logging
import os
import stat
from enum import IntEnum
from pathlib import Path

from fleecing.block.hostfile import NO_LOCKS, HostFile
from fleecing.errors import ImageError

log = logging.getLogger(__name__)

_HAS = 100
_DOES_NOT_SHARE = 200


class Permission(IntEnum):
    """What a program may do with an image: the numbers are QEMU's."""

    CONSISTENT_READ = 0
    WRITE = 1
    WRITE_UNCHANGED = 2
    RESIZE = 3


# What a running machine has and grants on its disk: nobody else may write while we do, and its size is ours.
_OURS = (Permission.CONSISTENT_READ, Permission.WRITE)
_UNSHARED = (Permission.WRITE, Permission.RESIZE)

_USES = {Permission.WRITE: "has it open for writing", Permission.RESIZE: "may change its size"}
_REFUSES = {Permission.WRITE: "lets nobody else write to it", Permission.CONSISTENT_READ: "lets nobody else read it"}


def lock_image(host: HostFile) -> bool:
    """Take the image for writing, until its descriptor is closed.

    False, with a warning in the log, where there are no such locks: then QEMU takes none either (`locking=auto`).
    Raises ImageError where another program uses the image, or the file of which it is a loop device, in a way that does
    not go with that, and OSError.
    """
    _refuse_loop(host)
    try:
        for permission in _OURS:
            host.hold_byte(_HAS + permission)
        for permission in _UNSHARED:
            host.hold_byte(_DOES_NOT_SHARE + permission)
        _refuse_others(host)
    except OSError as e:
        if e.errno not in NO_LOCKS:
            raise
        log.warning(
            "%s lies where there are no image locks (%s): QEMU and qemu-img are not kept from writing to it",
            host.path,
            e.strerror,
        )
        return False
    return True


def loop_file(status: os.stat_result) -> str | None:
    """The file behind a loop device, or behind a partition of one; None for anything else."""
    if not stat.S_ISBLK(status.st_mode):
        return None
    device = Path(f"/sys/dev/block/{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}")
    for folder in (device, device.resolve().parent):
        try:
            return os.fsdecode((folder / "loop" / "backing_file").read_bytes().removesuffix(b"\n"))
        except OSError:
            continue
    return None


def _refuse_loop(host: HostFile) -> None:
    """What is written to a loop device goes to its file, past whoever has that open."""
    path = loop_file(os.fstat(host.fd))
    if path is None:
        return
    try:
        file = HostFile.open(path, writable=False)
    except (OSError, ImageError):  # deleted, or nobody's to read: its locks cannot be seen
        return
    try:
        _refuse_others(file)
    except OSError as e:
        if e.errno not in NO_LOCKS:
            raise
    finally:
        file.close()


def _refuse_others(host: HostFile) -> None:
    held = [_USES[permission] for permission in _UNSHARED if host.is_byte_held(_HAS + permission)]
    held += [_REFUSES[permission] for permission in _OURS if host.is_byte_held(_DOES_NOT_SHARE + permission)]
    if held:
        raise ImageError(
            host.path,
            -1,
            f"is in use: another program (QEMU, qemu-img, qemu-nbd, a Fleecing) {' and '.join(held)}; end it first",
        )
