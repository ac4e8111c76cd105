"""A recording layer under files: what may be on disk when the power goes at any moment.

Every call that changes a file, and every sync, is seen at the operating system's border, so the code under test is the
real one. Mapped files are compared with what they were at each of those calls. For each sector of 512 bytes the
versions are kept, with the number of the call that made them:

    call        0    1     2     3     4     5                   the power goes after call 4:
    sector 7    A          B           C                         B or C
    sector 8    A    D                                           D
    sync                      [-----]                            what was there when it began is durable

So after a crash each sector has any version since the one that the last complete sync found, whatever the others have:
writes are lost, reordered, and torn at 512 bytes. A file's length is as free.
"""

from __future__ import annotations

import os
import threading
from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any
from unittest.mock import patch

from fleecing.block import hostfile

SECTOR = 512
MAPPED = (".bits", ".bitmap")

Pick = Callable[[int], int]
"""Of so many versions, oldest first, the one that the disk has."""


class History:
    """All versions of one file."""

    def __init__(self, created: int) -> None:
        self.created = created
        self.sectors: dict[int, list[tuple[int, bytes]]] = {}
        self.lengths: list[tuple[int, int]] = [(0, 0)]
        self.syncs: list[tuple[int, int]] = [(0, 0)]  # (call at which it began, call at which it ended)
        self.removed: int | None = None

    def note(self, now: int, sector: int, data: bytes) -> None:
        versions = self.sectors.setdefault(sector, [(0, bytes(SECTOR))])
        if versions[-1][1] != data:
            versions.append((now, data))

    def note_length(self, now: int, length: int) -> None:
        before = self.lengths[-1][1]
        if before != length:
            self.lengths.append((now, length))
        for sector in self.sectors:
            if sector * SECTOR >= length:
                self.note(now, sector, bytes(SECTOR))

    def at(self, moment: int, pick: Pick, page_pick: Callable[[], Pick]) -> bytes:
        """What the disk may have of the file after that call."""
        durable = max(begun for begun, ended in self.syncs if ended <= moment)
        length = _choose(self.lengths, durable, moment, pick)
        content = bytearray(length)
        page, of_page = -1, pick
        for sector in sorted(self.sectors):
            if sector * SECTOR // 4096 != page:
                page, of_page = sector * SECTOR // 4096, page_pick()
            data = _choose(self.sectors[sector], durable, moment, of_page)
            start = sector * SECTOR
            content[start : start + SECTOR] = data[: max(0, length - start)]
        return bytes(content)


def _choose(versions: list[tuple[int, Any]], durable: int, moment: int, pick: Pick) -> Any:
    numbers = [number for number, _ in versions]
    first = bisect_right(numbers, durable) - 1
    count = bisect_right(numbers, moment) - first
    return versions[first + pick(count)][1]


