"""The checkpoints of one disk: a chain of bitmaps, of which only the last one records.

    monday.bitmap          tuesday.bitmap           wednesday.bitmap
    changes from monday    changes from tuesday     changes from wednesday on:
    to tuesday             to wednesday             the tracker of the disk

What changed since a checkpoint is the OR of its bitmap and all later ones. To delete one is to OR it into the one
before it. So a guest write sets one bit, however many checkpoints there are, and no change is ever lost.

    checkpoints/index.json       the chain, see state.CheckpointIndex
    checkpoints/NAME.bitmap      a BitFile; one bit for each cluster of the size that the disk had when it was made, or
                                 for each SMALLEST_GRAIN bytes where clusters are smaller
    checkpoints/NAME.intent      its write-intent log

Whatever makes a bitmap miss changes makes it and all before it inconsistent, for good, with a reason; what is made
later is not concerned. See checkpoint_load for what a start does.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from bitarray import bitarray

from fleecing.block.bitfile import BitFile
from fleecing.block.bitmap import rescale, zeroes
from fleecing.block.copy_before_write import CopyBeforeWrite
from fleecing.block.graph import at_instant
from fleecing.block.tracking import IntentLog, Tracker, region_size
from fleecing.control.state import CheckpointEntry, CheckpointIndex, CheckpointState, sync_folder, write_json
from fleecing.errors import ControlError
from fleecing.units import KiB, div_up

log = logging.getLogger(__name__)

SMALLEST_GRAIN = 64 * KiB
"""Bytes; QEMU's default. Increments go into qcow2 files, and a cluster of theirs that changed in part only could not be
read from a snapshot that has nothing but changes."""


INCONSISTENT = "inconsistent"
"""The state that a checkpoint is in by what it missed, and not by what is done with it."""


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """One link of the chain. `tracker` None: inconsistent, its bits are not even opened."""

    entry: CheckpointEntry
    tracker: Tracker | None

    @property
    def name(self) -> str:
        return self.entry.name

    def with_entry(self, **changes: object) -> Checkpoint:
        """The same bits with another entry."""
        return Checkpoint(self.entry.model_copy(update=changes), self.tracker)


def reasons(chain: Sequence[Checkpoint]) -> list[str | None]:
    """Why each one is inconsistent, or None: what a bitmap missed is missing since every checkpoint before it."""
    found: list[str | None] = []
    reason = None
    for checkpoint in reversed(chain):
        own = checkpoint.entry.inconsistent
        if own is None and checkpoint.tracker is not None:
            own = checkpoint.tracker.failed
        reason = own or reason
        found.append(reason)
    return found[::-1]


def state_name(checkpoint: Checkpoint, reason: str | None) -> str:
    """What a person is told; `reason`: why it is inconsistent."""
    state = checkpoint.entry.state
    return str(state) if reason is None or state is not CheckpointState.ACTIVE else INCONSISTENT


class Untracked(Exception):
    """What changed since the checkpoint is not known; the text says why."""


class Changes:
    """What changed since a checkpoint; `now` at any moment, once. The frozen part of it is looked up before."""

    def __init__(self, frozen: bitarray, recording: Tracker, cluster_size: int) -> None:
        self._frozen = frozen
        self._recording = recording
        self._cluster_size = cluster_size

    def now(self) -> bitarray:
        """One bit for each cluster of the disk. Raises Untracked where the recording was given up meanwhile."""
        bits = self._frozen  # in place: the guest may be waiting
        bits |= _clusters(self._recording, self._cluster_size)
        if self._recording.failed is not None:
            raise Untracked(self._recording.failed)
        return bits


class CheckpointChain:
    """All calls but `infos`, `changes` and `settle` come from one thread at a time; these from any.

    `checkpoints` is replaced as a whole, after the index says the same. `cluster_size` in bytes is the disk's now.
    """

    def __init__(self, name: str, folder: str, disk: CopyBeforeWrite, cluster_size: int) -> None:
        """Without any checkpoint; checkpoint_load puts in those that there are."""
        self.disk_name = name
        self.folder = folder
        self.disk = disk
        self.cluster_size = cluster_size
        self.checkpoints: tuple[Checkpoint, ...] = ()
        self._changing = threading.Lock()

    # What there is.

    def infos(self) -> list[tuple[Checkpoint, str | None, bitarray | None]]:
        """Each checkpoint with why it is inconsistent, or else with the clusters that changed since it."""
        chain = self.checkpoints
        found: list[tuple[Checkpoint, str | None, bitarray | None]] = []
        changed = zeroes(div_up(self.disk.size, self.cluster_size))
        for checkpoint, reason in zip(reversed(chain), reversed(reasons(chain)), strict=True):
            if reason is None and checkpoint.tracker is not None:
                changed = changed | _clusters(checkpoint.tracker, self.cluster_size)
            found.append((checkpoint, reason, changed if reason is None else None))
        return found[::-1]

    def states(self) -> list[str]:
        """Of each checkpoint; looks at no bits."""
        chain = self.checkpoints
        return [state_name(checkpoint, reason) for checkpoint, reason in zip(chain, reasons(chain), strict=True)]

    def changes(self, name: str) -> Changes:
        """What changed since the checkpoint. Raises Untracked where that cannot be known."""
        chain = self.checkpoints
        index = self._find(chain, name)
        if index is None:
            raise Untracked(f"disk '{self.disk_name}' has no checkpoint '{name}'")
        if chain[index].entry.state is CheckpointState.DELETING:
            raise Untracked(f"checkpoint '{name}' of disk '{self.disk_name}' is being deleted")
        reason = reasons(chain)[index]
        if reason is not None:
            raise Untracked(f"checkpoint '{name}' of disk '{self.disk_name}' is inconsistent: {reason}")
        trackers = [checkpoint.tracker for checkpoint in chain[index:] if checkpoint.tracker is not None]
        # The last one, but for a deletion that got stuck when the one before had taken over already.
        recording = self.disk.tracker if self.disk.tracker in trackers else trackers[-1]
        assert recording is not None
        frozen = zeroes(div_up(self.disk.size, self.cluster_size))
        for tracker in trackers:
            if tracker is not recording:
                frozen |= _clusters(tracker, self.cluster_size)
        return Changes(frozen, recording, self.cluster_size)

    @staticmethod
    def _find(chain: Sequence[Checkpoint], name: str) -> int | None:
        return next((i for i, checkpoint in enumerate(chain) if checkpoint.name == name), None)

    def check_free(self, name: str) -> None:
        """Raises ControlError where there is a checkpoint of that name."""
        if self._find(self.checkpoints, name) is not None:
            raise ControlError(
                409, f"disk '{self.disk_name}' has a checkpoint '{name}' already: delete it or take another name"
            )

    # A new one: `begin`, then the tracker becomes the disk's at the instant, then `commit`; or `undo` at any time.

    def begin(self, name: str, created: datetime) -> Tracker:
        """Make its files; what is to record from the instant on. The name is free. Raises OSError."""
        with self._changing:
            tracker = self._create(name)
            entry = CheckpointEntry(name=name, created=created, state=CheckpointState.PENDING)
            try:
                self._write((*self.checkpoints, Checkpoint(entry, tracker)))
            except OSError:
                self._remove_files(tracker)
                raise
        return tracker

    def _create(self, name: str) -> Tracker:
        bits, log_path = bitmap_path(self.folder, name), intent_path(self.folder, name)
        for path in (bits, log_path):  # of a deletion that did not get through
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
        granularity = max(self.cluster_size, SMALLEST_GRAIN)
        file = BitFile.create(bits, size=self.disk.size, granularity=granularity)
        try:
            intents = IntentLog.create(log_path, region_size(self.disk.size, granularity))
        except BaseException:
            file.remove()
            raise
        sync_folder(self.folder)
        return Tracker(file, intents, disk=self.disk_name, checkpoint=name)

    def commit(self, name: str) -> None:
        """It is there. What was made before and had missed changes by the instant is inconsistent for good."""
        with self._changing:
            *before, made = self.checkpoints
            assert made.name == name
            marked = [c.with_entry(inconsistent=r) for c, r in zip(before, reasons(before), strict=True)]
            self._write((*marked, made.with_entry(state=CheckpointState.ACTIVE)))

    def undo(self, name: str, drain_timeout: float) -> None:
        """As if it had never been; what it recorded goes to the one before it. No harm where it is not there.

        Raises OSError (TimeoutError: changes of the guest did not end in time); to be tried again then.
        """
        with self._changing:
            if self.checkpoints and self.checkpoints[-1].name == name:
                self._drop(len(self.checkpoints) - 1, drain_timeout)

    def delete(self, name: str, drain_timeout: float) -> bool:
        """Forget it; what it alone knows goes to the one before it. False where there is none of that name.

        Raises OSError (TimeoutError: changes of the guest did not end in time); to be asked again then.
        """
        with self._changing:
            index = self._find(self.checkpoints, name)
            if index is None:
                return False
            self._drop(index, drain_timeout)
        return True

    def _drop(self, index: int, drain_timeout: float) -> None:
        chain = list(self.checkpoints)
        name = chain[index].name
        tracker = chain[index].tracker
        heir = None
        if index and reasons(chain)[index - 1] is None:
            heir = chain[index - 1].tracker
        recording = tracker is not None and self.disk.tracker is tracker
        chain[index] = chain[index].with_entry(state=CheckpointState.DELETING)
        if recording and heir is not None:
            chain[index - 1] = chain[index - 1].with_entry(synced=False)
        self._write(chain)

        def hand_over() -> None:
            if heir is not None and tracker is not None:
                inherit(heir, tracker)
            if recording:
                self.disk.tracker = heir

        if recording:
            at_instant(self.disk, hand_over, drain_timeout=drain_timeout)
        else:
            hand_over()
        if heir is not None:
            heir.file.sync()
        del chain[index]
        self._write(chain)
        if tracker is not None:
            self._remove_files(tracker)
        else:
            self._remove_unopened(name)

    # Durability.

    def settle(self) -> None:
        """Make what is recorded durable, for the first time also what has become frozen. Raises OSError."""
        with self._changing:
            chain = list(self.checkpoints)
            for i, checkpoint in enumerate(chain[:-1]):
                tracker = checkpoint.tracker
                if tracker is not None and not checkpoint.entry.synced and tracker is not self.disk.tracker:
                    tracker.sync()
                    chain[i] = checkpoint.with_entry(synced=True)
            if chain != list(self.checkpoints):
                self._write(chain)
            recording = self.disk.tracker
            if recording is not None and recording.failed is None:
                recording.settle()

    def suspend(self) -> None:
        """Make all durable and give the files back. Only when nothing records any more. Raises OSError."""
        try:
            for checkpoint in self.checkpoints:
                tracker = checkpoint.tracker
                if tracker is not None and tracker.failed is None:
                    tracker.sync()
                if tracker is not None:
                    tracker.file.seal()
                    tracker.file.sync()  # also why it failed, if it did
        finally:
            self.close()

    def close(self) -> None:
        """Give the files back as they are; twice does no harm."""
        for checkpoint in self.checkpoints:
            if checkpoint.tracker is not None:
                checkpoint.tracker.close()

    def _write(self, chain: Sequence[Checkpoint]) -> None:
        write_index(self.folder, chain)
        self.checkpoints = tuple(chain)

    @staticmethod
    def _remove_files(tracker: Tracker) -> None:
        try:
            tracker.file.remove()
            tracker.log.remove()
        except OSError as e:
            log.error("%s, which is not needed any more, could not be removed: %s", tracker.file.path, e)

    def _remove_unopened(self, name: str) -> None:
        """The files of an inconsistent one, as far as there are any."""
        for path in (bitmap_path(self.folder, name), intent_path(self.folder, name)):
            try:
                Path(path).unlink(missing_ok=True)
            except OSError as e:
                log.error("%s, which is not needed any more, could not be removed: %s", path, e)


def inherit(heir: Tracker, tracker: Tracker) -> None:
    """Whatever changed for one of them changed for the heir."""
    heir.file.bits |= rescale(
        tracker.file.bits, tracker.file.granularity, heir.file.granularity, heir.file.size
    )  # in place: the tracker's own view of the same memory


def write_index(folder: str, chain: Sequence[Checkpoint]) -> None:
    """Durable when it returns. Raises OSError."""
    write_json(index_path(folder), CheckpointIndex(checkpoints=tuple(checkpoint.entry for checkpoint in chain)))


def index_path(folder: str) -> str:
    return os.path.join(folder, "index.json")


def bitmap_path(folder: str, name: str) -> str:
    return os.path.join(folder, f"{name}.bitmap")


def intent_path(folder: str, name: str) -> str:
    return os.path.join(folder, f"{name}.intent")


def _clusters(tracker: Tracker, cluster_size: int) -> bitarray:
    """Its bits as they are now or later, one for each cluster of that size; only to be read."""
    if tracker.file.granularity == cluster_size:
        return tracker.file.bits
    return rescale(tracker.file.bits, tracker.file.granularity, cluster_size, tracker.file.size)
