"""A pull into a pipe: in order, whatever order the answers come in."""

from __future__ import annotations

import errno
import fcntl
import os
import select
import stat
from threading import Lock
from typing import Final

from fleecing.errors import BlockError
from fleecing.pull.target import Target
from fleecing.units import MiB

WINDOW: Final = 32 * MiB
"""Pieces may begin this many bytes ahead of the first one that is missing: that bounds what is held."""

_ZEROES: Final = memoryview(bytes(MiB))
_WAIT_MS: Final = 500


class StreamTarget(Target):
    """Writes to the descriptor `fd`. What comes early is held in memory; zeroes are held as a length only."""

    needs_all = True

    def __init__(self, fd: int, size: int, name: str = "standard output") -> None:
        """Raises OSError where nothing can be written there."""
        if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF), name)
        self._name = name
        self._size = size
        self._fd = _without_waiting(fd)
        self._lock = Lock()
        self._position = 0
        self._held: dict[int, bytes | int] = {}
        self._cancelled = False

    def limit(self) -> int:
        return self._position + WINDOW

    def write(self, offset: int, data: memoryview) -> None:
        with self._lock:
            if offset == self._position:
                self._put(data)
                self._put_held()
            else:
                self._held[offset] = bytes(data)

    def zero(self, offset: int, length: int) -> None:
        with self._lock:
            self._held[offset] = length
            self._put_held()

    def _put_held(self) -> None:
        while (piece := self._held.pop(self._position, None)) is not None:
            if isinstance(piece, bytes):
                self._put(memoryview(piece))
                continue
            for done in range(0, piece, len(_ZEROES)):
                self._put(_ZEROES[: piece - done])

    def _put(self, data: memoryview) -> None:
        length = len(data)
        while data:
            if self._cancelled:
                raise BlockError(f"{self._name}: the pull was stopped")
            try:
                data = data[os.write(self._fd, data) :]
            except BlockingIOError:
                poll = select.poll()
                poll.register(self._fd, select.POLLOUT)
                poll.poll(_WAIT_MS)
            except BrokenPipeError:
                raise BlockError(f"{self._name}: whoever reads it has hung up before the end") from None
            except OSError as e:
                raise OSError(e.errno, e.strerror, self._name) from e
        self._position += length

    def cancel(self) -> None:
        self._cancelled = True

    def finish(self) -> None:
        if self._position != self._size:
            raise BlockError(f"{self._name}: only {self._position} of {self._size} bytes were written")
        os.close(self._fd)

    def abandon(self) -> None:
        """Who reads sees a short stream; only the exit code tells it from a whole one."""
        os.close(self._fd)


def _without_waiting(fd: int) -> int:
    """A descriptor of our own for the same thing; for a pipe one that never blocks, without changing the one given."""
    if stat.S_ISFIFO(os.fstat(fd).st_mode):
        try:
            return os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:  # no /proc, or a pipe of another user: then a write that waits cannot be cut short
            return os.dup(fd)
    return os.dup(fd)
