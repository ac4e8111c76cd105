"""A snapshot's files, damaged while no process had them: gone on with exactly, or refused with a reason.

The block layer alone, so that there are many shots a second. Damage to the data itself cannot be told, and after a loss
of power, where there is no seal, neither can damage to entries of tables and bits: then the contents are not judged.
"""

from __future__ import annotations

import shutil
from contextlib import suppress
from pathlib import Path

from hypothesis import strategies as st

from fleecing.block.bitfile import HEAD, SEAL, SEAL_BYTES
from fleecing.block.copy_before_write import CopyBeforeWrite
from fleecing.block.graph import SnapshotSpec, freeze, open_disk, revive
from fleecing.block.hostfile import HostFile
from fleecing.block.qcow2.node import TempImage
from fleecing.block.snapshot_access import SnapshotAccess
from fleecing.errors import BlockError
from scripts.fuzzing.damage import edits, spoil
from scripts.fuzzing.target import Case, Finding

CLUSTER = 4096
CLUSTERS = 71
SIZE = (CLUSTERS - 1) * CLUSTER + 100
CHECKED = 3 * CLUSTER
"""Bytes of temp that are all checked: header, refcount block, refcount table."""
COPIED, TRIMMED = range(3, 40), range(20, 30)
SECONDS = 10.0
FILES = ["temp.qcow2", "trimmed.bits", "copied.bits"]


def _content(cluster: int, generation: int) -> bytes:
    """Every third cluster is zero at first."""
    return bytes(CLUSTER) if generation == 0 and cluster % 3 == 0 else bytes([cluster + 1, generation]) * (CLUSTER // 2)


OLD = b"".join(_content(cluster, 0) for cluster in range(CLUSTERS))[:SIZE]
NEW = b"".join(_content(cluster, 9) for cluster in range(CLUSTERS))[:SIZE]


class Temp:
    """temp.qcow2 and the bit files of two snapshots, one of them durable."""

    cases = st.fixed_dictionaries(
        {
            "durable": st.booleans(),
            "power_lost": st.booleans(),
            "files": st.lists(
                st.fixed_dictionaries({"file": st.sampled_from(FILES), "edits": edits}), min_size=1, max_size=2
            ),
        }
    )

    def __init__(self, folder: Path) -> None:
        self._work = folder / "w"
        self._base = {durable: folder / f"base{durable:d}" for durable in (False, True)}
        for durable, base in self._base.items():
            self._work.mkdir()
            self._make(durable=durable)
            self._work.rename(base)
        self._data = _data_clusters(self._base[False] / FILES[0])

    def _spec(self, *, durable: bool) -> SnapshotSpec:
        temp, trimmed, copied = (str(self._work / name) for name in FILES)
        return SnapshotSpec(
            "vda@s", temp, CLUSTER, trimmed_path=trimmed, durable=durable, copied_path=copied if durable else None
        )

    def _make(self, *, durable: bool) -> None:
        (self._work / "disk").write_bytes(OLD)
        disk = open_disk(str(self._work / "disk"))
        (snapshot,) = freeze([(disk, self._spec(durable=durable))], drain_timeout=SECONDS, on_broken=_no_news)
        for cluster in COPIED:
            disk.write(cluster * CLUSTER, NEW[cluster * CLUSTER : (cluster + 1) * CLUSTER])
        snapshot.discard(TRIMMED.start * CLUSTER, len(TRIMMED) * CLUSTER)
        snapshot.suspend()
        disk.close()

    def run(self, case: Case) -> None:
        base = self._base[case["durable"]]
        shutil.rmtree(self._work, ignore_errors=True)
        shutil.copytree(base, self._work)
        for file in case["files"]:
            path = self._work / file["file"]
            if path.exists():
                spoil(path, file)
        sealed = not case["power_lost"] and has_seal(self._work / FILES[1])
        judged = not self._reaches_contents(base, sealed=sealed)
        now = (self._work / "disk").read_bytes()
        disk = open_disk(str(self._work / "disk"))
        try:
            snapshot = self._go_on(disk, case)
            if disk.read(0, SIZE) != now:
                raise Finding("the guest's disk changed")
            if snapshot is not None:
                self._use(disk, snapshot, judged=judged)
        finally:
            disk.close(SECONDS)

    def _go_on(self, disk: CopyBeforeWrite, case: Case) -> SnapshotAccess | None:
        spec = self._spec(durable=case["durable"])
        try:
            return revive(disk, spec, None, on_broken=_no_news, power_lost=case["power_lost"])
        except (OSError, BlockError) as e:
            if not str(e).strip():
                raise Finding("refused without a reason") from e
            return None

    def _use(self, disk: CopyBeforeWrite, snapshot: SnapshotAccess, *, judged: bool) -> None:
        """A guest goes on, and a backup; what the guest changes is saved in what there is."""
        _look(snapshot, judged=judged)
        disk.discard(0, SIZE // 2)
        with suppress(OSError, BlockError):
            snapshot.discard(0, 9 * CLUSTER)
        disk.write(0, bytes(range(1, 251)) * (SIZE // 250))
        _look(snapshot, judged=judged)
        if disk.read(0, 250) != bytes(range(1, 251)):
            raise Finding("a write of the guest is lost")
        snapshot.remove(SECONDS)

    def _reaches_contents(self, base: Path, *, sealed: bool) -> bool:
        """Whether files differ where nothing tells."""
        for name in FILES if base.name.endswith("1") else FILES[:2]:
            old, new = (base / name).read_bytes(), (self._work / name).read_bytes()
            if name != FILES[0]:
                if not sealed and old[HEAD:] != new[HEAD:]:
                    return True
                continue
            changed = {at for at in range(0, len(old), CLUSTER) if old[at : at + CLUSTER] != new[at : at + CLUSTER]}
            if any(at // CLUSTER in self._data or (not sealed and at >= CHECKED) for at in changed):
                return True
        return False

    def close(self) -> None:
        """There is nothing to end."""


def _look(snapshot: SnapshotAccess, *, judged: bool) -> None:
    if snapshot.broken is not None:
        return
    states = snapshot.counts()
    if sum(states.values()) != CLUSTERS:
        raise Finding(f"the clusters do not add up: {states}")
    for cluster in range(CLUSTERS):
        offset = cluster * CLUSTER
        want = OLD[offset : offset + CLUSTER]
        try:
            snapshot.block_status(offset, len(want))
            found = snapshot.read(offset, len(want))
        except (OSError, BlockError):
            continue
        if judged and (found != want or cluster in TRIMMED):
            raise Finding(f"cluster {cluster} reads as {found[:2]!r}, and was {want[:2]!r}")


def _data_clusters(path: Path) -> set[int]:
    """Numbers of the host clusters that hold data of the guest."""
    temp = TempImage.open(HostFile.open(str(path)))
    found = {temp.host_offset(cluster) // CLUSTER for cluster in range(CLUSTERS)}
    temp.close()
    return found - {0}


def has_seal(path: Path) -> bool:
    """Whether the bit file still has one: a hole that reaches over it takes it along."""
    return any(path.read_bytes()[SEAL : SEAL + SEAL_BYTES])


def _no_news(snapshot: SnapshotAccess, cause: str) -> None:
    if not cause.strip():
        raise Finding("broken without a reason")
