"""What a folder of backups says of itself.

    manifest.json     the points in time, the oldest first, and a merge that may be under way
    NAME.qcow2        one point: a full image, or what changed since the point before, which is its backing file
    NAME.chunks       a line for each part of that file: offset, length (bytes of the disk), SHA-256 or `zero`
    .lock             whoever works on the folder holds it

Nothing is ever removed from the folder but what the manifest names: a file of a user's own, or one whose manifest got
lost, is never taken for a leftover.

The qcow2 files are all that a restore needs: `qemu-img convert NAME.qcow2` reads any point. The rest is for `verify`,
for the next increment, and for whoever wants to know.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime
from pathlib import Path
from typing import IO, Any, Final, NamedTuple

from fleecing.errors import ImageError
from fleecing.pull.qcow2_codec import CLUSTER
from fleecing.pull.target import naming, sync_folder
from fleecing.units import MAX_SIZE, MiB

FORMAT: Final = 1
MANIFEST: Final = "manifest.json"
ZERO: Final = "zero"

MOST_DATA: Final = 64 * MiB
"""Bytes of a chunk of data: it is held in memory as a whole."""

_CHUNK: Final = re.compile(rb"(\d{1,20}) (\d{1,20}) (zero|[0-9a-f]{64})\n")


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
    """`merging`: the point that is about to become a full image; its file decides whether it is one already.

    `making`: the name of the point that is being made. `litter`: files that may be there and that nobody needs.
    """

    points: list[Point] = field(default_factory=list)
    merging: Point | None = None
    making: str | None = None
    litter: list[str] = field(default_factory=list)

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
            merging, making = content.get("merging"), content.get("making")
            found = cls(
                [_point(p) for p in content["points"]],
                None if merging is None else _point(merging),
                None if making is None else _file_name(making),
                [_file_name(name) for name in content.get("litter", [])],
            )
            found._check_names()
            return found
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
            raise ImageError(str(path), -1, f"is no manifest of backups: {e}") from None

    def _check_names(self) -> None:
        for what in ("name", "file", "chunks"):
            names = [getattr(point, what) for point in self.points]
            if len(set(names)) < len(names):
                raise ValueError(f"two points have the same {what}")

    def save(self, folder: Path) -> None:
        """At any moment the folder has the old manifest or this one, durably."""
        content: dict[str, Any] = {"fleecing-backups": FORMAT, "points": [asdict(point) for point in self.points]}
        if self.merging is not None:
            content["merging"] = asdict(self.merging)
        if self.making is not None:
            content["making"] = self.making
        if self.litter:
            content["litter"] = self.litter
        write_whole(folder / MANIFEST, (json.dumps(content, indent=2) + "\n").encode())


def _point(content: dict[str, Any]) -> Point:
    point = Point(**content)
    for each in fields(Point):
        value = getattr(point, each.name)
        kinds = (int,) if each.name in ("size", "data") else (str,)
        if type(value) not in (kinds if each.default is not None else (*kinds, type(None))):
            raise ValueError(f"{each.name} is {value!r}")
    if not 0 < point.size <= MAX_SIZE or not 0 <= point.data <= point.size:
        raise ValueError(f"'{point.name}' is of {point.size} bytes, {point.data} of data")
    datetime.fromisoformat(point.created)
    for name in (point.name, point.file, point.chunks, point.backing):
        if name is not None:
            _file_name(name)
    return point


def _file_name(name: Any) -> str:
    """The name of a file in the folder, and of nothing else. Raises ValueError."""
    if not isinstance(name, str) or name in ("", ".", "..") or os.sep in name or b"\0" in os.fsencode(name):
        raise ValueError(f"{name!r} is not the name of a file in the folder")
    return name


def write_whole(path: Path, data: bytes) -> None:
    """A small file, whole or not at all, durable when this returns."""
    with _made(path) as file:
        file.write(data)
    sync_folder(str(path.parent))


@contextmanager
def _made(path: Path) -> Iterator[IO[bytes]]:
    """A file that gets its name when it is written, and durable but for its name. Errors say which it was."""
    part = path.with_name(path.name + ".part")
    try:
        with naming(str(part)):
            with part.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            part.rename(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def write_chunks(path: Path, chunks: Iterable[Chunk]) -> str:
    """The list of a file's parts, in order; its SHA-256."""
    digest = hashlib.sha256()
    with _made(path) as file:
        for chunk in chunks:
            line = f"{chunk.offset} {chunk.length} {chunk.check}\n".encode()
            digest.update(line)
            file.write(line)
    return digest.hexdigest()


def read_chunks(path: Path, sha256: str, size: int) -> Iterator[Chunk]:
    """The parts, in order, as they are read, of a disk of `size` bytes.

    Raises ImageError where they are not those that the manifest means, or are none of such a disk.
    """
    with path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
            raise ImageError(str(path), -1, "is not what the manifest says: its SHA-256 differs")
        file.seek(0)
        before = 0
        for line in file:
            chunk = _chunk(line, before, size)
            if chunk is None:
                raise ImageError(str(path), -1, f"makes no sense for a disk of {size} bytes: {line[:99]!r}")
            before = chunk.offset + chunk.length
            yield chunk


def _chunk(line: bytes, before: int, size: int) -> Chunk | None:
    """None where it does not consist of whole clusters behind those `before`, the disk's last one cut."""
    found = _CHUNK.fullmatch(line)
    if found is None:
        return None
    offset, length, check = int(found[1]), int(found[2]), found[3].decode()
    end = offset + length
    fits = length and before <= offset and end <= size and (check == ZERO or length <= MOST_DATA)
    whole = offset % CLUSTER == 0 and (end % CLUSTER == 0 or end == size)
    return Chunk(offset, length, check) if fits and whole else None
