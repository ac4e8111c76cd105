"""Disk images for the tests: their bytes, their holes, and a block device."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.peers import run

KIB, MIB = 1 << 10, 1 << 20

ODD_SIZES = [1, 511, 65537, 3 * MIB + 512, 2 * MIB + 12345]
"""Bytes: no multiple of the cluster, none of 512, less than either."""


def random_bytes(size: int, seed: int = 0) -> bytes:
    """The same bytes each time."""
    return random.Random(seed).randbytes(size)


def make_image(path: Path, size: int, seed: int = 0) -> bytes:
    """A raw image of random bytes; its contents."""
    contents = random_bytes(size, seed)
    path.write_bytes(contents)
    return contents


def make_sparse(path: Path, size: int, data: dict[int, bytes]) -> bytes:
    """A raw image that is a hole but for `data` (offset: bytes); its contents."""
    contents = bytearray(size)
    with path.open("wb") as image:
        image.truncate(size)
        for offset, piece in data.items():
            image.seek(offset)
            image.write(piece)
            contents[offset : offset + len(piece)] = piece
    return bytes(contents)


def padded(contents: bytes, unit: int = 512) -> bytes:
    """Followed by zeroes up to a multiple of `unit`: what QEMU makes of an image of an odd size."""
    return contents + bytes(-len(contents) % unit)


def allocated(path: Path) -> int:
    """Bytes of disk space that a file takes."""
    return path.stat().st_blocks * 512


IS_ROOT = os.geteuid() == 0
"""Root may set up block devices and mount. Elsewhere these tests are chosen at collection, or turned round."""

FULL = ["file size limit", *(["full file system"] if IS_ROOT else [])]
"""Ways to have no space: a limit that everybody may set (EFBIG), and a small tmpfs (ENOSPC), which takes root."""


@contextmanager
def little_space(how: str, folder: Path, size: int) -> Iterator[tuple[Path, list[str]]]:
    """A folder where files, each or all, take `size` bytes at most, and what must wrap the program for that."""
    if how == "file size limit":
        folder.mkdir()
        yield folder, ["prlimit", f"--fsize={size}"]
    else:
        with tmpfs(folder, size):
            yield folder, []


@contextmanager
def loop_device(image: Path) -> Iterator[Path]:
    """The image as a block device. Takes root."""
    device = run("losetup", "--find", "--show", str(image)).strip()
    try:
        yield Path(device)
    finally:
        run("losetup", "--detach", device)


@contextmanager
def tmpfs(folder: Path, size: int) -> Iterator[Path]:
    """A file system in memory of `size` bytes. Takes root."""
    folder.mkdir()
    run("mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder))
    try:
        yield folder
    finally:
        run("umount", "--lazy", str(folder))  # whoever still has files there
