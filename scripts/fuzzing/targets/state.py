"""The state folder, damaged while no server ran: the disk is served; what is kept is exact or says why not."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from hypothesis import strategies as st

from fleecing.block.snapshot_access import SnapshotAccess
from fleecing.control.addresses import Addresses
from fleecing.control.checkpoint import Checkpoint
from fleecing.control.config import make_settings
from fleecing.control.disk import Snapshot
from fleecing.control.manager import Manager
from fleecing.control.models import SnapshotRequest
from fleecing.control.report import Reporter
from fleecing.errors import BlockError
from fleecing.server.listener import NbdServer
from scripts.fuzzing.damage import edits, json_edits, spoil
from scripts.fuzzing.target import Case, Finding
from scripts.fuzzing.targets.temp import has_seal

CLUSTER = 4096
CLUSTERS = 40
SIZE = CLUSTER * CLUSTERS - 10


_KINDS: dict[str, dict[str, object]] = {
    "full": {"checkpoint": "c1"},
    "inc": {"since": "c1", "checkpoint": "c2"},
    "durable": {"durable": True},
}


def _fill(byte: int) -> bytes:
    return bytes([byte]) * SIZE


class State:
    """The files of a server that was stopped or killed: the disk's record, three snapshots, two checkpoints."""

    def __init__(self, folder: Path) -> None:
        self._image, self._state = folder / "vda.img", folder / "state"
        self._bases = {"stopped": folder / "stopped", "killed": folder / "killed"}
        self._expected: dict[str, bytes] = {}
        self._bits: dict[str, bytes] = {}
        self._sealed = True
        self._image.write_bytes(_fill(1))
        manager = self._start()
        self._make(manager)
        self._now = self._image.read_bytes()
        chain = manager.disks["vda"].chain.checkpoints
        self._bits = {c.name: c.tracker.bits.tobytes() for c in chain if c.tracker is not None}
        shutil.copytree(self._state, self._bases["killed"])
        manager.close()
        shutil.copytree(self._state, self._bases["stopped"])
        self._mtime = self._image.stat().st_mtime_ns
        files = [str(path.relative_to(self._state)) for path in self._state.rglob("*") if path.is_file()]
        files = sorted({*files, ".creation-1.json"})
        one = st.fixed_dictionaries(
            {
                "file": st.sampled_from(files),
                "gone": st.sampled_from([False] * 9 + [True]),
                "edits": st.just([]) | edits,
                "json": st.just([]) | json_edits,
            }
        )
        self.cases = st.fixed_dictionaries(
            {"end": st.sampled_from(["stopped", "killed"]), "files": st.lists(one, min_size=1, max_size=2)}
        )

    def _start(self) -> Manager:
        disk = {"path": str(self._image), "cluster-size": CLUSTER}
        return Manager(make_settings({"disk": {"vda": disk}, "state-dir": str(self._state)}, "fuzz"))

    def _make(self, manager: Manager) -> None:
        node = manager.disks["vda"].node
        for number, (name, more) in enumerate(_KINDS.items()):
            if number == 1:
                node.write(0, _fill(2)[: SIZE // 2])
            manager.create(SnapshotRequest.model_validate({"disks": ["vda"], "name": name, **more}))
            self._expected[name] = node.read(0, SIZE)
            node.write(number * 5 * CLUSTER + 100, bytes([number + 5]) * (9 * CLUSTER))
        for snapshot in manager.snapshots():
            snapshot.node.discard(6 * CLUSTER, 3 * CLUSTER)

    def run(self, case: Case) -> None:
        shutil.rmtree(self._state, ignore_errors=True)
        shutil.copytree(self._bases[case["end"]], self._state)
        with self._image.open("r+b") as image:
            image.write(self._now)
        os.utime(self._image, ns=(self._mtime, self._mtime))
        for file in case["files"]:
            path = self._state / file["file"]
            if not path.exists():
                path.write_bytes(b'{"version": 1, "disks": ["vda"], "snapshot": "inc", "checkpoint": "c2"}')
            spoil(path, file)
        self._sealed = all(has_seal(path) for path in self._state.rglob("trimmed.bits"))
        self._sealed = self._sealed and all(has_seal(path) for path in self._state.rglob("*.bitmap"))
        manager = self._start()
        try:
            self._look(manager, case)
        finally:
            manager.close()
        self._again()

    def _look(self, manager: Manager, case: Case) -> None:
        node = manager.disks["vda"].node
        if node.read(0, SIZE) != self._now:
            raise Finding("the guest's disk changed")
        judged = not any(self._beyond_telling(case["end"], file) for file in case["files"])
        for snapshot in manager.snapshots("vda"):
            self._read(snapshot, judged=judged)
        for checkpoint in manager.disks["vda"].chain.checkpoints:
            self._look_at(checkpoint, judged=judged and case["end"] == "stopped")
        reporter = Reporter(manager, NbdServer(manager), Addresses((), (), "control"))
        reporter.status().model_dump_json()
        node.write(0, _fill(9))
        for snapshot in manager.snapshots("vda"):
            self._read(snapshot, judged=False)

    def _look_at(self, checkpoint: Checkpoint, *, judged: bool) -> None:
        if checkpoint.entry.inconsistent is not None or checkpoint.tracker is None:
            if not (checkpoint.entry.inconsistent or "").strip():
                raise Finding(f"checkpoint {checkpoint.name} is inconsistent without a reason")
        elif judged and checkpoint.tracker.bits.tobytes() != self._bits.get(checkpoint.name):
            raise Finding(f"checkpoint {checkpoint.name} forgot what changed")

    def _beyond_telling(self, end: str, file: Case) -> bool:
        """Other values that make sense, data, and where there is no seal, entries of tables and bits."""
        path = self._bases[end] / file["file"]
        if path.suffix in (".bits", ".bitmap"):
            return end == "killed" or not self._sealed
        return bool(file["json"]) or path.suffix == ".qcow2"

    def _read(self, snapshot: Snapshot, *, judged: bool) -> None:
        node = snapshot.node
        if node.broken is not None:
            if not node.broken.strip():
                raise Finding(f"{snapshot.name} is broken without a reason")
            return
        assert isinstance(node, SnapshotAccess)
        want = self._expected.get(snapshot.name)
        for offset, length in _clusters():
            try:
                found = node.read(offset, length)
            except (OSError, BlockError):
                continue
            if judged and want is not None and found != want[offset : offset + length]:
                raise Finding(f"{snapshot.name} has {found[:2]!r} at {offset}, and had {want[offset : offset + 2]!r}")

    def _again(self) -> None:
        """All of it can be deleted, and the next snapshot is right; the next server starts, too."""
        manager = self._start()
        try:
            for snapshot in manager.snapshots("vda"):
                manager.delete("vda", snapshot.name)
            for checkpoint in list(manager.disks["vda"].chain.checkpoints):
                manager.delete_checkpoint("vda", checkpoint.name)
            (snapshot,) = manager.create(SnapshotRequest(disks=["vda"], name="next", checkpoint="next"))
            manager.disks["vda"].node.write(0, _fill(4))
            if snapshot.node.read(0, SIZE) != _fill(9):
                raise Finding("a snapshot that was made afterwards is wrong")
            manager.delete("vda", "next")
        finally:
            manager.close()

    def close(self) -> None:
        """There is nothing to end."""


def _clusters() -> Iterator[tuple[int, int]]:
    return ((at, min(CLUSTER, SIZE - at)) for at in range(0, SIZE, CLUSTER))
