"""Helper program: locks the pages of the files named in memory until its standard input ends.

Says "locked", or "not locked: REASON" (the benchmark goes on then).
"""

from __future__ import annotations

import ctypes
import mmap
import os
import resource
import sys

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64]
_libc.mlock.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


def lock(path: str) -> None:
    """Map the file and lock it. Raises OSError where that is not allowed."""
    fd = os.open(path, os.O_RDONLY)
    size = os.fstat(fd).st_size
    address = _libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, fd, 0)
    if address == ctypes.c_void_p(-1).value or _libc.mlock(address, size):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def main() -> None:
    """Lock, say so, wait."""
    try:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    except (OSError, ValueError):
        pass  # the limit that there is may be enough
    answer = "locked"
    try:
        for path in sys.argv[1:]:
            lock(path)
    except OSError as e:
        answer = f"not locked: {e.strerror}"
    sys.stdout.write(answer + "\n")
    sys.stdout.flush()
    sys.stdin.read()


if __name__ == "__main__":
    main()
