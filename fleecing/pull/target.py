"""Where a pull puts what it reads: the call, and the raw file or device."""

from __future__ import annotations

import errno
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from fleecing.block.hostfile import HostFile, rename_new
from fleecing.block.image_lock import lock_image
from fleecing.errors import ImageError
from fleecing.pull.write_behind import WriteBehind
from fleecing.units import KiB, MiB

PART: Final = ".part"
"""Behind the name of a file that is not whole yet."""

_ZEROES: Final = bytes(MiB)
_UNIT: Final = 64 * KiB


class Target(ABC):
    """Takes each byte of the disk once, in any order, from several threads; offsets and lengths in bytes.

    Errors are OSError. `finish`, `abandon` or `suspend` is the last call, made by one thread when all others are
    through. Pieces begin at multiples of `granularity`, and end there or with the disk.
    """

    granularity: int = 1
    needs_all: bool = False
    """Every byte has to come: an increment cannot go there."""
    waits: bool = True
    """`sync` and `finish` wait until the target's disk has it all; without, the loss of power may cost the copy."""

    @property
    def has_lost(self) -> bool:
        """What was kept since the last `sync` may be gone, although it can still be read."""
        return False

    is_half_written: bool = False
    """Something that was there before is written over in part."""

    @abstractmethod
    def write(self, offset: int, data: memoryview) -> None:
        """The bytes at `offset` are `data`; kept when this returns, durable after `sync` and `finish`."""

    @abstractmethod
    def zero(self, offset: int, length: int) -> None:
        """The range reads as zeroes."""

    def read(self, offset: int, length: int) -> bytes:
        """What was written there, possibly by an earlier run; for targets that can be resumed."""
        raise OSError(errno.ENOTSUP, "this target cannot be read")

    def limit(self) -> int | None:
        """Pieces at this offset and behind have to wait; None: none has to. Grows with what is written."""
        return None

    def cancel(self) -> None:
        """The pull has failed: calls that other threads wait in must come back, with an error. From any thread."""

    def sync(self) -> None:
        """What was written before this call is durable when it returns."""

    def finish(self) -> None:
        """All has been written: make it durable and give it its name."""

    def abandon(self) -> None:
        """Something failed: leave nothing behind that looks whole."""

    def look_again(self) -> None:
        """Have `read` give what the disk has, not what is in memory. Raises OSError."""

    def suspend(self) -> None:
        """Something failed, and another run will go on: keep what there is, under a name that does not look whole."""
        self.abandon()


