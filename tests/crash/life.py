"""A server's life over recorded files, from one crash to the next, and the model that says what must be left of it.

A life is what `graph` and `tracking` do with the files of one folder. `crash` gives the next life, over the files as a
crash at any moment may have left them, with the model of that moment.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from fleecing.block.bitfile import BitFile
from fleecing.block.bitmap import clusters_within
from fleecing.block.copy_before_write import CopyBeforeWrite
from fleecing.block.graph import SnapshotSpec, freeze, open_disk, revive
from fleecing.block.snapshot_access import SnapshotAccess
from fleecing.block.tracking import IntentLog, Tracker, recover
from fleecing.errors import ClusterUnreadable, SnapshotBroken
from tests.block.rig import SECONDS, in_thread
from tests.crash.recorder import SECTOR, Recorder

REGION = 16 * 1024
"""Bytes of a region of the write-intent log: small, so that a small disk has several."""

GRAIN = 1024
"""Bytes of a bit of the tracking."""


@dataclass
class Frozen:
    """What a snapshot must give."""

    name: str
    contents: bytes
    cluster: int
    durable: bool
    trimmed: set[int] = field(default_factory=set)  # the trim was answered
    maybe: set[int] = field(default_factory=set)  # it was asked for
    may_be_broken: bool = False  # it was deleted, or a copy failed
    broken: bool = False  # that is over


@dataclass
class Checkpoint:
    """What the disk had at the instant, None = it is not complete; `synced`: its bits are durable, and final."""

    name: str
    contents: bytes | None
    synced: bool = False


@dataclass
class Model:
    """Everything that must hold at a moment."""

    disk: list[set[bytes]] = field(default_factory=list)  # by sector: what it may have
    frozen: dict[str, Frozen] = field(default_factory=dict)
    checkpoints: list[Checkpoint] = field(default_factory=list)


Change = Callable[[Model], None]


class Life:
    """One process, from boot to crash. Everything it does is noted with its first and its last moment."""

    def __init__(self, folder: Path, model: Model, *, power_lost: bool) -> None:
        """The files in `folder` are as a crash left them, and `model` holds of them."""
        self.folder = folder
        self.power_lost = power_lost
        self.base = model
        self.recorder = Recorder(folder)
        self.active = bytearray((folder / "disk.img").read_bytes())
        sectors = [bytes(self.active[i : i + SECTOR]) for i in range(0, len(self.active), SECTOR)]
        for number, allowed in enumerate(model.disk):
            assert sectors[number] in allowed, f"sector {number} of the disk lost what was flushed"
        model.disk = [{sector} for sector in sectors]
        self.booted = 0  # the moment from which on guests are served
        self.changes: list[tuple[int, Change]] = []  # what becomes true at a moment
        self.snapshots: dict[str, SnapshotAccess] = {}
        self.trackers: list[Tracker] = []  # by checkpoint
        self.count = 0
        self.dead: set[str] = set()  # broken snapshots that the model knows of
        self.failing: set[str] = set()  # whose temp takes no writes
        self.broken: list[str] = []
        self.disk: CopyBeforeWrite

    # Its beginning.

    def boot(self) -> None:
        """What a server does when it starts."""
        self.disk = open_disk(str(self.folder / "disk.img"))
        for checkpoint in self.base.checkpoints:
            bits = BitFile.open(str(self.folder / f"{checkpoint.name}.bitmap"))
            log = IntentLog.open(str(self.folder / f"{checkpoint.name}.intent"), REGION)
            if self.power_lost and not checkpoint.synced:
                recover(bits, log)
            self.trackers.append(Tracker(bits, log))
        if self.trackers:
            self.disk.tracker = self.trackers[-1]
        for frozen in list(self.base.frozen.values()):
            self._revive(frozen)
        self.booted = self.recorder.mark()

    def _revive(self, frozen: Frozen) -> None:
        try:
            snapshot = revive(
                self.disk, self._spec(frozen), None, on_broken=self._note_broken, power_lost=self.power_lost
            )
        except SnapshotBroken:
            if not (frozen.may_be_broken or (self.power_lost and not frozen.durable)):
                raise
            frozen.may_be_broken = True
            self.when(_is_broken(frozen.name))
            self.dead.add(frozen.name)
            return
        if snapshot.broken:
            assert frozen.may_be_broken, snapshot.broken
            self.dead.add(frozen.name)
        else:
            assert not frozen.broken, f"{frozen.name} is alive again"
        self.snapshots[frozen.name] = snapshot

    def _spec(self, frozen: Frozen) -> SnapshotSpec:
        path = str(self.folder / frozen.name)
        return SnapshotSpec(
            frozen.name,
            path + ".qcow2",
            frozen.cluster,
            trimmed_path=path + ".trimmed.bits",
            durable=frozen.durable,
            copied_path=path + ".copied.bits" if frozen.durable else None,
            cbw_timeout=0,
        )

    def _note_broken(self, snapshot: SnapshotAccess, cause: str) -> None:
        self.broken.append(f"{snapshot.name}: {cause}")

    def check(self) -> None:
        """Everything that can be read is as the model has it."""
        for name, snapshot in self.snapshots.items():
            frozen = self.base.frozen[name]
            if snapshot.broken is None:
                self._check_snapshot(snapshot, frozen)
        self._check_tracking()

    @staticmethod
    def _check_snapshot(snapshot: SnapshotAccess, frozen: Frozen) -> None:
        size = len(frozen.contents)
        for cluster, offset in enumerate(range(0, size, frozen.cluster)):
            length = min(frozen.cluster, size - offset)
            try:
                got = snapshot.read(offset, length)
            except ClusterUnreadable:
                assert cluster in frozen.maybe, f"{frozen.name}: cluster {cluster} was never trimmed"
            else:
                assert cluster not in frozen.trimmed, f"{frozen.name}: cluster {cluster} is not trimmed any more"
                assert got == frozen.contents[offset : offset + length], f"{frozen.name}: cluster {cluster}"

    def _check_tracking(self) -> None:
        for number, checkpoint in enumerate(self.base.checkpoints):
            if checkpoint.contents is None:
                continue
            for offset in range(0, len(self.active), GRAIN):
                end = offset + GRAIN
                if checkpoint.contents[offset:end] != self.active[offset:end]:
                    marked = any(tracker.file.bits[offset // GRAIN] for tracker in self.trackers[number:])
                    assert marked, f"{checkpoint.name}: the change at {offset} is not marked"

    # What happens in it.

    def when(self, change: Change) -> None:
        """This holds from now on."""
        self.changes.append((self.recorder.mark(), change))

    def change(self, kind: str, parts: list[tuple[int, int, bytes]]) -> None:
        """Guest changes (offset, length, fill) that share no sector, all under way at once."""
        over = threading.Semaphore(0)
        for offset, length, fill in parts:
            data = (fill * length)[:length] if kind == "write" else bytes(length)
            self.when(self._may_have(offset, data))
            done = self._then(over, offset, data)
            if kind == "zeroes":
                self.disk.submit_zeroes(offset, length, done)
            elif kind == "discard":
                self.disk.submit_discard(offset, length, done)
            elif self.disk.write_now(offset, data):
                done(None)
            else:
                self.disk.submit_write(offset, data, done)
        for _ in parts:
            assert over.acquire(timeout=SECONDS)
        for name, snapshot in self.snapshots.items():
            if snapshot.broken and name not in self.dead:
                self.dead.add(name)
                self.when(_is_broken(name))

    def _then(self, over: threading.Semaphore, offset: int, data: bytes) -> Callable[[Exception | None], None]:
        def done(error: Exception | None) -> None:
            if error is None:
                self.active[offset : offset + len(data)] = data
            over.release()

        return done

    def _may_have(self, offset: int, data: bytes) -> Change:
        """These sectors may be as they were, or with this data in them."""
        first, end = offset // SECTOR, (offset + len(data) - 1) // SECTOR + 1
        new = self.active[first * SECTOR : end * SECTOR]
        new[offset - first * SECTOR : offset - first * SECTOR + len(data)] = data

        def apply(model: Model) -> None:
            for i, sector in enumerate(range(first, end)):
                model.disk[sector].add(bytes(new[i * SECTOR : (i + 1) * SECTOR]))

        return apply

    def flush(self) -> None:
        now = bytes(self.active)
        self.disk.flush()
        self.when(_durable(now))

    def freeze(self, *, cluster: int, durable: bool, checkpoint: bool) -> None:
        """Take a snapshot, and at the same instant a checkpoint where asked for."""
        name = f"{self.folder.name}-{self.count}"
        self.count += 1
        contents = bytes(self.active)
        frozen = Frozen(f"s{name}", contents, cluster, durable)
        tracker = self._new_tracker(f"c{name}") if checkpoint else None
        spec = replace(self._spec(frozen), tracker=tracker)
        self.snapshots[frozen.name] = freeze([(self.disk, spec)], drain_timeout=SECONDS, on_broken=self._note_broken)[0]
        if durable:
            self.when(_durable(contents))
            assert self.recorder.folder in self.recorder.synced_folders
        self.when(_add(frozen))
        if tracker is not None:
            self.flush()  # what the guest wrote before the instant is part of the checkpoint
            self.when(_is_active(f"c{name}", contents))

    def _new_tracker(self, name: str) -> Tracker:
        bits = BitFile.create(str(self.folder / f"{name}.bitmap"), size=len(self.active), granularity=GRAIN)
        tracker = Tracker(bits, IntentLog.create(str(self.folder / f"{name}.intent"), REGION))
        self.trackers.append(tracker)
        self.when(lambda model: model.checkpoints.append(Checkpoint(name, None)))
        return tracker

    def settle(self) -> None:
        """What a server does now and then: the recording bitmap settles, the others become durable."""
        for number, tracker in enumerate(self.trackers):
            if tracker is self.disk.tracker:
                tracker.settle()
            else:
                tracker.sync()
                self.when(_is_synced(number))

    def trim(self, name: str, ranges: list[tuple[int, int]]) -> None:
        """Trims of a snapshot, one connection each."""
        snapshot = self.snapshots[name]
        clusters: set[int] = set()
        for offset, length in ranges:
            first, end = clusters_within(offset, length, snapshot.cluster_size, snapshot.size)
            clusters.update(range(first, end))
        self.when(_trims(name, clusters, answered=False))
        trims = [in_thread(partial(snapshot.discard, *where)) for where in ranges]
        try:
            for trim in trims:
                trim.wait()
        except (SnapshotBroken, OSError):
            assert snapshot.broken or name in self.failing
        else:
            self.when(_trims(name, clusters, answered=True))

    def fail_copies(self, name: str) -> None:
        """From now on a copy for this snapshot fails."""

        def fail(offset: int, data: object) -> None:
            raise OSError(28, "No space left on device")

        self.when(_may_break(name))
        self.failing.add(name)
        self.snapshots[name].temp.file.write = fail  # type: ignore[method-assign]

    def delete(self, name: str) -> None:
        self.when(_may_break(name))
        self.snapshots.pop(name).remove(SECONDS)
        self.when(_is_gone(name))

    # Its end.

    def crash(self, moment: int, way: str, seed: int, target: Path) -> Life:
        """The next life, over what is left in `target` of a crash after call `moment`; `way` "kill": by kill -9."""
        target.mkdir()
        self.recorder.crash(moment, "kept" if way == "kill" else way, seed, target)
        model = deepcopy(self.base)
        for when, change in self.changes:
            if when <= moment:
                change(model)
        # A start that was interrupted has not yet said that it knows of the loss of power.
        power_lost = way != "kill" or (self.power_lost and moment < self.booted)
        return Life(target, model, power_lost=power_lost)

    def close(self) -> None:
        """Give everything back; the files stay as they are."""
        self.disk.close(SECONDS)
        for snapshot in self.snapshots.values():
            snapshot.suspend()
        for tracker in self.trackers:
            tracker.close()


def first_life(folder: Path, contents: bytes) -> Life:
    """A disk with nothing on it but its contents, whose changes are not recorded yet."""
    folder.mkdir()
    (folder / "disk.img").write_bytes(contents)
    return Life(folder, Model(), power_lost=False)


def _durable(contents: bytes) -> Change:
    def apply(model: Model) -> None:
        model.disk = [{contents[i : i + SECTOR]} for i in range(0, len(contents), SECTOR)]

    return apply


def _add(frozen: Frozen) -> Change:
    def apply(model: Model) -> None:
        model.frozen[frozen.name] = deepcopy(frozen)

    return apply


def _is_active(name: str, contents: bytes) -> Change:
    def apply(model: Model) -> None:
        next(c for c in model.checkpoints if c.name == name).contents = contents

    return apply


def _is_synced(number: int) -> Change:
    def apply(model: Model) -> None:
        model.checkpoints[number].synced = True

    return apply


def _may_break(name: str) -> Change:
    def apply(model: Model) -> None:
        model.frozen[name].may_be_broken = True

    return apply


def _is_gone(name: str) -> Change:
    def apply(model: Model) -> None:
        del model.frozen[name]

    return apply


def _is_broken(name: str) -> Change:
    def apply(model: Model) -> None:
        model.frozen[name].may_be_broken = model.frozen[name].broken = True

    return apply


def _trims(name: str, clusters: set[int], *, answered: bool) -> Change:
    def apply(model: Model) -> None:
        frozen = model.frozen[name]
        frozen.maybe |= clusters
        if answered:
            frozen.trimmed |= clusters

    return apply
