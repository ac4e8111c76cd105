"""What the tests of the temp image share: an image to work on, the real qemu-img, and files that fail or stop."""

from __future__ import annotations

import json
import subprocess
from errno import EIO
from pathlib import Path
from typing import Any

from fleecing.block.hostfile import HostFile
from fleecing.block.node import Buffer
from fleecing.block.qcow2.node import TempImage
from fleecing.units import KiB, TiB

CLUSTER = 64 * KiB


def make_backing(folder: Path, size: int, *, content: bytes = b"") -> Path:
    """A raw disk of `size` bytes that starts with `content`; no longer than file systems allow."""
    path = folder / "disk.raw"
    with path.open("wb") as disk:
        disk.write(content)
        disk.truncate(min(size, TiB))
    return path


def make_image(
    folder: Path, size: int, cluster_size: int = CLUSTER, *, limit: int | None = None, file: HostFile | None = None
) -> TempImage:
    """A new temp image over a disk of zeroes, in `folder`."""
    backing = make_backing(folder, size)
    file = file or HostFile.create(str(folder / "temp.qcow2"))
    return TempImage.create(
        file, size=size, cluster_size=cluster_size, backing_file=str(backing), backing_format="raw", limit=limit
    )


def reopen(image: TempImage, limit: int | None = None) -> TempImage:
    """What a restarted server has: the same file, nothing else."""
    image.close()
    return TempImage.open(HostFile.open(image.path), limit)


def pattern(image: TempImage, cluster: int, serial: int = 0) -> bytes:
    """One cluster of data that no other cluster and no other serial has."""
    return (b"%016x%016x" % (cluster + 1, serial)) * (image.cluster_size // 32)


def copy(image: TempImage, first: int, count: int = 1, serial: int = 0) -> list[tuple[int, int]]:
    """Do what the copy engine does: place, write, link. The host runs."""
    runs = image.place(count)
    cluster = first
    for host, n in runs:
        image.file.write(host, b"".join(pattern(image, cluster + i, serial) for i in range(n)))
        image.link(cluster, host, n)
        cluster += n
    return runs


def read(image: TempImage, offset: int, length: int) -> bytes:
    """The bytes of a linked range."""
    buffer = bytearray(b"\xee" * length)
    image.read_into(offset, memoryview(buffer))
    return bytes(buffer)


def qemu_img(*args: str | Path) -> str:
    """What qemu-img prints; fails where it fails."""
    return subprocess.run(["qemu-img", *map(str, args)], check=True, capture_output=True, text=True).stdout


def check(image: TempImage | Path | str) -> dict[str, int]:
    """The faults that `qemu-img check` finds: {} for a clean image, else "leaks", "corruptions", "check-errors"."""
    path = image.path if isinstance(image, TempImage) else str(image)
    command = ["qemu-img", "check", "-f", "qcow2", "--output=json", path]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode in (0, 2, 3), done.stderr
    report = json.loads(done.stdout)
    faults = {name: report[name] for name in ("leaks", "corruptions", "check-errors") if report.get(name)}
    assert bool(faults) == bool(done.returncode), done.stdout
    return faults


def qemu_map(image: TempImage) -> list[tuple[int, int, str]]:
    """(start, length, "data" | "zero") for what qemu-img finds in the image itself, not in its backing file."""
    extents: list[dict[str, Any]] = json.loads(qemu_img("map", "-f", "qcow2", "--output=json", image.path))
    found = [(e["start"], e["length"], "zero" if e["zero"] else "data") for e in extents if e["depth"] == 0]
    merged: list[tuple[int, int, str]] = []
    for start, length, kind in found:
        if merged and sum(merged[-1][:2]) == start and merged[-1][2] == kind:
            merged[-1] = (merged[-1][0], merged[-1][1] + length, kind)
        else:
            merged.append((start, length, kind))
    return merged


def qemu_read(image: TempImage, folder: Path) -> bytes:
    """The whole disk as qemu-img reads it through the image and its backing file."""
    target = folder / "converted.raw"
    qemu_img("convert", "-f", "qcow2", "-O", "raw", image.path, target)
    return target.read_bytes()


class RecordingFile(HostFile):
    """Remembers every write as (offset, bytes) and every punch as (offset, length)."""

    def __init__(self, path: str, fd: int) -> None:
        super().__init__(path, fd)
        self.writes: list[tuple[int, int]] = []
        self.punches: list[tuple[int, int]] = []

    def write(self, offset: int, data: Buffer) -> None:
        """Write and remember."""
        self.writes.append((offset, len(data)))
        super().write(offset, data)

    def punch(self, offset: int, length: int) -> bool:
        """Punch and remember."""
        self.punches.append((offset, length))
        return super().punch(offset, length)


def _part(data: Buffer, share: float) -> bytes:
    """What reaches the file of a write that fails: the kernel cuts at pages, never within an entry."""
    return bytes(data)[: int(len(data) * share) // 8 * 8] if share < 1 else bytes(data)


class FailingFile(HostFile):
    """After `fail_after(n)`, n writes work and the next fails, or that one and all after it.

    `share` of its bytes reach the file before the error comes.
    """

    def __init__(self, path: str, fd: int) -> None:
        super().__init__(path, fd)
        self.left: int | None = None
        self._share = 0.0
        self._lasting = False
        self.failed = 0

    def fail_after(self, writes: int, *, share: float = 0, lasting: bool = False) -> None:
        """Start counting."""
        self.left, self._share, self._lasting, self.failed = writes, share, lasting, 0

    def heal(self) -> None:
        """Every write works from here on."""
        self.left = None

    def write(self, offset: int, data: Buffer) -> None:
        """Write, or fail."""
        if self.left is not None:
            self.left -= 1
            if self.left == -1 or (self.left < 0 and self._lasting):
                self.failed += 1
                super().write(offset, _part(data, self._share))
                raise OSError(EIO, "made to fail")
        super().write(offset, data)


class StoppingFile(HostFile):
    """After `stop_after(n)`, n writes reach the file and nothing after them: what kill -9 leaves behind.

    A `share` of the next write's bytes reach it, too.
    """

    def __init__(self, path: str, fd: int) -> None:
        super().__init__(path, fd)
        self._left: int | None = None
        self._share = 0.0

    @property
    def stopped(self) -> bool:
        """Whether a write was lost."""
        return self._left is not None and self._left < 0

    def stop_after(self, writes: int, *, share: float = 0) -> None:
        """Start counting."""
        self._left, self._share = writes, share

    def write(self, offset: int, data: Buffer) -> None:
        """Write, or do nothing."""
        if self._left is not None:
            self._left -= 1
            if self._left == -1:
                super().write(offset, _part(data, self._share))
            if self._left < 0:
                return
        super().write(offset, data)

    def punch(self, offset: int, length: int) -> bool:
        """Punch, or do nothing."""
        return True if self.stopped else super().punch(offset, length)
