"""Buffers that the server reads into, in memory that both ends have (docs/shared-memory.md).

What the server read is there when its reply has come: it does not go through a socket, where it would be copied twice.
The memory is ours: allocated in full here, so that a reader costs the server nothing, and sealed against shrinking, so
that no access of the server can fail. We never write to it.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
from typing import Final

_F_ADD_SEALS: Final = 1033
_F_SEAL_SHRINK: Final = 0x2
"""linux/fcntl.h; a Python that was built on an old system has no names for these."""


class SharedMemory:
    """`count` equal buffers of `length` bytes. `fd` is for the server, and is closed as soon as it has it."""

    def __init__(self, count: int, length: int) -> None:
        """Raises OSError where the system has no such memory."""
        self.length = length
        if not hasattr(os, "memfd_create"):  # a Python that was built on an old system
            raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
        self.fd = os.memfd_create("fleecing pull", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.posix_fallocate(self.fd, 0, count * length)
            fcntl.fcntl(self.fd, _F_ADD_SEALS, _F_SEAL_SHRINK)
            self._map = mmap.mmap(self.fd, count * length, prot=mmap.PROT_READ)
        except BaseException:
            os.close(self.fd)
            raise
        self._view = memoryview(self._map)
        self._free = list(range(0, count * length, length))

    def close_fd(self) -> None:
        """The server has it, or never will."""
        os.close(self.fd)

    def close(self) -> None:
        """Before any of its buffers was used. Memory that was goes with the last of them."""
        self._view.release()
        self._map.close()

    def take(self) -> int | None:
        """The position of a buffer that is the caller's from now on: the one that was given back last."""
        return self._free.pop() if self._free else None

    def give_back(self, position: int) -> None:
        """Nobody uses the buffer any more."""
        self._free.append(position)

    def view(self, position: int, length: int) -> memoryview:
        """The first `length` bytes of the buffer."""
        return self._view[position : position + length]
