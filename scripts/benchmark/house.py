"""The scratch folder of a run: images whose pages stay in memory, sockets, logs. All of it is gone at the end."""

from __future__ import annotations

import itertools
import mmap
import os
import random
import shutil
import socket
import sys
import tempfile
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from fleecing.units import GiB, KiB, MiB
from scripts.benchmark.process import BenchError, Process, run

DIRTY_REGION = 256 * MiB
"""Bytes at the start of an image that write loads change."""

EXTENTS_SIZE = 1 << 40
EXTENTS = 1_000_000
"""The image with many extents: its size, and how many extents (data and holes) it has."""

SCATTERED_SIZE = 1 << 40
SCATTERED_DATA = GiB
"""The image whose data is scattered: its size, and the bytes of it that are data, in pieces of 64 KiB."""

_PAGE = 4 * KiB
_PIECE = 64 * KiB
_KEEP = Path(__file__).with_name("keep.py")
_LONGEST_SOCKET = 100


@dataclass(frozen=True)
class Settings:
    """How long and how large. `seconds`: of one sample; `size`: bytes of the image."""

    size: int
    seconds: float
    repeats: int
    touch: int
    writes: int
    """Guest writes of one sample on a fresh snapshot, at depth 16; a third of it at depth 1."""


class House(AbstractContextManager["House"]):
    """Everything a run leaves on disk and in memory, and its settings."""

    def __init__(self, parent: Path, settings: Settings) -> None:
        need = 8 * settings.size
        if (free := shutil.disk_usage(parent).free) < need:
            raise BenchError(f"{parent} has {free / GiB:.1f} GiB free, {need / GiB:.0f} are needed: use --scratch")
        self.settings = settings
        self.folder = Path(tempfile.mkdtemp(prefix="fleecing-bench-", dir=parent.resolve()))
        self.memory_folder = Path(tempfile.mkdtemp(prefix="fleecing-bench-", dir=_memory_parent(parent)))
        self.log = self.folder / "log"
        self.notes: list[str] = []
        self._stack = ExitStack()
        self._numbers = itertools.count(1)
        if len(str(self.folder)) > _LONGEST_SOCKET - 20:
            raise BenchError(f"{self.folder} is too long for Unix sockets: use --scratch")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *args: object) -> None:
        self._stack.close()
        for folder in (self.folder, self.memory_folder):
            shutil.rmtree(folder, ignore_errors=True)

    def path(self, name: str) -> Path:
        """A fresh path in the scratch folder."""
        return self.folder / f"{next(self._numbers)}.{name}"

    def free_port(self) -> int:
        """A TCP port of the loopback that was free just now."""
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port: int = probe.getsockname()[1]
            return port

    @property
    def image(self) -> Path:
        """The disk of most rows: full of data that is not zero, its pages locked in memory."""
        path = self.folder / "disk.img"
        if not path.exists():
            touch_memory(self.settings.touch)
            self._fill(path)
            self._keep(path)
        return path

    @property
    def cold_image(self) -> Path:
        """The same, but not locked in memory: see `forget`."""
        path = self.folder / "cold.img"
        if not path.exists():
            self._fill(path)
        return path

    @property
    def extents_image(self) -> Path:
        """A sparse image of 1 TiB with a million extents. In memory: some file systems take minutes to delete it."""
        path = self.memory_folder / "extents.img"
        if not path.exists():
            data = os.urandom(_PAGE)
            step = EXTENTS_SIZE // (EXTENTS // 2)
            with path.open("wb") as file:
                for i in range(EXTENTS // 2):
                    os.pwrite(file.fileno(), data, i * step // _PAGE * _PAGE)
                file.truncate(EXTENTS_SIZE)
        return path

    @property
    def scattered_image(self) -> Path:
        """A sparse image of 1 TiB with pieces of data all over it, no two gaps alike. In memory, like the one above."""
        path = self.memory_folder / "scattered.img"
        if not path.exists():
            dice, data = random.Random(1), os.urandom(_PIECE)
            step = SCATTERED_SIZE // (SCATTERED_DATA // _PIECE)
            with path.open("wb") as file:
                for start in range(0, SCATTERED_SIZE, step):
                    os.pwrite(file.fileno(), data, start + dice.randrange(0, step, _PIECE))
                file.truncate(SCATTERED_SIZE)
        return path

    def sparse_image(self, size: int) -> Path:
        """A disk of `size` bytes that is one hole. On tmpfs where there is one: ext4 ends at 16 TiB."""
        path = self.memory_folder / f"{size}.img"
        if not path.exists():
            with path.open("wb") as file:
                file.truncate(size)
        return path

    def _fill(self, path: Path) -> None:
        """Written in 4 KiB pieces: an image cached by large reads and writes sits in large folios of the page cache,
        where each small write costs ten times as much."""
        size = self.settings.size
        job = ["--name=fill", f"--filename={path}", f"--size={size}", "--rw=write", "--bs=4k", "--ioengine=psync"]
        run(["fio", *job, "--fallocate=none", "--end_fsync=1", "--output=/dev/null"], self.log)

    def _keep(self, path: Path) -> None:
        keeper = self._stack.enter_context(Process([sys.executable, _KEEP, path], self.log, listen="stdout"))
        said = keeper.wait_line("locked")
        if said != "locked":
            self.notes.append(f"the image's pages are not locked in memory ({said})")


def make_dirty(path: Path) -> None:
    """Write back what is dirty, then make the pages of the write region dirty: a write into a clean page costs ten
    times one into a dirty page, and whoever comes first would pay for the others."""
    data = os.urandom(_PAGE)
    with path.open("r+b", buffering=0) as file:
        fd = file.fileno()
        os.fdatasync(fd)
        for offset in range(0, DIRTY_REGION, _PAGE):
            os.pwrite(fd, data, offset)


def forget(path: Path) -> None:
    """Drop the pages of a file from memory."""
    with path.open("r+b", buffering=0) as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def touch_memory(size: int) -> None:
    """Use memory once: on a virtual machine the first use of a page asks the host for it, which takes long."""
    with mmap.mmap(-1, size) as memory:
        for offset in range(0, size, _PAGE):
            memory[offset] = 1


def _memory_parent(parent: Path) -> Path:
    shm = Path("/dev/shm")
    return shm if os.access(shm, os.W_OK) else parent
