"""Memory of a client on the same host, in which its READs are answered (docs/shared-memory.md).

    the client     memfd, all of it allocated, sealed against shrinking -- SCM_RIGHTS -->  ClientMemory.recv_into
                   READ, PAYLOAD_LEN, effect length 0                   ------------->     attach
                   READ, PAYLOAD_LEN, effect length, position           ------------->     part

The memory is the client's, and is accounted to it: what is not allocated is refused, and once attached it cannot be
given back to the system behind our back, which would have the server allocate it anew when it reads into it. It cannot
become shorter either, so no access can fail. What the client does with its contents is its own affair: they are written
here, and never looked at.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import socket
from array import array
from contextlib import suppress
from typing import Final

from fleecing.errors import RequestError
from fleecing.nbd.constants import NbdError
from fleecing.server.budget import Budget
from fleecing.units import MiB

MOST: Final = 64 * MiB
"""Bytes of a client's memory."""

MEMORIES: Final = 64
"""Of all clients together. Each takes a descriptor beside that of its connection, as long as that lasts."""

_F_ADD_SEALS: Final = 1033
_F_GET_SEALS: Final = 1034
_F_SEAL_SEAL: Final = 0x1
_F_SEAL_SHRINK: Final = 0x2
_F_SEAL_GROW: Final = 0x4
_F_SEAL_FUTURE_WRITE: Final = 0x10
"""linux/fcntl.h; a Python that was built on an old system has no names for these."""

_ONE_DESCRIPTOR: Final = socket.CMSG_LEN(array("i").itemsize)
"""Bytes of ancillary data: the system closes what is more."""

_BLOCK: Final = 512
"""Bytes that `st_blocks` counts in."""


class ClientMemory:
    """For the connection's thread alone."""

    def __init__(self, sock: socket.socket, memories: Budget) -> None:
        """`memories`: how many there may be yet, of all clients."""
        self._sock = sock
        self._memories = memories
        self._fd: int | None = None
        self._is_counted = False
        self._map: mmap.mmap | None = None
        self._view = memoryview(b"")

    def recv_into(self, view: memoryview) -> int:
        """As of the socket. The first descriptor that comes is kept until `attach`; all others the system closes."""
        if self._is_counted:
            return self._sock.recv_into(view)
        count, ancillary, *_ = self._sock.recvmsg_into([view], _ONE_DESCRIPTOR, socket.MSG_CMSG_CLOEXEC)
        for level, kind, data in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                self._keep(*array("i", data))
        return count

    def _keep(self, fd: int) -> None:
        self._is_counted = self._memories.take(1, 0)
        if self._is_counted:
            self._fd = fd
        else:
            os.close(fd)

    def attach(self) -> None:
        """Have the memory whose descriptor has come. Raises RequestError where there is none, or it is of no use."""
        if self._map is not None:
            raise RequestError(NbdError.EINVAL, "this connection has its shared memory already")
        if self._fd is None:
            raise RequestError(
                NbdError.EINVAL, f"no descriptor has come of memory to be shared, or {MEMORIES} are shared already"
            )
        fd, self._fd = self._fd, None
        try:
            self._map = _mapped(fd)
        except (OSError, ValueError) as e:
            raise RequestError(NbdError.EINVAL, f"the memory to be shared is of no use: {e}") from e
        finally:
            os.close(fd)
        self._view = memoryview(self._map)

    def part(self, position: int, length: int) -> memoryview:
        """Where a READ of `length` bytes goes. Raises RequestError."""
        if position + length > len(self._view):
            raise RequestError(
                NbdError.EINVAL, f"{length} bytes at {position} are not within {len(self._view)} bytes of shared memory"
            )
        return self._view[position : position + length]

    def close(self) -> None:
        """The connection is over. Once is enough, twice does no harm."""
        if self._is_counted:
            self._memories.give_back(1)
            self._is_counted = False
        self._view = memoryview(b"")
        if self._map is not None:
            with suppress(BufferError):  # an error's traceback has a part of it: it goes with that
                self._map.close()
        fd, self._fd = self._fd, None
        if fd is not None:
            os.close(fd)


def _mapped(fd: int) -> mmap.mmap:
    """Raises OSError, and ValueError with what is wrong with it."""
    if not fcntl.fcntl(fd, _F_GET_SEALS) & _F_SEAL_SHRINK:
        raise ValueError("it is not sealed against shrinking")
    size = os.fstat(fd).st_size
    if not 0 < size <= MOST:
        raise ValueError(f"it has {size} bytes, 1 to {MOST} are possible")
    mapped = mmap.mmap(fd, size)
    try:
        # Maps that are there stay writable; but nobody can punch a hole any more, or shrink it, or take the seals away
        fcntl.fcntl(fd, _F_ADD_SEALS, _F_SEAL_FUTURE_WRITE | _F_SEAL_GROW | _F_SEAL_SEAL)
        os.ftruncate(fd, size)  # blocks behind the end would be counted as well: they go, and cannot come back
        if os.fstat(fd).st_blocks * _BLOCK < size:
            raise ValueError("it is not allocated in full")
    except BaseException:
        mapped.close()
        raise
    return mapped
