"""The chain of checkpoints that an earlier server left, before the disk is served.

What was under way is ended: a checkpoint that is `pending` or `deleting` goes into the one before it. After a loss of
power, the regions that were at work count as changed. What cannot be trusted becomes inconsistent, with the reason.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from datetime import UTC, datetime

from fleecing.block.bitfile import BitFile
from fleecing.block.tracking import IntentLog, Tracker, recover, region_size
from fleecing.control.checkpoint import (
    Checkpoint,
    CheckpointChain,
    bitmap_path,
    index_path,
    inherit,
    intent_path,
    reasons,
    write_index,
)
from fleecing.control.identity import Verdict
from fleecing.control.names import check_name
from fleecing.control.state import CheckpointEntry, CheckpointIndex, CheckpointState, read_json
from fleecing.errors import ImageError, sentence
from fleecing.events import Event, tell

log = logging.getLogger(__name__)


def load_chain(into: CheckpointChain, verdict: Verdict, unfinished: str | None) -> None:
    """Put in what is in the chain's folder, and the disk's tracker in its place.

    `unfinished`: a checkpoint whose creation is undone. Raises OSError where the folder cannot be written.
    """
    name, folder, disk = into.disk_name, into.folder, into.disk
    entries = _entries(folder)
    chain = [_open(folder, entry, disk.size, verdict, name) for entry in entries]
    chain = [_marked(c, reason, name) for c, reason in zip(chain, reasons(chain), strict=True)]
    dropped = []
    for checkpoint in list(chain):
        if checkpoint.entry.state is not CheckpointState.ACTIVE or checkpoint.name == unfinished:
            dropped.append(checkpoint)
            _fold(chain, checkpoint)
    for i, checkpoint in enumerate(chain):
        last = i == len(chain) - 1
        if not last and not checkpoint.entry.synced and checkpoint.tracker is not None:
            checkpoint.tracker.sync()
        chain[i] = checkpoint.with_entry(synced=not last)
    if tuple(checkpoint.entry for checkpoint in chain) != entries:
        write_index(folder, chain)
    for checkpoint in dropped:
        log.warning("checkpoint %s of disk %s, which was not finished, is gone", checkpoint.name, name)
        if checkpoint.tracker is not None:
            checkpoint.tracker.close()
    _remove_strays(folder, {checkpoint.name for checkpoint in chain})
    disk.tracker = chain[-1].tracker if chain else None
    into.checkpoints = tuple(chain)


def _entries(folder: str) -> tuple[CheckpointEntry, ...]:
    """The index; where it makes no sense, the names that there are files of, all of no use."""
    try:
        return read_json(index_path(folder), CheckpointIndex).checkpoints
    except FileNotFoundError:
        return ()
    except ImageError as e:
        reason = str(e)
    found = [(os.stat(bitmap_path(folder, name)).st_mtime, name) for name, kind in _files(folder) if kind == ".bitmap"]
    return tuple(
        CheckpointEntry(
            name=name, created=datetime.fromtimestamp(time, UTC), state=CheckpointState.ACTIVE, inconsistent=reason
        )
        for time, name in sorted(found)
    )


def _files(folder: str) -> Iterator[tuple[str, str]]:
    """(name of the checkpoint, ending) of what this module made; the rest is not ours."""
    for file in sorted(os.listdir(folder)):
        name, ending = os.path.splitext(file)
        if ending in (".bitmap", ".intent"):
            with contextlib.suppress(ValueError):
                yield check_name(name), ending


def _open(folder: str, entry: CheckpointEntry, size: int, verdict: Verdict, disk: str) -> Checkpoint:
    reason = entry.inconsistent or verdict.changed
    if reason is None:
        try:
            return Checkpoint(entry, _tracker(folder, entry, size, verdict, disk))
        except (OSError, ImageError) as e:
            reason = sentence(e)
    return Checkpoint(entry.model_copy(update={"inconsistent": reason}), None)


def _tracker(folder: str, entry: CheckpointEntry, size: int, verdict: Verdict, disk: str) -> Tracker:
    bits = BitFile.open(bitmap_path(folder, entry.name))
    try:
        seal = bits.take_seal()
        if seal is not None and not verdict.power_lost and seal != bits.checksum():
            raise ImageError(bits.path, -1, "is not as the last server left it: it was damaged, or changed")
        if bits.size != size:
            raise ImageError(bits.path, -1, f"is of a disk of {bits.size} bytes, and this one has {size}")
        intents = IntentLog.open(intent_path(folder, entry.name), region_size(size, bits.granularity))
    except BaseException:
        bits.close()
        raise
    if verdict.power_lost and not entry.synced:
        more = recover(bits, intents) * bits.granularity
        log.warning("checkpoint %s: %d bytes more count as changed after the loss of power", entry.name, more)
    return Tracker(bits, intents, disk=disk, checkpoint=entry.name)


def _marked(checkpoint: Checkpoint, reason: str | None, disk: str) -> Checkpoint:
    if reason is None:
        return checkpoint
    tell(
        log,
        logging.WARNING,
        Event.CHECKPOINT_INCONSISTENT,
        "checkpoint %s of disk %s is inconsistent: %s",
        checkpoint.name,
        disk,
        reason,
        disk=disk,
        checkpoint=checkpoint.name,
        reason=reason,
    )
    if checkpoint.tracker is not None:
        checkpoint.tracker.close()
    return Checkpoint(checkpoint.entry.model_copy(update={"inconsistent": reason}), None)


def _fold(chain: list[Checkpoint], checkpoint: Checkpoint) -> None:
    """Take it out of the chain; what it recorded goes to the one before it, durably."""
    index = chain.index(checkpoint)
    heir = chain[index - 1].tracker if index else None
    if heir is not None and checkpoint.tracker is not None:
        inherit(heir, checkpoint.tracker)
        heir.file.sync()
    del chain[index]


def _remove_strays(folder: str, known: set[str]) -> None:
    for name, ending in list(_files(folder)):
        if name not in known:
            try:
                os.unlink(os.path.join(folder, name + ending))
            except OSError as e:
                log.error("%s, which is not needed any more, could not be removed: %s", name + ending, e)
