"""An open file of the host: the only place where the block layer calls the operating system.

Every call takes bytes as (offset, ...), does the whole of what it was asked or raises OSError, releases the GIL while
the kernel works, and may be made from any thread. Tests put faults in by wrapping this class.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import stat
import struct
import threading
from typing import Self

from fleecing.block.node import Buffer
from fleecing.errors import ImageError

# linux/falloc.h
FALLOC_FL_KEEP_SIZE = 0x01
FALLOC_FL_PUNCH_HOLE = 0x02
FALLOC_FL_ZERO_RANGE = 0x10

# linux/fs.h: whether a block device is read-only, its size in bytes, and its logical sector size
BLKROGET = 0x125E
BLKGETSIZE64 = 0x80081272
BLKSSZGET = 0x1268

# linux/fs.h
SYNC_FILE_RANGE_WAIT_BEFORE = 1
SYNC_FILE_RANGE_WRITE = 2

# linux/fs.h, linux/fcntl.h
_RENAME_NOREPLACE = 1
_AT_FDCWD = -100

# linux/magic.h; the type is the first thing in struct statfs, a long, and the whole is below this size
_TMPFS = 0x01021994
_EXT4 = 0xEF53
_STATFS_BYTES = 256

# struct flock of fcntl(2): type, whence, start, length, process
_FLOCK = struct.Struct("@hhqqi4x")

_LOSSES = (errno.EIO, errno.ENOSPC, errno.EDQUOT)
"""What the system tells of data that it had taken and could not write."""

NO_LOCKS = (errno.EINVAL, errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
"""No open file description locks there at all: an old kernel (EINVAL, ENOSYS), a file system without (the others)."""

_UNSUPPORTED = (errno.EOPNOTSUPP, errno.ENOSYS, errno.ENODEV)

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
_libc.renameat2.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint]
_libc.sync_file_range.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]
# Keeps the interpreter's lock: it is over sooner than the lock is taken again. Arguments that are made once: a third
# of the call is making them. No file has a page at that offset, so there is nothing to wait for.
_sync_file_range = ctypes.PyDLL(None, use_errno=True).sync_file_range
_NO_PAGES = (ctypes.c_int64(1 << 60), ctypes.c_int64(1), ctypes.c_uint(SYNC_FILE_RANGE_WAIT_BEFORE))


class WritesLost(OSError):
    """The system could not bring to the disk what it had taken; reads may give what was there before."""


def _fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    while _libc.fallocate(fd, mode, offset, length):
        code = ctypes.get_errno()
        if code != errno.EINTR:
            raise OSError(code, os.strerror(code))


def rename_new(path: str, new: str) -> None:
    """Rename a file to a name that nobody has. Raises OSError, FileExistsError among others."""
    if not _libc.renameat2(_AT_FDCWD, os.fsencode(path), _AT_FDCWD, os.fsencode(new), _RENAME_NOREPLACE):
        return
    code = ctypes.get_errno()
    if code not in (errno.EINVAL, errno.ENOSYS):  # these: not on this file system, as NFS
        raise OSError(code, os.strerror(code), new if code == errno.EEXIST else path)
    if os.path.lexists(new):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), new)
    os.rename(path, new)


def _file_system(fd: int) -> int:
    """The number of its kind, or 0."""
    status = ctypes.create_string_buffer(_STATFS_BYTES)
    if _libc.fstatfs(fd, status):
        return 0
    kind: int = struct.unpack_from("@l", status)[0]
    return kind


class HostFile:
    """A regular file or block device, open for reading and, unless `writable` is off, for writing."""

    def __init__(self, path: str, fd: int) -> None:
        self.path = path
        self.fd = fd
        mode = os.fstat(fd).st_mode
        self.is_block_device = stat.S_ISBLK(mode)
        self.sector = struct.unpack("i", fcntl.ioctl(fd, BLKSSZGET, b"\0" * 4))[0] if self.is_block_device else 1
        self._no_wait = os.RWF_NOWAIT  # 0 where the file system does not know it
        kind = _file_system(fd)
        self._in_memory = kind == _TMPFS  # it knows no RWF_NOWAIT and needs none
        self.is_on_ext4 = kind == _EXT4 and not self.is_block_device
        self._taker = -1  # the same file with a position of its own, once it is needed; under the lock
        self._taker_lock = threading.Lock()
        self.takes_copies = True
        """Off where the system turned out to be unable to."""
        self._lost: int | None = None  # the errno; under the lock, since the system tells it once
        self._lost_lock = threading.Lock()

    @classmethod
    def open(cls, path: str, *, writable: bool = True) -> Self:
        """Open what is there. Raises OSError, and ImageError for what is neither a regular file nor a block device."""
        fd = os.open(path, (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC | os.O_NONBLOCK)
        mode = os.fstat(fd).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
            os.close(fd)
            raise ImageError(path, -1, "is neither a regular file nor a block device")
        os.set_blocking(fd, True)
        return cls(path, fd)

    @classmethod
    def create(cls, path: str) -> Self:
        """Make a new, empty file that only its owner may read. Raises FileExistsError where there is one already."""
        return cls(path, os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))

    def close(self) -> None:
        """Give the descriptor back; once is enough, twice does no harm."""
        self.takes_copies = False
        fd, self.fd = self.fd, -1
        taker, self._taker = self._taker, -1
        for open_fd in (fd, taker):
            if open_fd >= 0:
                os.close(open_fd)

    def length(self) -> int:
        """Bytes that the file or device has now."""
        if self.is_block_device:
            size: int = struct.unpack("Q", fcntl.ioctl(self.fd, BLKGETSIZE64, b"\0" * 8))[0]
            return size
        return os.fstat(self.fd).st_size

    def is_read_only_device(self) -> bool:
        """A block device that no write changes, although it could be opened for writing."""
        return self.is_block_device and fcntl.ioctl(self.fd, BLKROGET, b"\0" * 4) != b"\0" * 4

    def allocated(self) -> int:
        """Bytes of disk space that the file takes (st_blocks)."""
        return os.fstat(self.fd).st_blocks * 512

    def read_into(self, offset: int, buffer: memoryview) -> int:
        """Fill `buffer`; returns the bytes read, fewer only where the file ends."""
        done = os.preadv(self.fd, (buffer,), offset)
        want = len(buffer)
        while done < want:
            n = os.preadv(self.fd, (buffer[done:],), offset + done)
            if not n:
                break
            done += n
        return done

    @property
    def never_waits(self) -> bool:
        """Whether `read_cached` waits for no disk, as far as is known: the first one tells."""
        return bool(self._no_wait) or self._in_memory

    def read_cached(self, offset: int, buffer: memoryview) -> bool:
        """Fill `buffer` if that takes no waiting for the disk; False where it would (or where the file ends)."""
        try:
            return os.preadv(self.fd, (buffer,), offset, self._no_wait) == len(buffer)
        except BlockingIOError:
            return False
        except OSError as e:
            if e.errno not in _UNSUPPORTED or not self._no_wait:
                raise
        self._no_wait = 0  # asking again and again would cost tmpfs and NFS 0.8 us a read
        return self.read_into(offset, buffer) == len(buffer)

    def check_written(self) -> None:
        """Raise WritesLost where writing to the disk has failed since the file was opened; from then on each time.

        The system forgets pages that it could not write as it forgets others, and tells it once to those who ask. So
        who must not read what was there before asks behind each read. That takes 0.7 us and waits for no disk: the
        range has no pages.
        """
        with self._lost_lock:
            if self._lost is None and _sync_file_range(self.fd, *_NO_PAGES):
                code = ctypes.get_errno()
                if code in _LOSSES:  # others: the system does not know the call
                    self._lost = code
            if self._lost is not None:
                raise WritesLost(self._lost, os.strerror(self._lost))

    def write(self, offset: int, data: Buffer) -> None:
        """Write all of `data`."""
        done = os.pwrite(self.fd, data, offset)
        if done < len(data):
            rest = memoryview(data)
            while done < len(rest):
                done += os.pwrite(self.fd, rest[done:], offset + done)

    def copy_to(self, offset: int, length: int, target: HostFile, at: int) -> bool:
        """Copy bytes to `at` of another file within the kernel, a third faster than to read and to write them.

        They are copied when this returns, for a file's write takes them out of the pages (a socket's would keep the
        pages): a later change here does not show there. False where it was not done, or in
        part: whoever calls reads and writes instead, and meets the error, if there was one, where it comes from.
        """
        return target.take_copy(self.fd, offset, length, at)

    def take_copy(self, fd: int, offset: int, length: int, at: int) -> bool:
        """The other half of `copy_to`. One at a time: it has to go by the position of a descriptor."""
        if not self.takes_copies or not self._taker_lock.acquire(blocking=False):
            return False
        try:
            if self._taker < 0:
                self._taker = os.open(f"/proc/self/fd/{self.fd}", os.O_WRONLY | os.O_CLOEXEC)
            os.lseek(self._taker, at, os.SEEK_SET)
            while length:
                done = os.sendfile(self._taker, fd, offset, length)
                if not done:
                    return False
                offset += done
                length -= done
        except OSError as e:
            if e.errno not in _LOSSES:
                self.takes_copies = False
            return False
        finally:
            self._taker_lock.release()
        return True

    def punch(self, offset: int, length: int) -> bool:
        """Free the space of the range, which reads as zeroes then. False where the file system cannot."""
        return self._change(FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, length)

    def zero_range(self, offset: int, length: int) -> bool:
        """Make the range read as zeroes and keep its space. False where the file system cannot."""
        return self._change(FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE, offset, length)

    def _change(self, mode: int, offset: int, length: int) -> bool:
        try:
            _fallocate(self.fd, mode, offset, length)
        except OSError as e:
            if e.errno in _UNSUPPORTED:
                return False
            raise
        return True

    def truncate(self, length: int) -> None:
        """Set the file's length; what is cut off frees its space."""
        os.ftruncate(self.fd, length)

    def sync(self) -> None:
        """Every write that has returned is durable when this returns."""
        os.fdatasync(self.fd)

    def reserve(self, offset: int, length: int) -> bool:
        """Give the range its space, with the bytes that it has; False where the file system cannot. Raises OSError."""
        try:
            _fallocate(self.fd, FALLOC_FL_KEEP_SIZE, offset, length)
        except OSError as e:
            if e.errno in _UNSUPPORTED:
                return False
            raise
        return True

    def start_write_out(self, offset: int, length: int) -> None:
        """Ask the system to send what is written there to the disk now. That it cannot is no error: `sync` can."""
        _libc.sync_file_range(self.fd, offset, length, SYNC_FILE_RANGE_WRITE)

    def wait_for_write_out(self, offset: int, length: int) -> None:
        """Wait until what is on its way is on the disk.

        Raises WritesLost where writing has failed since the file was opened; this file's `sync` does not tell it then.
        """
        if _libc.sync_file_range(self.fd, offset, length, SYNC_FILE_RANGE_WAIT_BEFORE):
            code = ctypes.get_errno()
            if code in _LOSSES:  # others: the system does not know the call
                raise WritesLost(code, os.strerror(code))

    def forget(self, offset: int, length: int) -> None:
        """Have the system drop from memory what the disk has of the range, if it will; of length 0: of all behind."""
        with contextlib.suppress(OSError):
            os.posix_fadvise(self.fd, offset, length, os.POSIX_FADV_DONTNEED)

    def hold_alone(self) -> bool:
        """Lock the file against everybody else who does the same, until the descriptor is closed; False: somebody has.

        True as well where there are no such locks. Raises OSError.
        """
        try:
            fcntl.fcntl(self.fd, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0))
        except OSError as e:
            if e.errno in (errno.EAGAIN, errno.EACCES):
                return False
            if e.errno not in NO_LOCKS:
                raise
        return True

    def hold_byte(self, offset: int) -> None:
        """Lock one byte, shared with others who do the same, until the descriptor is closed.

        Raises OSError where that is not to be had, and BlockingIOError where somebody has it for himself.
        """
        fcntl.fcntl(self.fd, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_RDLCK, os.SEEK_SET, offset, 1, 0))

    def is_byte_held(self, offset: int) -> bool:
        """Whether somebody else has locked it, shared or not. Raises OSError."""
        wanted = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, offset, 1, 0)
        kind: int = _FLOCK.unpack(fcntl.fcntl(self.fd, fcntl.F_OFD_GETLK, wanted))[0]
        return kind != fcntl.F_UNLCK

    def will_need(self, offset: int, length: int) -> None:
        """Ask the kernel to read ahead."""
        os.posix_fadvise(self.fd, offset, length, os.POSIX_FADV_WILLNEED)
