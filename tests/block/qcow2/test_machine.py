"""Random sequences against a model in memory, with qemu-img as the judge."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from fleecing.block.qcow2.node import TempImage
from fleecing.errors import TempLimitReached
from fleecing.units import KiB
from tests.block.qcow2.tools import check, copy, make_image, pattern, qemu_map, qemu_read, read, reopen

CLUSTERS = 300
RUN = st.tuples(st.integers(0, CLUSTERS - 1), st.integers(1, 150))


class TempImageMachine(RuleBasedStateMachine):
    """The model: what each mapped cluster holds, and which host runs were taken and not given back."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="fleecing-"))
        self.model: dict[int, bytes] = {}
        self.taken: list[tuple[int, int]] = []
        self.serial = 0

    @initialize(
        cluster_size=st.sampled_from([512, 512, 1 * KiB, 4 * KiB]), odd=st.integers(-511, 0), tight=st.booleans()
    )
    def create(self, cluster_size: int, odd: int, tight: bool) -> None:
        """A new image of CLUSTERS clusters; a tight limit takes about half of them."""
        self.limit = 170 * cluster_size if tight else None
        self.image = make_image(self.folder, CLUSTERS * cluster_size + odd, cluster_size, limit=self.limit)

    def _free_runs(self, first: int, count: int) -> list[tuple[int, int]]:
        """The unmapped runs of a range."""
        runs: list[tuple[int, int]] = []
        for cluster in range(first, min(first + count, CLUSTERS)):
            if cluster not in self.model:
                if runs and sum(runs[-1]) == cluster:
                    runs[-1] = (runs[-1][0], runs[-1][1] + 1)
                else:
                    runs.append((cluster, 1))
        return runs

    @rule(run=RUN)
    def copy(self, run: tuple[int, int]) -> None:
        """Copy what is not mapped yet."""
        self.serial += 1
        for first, count in self._free_runs(*run):
            try:
                copy(self.image, first, count, self.serial)
            except TempLimitReached:
                assert self.limit is not None
                self._forget_half_copied(first, count)
                return
            for cluster in range(first, first + count):
                self.model[cluster] = pattern(self.image, cluster, self.serial)

    def _forget_half_copied(self, first: int, count: int) -> None:
        """The copy of tools.py releases nothing when it fails; start over, as after a crash."""
        self.image.release(self.image.unlink(first, count))
        self.reopen()

    @rule(run=RUN)
    def zero(self, run: tuple[int, int]) -> None:
        """Link zero clusters where nothing is mapped, or zeroes are."""
        for first, count in self._free_runs(*run):
            try:
                self.image.link_zero(first, count)
            except TempLimitReached:
                return
            for cluster in range(first, first + count):
                self.model[cluster] = bytes(self.image.cluster_size)

    @rule(run=RUN)
    def unlink(self, run: tuple[int, int]) -> None:
        """Unmap a range; its space stays taken."""
        first, count = run[0], min(run[1], CLUSTERS - run[0])
        hosts = [self.image.host_offset(cluster) for cluster in range(first, first + count)]
        freed = self.image.unlink(first, count)
        size = self.image.cluster_size
        assert {offset + i * size for offset, n in freed for i in range(n)} == {host for host in hosts if host > 1}
        self.taken += freed
        for cluster in range(first, first + count):
            self.model.pop(cluster, None)

    @rule(count=st.integers(1, 100))
    def place_only(self, count: int) -> None:
        """Take space and write to it, as a copy does that a trim overtakes."""
        try:
            runs = self.image.place(count)
        except TempLimitReached:
            return
        for offset, n in runs:
            self.image.file.write(offset, b"\xaa" * n * self.image.cluster_size)
        assert sum(n for _, n in runs) == count
        self.taken += runs

    @precondition(lambda self: self.taken)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        """Give some of what is taken back."""
        runs = data.draw(st.lists(st.sampled_from(self.taken), unique=True))
        self.taken = [run for run in self.taken if run not in runs]
        self.image.release(runs)

    @rule()
    def reopen(self) -> None:
        """A restart: nobody has any space taken any more."""
        self.image = reopen(self.image, self.limit)
        self.taken = []

    @rule(first=st.integers(0, CLUSTERS - 1), within=st.integers(0, 511), tail=st.integers(0, 511))
    def read(self, first: int, within: int, tail: int) -> None:
        """Read a linked range, of any alignment."""
        end = first
        while end in self.model and end - first < 40:
            end += 1
        if end > first:
            expected = b"".join(self.model[cluster] for cluster in range(first, end))
            length = len(expected) - within - tail
            if length > 0:
                got = read(self.image, first * self.image.cluster_size + within, length)
                assert got == expected[within : within + length]

    @rule()
    def qemu_agrees(self) -> None:
        """`qemu-img check` has nothing to say, and sees the same clusters."""
        assert check(self.image) == {}
        size = self.image.cluster_size
        mapped = {
            cluster: kind
            for start, length, kind in qemu_map(self.image)
            for cluster in range(start // size, -(-(start + length) // size))
        }
        assert mapped == {cluster: "data" if any(data) else "zero" for cluster, data in self.model.items()}

    @invariant()
    def mapping_is_the_model(self) -> None:
        """Every cluster is as the model says, and no host cluster has two users."""
        image: TempImage | None = getattr(self, "image", None)
        if image is None:
            return
        hosts = [image.host_offset(cluster) for cluster in range(CLUSTERS)]
        assert {cluster for cluster, host in enumerate(hosts) if host} == self.model.keys()
        data = [host for host in hosts if host > 1]
        data += [offset + i * image.cluster_size for offset, n in self.taken for i in range(n)]
        assert len(data) == len(set(data))
        assert len(data) * image.cluster_size < image.used_bytes <= image.peak_bytes
        assert self.limit is None or image.used_bytes <= self.limit
        cluster = 0
        while cluster < CLUSTERS:
            is_zero, count = image.next_change(cluster, CLUSTERS)
            assert [host == 1 for host in hosts[cluster : cluster + count]] == [is_zero] * count
            cluster += count

    def teardown(self) -> None:
        """qemu-img reads the whole disk as the model has it."""
        if hasattr(self, "image"):
            assert check(self.image) == {}
            size = self.image.cluster_size
            expected = b"".join(self.model.get(cluster, bytes(size)) for cluster in range(CLUSTERS))
            assert qemu_read(self.image, self.folder) == expected[: self.image.size]
            self.image.close()
        shutil.rmtree(self.folder)


TestTempImage = TempImageMachine.TestCase
TestTempImage.settings = settings(
    max_examples=40, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
)
