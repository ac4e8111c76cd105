"""A state machine over the copy engine: any order of changes, snapshots, trims, faults and races against a model."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
import threading
from functools import partial
from pathlib import Path
from random import Random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from fleecing.block.copy_before_write import OnCbwError
from fleecing.block.extent import Allocation, ClusterState
from fleecing.block.snapshot_access import SnapshotAccess
from fleecing.errors import BlockError, ClusterUnreadable, SnapshotBroken
from fleecing.units import KiB
from tests.block.rig import SECONDS, FaultyTemp, Rig, in_thread, pattern, write_together

SIZE = 10 * 4 * KiB + 777
NO_SPACE = OSError(28, "No space left on device")

ranges = st.tuples(st.integers(0, SIZE - 1), st.integers(1, SIZE)).map(lambda r: (r[0], min(r[1], SIZE - r[0])))
changes = st.tuples(st.sampled_from(["write", "zeroes", "discard"]), ranges, st.integers(0, 255))


class Frozen:
    """A snapshot and what it must give."""

    def __init__(self, snapshot: SnapshotAccess, temp: FaultyTemp, contents: bytes) -> None:
        self.snapshot = snapshot
        self.temp = temp
        self.contents = contents
        self.trimmed: set[int] = set()
        self.maybe: set[int] = set()  # being trimmed
        self.cluster = snapshot.cluster_size

    def clusters(self, offset: int, length: int) -> range:
        return range(offset // self.cluster, (offset + length - 1) // self.cluster + 1)

    def readable(self, offset: int, length: int) -> bool:
        return not self.trimmed.intersection(self.clusters(offset, length))


def read_as_a_connection_does(snapshot: SnapshotAccess, offset: int, length: int) -> bytes:
    """What takes no waiting first, the rest the long way."""
    buffer = bytearray(length)
    if not snapshot.read_cached(offset, memoryview(buffer)):
        snapshot.read_into(offset, memoryview(buffer))
    return bytes(buffer)


def apart(writes: list[tuple[int, bytes]]) -> list[tuple[int, bytes]]:
    """Those that overlap none before them: nobody knows the order in which overlapping ones in flight are done."""
    chosen: list[tuple[int, bytes]] = []
    for offset, data in writes:
        if all(offset + len(data) <= at or at + len(other) <= offset for at, other in chosen):
            chosen.append((offset, data))
    return chosen


class EngineMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.count = 0
        self.frozen: list[Frozen] = []

    @initialize(zero_from=st.integers(0, SIZE), zero_length=st.integers(0, SIZE))
    def start(self, zero_from: int, zero_length: int) -> None:
        contents = bytearray(pattern(SIZE))
        contents[zero_from : zero_from + zero_length] = bytes(min(zero_length, SIZE - zero_from))
        self.active = contents
        self.rig = Rig(self.folder, bytes(contents))

    # The guest.

    def change(self, kind: str, offset: int, length: int, fill: int) -> None:
        """A change of the active disk; an error may only come from a snapshot that asks for it, and changes nothing."""
        disk, data = self.rig.disk, bytes([fill]) * length
        try:
            match kind:
                case "write":
                    disk.write(offset, data)
                case "zeroes":
                    disk.write_zeroes(offset, length, may_unmap=bool(fill % 2))
                case "discard":
                    disk.discard(offset, length)
        except OSError:
            faulty = [f for f in self.frozen if f.temp.fail and f.snapshot.on_cbw_error is OnCbwError.BREAK_GUEST_WRITE]
            assert faulty, "a guest change failed and no snapshot may do that"
        else:
            self.active[offset : offset + length] = data if kind == "write" else bytes(length)

    @rule(change=changes)
    def guest_changes(self, change: tuple[str, tuple[int, int], int]) -> None:
        kind, (offset, length), fill = change
        self.change(kind, offset, length, fill)

    @rule(many=st.lists(st.tuples(ranges, st.integers(0, 255)), min_size=2, max_size=6))
    def guest_writes_together(self, many: list[tuple[tuple[int, int], int]]) -> None:
        self.write_many([(offset, bytes([fill]) * length) for (offset, length), fill in many])

    def write_many(self, writes: list[tuple[int, bytes]]) -> None:
        writes = apart(writes)
        for (offset, data), error in zip(writes, write_together(self.rig.disk, writes), strict=True):
            if error is None:
                self.active[offset : offset + len(data)] = data
            else:
                assert any(f.temp.fail and f.snapshot.on_cbw_error is OnCbwError.BREAK_GUEST_WRITE for f in self.frozen)

    @rule(where=ranges)
    def guest_reads(self, where: tuple[int, int]) -> None:
        offset, length = where
        assert self.rig.disk.read(offset, length) == self.active[offset : offset + length]

    # Snapshots.

    @precondition(lambda self: len(self.frozen) < 3)
    @rule(cluster_size=st.sampled_from([512, 4 * KiB, 16 * KiB]), policy=st.sampled_from(list(OnCbwError)))
    def snapshot(self, cluster_size: int, policy: OnCbwError) -> None:
        self.count += 1
        snapshot, temp = self.rig.snapshot(f"s{self.count}", cluster_size=cluster_size, on_cbw_error=policy)
        self.frozen.append(Frozen(snapshot, temp, bytes(self.active)))

    @precondition(lambda self: self.frozen)
    @rule(data=st.data())
    def delete(self, data: st.DataObject) -> None:
        frozen = self.frozen.pop(data.draw(st.integers(0, len(self.frozen) - 1)))
        frozen.snapshot.remove(SECONDS)
        assert not Path(frozen.temp.path).exists()

    def one(self, data: st.DataObject) -> Frozen:
        return data.draw(st.sampled_from(self.frozen))

    def trim(self, frozen: Frozen, offset: int, length: int) -> None:
        try:
            frozen.snapshot.discard(offset, length)
        except SnapshotBroken:
            assert frozen.snapshot.broken
            return
        except OSError:
            # Temp refused the write that unlinks: not readable all the same, and to be asked again.
            assert frozen.temp.fail
        end = offset + length
        frozen.trimmed |= {
            number
            for number in range(-(-SIZE // frozen.cluster))
            if offset <= number * frozen.cluster and min(SIZE, (number + 1) * frozen.cluster) <= end
        }

    @precondition(lambda self: self.frozen)
    @rule(data=st.data(), where=ranges)
    def trims(self, data: st.DataObject, where: tuple[int, int]) -> None:
        self.trim(self.one(data), *where)

    def check_read(self, frozen: Frozen, offset: int, length: int) -> None:
        before = frozen.readable(offset, length)
        try:
            got = read_as_a_connection_does(frozen.snapshot, offset, length)
        except SnapshotBroken:
            assert frozen.snapshot.broken
        except ClusterUnreadable:
            assert not frozen.readable(offset, length)
        else:
            assert before
            assert got == frozen.contents[offset : offset + length]

    @precondition(lambda self: self.frozen)
    @rule(data=st.data(), where=ranges)
    def reads(self, data: st.DataObject, where: tuple[int, int]) -> None:
        self.check_read(self.one(data), *where)

    @precondition(lambda self: self.frozen)
    @rule(data=st.data(), where=ranges)
    def block_status(self, data: st.DataObject, where: tuple[int, int]) -> None:
        frozen = self.one(data)
        offset, length = where
        try:
            runs = frozen.snapshot.block_status(offset, length)
            states = frozen.snapshot.cluster_state(offset, length)
        except BlockError:
            assert frozen.snapshot.broken or not frozen.readable(offset, length)
            return
        assert sum(n for n, _ in runs) == sum(n for n, _ in states) == length
        for n, state in runs:
            if state != Allocation.DATA:
                assert not any(frozen.contents[offset : offset + n])
            offset += n
        assert all(state in (ClusterState.UNTOUCHED, ClusterState.COPIED) for _, state in states)

    # Races and faults.

    @precondition(lambda self: self.frozen)
    @rule(data=st.data(), where=ranges, change=changes, trim=st.one_of(st.none(), ranges))
    def change_during_a_read(
        self,
        data: st.DataObject,
        where: tuple[int, int],
        change: tuple[str, tuple[int, int], int],
        trim: tuple[int, int] | None,
    ) -> None:
        frozen = self.one(data)
        kind, (offset, length), fill = change

        def meanwhile() -> None:
            if trim is not None:
                self.trim(frozen, *trim)
            self.change(kind, offset, length, fill)

        self.rig.file.after_read = meanwhile
        self.check_read(frozen, *where)
        self.rig.file.after_read = None

    @precondition(lambda self: any(not f.temp.fail and not f.snapshot.broken for f in self.frozen))
    @rule(data=st.data(), places=st.lists(ranges, min_size=1, max_size=4), trim=ranges, read=ranges)
    def trim_and_read_during_a_copy(
        self, data: st.DataObject, places: list[tuple[int, int]], trim: tuple[int, int], read: tuple[int, int]
    ) -> None:
        frozen = data.draw(st.sampled_from([f for f in self.frozen if not f.temp.fail and not f.snapshot.broken]))
        if any(f.temp.fail for f in self.frozen):
            return
        frozen.temp.hold = hold = threading.Event()
        writes = apart([(offset, b"\xee" * length) for offset, length in places])
        write = in_thread(lambda: write_together(self.rig.disk, writes))
        # Where there is something to write to temp the copy waits there now; else the write just ends.
        while not write.over.is_set() and not frozen.temp.held.acquire(timeout=0.001):
            pass
        frozen.temp.hold = None
        self.check_read(frozen, *read)
        trimmed = in_thread(lambda: self.trim(frozen, *trim))
        hold.set()
        trimmed.wait()
        write.wait()
        for offset, contents in writes:
            self.active[offset : offset + len(contents)] = contents
        self.check_read(frozen, *read)

    @precondition(lambda self: self.frozen)
    @rule(
        data=st.data(),
        skip=st.integers(0, 8),
        failures=st.integers(1, 3),
        change=changes,
        others=st.lists(ranges, max_size=4),
    )
    def temp_fails(
        self,
        data: st.DataObject,
        skip: int,
        failures: int,
        change: tuple[str, tuple[int, int], int],
        others: list[tuple[int, int]],
    ) -> None:
        frozen = self.one(data)
        frozen.temp.fail, frozen.temp.skip, frozen.temp.failures = NO_SPACE, skip, failures
        kind, (offset, length), fill = change
        if kind == "write":
            self.write_many([(at, bytes([fill]) * count) for at, count in [(offset, length), *others]])
        else:
            self.change(kind, offset, length, fill)
        frozen.temp.fail = None
        if frozen.snapshot.broken:
            assert frozen.snapshot.on_cbw_error is OnCbwError.BREAK_SNAPSHOT
            assert "No space left on device" in frozen.snapshot.broken

    def teardown(self) -> None:
        if hasattr(self, "rig"):
            self.check_all()
            self.rig.close()
        shutil.rmtree(self.folder)

    def check_all(self) -> None:
        assert self.rig.path.read_bytes() == self.active
        for frozen in self.frozen:
            for offset in range(0, SIZE, frozen.cluster):
                self.check_read(frozen, offset, min(frozen.cluster, SIZE - offset))
            if not frozen.snapshot.broken:
                self.check_temp(frozen)

    @staticmethod
    def check_temp(frozen: Frozen) -> None:
        """What plain qemu-img makes of the temp file: no corruption, and the frozen bytes where nothing was trimmed."""
        found = subprocess.run(
            ["qemu-img", "check", "-U", "-q", "-f", "qcow2", frozen.temp.path], check=False, capture_output=True
        )
        assert found.returncode in (0, 3), found.stdout  # 3: clusters leaked by the writes that were made to fail
        raw = Path(frozen.temp.path + ".raw")
        subprocess.run(["qemu-img", "convert", "-U", "-f", "qcow2", "-O", "raw", frozen.temp.path, raw], check=True)
        got = raw.read_bytes()
        for offset in range(0, SIZE, frozen.cluster):
            if frozen.readable(offset, 1):
                end = min(SIZE, offset + frozen.cluster)
                assert got[offset:end] == frozen.contents[offset:end]


TestEngine = EngineMachine.TestCase
TestEngine.settings = settings(max_examples=60, stateful_step_count=30)


class Race:
    """Threads that go as fast as they can at one disk; what each may see follows from no lock but the engine's own."""

    SIZE = 64 * 4 * KiB + 5

    def __init__(self, folder: Path, seed: int) -> None:
        self.rig = Rig(folder, pattern(self.SIZE))
        self.seed = seed
        self.stop = threading.Event()
        self.reads = 0

    def somewhere(self, random: Random) -> tuple[int, int]:
        offset = random.randrange(self.SIZE)
        return offset, min(random.choice([1, 100, 512, 4096, 20000, 60000]), self.SIZE - offset)

    def write(self, number: int) -> None:
        random, disk = Random(self.seed * 100 + number), self.rig.disk
        while not self.stop.is_set():
            offset, length = self.somewhere(random)
            try:
                match random.randrange(4):
                    case 0:
                        disk.discard(offset, length)
                    case 1:
                        disk.write_zeroes(offset, length)
                    case _:
                        disk.write(offset, random.randbytes(length))
            except OSError as e:
                assert e is NO_SPACE  # noqa: PT017 a temp was told to fail, and its snapshot to break guest writes

    def read(self, frozen: Frozen, over: threading.Event, number: int) -> None:
        random = Random(self.seed * 100 + number)
        while not over.is_set():
            offset, length = self.somewhere(random)
            asked = frozen.readable(offset, length)  # what was said to be trimmed before the read, must fail
            try:
                got = read_as_a_connection_does(frozen.snapshot, offset, length)
            except ClusterUnreadable:
                assert frozen.maybe.intersection(frozen.clusters(offset, length))
            else:
                assert asked
                assert got == frozen.contents[offset : offset + length]
            self.reads += 1

    def turn(self, number: int) -> None:
        """One snapshot: read by three threads while it is trimmed from the start and its temp fails now and then."""
        taken: list[bytes] = []
        snapshot, temp = self.rig.snapshot(
            f"s{number}",
            cluster_size=4 * KiB,
            on_cbw_error=OnCbwError.BREAK_GUEST_WRITE,
            at_instant=lambda: taken.append(self.rig.path.read_bytes()),
        )
        frozen, over = Frozen(snapshot, temp, taken[0]), threading.Event()
        readers = [in_thread(partial(self.read, frozen, over, 10 + n)) for n in range(3)]
        random = Random(self.seed)
        for cluster in range(0, 48, 3):
            target = self.reads + 60
            while self.reads < target and not any(reader.over.is_set() for reader in readers):
                temp.failures, temp.fail = random.choice([(0, None), (1, NO_SPACE)])
            # The trim may be seen from now on; it must be seen once it has returned.
            doubtful = set(range(cluster, cluster + 2))
            frozen.maybe |= doubtful
            temp.fail = None
            snapshot.discard(cluster * 4 * KiB, 2 * 4 * KiB)
            frozen.trimmed |= doubtful
        over.set()
        for reader in readers:
            reader.wait()
        temp.fail = None
        assert snapshot.broken is None
        snapshot.remove(SECONDS)


@pytest.mark.parametrize("seed", range(3))
def test_reads_stay_exact_while_threads_write_trim_and_fail(tmp_path: Path, seed: int) -> None:
    race = Race(tmp_path, seed)
    writers = [in_thread(partial(race.write, number)) for number in range(3)]
    for number in range(3):
        race.turn(number)
    race.stop.set()
    for writer in writers:
        writer.wait()
    race.rig.close()
