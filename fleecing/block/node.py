"""A node of the block graph: a thing of `size` bytes that can be read and, if it allows, changed.

All calls are plain and synchronous, may be made from any thread, and have checked arguments: whoever stands at the
border has made sure that 0 <= offset, 0 < length and offset + length <= size. A call returns when it is done, or raises
OSError or a BlockError; a failed read may leave anything in the buffer.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

from fleecing.block.extent import MAX_RUNS, Runs

if TYPE_CHECKING:
    from fleecing.block.hostfile import HostFile

Buffer = bytes | bytearray | memoryview


class Node(ABC):
    """The calls that every node of the graph understands. Offsets and lengths are bytes."""

    size: int

    @abstractmethod
    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill the whole of `buffer` with the bytes at `offset`."""

    @property
    def never_waits(self) -> bool:
        """Whether `read_cached` keeps its word: the answer may change from True to False with the first read."""
        return False

    def read_cached(self, offset: int, buffer: memoryview) -> bool:
        """The same if that takes no waiting for a disk; else False, at once, and the buffer may hold anything."""
        self.read_into(offset, buffer)
        return True

    def copy_to(self, offset: int, length: int, target: HostFile, at: int) -> bool:
        """Copy the range to `at` of a file, in a way that is better than to read and to write; False: do that."""
        return False

    @abstractmethod
    def write(self, offset: int, data: Buffer) -> None:
        """Change the bytes at `offset`. Returns when a later read sees them; `flush` makes them durable."""

    @abstractmethod
    def write_zeroes(self, offset: int, length: int, *, may_unmap: bool = True, fast_only: bool = False) -> None:
        """Make the range read as zeroes. `fast_only`: raise OSError(EOPNOTSUPP) rather than write zeroes out."""

    @abstractmethod
    def discard(self, offset: int, length: int) -> None:
        """The range is not needed any more; a node that cannot free it does nothing."""

    @abstractmethod
    def flush(self) -> None:
        """Every change whose call has returned is durable when this returns."""

    @abstractmethod
    def block_status(self, offset: int, length: int, max_runs: int = MAX_RUNS) -> Runs:
        """Runs of `Allocation` from `offset` on: the whole range, less only where that takes more than `max_runs`."""

    def prefetch(self, offset: int, length: int) -> None:
        """The range will be read soon. A hint: doing nothing is right."""

    def read(self, offset: int, length: int) -> bytes:
        """The bytes of the range; for callers that are in no hurry."""
        buffer = bytearray(length)
        self.read_into(offset, memoryview(buffer))
        return bytes(buffer)
