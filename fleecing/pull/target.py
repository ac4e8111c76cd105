"""Where a pull puts what it reads."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final, Protocol

from fleecing.block.hostfile import HostFile
from fleecing.block.node import Buffer
from fleecing.errors import ImageError
from fleecing.units import MiB

_ZEROES: Final = bytes(MiB)


class Target(Protocol):
    """Takes each byte of the disk once, in any order, from several threads; offsets and lengths in bytes.

    Errors are OSError. `finish` or `abandon` is the last call, made by one thread when all others are through.
    """

    def write(self, offset: int, data: Buffer) -> None:
        """The bytes at `offset` are `data`; kept when this returns, durable after `finish`."""

    def zero(self, offset: int, length: int) -> None:
        """The range reads as zeroes."""

    def finish(self) -> None:
        """All has been written: make it durable and give it its name."""

    def abandon(self) -> None:
        """Something failed: leave nothing behind that looks whole."""


class RawTarget:
    """A raw file or block device of exactly, or at least, the disk's size."""

    def __init__(self, path: str, file: HostFile, *, is_new: bool) -> None:
        self.path = path
        self._file = file
        self._is_new = is_new

    @classmethod
    def create(cls, path: str, size: int) -> RawTarget:
        """A new sparse file. It is called `path`.part until `finish`, so a half-made one never looks whole.

        Raises FileExistsError where either name is taken.
        """
        if os.path.lexists(path):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), path)
        file = HostFile.create(path + ".part")
        target = cls(path, file, is_new=True)
        try:
            with _naming(file.path):
                file.truncate(size)
        except OSError:
            target.abandon()
            raise
        return target

    @classmethod
    def overwrite(cls, path: str, size: int) -> RawTarget:
        """A file or device that is there; whatever it holds in its first `size` bytes is lost.

        Raises OSError, and ImageError where it is too small.
        """
        file = HostFile.open(path)
        length = file.length()
        if length < size:
            file.close()
            raise ImageError(path, -1, f"has {length} bytes, {size} are needed")
        return cls(path, file, is_new=False)

    def write(self, offset: int, data: Buffer) -> None:
        with _naming(self._file.path):
            self._file.write(offset, data)

    def zero(self, offset: int, length: int) -> None:
        """Nothing to do in a new file, which is all holes; else a hole, zeroes without writing, or written zeroes."""
        if self._is_new:
            return
        with _naming(self._file.path):
            if not (self._file.punch(offset, length) or self._file.zero_range(offset, length)):
                for done in range(0, length, len(_ZEROES)):
                    self._file.write(offset + done, _ZEROES[: length - done])

    def finish(self) -> None:
        with _naming(self._file.path):
            self._file.sync()
        self._file.close()
        if self._is_new:
            os.rename(self._file.path, self.path)
            _sync_folder(os.path.dirname(self.path) or ".")

    def abandon(self) -> None:
        self._file.close()
        if self._is_new and os.path.lexists(self._file.path):
            os.unlink(self._file.path)


@contextmanager
def _naming(path: str) -> Iterator[None]:
    """Errors of calls on a descriptor say which file it is."""
    try:
        yield
    except OSError as e:
        raise OSError(e.errno, e.strerror, path) from e


def _sync_folder(path: str) -> None:
    """A rename in this folder is durable when this returns."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
