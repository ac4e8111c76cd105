"""What a server takes of its machine, and whether that comes back to where it was.

Sampled at rest: no client and no snapshot. Memory (resident bytes), file descriptors and threads are those of the
process; bytes and files are those of the state folder, temp files included.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from fleecing.units import KiB, MiB, format_size

MEMORY_SHARE, MEMORY_EXTRA = 0.15, 32 * MiB
"""The resident memory of a process may end so much above that of its first rest: allocators keep what they had, and
each thread that copies for guests takes a MiB at its first copy, some twenty in all."""

THREADS_EXTRA = 6
"""The event loop's executor starts threads as calls come at once, six on two processors, and keeps them."""


@dataclass(frozen=True)
class Sample:
    """One look. `memory` and `disk` in bytes."""

    memory: int
    descriptors: int
    threads: int
    disk: int
    files: int

    def __str__(self) -> str:
        return (
            f"memory {format_size(self.memory)}, {self.descriptors} descriptors, {self.threads} threads, "
            f"state folder {format_size(self.disk)} in {self.files} files"
        )


def look(pid: int, state: Path) -> Sample:
    """The process and its state folder now."""
    proc = Path("/proc") / str(pid)
    resident = re.search(r"^VmRSS:\s+(\d+) kB$", (proc / "status").read_text(), re.MULTILINE)
    assert resident is not None
    kept = [path.lstat() for path in state.rglob("*") if not path.is_dir()]
    return Sample(
        memory=int(resident.group(1)) * KiB,
        descriptors=len(os.listdir(proc / "fd")),
        threads=len(os.listdir(proc / "task")),
        disk=sum(status.st_blocks * 512 for status in kept),
        files=len(kept),
    )


def grown(first: Sample, now: Sample) -> list[str]:
    """What is above the level of `first` by more than its tolerance, a sentence each."""
    allowed = {
        "memory": int(first.memory * (1 + MEMORY_SHARE)) + MEMORY_EXTRA,
        "descriptors": first.descriptors,
        "threads": first.threads + THREADS_EXTRA,
        "disk": first.disk,
        "files": first.files,
    }
    return [
        f"{what} went from {getattr(first, what)} to {getattr(now, what)}, and {most} is the most that is right"
        for what, most in allowed.items()
        if getattr(now, what) > most
    ]
