"""The active image: a raw file or a block device of the host, as a node.

Its size is taken at opening and never changes: a file that somebody shrinks under us is an error on the reads that
notice, and `check_size` tells it in advance.
"""

from __future__ import annotations

import errno
import fcntl
import os
from typing import Self

from fleecing.block.extent import MAX_RUNS, Allocation, Runs, append_run
from fleecing.block.hostfile import HostFile
from fleecing.block.image_lock import lock_image
from fleecing.block.node import Buffer, Node
from fleecing.errors import ImageError
from fleecing.units import MiB, align_down, align_up

_ZEROES = bytes(MiB)


class FileNode(Node):
    """Reads and writes an image that nobody else serves: it holds the file's lock as long as it is open."""

    def __init__(self, host: HostFile) -> None:
        self.host = host
        self.path = os.path.realpath(host.path)
        self.size = host.length()
        self._knows_holes = not host.is_block_device
        # A run of data, found by `block_status`. What became a hole since is told as data, which is no lie; what was
        # a hole is never told as one without a look.
        self._data_run = (0, 0)
        self._holes_made = 0

    @classmethod
    def open(cls, path: str, *, image_lock: bool = True) -> Self:
        """Open and lock the image: against another server always, and against QEMU's programs by `image_lock`.

        Raises OSError, or ImageError where it is empty, no image, or in use.
        """
        host = HostFile.open(path)
        try:
            try:
                fcntl.flock(host.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ImageError(path, -1, "is locked: another server has this image open") from None
            if image_lock:
                lock_image(host)
            if not host.length():
                raise ImageError(path, -1, "is empty: an image needs a size, as `truncate -s 10G FILE` gives it")
            return cls(host)
        except BaseException:
            host.close()
            raise

    def close(self) -> None:
        """Give the image and its lock back."""
        self.host.close()

    def check_size(self) -> None:
        """Raise ImageError where the image was grown or shrunk since it was opened."""
        now = self.host.length()
        if now != self.size:
            change = "grown" if now > self.size else "shrunk"
            raise ImageError(
                self.path, -1, f"has {change} from {self.size} to {now} bytes since it was opened: restart the server"
            )

    def read_into(self, offset: int, buffer: memoryview) -> None:
        if self.host.read_into(offset, buffer) != len(buffer):
            self.check_size()
            raise ImageError(self.path, offset, "ends before the bytes asked for")

    def read_cached(self, offset: int, buffer: memoryview) -> bool:
        return self.host.read_cached(offset, buffer)

    def copy_to(self, offset: int, length: int, target: HostFile, at: int) -> bool:
        return self.host.copy_to(offset, length, target, at)

    def write(self, offset: int, data: Buffer) -> None:
        self.host.write(offset, data)

    def write_zeroes(self, offset: int, length: int, *, may_unmap: bool = True, fast_only: bool = False) -> None:
        """Punch or convert the range where the file system can; write zeroes out only where it cannot.

        A block device takes whole sectors; the bytes beside them are written.
        """
        start, end = align_up(offset, self.host.sector), align_down(offset + length, self.host.sector)
        if start < end and not self._zero_fast(start, end - start, may_unmap=may_unmap):
            if fast_only:
                raise OSError(errno.EOPNOTSUPP, "zeroing is not faster than writing here")
            self._write_out_zeroes(start, end - start)
        if start > end:
            start = end = offset + length
        self._write_out_zeroes(offset, start - offset)
        self._write_out_zeroes(end, offset + length - end)

    def _zero_fast(self, offset: int, length: int, *, may_unmap: bool) -> bool:
        try:
            return (may_unmap and self.host.punch(offset, length)) or self.host.zero_range(offset, length)
        finally:
            self._forget_data()

    def _write_out_zeroes(self, offset: int, length: int) -> None:
        end = offset + length
        while offset < end:
            n = min(end - offset, len(_ZEROES))
            self.host.write(offset, memoryview(_ZEROES)[:n])
            offset += n

    def discard(self, offset: int, length: int) -> None:
        """Punch the range, rounded inwards to what the device can free; the rest of it stays as it is."""
        start, end = align_up(offset, self.host.sector), align_down(offset + length, self.host.sector)
        if start < end:
            try:
                self.host.punch(start, end - start)
            finally:
                self._forget_data()

    def _forget_data(self) -> None:
        self._holes_made += 1
        self._data_run = (0, 0)

    def flush(self) -> None:
        self.host.sync()

    def prefetch(self, offset: int, length: int) -> None:
        self.host.will_need(offset, length)

    def block_status(self, offset: int, length: int, max_runs: int = MAX_RUNS) -> Runs:
        """Holes of the file (SEEK_HOLE, SEEK_DATA); a block device is all data.

        The last run of data is remembered: tmpfs, and others for space that is only reserved, look for its end page by
        page. A snapshot with every other cluster copied asks for each of the clusters in between, of one and the same
        run; of 1 GiB that took 10 ms each time, and minutes in all.
        """
        if not self._knows_holes:
            return [(length, Allocation.DATA)]
        runs: Runs = []
        end = offset + length
        # In line, with plain numbers and the system's own call: an image may have a million runs.
        fd, seek, seek_data, seek_hole, append = self.host.fd, os.lseek, os.SEEK_DATA, os.SEEK_HOLE, runs.append
        hole_zero, plain_data = int(Allocation.HOLE_ZERO), int(Allocation.DATA)
        holes_made = self._holes_made
        start, stop = self._data_run
        if start <= offset < stop:
            append((stop - offset, plain_data))
            offset = stop
        start = stop = 0
        try:
            while offset < end and len(runs) < max_runs:
                data = seek(fd, offset, seek_data)
                if data > offset:
                    append((data - offset, hole_zero))
                    offset = data
                    if offset >= end or len(runs) == max_runs:
                        break
                elif runs:  # behind data that was known, or written since the look above: it is one run
                    length, _ = runs.pop()
                    offset -= length
                hole = seek(fd, offset, seek_hole)
                if hole > offset:
                    append((hole - offset, plain_data))
                    start = offset
                    offset = stop = hole
                elif runs:  # a hole punched since the look above: it and the one before it are one run
                    length, _ = runs.pop()
                    offset -= length
        except OSError as e:
            append_run(runs, end - offset, self._status_after(e))
        if offset > end:
            length, state = runs.pop()
            append((length - (offset - end), state))
        if stop and holes_made == self._holes_made:
            self._data_run = (start, stop)
        return runs

    def _status_after(self, error: OSError) -> Allocation:
        """What the rest is where SEEK_DATA found nothing to tell. Raises the error where that is no answer."""
        if error.errno == errno.ENXIO:  # no data behind this offset, or no file
            self.check_size()
            return Allocation.HOLE_ZERO
        if error.errno == errno.EINVAL:  # a file system that knows no holes
            self._knows_holes = False
            return Allocation.DATA
        raise error