class RawTarget(Target):
    """A raw file or block device of exactly, or at least, the disk's size."""

    def __init__(self, path: str, file: HostFile, *, is_new: bool) -> None:
        self.path = path
        self._file = file
        self._data = WriteBehind(file)
        self._is_new = is_new

    @classmethod
    def create(cls, path: str, size: int) -> RawTarget:
        """A new sparse file. It is called `path`.part until `finish`, so a half-made one never looks whole.

        Raises FileExistsError where either name is taken.
        """
        target = cls(path, new_part(path), is_new=True)
        try:
            with naming(target._file.path):
                target._file.truncate(size)
        except OSError:
            target.abandon()
            raise
        return target

    @classmethod
    def resume(cls, path: str, size: int) -> RawTarget:
        """What an earlier run left as `path`.part. Raises OSError, and ImageError where it has another size."""
        file = HostFile.open(path + PART)
        if file.length() != size:
            file.close()
            raise ImageError(path + PART, -1, f"has another size than {size} bytes: remove it and start again")
        return cls(path, file, is_new=True)

    @classmethod
    def overwrite(cls, path: str, size: int) -> RawTarget:
        """A file or device that is there; whatever it holds in its first `size` bytes is lost.

        Raises OSError, and ImageError where it is too small or read-only, or a machine or a server has it open.
        """
        file = HostFile.open(path)
        try:
            length = file.length()
            if length < size:
                raise ImageError(path, -1, f"has {length} bytes, {size} are needed")
            if file.is_read_only_device():
                raise ImageError(path, -1, "is read-only")
            lock_image(file)
        except BaseException:
            file.close()
            raise
        return cls(path, file, is_new=False)

    def write(self, offset: int, data: memoryview) -> None:
        """Zeroes among the data stay holes."""
        self.is_half_written = not self._is_new
        for start, end, is_zero in zero_runs(data):
            if is_zero:
                self.zero(offset + start, end - start)
                continue
            try:
                self._data.write(offset + start, data[start:end], waits=self.waits)
            except OSError as e:
                raise named(e, self._file.path) from e

    def zero(self, offset: int, length: int) -> None:
        """Nothing to do in a new file, which is all holes; else a hole, zeroes without writing, or written zeroes."""
        if self._is_new:
            return
        self.is_half_written = True
        with naming(self._file.path):
            if not (self._file.punch(offset, length) or self._file.zero_range(offset, length)):
                for done in range(0, length, len(_ZEROES)):
                    self._file.write(offset + done, _ZEROES[: length - done])

    def read(self, offset: int, length: int) -> bytes:
        with naming(self._file.path):
            return os.pread(self._file.fd, length, offset)

    def look_again(self) -> None:
        with naming(self._file.path):
            self._data.look_again(waits=self.waits)

    def sync(self) -> None:
        with naming(self._file.path):
            self._data.sync(waits=self.waits)

    def finish(self) -> None:
        self.sync()
        self.is_half_written = False
        if self._is_new:
            give_name(self.path, durably=self.waits)
        self._close()

    def abandon(self) -> None:
        self._close()
        if self._is_new:
            remove_part(self.path)

    @property
    def has_lost(self) -> bool:
        return self._data.has_lost

    def suspend(self) -> None:
        self._close()

    def _close(self) -> None:
        self._data.close()
        self._file.close()


def zero_runs(data: memoryview, unit: int = _UNIT) -> Iterator[tuple[int, int, bool]]:
    """(start, end, all zeroes) of the runs of units of `data`, equal neighbours as one."""
    start, was_zero = 0, False
    length = len(data)
    if length and 0 not in data[::unit].tobytes():  # a byte of each tells most data from zeroes
        yield 0, length, False
        return
    for at in range(0, length, unit):
        end = min(at + unit, length)
        # Three bytes tell most data from zeroes without a look at the rest
        is_zero = not (data[at] or data[end - 1] or data[(at + end) // 2]) and _is_zero(data[at:end])
        if is_zero != was_zero:
            if at > start:
                yield start, at, was_zero
            start, was_zero = at, is_zero
    if length > start:
        yield start, length, was_zero


def _is_zero(data: memoryview) -> bool:
    return data.tobytes() == _ZEROES[: len(data)] if len(data) <= len(_ZEROES) else not any(data)


def new_part(path: str) -> HostFile:
    """A new file called `path`.part. Raises FileExistsError where either name is taken."""
    if os.path.lexists(path):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), path)
    return HostFile.create(path + PART)


def remove_part(path: str) -> None:
    """Remove `path`.part; once is enough, twice does no harm."""
    if os.path.lexists(path + PART):
        os.unlink(path + PART)


def give_name(path: str, *, durably: bool = True) -> None:
    """`path`.part, which is durable, is `path` from now on, durably. Raises FileExistsError where there is one now."""
    rename_new(path + PART, path)
    if durably:
        sync_folder(os.path.dirname(path) or ".")


@contextmanager
def naming(path: str) -> Iterator[None]:
    """Errors of calls on a descriptor say which file it is."""
    try:
        yield
    except OSError as e:
        raise named(e, path) from e


def named(error: OSError, path: str) -> OSError:
    """The same, of this file."""
    return OSError(error.errno, error.strerror, error.filename or path)


def sync_folder(path: str) -> None:
    """A rename in this folder is durable when this returns."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
