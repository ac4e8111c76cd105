"""Writes that fail, and a server that is killed: whichever write it is, the image stays right."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from fleecing.block.qcow2.node import TempImage
from fleecing.errors import ImageError
from fleecing.units import MiB
from tests.block.qcow2.tools import (
    FailingFile,
    StoppingFile,
    check,
    copy,
    make_image,
    pattern,
    qemu_read,
    read,
    reopen,
)

CLUSTER = 512  # small, so that few clusters take several L2 tables (64 each) and refcount blocks (256 each)
SIZE = 400 * CLUSTER

Step = Callable[[TempImage], object]


def _copy(first: int, count: int) -> Step:
    def step(image: TempImage) -> None:
        cluster = first
        runs = image.place(count)
        try:
            while runs:
                host, n = runs[0]
                image.file.write(host, b"".join(pattern(image, cluster + i) for i in range(n)))
                image.link(cluster, host, n)
                cluster += n
                runs.pop(0)
        except OSError:
            image.release(runs)
            if cluster > first:  # what is linked by now is not to be copied again
                image.release(image.unlink(first, cluster - first))
            raise

    return step


def _zero(first: int, count: int) -> Step:
    return lambda image: image.link_zero(first, count)


def _trim(first: int, count: int) -> Step:
    return lambda image: image.release(image.unlink(first, count))


# Tables come and go, space is reused, ranges of refcounts are entered.
STEPS = [
    _copy(10, 1),
    _copy(11, 3),
    _copy(15, 1),  # one alone, with its table there
    _zero(20, 5),
    _copy(60, 8),
    _zero(100, 200),
    _trim(60, 3),
    _trim(120, 170),
    _copy(120, 10),
    _trim(0, 64),
    _copy(270, 20),
    _copy(0, 64),
    _trim(64, 60),
    _copy(300, 100),
]


def _expected() -> dict[int, int]:
    """Guest cluster -> 1 where it is a zero cluster, 2 where it has data, at the end of STEPS."""
    data = {*range(64), *range(124, 130), *range(270, 290), *range(300, 400)}
    return dict.fromkeys(range(290, 300), 1) | dict.fromkeys(data, 2)


def _kinds(image: TempImage) -> dict[int, int]:
    found = ((cluster, image.host_offset(cluster)) for cluster in range(image.clusters))
    return {cluster: min(host, 2) for cluster, host in found if host}


def _assert_right(image: TempImage, clusters: dict[int, int]) -> None:
    for cluster, kind in clusters.items():
        expected = bytes(CLUSTER) if kind == 1 else pattern(image, cluster)
        assert read(image, cluster * CLUSTER, CLUSTER) == expected


def _new(folder: Path, size: int = SIZE) -> tuple[TempImage, FailingFile]:
    (folder / "temp.qcow2").unlink(missing_ok=True)
    file = FailingFile.create(str(folder / "temp.qcow2"))
    assert isinstance(file, FailingFile)
    return make_image(folder, size, CLUSTER, file=file), file


def _cost(folder: Path) -> tuple[int, int]:
    """The writes of STEPS, and the bytes in use after them."""
    image, file = _new(folder)
    file.fail_after(1 << 30)
    for step in STEPS:
        step(image)
    image.close()
    assert file.left is not None
    return (1 << 30) - file.left, image.used_bytes


def test_steps_without_a_fault_end_as_expected(tmp_path: Path) -> None:
    image = make_image(tmp_path, SIZE, CLUSTER)
    for step in STEPS:
        step(image)
        assert check(image) == {}
    assert _kinds(image) == _expected()
    _assert_right(image, _expected())


@pytest.mark.parametrize("share", [0, 0.5, 1])
def test_any_one_write_may_fail_and_the_step_be_repeated(tmp_path: Path, share: float) -> None:
    writes, used = _cost(tmp_path)
    for n in range(writes):
        image, file = _new(tmp_path)
        file.fail_after(n, share=share)
        faulty = False
        for step in STEPS:
            try:
                step(image)
            except OSError:
                faulty = True
                assert check(image).keys() <= {"leaks"}, f"write {n}"
                step(image)
        assert file.failed == 1
        assert _kinds(image) == _expected(), f"write {n}"
        _assert_right(image, _expected())
        # An empty table that could not be freed is no reason for an error: it stays, and leaks at worst.
        assert image.used_bytes == used or (not faulty and image.used_bytes == used + CLUSTER), f"write {n}"
        assert check(image) == {} or (not faulty and check(image) == {"leaks": 1}), f"write {n}"
        image = reopen(image)
        assert _kinds(image) == _expected(), f"write {n}"
        assert check(image) == {}, f"write {n}"
        image.close()


@pytest.mark.parametrize("share", [0, 0.5, 1])
def test_all_writes_from_any_one_on_may_fail_until_the_host_recovers(tmp_path: Path, share: float) -> None:
    for n in range(_cost(tmp_path)[0]):
        image, file = _new(tmp_path)
        file.fail_after(n, share=share, lasting=True)
        for step in STEPS:
            try:
                step(image)
            except OSError:
                assert "corruptions" not in check(image), f"write {n}"
                with pytest.raises(OSError, match="made to fail"):
                    step(image)
                file.heal()
                step(image)
        assert _kinds(image) == _expected(), f"write {n}"
        _assert_right(image, _expected())
        assert check(image).keys() <= {"leaks"}, f"write {n}"
        image.close()


@pytest.mark.parametrize("share", [0, 0.5, 1])
@pytest.mark.parametrize("writes", [0, 1])  # the counts, the entries
@pytest.mark.parametrize("count", [1, 20])
def test_link_that_fails_is_undone_at_once(tmp_path: Path, writes: int, share: float, count: int) -> None:
    image, file = _new(tmp_path)
    copy(image, 0)
    (run,) = image.place(count)
    image.file.write(run[0], b"x" * count * CLUSTER)
    file.fail_after(writes, share=share)
    with pytest.raises(OSError, match="made to fail"):
        image.link(10, run[0], count)
    assert check(image) == {}
    image.release([run])
    assert image.place(count) == [run]


@pytest.mark.parametrize("count", [1, 4])
def test_clusters_that_the_file_may_still_link_are_not_reused(tmp_path: Path, count: int) -> None:
    image, file = _new(tmp_path, MiB)
    copy(image, 0)
    (run,) = image.place(count)
    image.file.write(run[0], b"x" * count * CLUSTER)
    file.fail_after(1, share=0.5, lasting=True)  # the counts go up; the entries get there in part
    with pytest.raises(OSError, match="made to fail"):
        image.link(10, run[0], count)
    file.heal()
    used = image.used_bytes
    image.release([run])
    assert image.used_bytes == used
    assert not any(run[0] <= host < run[0] + count * CLUSTER for host, _ in image.place(1) + image.place(4))
    assert check(image).keys() <= {"leaks"}


@pytest.mark.parametrize("count", [1, 4])
def test_doubtful_clusters_are_trusted_again_once_they_are_linked(tmp_path: Path, count: int) -> None:
    image, file = _new(tmp_path, MiB)
    copy(image, 0)
    (run,) = image.place(count)
    image.file.write(run[0], b"x" * count * CLUSTER)
    file.fail_after(1, share=0.5, lasting=True)
    with pytest.raises(OSError, match="made to fail"):
        image.link(10, run[0], count)
    file.heal()
    image.link(10, run[0], count)
    image.release(image.unlink(10, count))
    assert image.place(count) == [run]
    assert check(image) == {}


@pytest.mark.parametrize("share", [0, 1])
def test_table_that_could_not_be_freed_is_used_again(tmp_path: Path, share: float) -> None:
    image, file = _new(tmp_path, MiB)
    copy(image, 0)
    copy(image, 64)
    image.release(image.unlink(0, 1))
    file.fail_after(2, share=share)  # entry, count, and then the L1 entry of the table emptied before
    image.release(image.unlink(64, 1))
    assert file.failed == 1
    copy(image, 0)
    copy(image, 64)
    assert check(image) == {}
    _assert_right(image, {0: 2, 64: 2})


@pytest.mark.parametrize("share", [0, 0.5])
def test_killed_after_any_write_it_leaks_at_worst(tmp_path: Path, share: float) -> None:
    for n in range(_cost(tmp_path)[0]):
        (tmp_path / "temp.qcow2").unlink(missing_ok=True)
        file = StoppingFile.create(str(tmp_path / "temp.qcow2"))
        assert isinstance(file, StoppingFile)
        image = make_image(tmp_path, SIZE, CLUSTER, file=file)
        file.stop_after(n, share=share)
        alive: dict[int, int] = {}
        for step in STEPS:
            step(image)
            if file.stopped:
                break
            alive = _kinds(image)
        during = _kinds(image)
        assert check(image).keys() <= {"leaks"}, f"write {n}"
        image = reopen(image)
        found = _kinds(image)
        # What was linked before the fatal step, or is after it; nothing else, and what is in both is there.
        assert found.items() <= (alive.items() | during.items()), f"write {n}"
        assert found.items() >= (alive.items() & during.items()), f"write {n}"
        _assert_right(image, found)
        assert check(image) == {}, f"write {n}"
        image.release(image.unlink(299, 1))
        copy(image, 299)
        assert check(image) == {}, f"write {n}"
        image.close()


def test_creation_that_stops_half_way_is_no_image(tmp_path: Path) -> None:
    for n in range(3):
        (tmp_path / "temp.qcow2").unlink(missing_ok=True)
        file = FailingFile.create(str(tmp_path / "temp.qcow2"))
        assert isinstance(file, FailingFile)
        file.fail_after(n)
        with pytest.raises(OSError, match="made to fail"):
            make_image(tmp_path, SIZE, CLUSTER, file=file)
        with pytest.raises(ImageError, match="is no qcow2 image"):
            TempImage.open(file)
        file.close()


def test_image_reads_the_same_through_qemu_after_faults(tmp_path: Path) -> None:
    image, file = _new(tmp_path)
    for n, step in enumerate(STEPS):
        file.fail_after(n % 4, share=0.5)
        try:
            step(image)
        except OSError:
            step(image)
    expected = bytearray(SIZE)
    for cluster, kind in _expected().items():
        if kind == 2:
            expected[cluster * CLUSTER : (cluster + 1) * CLUSTER] = pattern(image, cluster)
    assert qemu_read(image, tmp_path) == expected
