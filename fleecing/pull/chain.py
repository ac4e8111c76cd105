"""A folder of backups that is worked on: locked, brought to rest after a crash, and given new points.

A point is added in this order: its qcow2 file under its name, its list of chunks, the manifest. Until the manifest
names it, it is nothing, and the next command that writes removes what is left of it, unless it resumes that very pull.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Final

from fleecing.errors import ImageError
from fleecing.pull.destination import JOURNAL, Destination, Format
from fleecing.pull.journal import Journal
from fleecing.pull.manifest import ZERO, Chunk, Manifest, Point, write_chunks
from fleecing.pull.qcow2_codec import Compression
from fleecing.pull.qcow2_reader import Qcow2File
from fleecing.pull.target import PART

LOCK: Final = "lock"
MERGE: Final = ".merge-"
"""Begins the name of a full image that is being made of a point and those before it."""


class Chain:
    """The backups of one disk in `folder`. Only `open_chain` and `new_chain` make one."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder = folder
        self.manifest = manifest

    @property
    def points(self) -> list[Point]:
        """The oldest first."""
        return self.manifest.points

    @property
    def last(self) -> Point | None:
        return self.points[-1] if self.points else None

    def path(self, name: str) -> Path:
        return self.folder / name

    def find(self, name: str | None) -> int:
        """The index of the point, or of the one that belongs to the checkpoint; None: the last. Raises ImageError."""
        if not self.points:
            raise ImageError(str(self.folder), -1, "holds no backup yet")
        if name is None:
            return len(self.points) - 1
        for index, point in enumerate(self.points):
            if name in (point.name, point.checkpoint):
                return index
        known = ", ".join(point.name for point in self.points[-10:])
        raise ImageError(str(self.folder), -1, f"has no point '{name}'; the last ones are {known}")

    def layers(self, index: int) -> list[Point]:
        """The point and those that it stands on, from its full image on. Raises ImageError."""
        start = index
        while self.points[start].backing is not None:
            start -= 1
            if start < 0 or self.points[start].file != self.points[start + 1].backing:
                raise ImageError(
                    str(self.folder), -1, f"lacks what '{self.points[index].name}' stands on: its manifest is damaged"
                )
        return self.points[start : index + 1]

    # New points

    def destination(self, name: str, *, since: str | None, compression: Compression, resume: bool) -> Destination:
        """Where the next point goes. Raises ImageError where it does not fit behind the last one."""
        if any(name == point.name for point in self.points):
            raise ImageError(str(self.folder), -1, f"has a point '{name}' already: a point is pulled once")
        backing = ""
        if since is not None:
            if self.last is None:
                raise ImageError(
                    str(self.folder),
                    -1,
                    f"is empty, and an increment since '{since}' cannot be the first: pull a full one",
                )
            if self.last.checkpoint != since:
                raise ImageError(
                    str(self.folder),
                    -1,
                    f"ends with checkpoint '{self.last.checkpoint}', and this increment begins with '{since}': "
                    f"take one since '{self.last.checkpoint}', or a full one",
                )
            backing = self.last.file
        return Destination(
            str(self.path(f"{name}.qcow2")),
            format=Format.QCOW2,
            compression=compression,
            backing=backing,
            resume=resume,
        )

    def add(
        self, name: str, *, size: int, created: str, since: str | None, checkpoint: str | None, snapshot: str | None
    ) -> Point:
        """Its file and its journal are there: write the list of chunks, and make it the last point."""
        file = f"{name}.qcow2"
        if self.last is not None and since is not None and self.last.size != size:
            raise ImageError(str(self.path(file)), -1, f"has another size than the {self.last.size} bytes before it")
        journal = Journal.resume(str(self.path(file + JOURNAL)))
        chunks = [
            Chunk(piece.offset, piece.length, ZERO if piece.is_zero else check.hex())
            for piece, check in sorted(journal.kept.values())
        ]
        sha256 = write_chunks(self.path(f"{name}.chunks"), chunks)
        point = Point(
            name=name,
            file=file,
            chunks=f"{name}.chunks",
            chunks_sha256=sha256,
            size=size,
            data=sum(chunk.length for chunk in chunks if chunk.check != ZERO),
            created=created,
            backing=None if since is None or self.last is None else self.last.file,
            since=since,
            checkpoint=checkpoint,
            snapshot=snapshot,
        )
        self.manifest.points.append(point)
        self.manifest.save(self.folder)
        journal.remove()
        return point

    def is_begun(self, name: str) -> bool:
        """Something of the point that is being made can be resumed."""
        return self.path(f"{name}.qcow2{JOURNAL}").exists()

    def size_of(self, name: str) -> int:
        """Bytes of the disk, as the journal of the point that is being made has them."""
        journal = Journal.resume(str(self.path(f"{name}.qcow2{JOURNAL}")))
        journal.close()
        assert journal.header is not None
        return int(journal.header["size"])

    def drop_last(self, name: str) -> None:
        """Take the last point back, if that is its name, and whatever was being made under it."""
        if self.last is not None and self.last.name == name:
            self.manifest.points.pop()
            self.manifest.save(self.folder)
        self.sweep()

    # Rest

    def sweep(self, *, keep: str | None = None) -> None:
        """Remove what no point needs; `keep` is the name of a point that is being made."""
        needed = {name for point in self.points for name in (point.file, point.chunks)}
        if self.manifest.merging is not None:
            needed.add(self.manifest.merging.chunks)
        for path in self.folder.iterdir():
            name = path.name
            ours = name.endswith((".qcow2", ".chunks", PART, JOURNAL))
            if not ours or name in needed or (keep is not None and name.startswith(f"{keep}.qcow2")):
                continue
            path.unlink()

    def settle(self) -> None:
        """A merge that was under way when the process ended is finished, or taken back."""
        if self.manifest.merging is not None:
            if self.is_merged(self.manifest.merging):
                self.finish_merge()
            else:
                self.manifest.merging = None
                self.manifest.save(self.folder)

    def is_merged(self, point: Point) -> bool:
        """Whether its file is the full image already."""
        file = Qcow2File.open(str(self.path(point.file)))
        file.close()
        return not file.header.backing

    def finish_merge(self) -> None:
        """The file of the point `merging` is a full image: nothing needs the points before it any more."""
        merged = self.manifest.merging
        assert merged is not None
        index = self.find(merged.name)
        self.manifest.points[: index + 1] = [merged]
        self.manifest.merging = None
        self.manifest.save(self.folder)