class Recorder:
    """Records the files in one folder. `now`: the number of the last call."""

    def __init__(self, folder: Path) -> None:
        """What is in the folder now is durable."""
        self.folder = os.path.realpath(folder)
        self.now = 0
        self.files: dict[str, History] = {}
        self.synced_folders: set[str] = set()
        self.fail_sync: str | None = None  # name of the file whose syncs fail
        self._lock = threading.RLock()
        for path in sorted(folder.iterdir()):
            history = self.files[path.name] = History(0)
            self._look(path.name, 0, path.stat().st_size)
            history.lengths = [(0, path.stat().st_size)]
            history.sectors = {sector: versions[-1:] for sector, versions in history.sectors.items()}

    # What is seen.

    @contextmanager
    def recording(self) -> Iterator[None]:
        """See the calls of this process until the block ends."""
        seen: dict[str, Any] = {
            "pwrite": self._wrap(os.pwrite, self._written),
            "ftruncate": self._wrap(os.ftruncate, self._resized),
            "posix_fallocate": self._wrap(os.posix_fallocate, self._resized),
            "fdatasync": self._sync(os.fdatasync),
            "fsync": self._sync(os.fsync),
            "unlink": self._unlink(os.unlink),
        }
        fallocate = self._wrap(hostfile._fallocate, lambda name, fd, mode, at, n: self._look(name, at, n))
        with patch.multiple(os, **seen), patch.object(hostfile, "_fallocate", fallocate):
            yield

    def _name(self, fd: int) -> str | None:
        """The file's name where it is one of ours."""
        folder, _, name = os.readlink(f"/proc/self/fd/{fd}").rpartition("/")
        return name if folder == self.folder else None

    def _wrap(self, call: Any, look: Any) -> Any:
        def wrapped(fd: int, *args: Any) -> Any:
            name = self._name(fd)
            if name is None:
                return call(fd, *args)
            with self._lock:
                self._step()
                result = call(fd, *args)
                self.files.setdefault(name, History(self.now))
                look(name, fd, *args)
                return result

        return wrapped

    def _sync(self, call: Any) -> Any:
        def wrapped(fd: int) -> None:
            if os.readlink(f"/proc/self/fd/{fd}") == self.folder:
                self.synced_folders.add(self.folder)
                return
            name = self._name(fd)
            if name is None:
                call(fd)
                return
            with self._lock:
                self._step()
                begun = self.now
            if name == self.fail_sync:
                raise OSError(5, "Input/output error")
            with self._lock:
                self._step()
                self.files.setdefault(name, History(self.now)).syncs.append((begun, self.now))

        return wrapped

    def _unlink(self, call: Any) -> Any:
        def wrapped(path: str) -> None:
            folder, _, name = os.path.realpath(path).rpartition("/")
            if folder == self.folder and name in self.files:
                with self._lock:
                    self._step()
                    self.files[name].removed = self.now
            call(path)

        return wrapped

    def _step(self) -> None:
        """The next call begins: what was stored into mapped memory belongs to the time before it."""
        for name, history in self.files.items():
            if name.endswith(MAPPED) and history.removed is None:
                self._look(name, 0, history.lengths[-1][1])
        self.now += 1

    def mark(self) -> int:
        """The number of a moment between two calls."""
        with self._lock:
            self._step()
            return self.now

    def _written(self, name: str, _fd: int, data: bytes, offset: int) -> None:
        self._look(name, offset, len(data))

    def _resized(self, name: str, fd: int, *_: int) -> None:
        self.files[name].note_length(self.now, os.fstat(fd).st_size)

    def _look(self, name: str, offset: int, length: int) -> None:
        """Note what the file has in this range."""
        history = self.files[name]
        first, end = offset // SECTOR, -(-(offset + length) // SECTOR)
        with open(os.path.join(self.folder, name), "rb") as file:
            file.seek(first * SECTOR)
            content = file.read((end - first) * SECTOR)
            size = os.fstat(file.fileno()).st_size
        if size > history.lengths[-1][1]:
            history.note_length(self.now, size)
        for sector in range(first, end):
            start = (sector - first) * SECTOR
            history.note(self.now, sector, content[start : start + SECTOR].ljust(SECTOR, b"\0"))

    # What may be left.

    def crash(self, moment: int, way: str, seed: int, target: Path) -> None:
        """Make in `target` the files as a disk may have them when the power goes after call `moment`."""
        random = Random(seed)
        for name, history in self.files.items():
            if history.created > moment:
                continue
            pick = _pick(way, random)
            pages = _pages(way, random)
            (target / name).write_bytes(history.at(moment, pick, pages))


WAYS = ("lost", "kept", "pages", "sectors", "mostly lost", "mostly kept", "files", "torn pages")
"""How the disk chose. "kept": as kill -9 leaves it."""


def _pick(way: str, random: Random) -> Pick:
    """The choice for one file's sectors."""

    def oldest(count: int) -> int:
        return 0

    def newest(count: int) -> int:
        return count - 1

    def any_(count: int) -> int:
        return random.randrange(count)

    match way:
        case "lost":
            return oldest
        case "kept":
            return newest
        case "files":
            return random.choice([oldest, newest])
        case "mostly lost":
            return lambda count: any_(count) if random.random() < 0.1 else 0
        case "mostly kept":
            return lambda count: any_(count) if random.random() < 0.1 else count - 1
    return any_


def _pages(way: str, random: Random) -> Callable[[], Pick]:
    """The choice for each page of 4 KiB of one file: they reach the disk as a whole, or not, or torn."""
    pick = _pick(way, random)
    if way not in ("pages", "torn pages"):
        return lambda: pick

    def choose() -> Pick:
        share = random.random()
        if way == "torn pages" and random.random() < 0.5:
            return random.randrange
        return lambda count: min(int(share * count), count - 1)

    return choose
