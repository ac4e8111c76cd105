"""What makes a durable snapshot outlive the loss of power: the order of syncs, and one sync for many who wait.

A guest write that changes a cluster of a durable snapshot waits for this, behind the copy itself:

    temp: data, count, L2 entry  --->  sync temp  --->  the cluster's bit in copied.bits  --->  sync copied.bits

So a bit that is on disk says that all of its cluster's copy is, its data and every table on the way to it. After a
power loss only those bits are believed, whatever else temp's tables say; what has no bit was not changed by the guest.

A trim waits until its bits in trimmed.bits are synced, and only then changes may go ahead without a copy, and temp
space is used again. So trimmed wins over copied.

A sync costs a disk some milliseconds, and as much for one copy as for all that are complete by then. The first who
asks while none runs does it; who asks meanwhile waits for the next one, which one of those does for all of them.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

from fleecing.block.bitfile import BitFile
from fleecing.block.breakage import NOT_SYNCED
from fleecing.block.flusher import Done, Flusher
from fleecing.block.qcow2.node import TempImage

log = logging.getLogger(__name__)

NOTE_SECONDS = 5.0
"""How long a guest write waits at most until the disk has the note that its snapshot is broken."""

Runs = list[tuple[int, int]]
"""(first guest cluster, clusters)"""

Item = TypeVar("Item")


class _Batch(Generic[Item]):
    __slots__ = ("error", "items", "over")

    def __init__(self) -> None:
        self.items: list[Item] = []
        self.over = threading.Event()
        self.error: BaseException | None = None


class GroupCommit(Generic[Item]):
    """`submit` from any thread; `commit` gets the items of all who waited, in one thread at a time."""

    def __init__(self, commit: Callable[[list[Item]], None]) -> None:
        self._commit = commit
        self._lock = threading.Lock()
        self._next: _Batch[Item] | None = None  # those who wait for the commit after this one; under _lock
        self._committing = threading.Lock()

    def submit(self, item: Item) -> None:
        """Return when a `commit` that began after this call has taken the item; raises what that commit raised."""
        with self._lock:
            batch, leads = self._next, self._next is None
            if batch is None:
                batch = self._next = _Batch()
            batch.items.append(item)
        if leads:
            self._lead(batch)
        else:
            batch.over.wait()
        if batch.error is not None:
            raise batch.error

    def _lead(self, batch: _Batch[Item]) -> None:
        with self._committing:
            with self._lock:
                self._next = None
            try:
                self._commit(batch.items)
            except BaseException as e:
                batch.error = e
            finally:
                batch.over.set()


class _Files:
    """What is synced. It knows nothing of those who ask for it, so that it goes when the last of them does."""

    def __init__(self, temp: TempImage, copied: BitFile, trimmed: BitFile) -> None:
        self.temp = temp
        self.copied = copied
        self.trimmed = trimmed
        # Why nothing can be made durable any more. A sync that failed may have dropped what it was to write, and the
        # next one would not tell: so the first failure is for good, in the next process, too.
        self._failed: OSError | None = None

    def check(self) -> None:
        """Raise the error after which nothing could be made durable any more."""
        if self._failed is not None:
            raise self._failed

    def commit(self, batch: list[Runs]) -> None:
        """The data and the tables first, then the bits that say so."""
        self.check()
        try:
            self.temp.sync()
            for runs in batch:
                for first, count in runs:
                    self.copied.bits[first : first + count] = 1
            self.copied.sync()
        except OSError as e:
            self._fail(e)
            raise

    def sync_trimmed(self) -> None:
        """Make the bits of what is trimmed durable."""
        self.check()
        try:
            self.trimmed.sync()
        except OSError as e:
            self._fail(e)
            raise

    def _fail(self, error: OSError) -> None:
        self._failed = error
        self.copied.note = f"{NOT_SYNCED}{error.strerror}"


class Durability:
    """The files of one durable snapshot, and when they are synced."""

    def __init__(self, temp: TempImage, copied: BitFile, trimmed: BitFile) -> None:
        self._files = _Files(temp, copied, trimmed)
        self._copies = GroupCommit(self._files.commit)
        self._trims = Flusher(self._files.sync_trimmed, name=trimmed.path)

    def check(self) -> None:
        """Raise the error after which nothing could be made durable any more."""
        self._files.check()

    def commit(self, runs: Runs) -> None:
        """Make the copies of these clusters durable; all of them are linked in temp.

        Raises OSError where that failed, now or earlier.
        """
        self._copies.submit(runs)

    def submit_trim(self, done: Done) -> None:
        """Call `done` when what is set in trimmed.bits now is durable, or with the error. Returns at once."""
        self._trims.submit(done)

    def sync(self) -> None:
        """Make everything durable, for another process to go on with. Raises OSError."""
        self.check()
        self._files.temp.sync()
        self._files.trimmed.sync()
        self._files.copied.sync()

    def close(self, timeout: float) -> None:
        """Answer the trims that wait, for `timeout` seconds at most, and give the file of copied.bits back."""
        self._trims.close(timeout)
        self._files.copied.close()

    def remove(self) -> None:
        """Take the file of copied.bits away."""
        self._files.copied.remove()


def sync_note(file: BitFile) -> None:
    """Make a file's note durable, if that takes no more than NOTE_SECONDS: a disk that hangs must not hold the guest.

    Where it fails or takes longer, the note is in the page cache all the same, so the next process has it; only the
    loss of power can take it back.
    """
    failures: list[OSError] = []

    def sync() -> None:
        try:
            file.sync()
        except OSError as e:
            failures.append(e)

    thread = threading.Thread(target=sync, name=f"{file.path} note", daemon=True)
    thread.start()
    thread.join(NOTE_SECONDS)
    if thread.is_alive():
        log.error("%s: the note is not durable after %g s", file.path, NOTE_SECONDS)
    elif failures:
        log.error("%s: the note cannot be made durable: %s", file.path, failures[0])


def sync_folders(paths: Iterable[str]) -> None:
    """Make the names of these files durable, and those of the folders that they are in."""
    folders = {os.path.dirname(os.path.realpath(path)) for path in paths}
    for folder in sorted(folders | {os.path.dirname(folder) for folder in folders}):
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
