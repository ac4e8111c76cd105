"""Reading backups: every byte of a point from the newest file that has it, each chunk compared with its checksum.

    point 3 (asked for)          |##|        |####|
    point 2                   |####|     |00|
    point 1, full         |#####################......|     # data, 0 zeroes, . nothing: zeroes

The disk is gone through in windows, so memory does not grow with it. Within a window each cluster is owned by the
newest file that has it; only chunks that own something are read.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from typing import Final, NamedTuple

from fleecing.errors import ImageError
from fleecing.pull.chain import Chain
from fleecing.pull.manifest import ZERO, Chunk, Point, read_chunks
from fleecing.pull.qcow2_codec import CLUSTER
from fleecing.pull.qcow2_reader import Qcow2File
from fleecing.pull.target import Target
from fleecing.units import GiB, align_up, div_up

WINDOW: Final = GiB
ProgressCall = Callable[[int], None]
"""Is told how many bytes more are done."""


class Part(NamedTuple):
    """Neighbouring bytes of the disk; `data` None = zeroes."""

    offset: int
    length: int
    data: bytes | None


class _Layer:
    """One file with its chunks, read side by side with the others."""

    def __init__(self, chain: Chain, point: Point) -> None:
        self.path = str(chain.path(point.file))
        self.file = open_file(chain, point)
        self._chunks = read_chunks(chain.path(point.chunks), point.chunks_sha256, point.size)
        self._current: list[Chunk] = []
        self._ahead = next(self._chunks, None)
        self._held: tuple[Chunk, bytes] | None = None

    def within(self, start: int, end: int) -> list[Chunk]:
        """The chunks that reach into the window; windows are asked for in order."""
        self._current = [chunk for chunk in self._current if chunk.offset + chunk.length > start]
        while self._ahead is not None and self._ahead.offset < end:
            self._current.append(self._ahead)
            self._ahead = next(self._chunks, None)
        return self._current

    def read(self, chunk: Chunk) -> bytes:
        """Its bytes, compared with its checksum. Raises ImageError."""
        if self._held is None or self._held[0] != chunk:
            self._held = chunk, read_checked(self.file, chunk)
        return self._held[1]


def open_file(chain: Chain, point: Point) -> Qcow2File:
    """The point's own file. Raises OSError, and ImageError for one that is not of such a disk."""
    file = Qcow2File.open(str(chain.path(point.file)))
    if file.header.size != align_up(point.size, 512):
        file.close()
        raise ImageError(file.path, 24, f"has {file.header.size} bytes, the manifest says {point.size}")
    return file


def check_ground(chain: Chain, index: int) -> None:
    """What stands on that point can be restored, as far as files and their headers tell; no data is read.

    Raises ImageError, and OSError.
    """
    for point in chain.layers(index):
        with closing(open_file(chain, point)) as file:
            _check_header(file, point)
        chain.path(point.chunks).stat()


def _check_header(file: Qcow2File, point: Point) -> None:
    header = file.header
    if header.backing != (point.backing or ""):
        problem = f"has the backing file '{header.backing}', the manifest says '{point.backing}'"
        raise ImageError(file.path, 8, problem)
    # The refcount table is the last that is written
    if file.length() < header.table_offset + header.table_clusters * CLUSTER:
        raise ImageError(file.path, file.length(), "is cut off there")


def read_checked(file: Qcow2File, chunk: Chunk) -> bytes:
    """The bytes of a chunk of data. Raises ImageError where they are not what was backed up."""
    data = file.read(chunk.offset, chunk.length)
    if hashlib.sha256(data).hexdigest() != chunk.check:
        raise ImageError(file.path, -1, f"is damaged: {chunk.length} bytes at {chunk.offset} differ from their SHA-256")
    return data


def contents(chain: Chain, index: int) -> Iterator[Part]:
    """All of the disk at that point, in order. Raises ImageError for damage, and OSError."""
    layers = chain.layers(index)
    size = chain.points[index].size
    with ExitStack() as stack:
        opened = []
        for point in layers:
            opened.append(_Layer(chain, point))
            stack.callback(opened[-1].file.close)
        for start in range(0, size, WINDOW):
            yield from _window(opened, start, min(start + WINDOW, size))


def _window(layers: Sequence[_Layer], start: int, end: int) -> Iterator[Part]:
    owner = array("i", [-1]) * div_up(end - start, CLUSTER)
    claims: list[tuple[_Layer, Chunk]] = []
    for layer in layers:
        for chunk in layer.within(start, end):
            first = max(chunk.offset - start, 0) // CLUSTER
            stop = div_up(min(chunk.offset + chunk.length, end) - start, CLUSTER)
            owner[first:stop] = array("i", [len(claims)]) * (stop - first)
            claims.append((layer, chunk))
    at = 0
    while at < len(owner):
        claim = owner[at]
        stop = at + 1
        while stop < len(owner) and owner[stop] == claim:
            stop += 1
        offset = start + at * CLUSTER
        length = min(start + stop * CLUSTER, end) - offset
        yield Part(offset, length, _bytes(claims, claim, offset, length))
        at = stop


def _bytes(claims: Sequence[tuple[_Layer, Chunk]], claim: int, offset: int, length: int) -> bytes | None:
    if claim < 0:
        return None
    layer, chunk = claims[claim]
    if chunk.check == ZERO:
        return None
    data = layer.read(chunk)
    return data[offset - chunk.offset : offset - chunk.offset + length]


def restore(chain: Chain, index: int, target: Target, progress: ProgressCall) -> None:
    """Write the disk at that point into the target, which is finished, or abandoned with the error."""
    try:
        for part in contents(chain, index):
            if part.data is None:
                target.zero(part.offset, part.length)
            else:
                target.write(part.offset, memoryview(part.data))
            progress(part.length)
        target.finish()
    except BaseException:
        target.abandon()
        raise


def verify(chain: Chain, index: int, progress: ProgressCall) -> None:
    """Read all that the point's own file has, and see that it has nothing else: other readers know no list of chunks.

    Raises ImageError for the first damage, and OSError.
    """
    point = chain.points[index]
    chain.layers(index)
    with closing(open_file(chain, point)) as file:
        _check_header(file, point)
        file.check_first_cluster()
        done = 0
        for chunk in read_chunks(chain.path(point.chunks), point.chunks_sha256, point.size):
            file.check_nothing(done, chunk.offset)
            done = chunk.offset + chunk.length
            if chunk.check != ZERO:
                read_checked(file, chunk)
            elif not file.is_zero(chunk.offset, chunk.length):
                raise ImageError(file.path, -1, f"is damaged: {chunk.length} bytes at {chunk.offset} are not zeroes")
            progress(chunk.length)
        file.check_nothing(done, point.size)
