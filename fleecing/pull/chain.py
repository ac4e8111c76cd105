"""A folder of backups that is worked on: locked, brought to rest after a crash, and given new points.

A point is added in this order: the manifest says that it is being made, its qcow2 file, its list of chunks, the
manifest with the point. Before that it is nothing, and the next point takes its place, unless it resumes that very
pull.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Final

from fleecing.errors import ImageError
from fleecing.pull.destination import JOURNAL, Destination, Format
from fleecing.pull.journal import Journal
from fleecing.pull.manifest import MANIFEST, ZERO, Chunk, Manifest, Point, write_chunks
from fleecing.pull.qcow2_codec import Compression
from fleecing.pull.qcow2_reader import Qcow2File
from fleecing.pull.target import PART

LOCK: Final = ".lock"
MERGE: Final = ".merge-"
"""Begins the name of a full image that is being made of a point and those before it. No point's name begins so."""
MERGED: Final = "+full.chunks"
"""Ends the name of its list of chunks. No point's name has a plus."""


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
            upper = self.points[start + 1]
            if start < 0 or (self.points[start].file, self.points[start].size) != (upper.backing, upper.size):
                raise ImageError(
                    str(self.folder), -1, f"lacks what '{self.points[index].name}' stands on: its manifest is damaged"
                )
        return self.points[start : index + 1]

    # New points

    def begin(self, name: str) -> None:
        """The point `name` is being made from now on, or still; what else was being made is given up.

        Raises ImageError where something of a stranger's is in the way.
        """
        making = self.manifest.making
        if making is not None and (making != name or not self.is_begun(name)):
            self.manifest.making = None
            self._throw_away(*_files_of(making))
        self.sweep()
        if self.manifest.making is None:
            for file in _files_of(name):
                if os.path.lexists(self.path(file)):
                    raise ImageError(str(self.path(file)), -1, "is in the way, and no backup: remove it")
            self.manifest.making = name
            self.manifest.save(self.folder)

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
        self.manifest.making = None
        self._throw_away(file + JOURNAL)
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
        return journal.size

    def drop_last(self, name: str) -> None:
        """Take the last point back, if that is its name, and whatever was being made under it."""
        if self.manifest.making == name:
            self.manifest.making = None
            self._throw_away(*_files_of(name))
        if self.last is not None and self.last.name == name:
            self.drop(self.manifest.points.pop())
            self.manifest.save(self.folder)
        self.sweep()

    # Rest

    def drop(self, *points: Point) -> None:
        """Their files are needed no more, unless other points do. For whoever saves the manifest without them."""
        for point in points:
            self._throw_away(point.file, point.chunks)

    def _throw_away(self, *names: str) -> None:
        self.manifest.litter = list(dict.fromkeys([*self.manifest.litter, *names]))

    def sweep(self) -> None:
        """Remove what nobody needs."""
        if not self.manifest.litter:
            return
        needed = {name for point in self.points for name in (point.file, point.chunks)}
        if self.manifest.merging is not None:
            needed.add(self.manifest.merging.chunks)
        if self.manifest.making is not None:
            needed.update(_files_of(self.manifest.making))
        for name in self.manifest.litter:
            if name not in needed:
                self.path(name).unlink(missing_ok=True)
        self.manifest.litter = []
        self.manifest.save(self.folder)

    def settle(self) -> None:
        """A merge that was under way when the process ended is finished, or taken back."""
        if self.manifest.merging is not None:
            if self.is_merged(self.manifest.merging):
                self.finish_merge()
            else:
                self._throw_away(self.manifest.merging.chunks)
                self.manifest.merging = None
                self.manifest.save(self.folder)

    def begin_merge(self, point: Point) -> tuple[str, str]:
        """The names of the full image that is to be made of it, and of that one's list of chunks."""
        file, chunks = f"{MERGE}{point.name}.qcow2", f"{point.name}{MERGED}"
        self.sweep()
        self._throw_away(file, file + PART, chunks, chunks + PART)
        self.manifest.save(self.folder)
        return file, chunks

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
        self.drop(*self.points[: index + 1])
        self.manifest.points[: index + 1] = [merged]
        self.manifest.merging = None
        self.manifest.save(self.folder)


def merged_point(point: Point, *, chunks: str, sha256: str, data: int) -> Point:
    """The same instant as a full image."""
    return replace(point, chunks=chunks, chunks_sha256=sha256, data=data, backing=None, since=None)


@contextmanager
def new_chain(folder: str, say: Callable[[str], None] | None = None) -> Iterator[Chain]:
    """The folder to write to, made where there is none; `say` as for `locked`.

    Raises OSError, and ImageError where others work on it, or it is not empty and no manifest says what is in it.
    """
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    with locked(path, fcntl.LOCK_EX, say):
        manifest = Manifest.load(path)
        if manifest is None:
            if any(entry.name not in (LOCK, MANIFEST + PART) for entry in path.iterdir()):
                problem = "is not empty and holds no backups: there is no manifest.json in it; name another folder"
                raise ImageError(folder, -1, problem)
            manifest = Manifest()
        chain = Chain(path, manifest)
        chain.settle()
        yield chain


@contextmanager
def open_chain(folder: str, *, writing: bool = False) -> Iterator[Chain]:
    """Backups that are there. Raises OSError, and ImageError where there are none, or others write to them."""
    path = Path(folder)
    if not path.is_dir() or Manifest.load(path) is None:
        inside = sorted(str(manifest.parent) for manifest in path.glob(f"*/{MANIFEST}"))
        way_out = f"; name one of {', '.join(inside)}" if inside else ""
        raise ImageError(folder, -1, f"holds no backups: there is no manifest.json in it{way_out}")
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
    if (path / MANIFEST).is_file():
        return [folder]
    found = sorted(str(manifest.parent) for manifest in path.glob(f"*/{MANIFEST}") if manifest.is_file())
    if not found:
        raise ImageError(folder, -1, "holds no backups: there is no manifest.json in it, nor in a folder of it")
    return found


def orphans_in(folder: str) -> list[str]:
    """Folders in it that had backups, as their lists of chunks say, and have no manifest any more."""
    found = {chunks.parent for chunks in Path(folder).glob("*/*.chunks")}
    return sorted(str(path) for path in found if not (path / MANIFEST).is_file())


def _files_of(name: str) -> list[str]:
    """All that a point may leave, whenever it is given up."""
    file, chunks = f"{name}.qcow2", f"{name}.chunks"
    return [file, file + PART, file + JOURNAL, chunks, chunks + PART]


@contextmanager
def locked(folder: Path, how: int = fcntl.LOCK_EX, say: Callable[[str], None] | None = None) -> Iterator[None]:
    """Work on the folder. Where others do: ImageError, or with `say` a sentence, and their end is waited for."""
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
            if say is None:
                raise ImageError(str(folder), -1, "is being worked on by another command: wait for its end") from None
            say(f"{folder} is being worked on by another command: waiting for its end")
            fcntl.flock(fd, how)
        yield
    finally:
        os.close(fd)
