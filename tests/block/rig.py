"""A disk with snapshots without any server, and files with faults to put under it."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from bitarray import bitarray

from fleecing.block.copy_before_write import CopyBeforeWrite, OnCbwError, same_instant
from fleecing.block.file import FileNode
from fleecing.block.hostfile import HostFile
from fleecing.block.node import Buffer
from fleecing.block.qcow2.node import TempImage
from fleecing.block.snapshot_access import SnapshotAccess
from fleecing.errors import BlockError
from fleecing.units import KiB

CLUSTER = 64 * KiB
SECONDS = 20.0
"""How long a test waits for what must come; nothing is slow, so it is never reached unless something hangs."""


class HookedFile(FileNode):
    """An active image that lets a test step in while somebody reads it: bytes are there, the reader not back yet."""

    after_read: Callable[[], None] | None = None

    def read_into(self, offset: int, buffer: memoryview) -> None:
        super().read_into(offset, buffer)
        self._step_in()

    def read_cached(self, offset: int, buffer: memoryview) -> bool:
        cached = super().read_cached(offset, buffer)
        if len(buffer) > 64:  # less is a look at a cluster that is about to be copied
            self._step_in()
        return cached

    def copy_to(self, offset: int, length: int, target: HostFile, at: int) -> bool:
        copied = super().copy_to(offset, length, target, at)
        self._step_in()
        return copied

    def _step_in(self) -> None:
        hook, self.after_read = self.after_read, None
        if hook is not None:
            hook()


class FaultyTemp(HostFile):
    """The file of a temp image. `fail` raises an error; `hold` makes writes wait until it is set."""

    fail: OSError | None = None
    hold: threading.Event | None = None
    before_hold = 0  # writes that still go through before `hold`
    skip = 0  # writes that still succeed before `fail`
    failures = -1  # writes that fail then, -1 = all

    def __init__(self, path: str, fd: int) -> None:
        super().__init__(path, fd)
        self.held = threading.Semaphore(0)  # one release for each write that waits

    def take_copy(self, fd: int, offset: int, length: int, at: int) -> bool:
        """With a fault to come, all is left to `write`."""
        return self.fail is None and self.hold is None and super().take_copy(fd, offset, length, at)

    def write(self, offset: int, data: Buffer) -> None:
        if self.hold is not None and self.before_hold:
            self.before_hold -= 1
        elif self.hold is not None:
            hold = self.hold
            self.held.release()
            assert hold.wait(SECONDS)
        if self.fail is not None and self.failures:
            if not self.skip:
                self.failures -= 1
                raise self.fail
            self.skip -= 1
        super().write(offset, data)


class Rig:
    """One disk; snapshots by name."""

    def __init__(self, folder: Path, contents: bytes, size: int | None = None) -> None:
        """`size` in bytes: the disk goes on as a hole behind the contents."""
        self.folder = folder
        self.path = folder / "disk.img"
        self.path.write_bytes(contents)
        self.size = len(contents) if size is None else size
        os.truncate(self.path, self.size)
        self.file = HookedFile.open(str(self.path))
        self.disk = CopyBeforeWrite(self.file)
        self.snapshots: list[SnapshotAccess] = []
        self.broken: list[tuple[str, str]] = []

    def snapshot(
        self,
        name: str = "s",
        *,
        cluster_size: int = CLUSTER,
        on_cbw_error: OnCbwError = OnCbwError.BREAK_SNAPSHOT,
        cbw_timeout: float = 0,
        limit: int | None = None,
        bitmap: bitarray | None = None,
        at_instant: Callable[[], None] = lambda: None,
    ) -> tuple[SnapshotAccess, FaultyTemp]:
        """A snapshot whose temp can be made to fail. `cbw_timeout` in seconds, 0 = none.

        `at_instant` is called at the very instant, when no change is under way.
        """
        host = FaultyTemp.create(str(self.folder / f"{name}.qcow2"))
        temp = TempImage.create(
            host,
            size=self.size,
            cluster_size=cluster_size,
            backing_file=str(self.path),
            backing_format="raw",
            limit=limit,
        )
        snapshot = SnapshotAccess(
            name,
            self.disk,
            temp,
            cluster_size=cluster_size,
            on_cbw_error=on_cbw_error,
            cbw_timeout=cbw_timeout,
            temp_limit=limit,
            bitmap=bitmap,
            on_broken=lambda node, cause: self.broken.append((node.name, cause)),
        )

        def install() -> None:
            self.disk.attach(snapshot)
            at_instant()

        same_instant([self.disk], install, timeout=SECONDS)
        self.snapshots.append(snapshot)
        return snapshot, host

    def close(self) -> None:
        for snapshot in self.snapshots:
            snapshot.remove(SECONDS)
        self.disk.close(SECONDS)


def write_together(disk: CopyBeforeWrite, writes: Sequence[tuple[int, bytes]]) -> list[Exception | None]:
    """(offset, data) as a connection does them that got them at once; how each ended."""
    views = [(offset, memoryview(data)) for offset, data in writes]
    disk.save_ahead(views, hand_over=lambda: None)
    ends: list[Exception | None] = []
    for (offset, data), outcome in zip(writes, disk.write_many(views), strict=True):
        try:
            if isinstance(outcome, Exception):
                raise outcome
            if not outcome:
                disk.write(offset, data)
        except (OSError, BlockError) as e:
            ends.append(e)
        else:
            ends.append(None)
    return ends


def in_thread(call: Callable[[], object]) -> Running:
    """Run `call` beside the test."""
    return Running(call)


class Running:
    """A call under way in another thread; `wait` for its end, its error is raised there."""

    def __init__(self, call: Callable[[], object]) -> None:
        self._error: BaseException | None = None
        self._call = call
        self.over = threading.Event()
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        try:
            self._call()
        except BaseException as e:
            self._error = e
        finally:
            self.over.set()

    def wait(self) -> None:
        assert self.over.wait(SECONDS)
        if self._error is not None:
            raise self._error


def pattern(size: int, seed: int = 0) -> bytes:
    """Bytes that differ from place to place and from seed to seed, and are never zero."""
    step = bytes((i * 7 + seed * 13) % 255 + 1 for i in range(4099))
    return (step * (size // len(step) + 1))[:size]


def blocks(path: str) -> int:
    """Bytes of disk space that a file takes."""
    return os.stat(path).st_blocks * 512
