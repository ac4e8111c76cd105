"""Helper program: reads a whole export through libnbd, and trims behind the read head, as a backup tool would.

    trim_pull.py URI --trim|--no-trim MB/S

MB/S 0 = as fast as it goes. Prints JSON: when it began and ended (seconds since the epoch) and the bytes. Runs in
Debian's own Python, for which the package python3-libnbd is made.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from typing import Any

PIECE = 256 * 1024
DEPTH = 16


def pull(nbd: Any, handle: Any, *, trim: bool, rate: float) -> int:
    """Keep DEPTH requests in flight; returns the bytes read."""
    size = handle.get_size()
    free = [nbd.Buffer(PIECE) for _ in range(DEPTH)]
    reading: dict[int, tuple[int, int, Any]] = {}
    position = under_way = 0
    start = time.monotonic()
    while position < size or under_way:
        while free and position < size and not _ahead(position, start, rate):
            length = min(PIECE, size - position)
            buffer = free.pop() if length == PIECE else nbd.Buffer(length)
            reading[handle.aio_pread(buffer, position)] = position, length, buffer
            position += length
            under_way += 1
        if not under_way:
            time.sleep(0.001)  # ahead of the rate
            continue
        if handle.aio_in_flight():
            handle.poll(-1)
        while under_way and (cookie := handle.aio_peek_command_completed()) > 0:
            handle.aio_command_completed(cookie)
            under_way -= 1
            if cookie in reading:
                offset, length, buffer = reading.pop(cookie)
                free.append(buffer)
                if trim:
                    handle.aio_trim(length, offset)
                    under_way += 1
    return int(size)


def _ahead(position: int, start: float, rate: float) -> bool:
    return bool(rate) and position > (time.monotonic() - start) * rate


def main() -> None:
    """See above."""
    uri, mode, rate = sys.argv[1:]
    nbd = importlib.import_module("nbd")
    handle = nbd.NBD()
    handle.connect_uri(uri)
    began = time.time()
    size = pull(nbd, handle, trim=mode == "--trim", rate=float(rate) * 1e6)
    report = {"began": began, "ended": time.time(), "bytes": size}
    handle.shutdown()
    sys.stdout.write(json.dumps(report) + "\n")


if __name__ == "__main__":
    main()
