"""The chain of checkpoints of a disk, over the real block layer: no change is ever lost, whatever is deleted when."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fleecing.block.bitfile import HEAD, BitFile
from fleecing.control.checkpoint import Untracked
from fleecing.control.config import make_settings
from fleecing.control.manager import Manager
from fleecing.control.models import SnapshotRequest
from fleecing.control.report import Reporter
from fleecing.errors import ControlError
from fleecing.server.listener import NbdServer
from fleecing.units import KiB
from tests.control.test_report import ADDRESSES

CLUSTER = 64 * KiB
COUNT = 41
SIZE = (COUNT - 1) * CLUSTER + 5


class Disk:
    """A manager of one disk, restarted at will, and a model: which clusters changed since each checkpoint."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "vda.img").write_bytes(b"\1" * SIZE)
        self.model: dict[str, set[int]] = {}
        self.start()

    def start(self, cluster_size: int = CLUSTER) -> None:
        disk = {"path": str(self.folder / "vda.img"), "cluster-size": cluster_size}
        settings = make_settings({"disk": {"vda": disk}, "state-dir": str(self.folder / "state")}, "test")
        self.manager = Manager(settings, drain_seconds=0)

    def stop(self) -> None:
        self.manager.close()

    def kill(self) -> None:
        """Leave all files as they are; only descriptors and locks go, as they do with a process."""
        for ticker in self.manager._tickers:
            ticker.close()
        self.manager.disks["vda"].close()

    def lose_power(self, durable: dict[str, bytes]) -> None:
        """Kill it; of the bit files there is what was `durable`, by path, or nothing but zeroes."""
        self.kill()
        record = self.state / "disk.json"
        record.write_text(json.dumps(json.loads(record.read_text()) | {"boot_id": "another"}))
        for path in self.checkpoints.glob("*.bitmap"):
            with path.open("r+b") as file:
                file.seek(HEAD)
                file.write(durable.get(str(path), bytes(COUNT // 8 + 1)))

    @property
    def state(self) -> Path:
        return self.folder / "state" / "vda"

    @property
    def checkpoints(self) -> Path:
        return self.state / "checkpoints"

    def index(self) -> list[dict[str, object]]:
        found: list[dict[str, object]] = json.loads((self.checkpoints / "index.json").read_text())["checkpoints"]
        return found

    def write(self, *clusters: int) -> None:
        for cluster in clusters:
            self.manager.disks["vda"].node.write(cluster * CLUSTER, b"\2")
            for changed in self.model.values():
                changed.add(cluster)

    def checkpoint(self, name: str, **options: object) -> None:
        request = {"disks": ["vda"], "name": f"of-{name}", "checkpoint": name, **options}
        self.manager.create(SnapshotRequest.model_validate(request))
        self.manager.delete("vda", f"of-{name}")
        self.model[name] = set()

    def delete(self, name: str) -> None:
        assert self.manager.delete_checkpoint("vda", name)
        del self.model[name]

    def changed(self, name: str) -> set[int]:
        return set(self.manager.disks["vda"].chain.changes(name).now().search(1))

    def check(self) -> None:
        """Every checkpoint knows exactly what changed since."""
        names = [checkpoint.name for checkpoint in self.manager.disks["vda"].chain.checkpoints]
        assert names == list(self.model)
        assert {name: self.changed(name) for name in names} == self.model


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    made = Disk(tmp_path)
    yield made
    made.stop()


def test_changes_since_every_checkpoint_are_known(disk: Disk) -> None:
    disk.write(0)
    disk.checkpoint("a")
    disk.check()
    disk.write(1, 2, 40)
    disk.checkpoint("b")
    disk.write(2, 3)
    disk.check()
    assert disk.changed("a") == {1, 2, 3, 40}


def test_only_one_bitmap_records(disk: Disk) -> None:
    for name in "abc":
        disk.checkpoint(name)
        disk.write(5)
    bits = [c.tracker.file.bits.count() for c in disk.manager.disks["vda"].chain.checkpoints if c.tracker is not None]
    disk.write(6, 7)
    now = [c.tracker.file.bits.count() for c in disk.manager.disks["vda"].chain.checkpoints if c.tracker is not None]
    assert (bits, now) == ([1, 1, 1], [1, 1, 3])


@pytest.mark.parametrize("order", list(itertools.permutations("abc")))
def test_checkpoints_are_deleted_in_any_order(disk: Disk, order: tuple[str, ...]) -> None:
    for number, name in enumerate("abc"):
        disk.checkpoint(name)
        disk.write(number, number + 10, 20)
    for number, name in enumerate(order):
        disk.delete(name)
        disk.check()
        disk.write(30 + number)
        disk.check()
    assert disk.manager.disks["vda"].node.tracker is None
    assert sorted(path.name for path in disk.checkpoints.iterdir()) == ["index.json"]
    assert not disk.manager.delete_checkpoint("vda", "a")


END = pytest.mark.parametrize("end", [Disk.stop, Disk.kill], ids=["stopped", "killed"])


@END
def test_all_is_known_after_a_restart(disk: Disk, end: Callable[[Disk], None]) -> None:
    disk.checkpoint("a")
    disk.write(1, 2)
    disk.checkpoint("b")
    disk.write(2, 3)
    for _ in range(2):
        end(disk)
        disk.start()
        disk.check()
        disk.write(9)
        disk.check()
    disk.delete("b")
    end(disk)
    disk.start()
    disk.check()


def test_random_histories_lose_nothing(disk: Disk) -> None:
    chance = random.Random(7)
    names = (f"c{number}" for number in itertools.count())
    for _ in range(150):
        match chance.randrange(8):
            case 0 | 1:
                disk.checkpoint(next(names))
            case 2 if disk.model:
                disk.delete(chance.choice(list(disk.model)))
            case 3:
                chance.choice([disk.stop, disk.kill])()
                disk.start()
            case 4:
                disk.manager.disks["vda"].chain.settle()
            case _:
                disk.write(*chance.sample(range(COUNT), 3))
        disk.check()


@pytest.mark.parametrize("seed", range(4))
def test_power_loss_costs_some_extra_and_loses_nothing(disk: Disk, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    durable: dict[str, bytes] = {}
    sync = BitFile.sync

    def remember(file: BitFile) -> None:
        sync(file)
        durable[file.path] = file.bits.tobytes()

    monkeypatch.setattr(BitFile, "sync", remember)
    chance = random.Random(seed)
    for number in range(60):
        match chance.randrange(6):
            case 0:
                disk.checkpoint(f"c{number}")
            case 1 if disk.model:
                disk.delete(chance.choice(list(disk.model)))
            case 2:
                disk.lose_power(durable)
                disk.start()
                for name in list(disk.model):
                    assert disk.changed(name) >= disk.model[name]
                    disk.model[name] = disk.changed(name)
            case 3:
                disk.manager.disks["vda"].chain.settle()
            case _:
                disk.write(*chance.sample(range(COUNT), 3))
        disk.check()


def test_bitmaps_of_another_cluster_size_are_converted(disk: Disk) -> None:
    disk.checkpoint("a")
    disk.write(1)
    disk.stop()
    disk.start(16 * KiB)
    assert disk.changed("a") == {4, 5, 6, 7}
    disk.manager.disks["vda"].node.write(0, b"\2")
    disk.model.clear()
    disk.checkpoint("b")
    disk.manager.disks["vda"].node.write(SIZE - 1, b"\2")
    disk.stop()
    disk.start(128 * KiB)
    assert (disk.changed("a"), disk.changed("b")) == ({0, 20}, {20})
    disk.manager.delete_checkpoint("vda", "b")
    assert disk.changed("a") == {0, 20}


def test_changes_are_told_in_clusters_that_a_qcow2_file_can_take_whole(disk: Disk) -> None:
    disk.stop()
    disk.start(4 * KiB)
    disk.checkpoint("a")
    disk.manager.disks["vda"].node.write(CLUSTER + 5000, b"\2")
    assert disk.changed("a") == set(range(16, 32))
    disk.delete("a")


def test_a_taken_name_is_refused_and_nothing_is_made(disk: Disk) -> None:
    disk.checkpoint("a")
    with pytest.raises(ControlError, match="disk 'vda' has a checkpoint 'a' already"):
        disk.checkpoint("a")
    assert disk.manager.snapshots() == []
    disk.check()


def test_creation_that_fails_leaves_the_old_tracker(disk: Disk) -> None:
    disk.checkpoint("a")
    gate = disk.manager.disks["vda"].node.gate
    gate.enter("a write")
    with pytest.raises(ControlError, match="took longer"):
        disk.checkpoint("b")
    gate.leave("a write")
    disk.write(3)
    disk.check()
    assert sorted(path.name for path in disk.checkpoints.iterdir()) == ["a.bitmap", "a.intent", "index.json"]


def test_failure_behind_the_instant_gives_what_was_recorded_back(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    disk.checkpoint("a")
    flush = disk.manager.disks["vda"].node.file.flush

    def fail() -> None:
        disk.write(7)
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(disk.manager.disks["vda"].node.file, "flush", fail)
    with pytest.raises(ControlError, match="cannot be flushed: Input"):
        disk.checkpoint("b")
    monkeypatch.setattr(disk.manager.disks["vda"].node.file, "flush", flush)
    disk.write(8)
    disk.check()
    assert disk.manager.snapshots() == []
    disk.kill()
    disk.start()
    disk.check()


def test_what_could_not_be_undone_is_undone_before_the_next_creation(
    disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk.checkpoint("a")
    gate = disk.manager.disks["vda"].node.gate

    def fail() -> None:
        gate.enter("a write")
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(disk.manager.disks["vda"].node.file, "flush", fail)
        with pytest.raises(ControlError, match="cannot be flushed"):
            disk.checkpoint("b")
    disk.write(5)
    with pytest.raises(ControlError, match="could not be undone yet"):
        disk.checkpoint("b")
    gate.leave("a write")
    disk.checkpoint("b")
    disk.check()
    assert list((disk.folder / "state").glob(".creation*")) == []


@pytest.mark.parametrize("state", ["pending", "deleting"])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_what_a_killed_server_did_not_finish_is_finished(disk: Disk, state: str, which: int) -> None:
    for number, name in enumerate("abc"):
        disk.checkpoint(name)
        disk.write(number)
    disk.kill()
    index = disk.index()
    index[which]["state"] = state
    (disk.checkpoints / "index.json").write_text(json.dumps({"version": 1, "checkpoints": index}))
    disk.start()
    del disk.model["abc"[which]]
    disk.check()
    disk.write(9)
    disk.check()
    assert len(list(disk.checkpoints.iterdir())) == 5


def test_checkpoint_of_an_unfinished_creation_is_undone(disk: Disk) -> None:
    disk.checkpoint("a")
    disk.write(1)
    disk.checkpoint("b")
    disk.write(2)
    disk.kill()
    unfinished = {"version": 1, "disks": ["vda"], "snapshot": "s", "checkpoint": "b"}
    (disk.folder / "state" / ".creation-1.json").write_text(json.dumps(unfinished))
    disk.start()
    del disk.model["b"]
    disk.check()


def test_files_that_no_index_names_are_removed_and_foreign_ones_stay(disk: Disk) -> None:
    disk.checkpoint("a")
    disk.kill()
    (disk.checkpoints / "old.bitmap").touch()
    (disk.checkpoints / "old.intent").touch()
    (disk.checkpoints / "mine.txt").touch()
    disk.start()
    disk.check()
    assert sorted(path.name for path in disk.checkpoints.iterdir()) == [
        "a.bitmap",
        "a.intent",
        "index.json",
        "mine.txt",
    ]


def states(disk: Disk) -> dict[str, str]:
    reporter = Reporter(disk.manager, NbdServer(disk.manager), ADDRESSES)
    return {info.name: info.state for info in reporter.checkpoints("vda")}


@pytest.mark.parametrize(
    "file, states_then",
    [
        ("a.bitmap", {"a": "inconsistent", "b": "active", "c": "active"}),
        ("b.intent", {"a": "inconsistent", "b": "inconsistent", "c": "active"}),
        ("c.bitmap", dict.fromkeys("abc", "inconsistent")),
    ],
)
def test_bitmap_that_is_missing_makes_it_and_those_before_inconsistent(
    disk: Disk, file: str, states_then: dict[str, str]
) -> None:
    for name in "abc":
        disk.checkpoint(name)
        disk.write(4)
    disk.kill()
    (disk.checkpoints / file).unlink()
    for _ in range(2):
        disk.start()
        assert states(disk) == states_then
        with pytest.raises(Untracked, match=r"checkpoint 'a' of disk 'vda' is inconsistent: .*No such file"):
            disk.changed("a")
        disk.stop()
    disk.start()
    disk.model = {name: changed for name, changed in disk.model.items() if states_then[name] == "active"}
    disk.write(5)
    disk.checkpoint("d")
    disk.write(6)
    assert {name: disk.changed(name) for name in disk.model} == disk.model
    for name in "abcd":
        assert disk.manager.delete_checkpoint("vda", name)
    assert [path.name for path in disk.checkpoints.iterdir()] == ["index.json"]
    assert disk.manager.disks["vda"].node.tracker is None


@pytest.mark.parametrize("content", ["{", '{"version": 2}', '{"version": 1, "checkpoints": [{"name": "a"}]}'])
def test_index_that_makes_no_sense_makes_all_inconsistent(disk: Disk, content: str) -> None:
    disk.checkpoint("a")
    disk.checkpoint("b")
    disk.kill()
    (disk.checkpoints / "index.json").write_text(content)
    disk.start()
    assert states(disk) == {"a": "inconsistent", "b": "inconsistent"}
    disk.model.clear()
    disk.checkpoint("c")
    assert states(disk)["c"] == "active"


def test_tracker_that_gives_up_spoils_what_was_and_not_what_comes(disk: Disk) -> None:
    disk.checkpoint("a")
    disk.checkpoint("b")
    tracker = disk.manager.disks["vda"].node.tracker
    assert tracker is not None
    tracker.give_up("no space")
    disk.write(1)
    assert states(disk) == {"a": "inconsistent", "b": "inconsistent"}
    disk.checkpoint("c")
    disk.write(2)
    disk.kill()
    disk.start()
    assert states(disk) == {"a": "inconsistent", "b": "inconsistent", "c": "active"}
    assert disk.changed("c") == {2}
    with pytest.raises(ControlError, match="inconsistent: no space; take a full one, or allow for it with --or-full"):
        disk.checkpoint("d", since="b")
    disk.checkpoint("d", since="b", or_full=True)


def test_image_that_was_written_meanwhile_makes_all_inconsistent(disk: Disk) -> None:
    disk.checkpoint("a")
    disk.stop()
    with (disk.folder / "vda.img").open("r+b") as image:
        image.write(b"x")
    disk.start()
    with pytest.raises(Untracked, match="inconsistent: the image was written by something else while it was not"):
        disk.changed("a")
    disk.stop()
    disk.start()
    assert states(disk) == {"a": "inconsistent"}


def test_changed_bytes_end_with_the_disk(disk: Disk) -> None:
    disk.checkpoint("a")
    disk.write(0, COUNT - 1)
    reporter = Reporter(disk.manager, NbdServer(disk.manager), ADDRESSES)
    (info,) = reporter.checkpoints()
    assert (info.changed, info.recording, info.granularity) == (CLUSTER + 5, True, CLUSTER)
    page = reporter.extent_page("vda", "a", 0, 1)
    assert [(e.offset, e.length) for e in page.extents] == [(0, CLUSTER)]
    assert page.next == (COUNT - 1) * CLUSTER
    page = reporter.extent_page("vda", "a", page.next, 1)
    assert [(e.offset, e.length) for e in page.extents] == [((COUNT - 1) * CLUSTER, 5)]
    assert page.next is None
