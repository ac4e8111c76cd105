"""What a folder of backups says of itself.

    manifest.json     the points in time, the oldest first, and a merge that may be under way
    NAME.qcow2        one point: a full image, or what changed since the point before, which is its backing file
    NAME.chunks       a line for each part of that file: offset, length (bytes of the disk), SHA-256 or `zero`
    lock              whoever works on the folder holds it

The qcow2 files are all that a restore needs: `qemu-img convert NAME.qcow2` reads any point. The rest is for `verify`,
for the next increment, and for whoever wants to know.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final, NamedTuple

from fleecing.errors import ImageError
from fleecing.pull.target import sync_folder
from fleecing.units import MAX_SIZE

FORMAT: Final = 1
MANIFEST: Final = "manifest.json"
ZERO: Final = "zero"


class Chunk(NamedTuple):
    """A part of the disk that one file has; `check` is the SHA-256 of its bytes in hex, or `ZERO`."""

    offset: int
    length: int
    check: str


@dataclass(frozen=True, kw_only=True)
class Point:
    """One point in time. Sizes in bytes; `size` is the disk's, `data` what was read for this point."""

    name: str
    file: str
    chunks: str
    chunks_sha256: str
    size: int
    data: int
    created: str
    """UTC, ISO 8601."""
    backing: str | None = None
    """The file of the point before; None for a full image."""
    since: str | None = None
    """The checkpoint that its changes begin with."""
    checkpoint: str | None = None
    """The checkpoint of its own instant: what the next increment begins with."""
    snapshot: str | None = None
    """The export that it was pulled from."""


@dataclass
class Manifest:
    """`merging`: the point that is about to become a full image; its file decides whether it is one already."""

    points: list[Point] = field(default_factory=list)
    merging: Point | None = None

    @classmethod
    def load(cls, folder: Path) -> Manifest | None:
        """None where there is none. Raises OSError, and ImageError for one that cannot be understood."""
        path = folder / MANIFEST
        try:
            text = path.read_bytes()
        except FileNotFoundError:
            return None
        try:
            content = json.loads(text)
            if content["fleecing-backups"] != FORMAT:
                raise ImageError(str(path), -1, "is of another release of Fleecing")
            merging = content.get("merging")
            points = [_point(p) for p in content["points"]]
            return cls(points, None if merging is None else _point(merging))
        except (ValueError, KeyError, TypeError, RecursionError) as e:
            raise ImageError(str(path), -1, f"is no manifest of backups: {e}") from None

    def save(self, folder: Path) -> None:
        """At any moment the folder has the old manifest or this one, durably."""
        content: dict[str, Any] = {"fleecing-backups": FORMAT, "points": [asdict(point) for point in self.points]}
        if self.merging is not None:
            content["merging"] = asdict(self.merging)
        write_whole(folder / MANIFEST, (json.dumps(content, indent=2) + "\n").encode())


def _point(content: dict[str, Any]) -> Point:
    point = Point(**content)
    texts = (point.name, point.file, point.chunks, point.chunks_sha256, point.created)
    maybe = (point.backing, point.since, point.checkpoint, point.snapshot)
    if not all(isinstance(text, str) for text in (*texts, *(text for text in maybe if text is not None))):
        raise TypeError("a name is no text")
    if not all(type(number) is int and 0 < number <= MAX_SIZE for number in (point.size, point.data or 1)):
        raise TypeError("a size is no number of bytes")
    for name in (point.file, point.chunks, point.backing or ""):
        if os.sep in name or name in (".", ".."):
            raise ValueError(f"'{name}' is not the name of a file in the folder")
    return point


def write_whole(path: Path, data: bytes) -> None:
    """A small file, whole or not at all, durable when this returns."""
    part = path.with_name(path.name + ".part")
    with part.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    part.rename(path)
    sync_folder(str(path.parent))


def write_chunks(path: Path, chunks: Iterable[Chunk]) -> str:
    """The list of a file's parts, in order; its SHA-256."""
    digest = hashlib.sha256()
    part = path.with_name(path.name + ".part")
    with part.open("wb") as file:
        for chunk in chunks:
            line = f"{chunk.offset} {chunk.length} {chunk.check}\n".encode()
            digest.update(line)
            file.write(line)
        file.flush()
        os.fsync(file.fileno())
    part.rename(path)
    return digest.hexdigest()


def read_chunks(path: Path, sha256: str) -> Iterator[Chunk]:
    """The parts, in order, as they are read. Raises ImageError where they are not those that the manifest means."""
    with path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
            raise ImageError(str(path), -1, "is not what the manifest says: its SHA-256 differs")
        file.seek(0)
        for line in file:
            offset, length, check = line.decode("ascii").split()
            yield Chunk(int(offset), int(length), check)