def merged_point(point: Point, *, chunks: str, sha256: str, data: int) -> Point:
    """The same instant as a full image."""
    return replace(point, chunks=chunks, chunks_sha256=sha256, data=data, backing=None, since=None)


@contextmanager
def new_chain(folder: str) -> Iterator[Chain]:
    """The folder to write to, made where there is none. Raises OSError, and ImageError where others work on it."""
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    manifest = Manifest.load(path)
    if manifest is None and any(entry.name != LOCK and not _is_ours(entry.name) for entry in path.iterdir()):
        raise ImageError(folder, -1, "is not empty and holds no backups: name another folder")
    with locked(path, fcntl.LOCK_EX):
        chain = Chain(path, Manifest.load(path) or Manifest())
        chain.settle()
        yield chain


@contextmanager
def open_chain(folder: str, *, writing: bool = False) -> Iterator[Chain]:
    """Backups that are there. Raises OSError, and ImageError where there are none, or others write to them."""
    path = Path(folder)
    if not path.is_dir() or Manifest.load(path) is None:
        raise ImageError(folder, -1, "holds no backups: there is no manifest.json in it")
    with locked(path, fcntl.LOCK_EX if writing else fcntl.LOCK_SH):
        chain = Chain(path, Manifest.load(path) or Manifest())
        if writing:
            chain.settle()
        elif chain.manifest.merging is not None and chain.is_merged(chain.manifest.merging):
            index = chain.find(chain.manifest.merging.name)
            chain.manifest.points[: index + 1] = [chain.manifest.merging]
        yield chain


def chains_in(folder: str) -> list[str]:
    """The folder itself where it holds backups, or those of its folders that do. Raises ImageError for none."""
    path = Path(folder)
    if (path / "manifest.json").exists():
        return [folder]
    found = sorted(str(manifest.parent) for manifest in path.glob("*/manifest.json"))
    if not found:
        raise ImageError(folder, -1, "holds no backups: there is no manifest.json in it, nor in a folder of it")
    return found


def _is_ours(name: str) -> bool:
    return name.endswith((PART, JOURNAL, ".chunks", ".qcow2"))


@contextmanager
def locked(folder: Path, how: int = fcntl.LOCK_EX) -> Iterator[None]:
    """Work on the folder; ImageError where others do."""
    try:
        fd = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError:
        if how == fcntl.LOCK_EX:
            raise
        yield  # a folder that cannot be written is not written by others of its kind either
        return
    try:
        try:
            fcntl.flock(fd, how | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ImageError(str(folder), -1, "is being worked on by another command: wait for its end") from None
        yield
    finally:
        os.close(fd)
