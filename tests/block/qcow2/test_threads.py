"""Several threads on one image: every cluster ends up with its own data, and nothing is lost or shared."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from fleecing.block.qcow2.node import TempImage
from fleecing.errors import ImageError
from fleecing.units import KiB
from tests.block.qcow2.tools import check, copy, make_image, pattern, read

CLUSTER = 4 * KiB
CLUSTERS = 1600  # in 4 L2 tables, all of which all threads use
THREADS = 4
ROUNDS = 1500


def _run(*jobs: Callable[[], None]) -> None:
    """Run the jobs at once; raises what the first of them raised."""
    errors: list[BaseException] = []

    def guarded(job: Callable[[], None]) -> None:
        try:
            job()
        except BaseException as e:
            errors.append(e)

    threads = [threading.Thread(target=guarded, args=(job,)) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def test_threads_copy_and_trim_clusters_of_the_same_tables(tmp_path: Path) -> None:
    image = make_image(tmp_path, CLUSTERS * CLUSTER, CLUSTER)
    mapped: list[dict[int, int]] = [{} for _ in range(THREADS)]

    def worker(number: int) -> None:
        """Owns every fourth group of 8 clusters."""
        rng = random.Random(number)
        mine = mapped[number]
        for serial in range(ROUNDS):
            first = (rng.randrange(CLUSTERS // 8 // THREADS) * THREADS + number) * 8
            if first in mine:
                assert read(image, first * CLUSTER, CLUSTER) == pattern(image, first, mine.pop(first))
                image.release(image.unlink(first, 8))
            else:
                copy(image, first, 8, serial)
                mine[first] = serial

    _run(*[lambda n=n: worker(n) for n in range(THREADS)])
    for mine in mapped:
        for first, serial in mine.items():
            expected = b"".join(pattern(image, cluster, serial) for cluster in range(first, first + 8))
            assert read(image, first * CLUSTER, 8 * CLUSTER) == expected
    assert check(image) == {}
    expected_data = 8 * sum(map(len, mapped))
    assert sum(image.host_offset(cluster) > 1 for cluster in range(CLUSTERS)) == expected_data


def test_readers_see_a_cluster_whole_or_not_at_all(tmp_path: Path) -> None:
    image = make_image(tmp_path, CLUSTERS * CLUSTER, CLUSTER)
    done = threading.Event()

    def writer() -> None:
        try:
            for serial in range(300):
                copy(image, 100, 4, serial)
                image.unlink(100, 4)  # not released: nobody else writes there
        finally:
            done.set()

    def reader() -> None:
        possible = {cluster: {pattern(image, cluster, serial) for serial in range(300)} for cluster in range(100, 104)}
        while not done.is_set():
            _read_whole(image, possible)

    _run(writer, reader, reader)


def _read_whole(image: TempImage, possible: dict[int, set[bytes]]) -> None:
    try:
        data = read(image, 100 * CLUSTER, 4 * CLUSTER)
    except ImageError:
        return
    for i in range(4):
        assert data[i * CLUSTER : (i + 1) * CLUSTER] in possible[100 + i]


def test_drop_while_others_work_ends_them_with_an_error(tmp_path: Path) -> None:
    image = make_image(tmp_path, CLUSTERS * CLUSTER, CLUSTER)
    started = threading.Barrier(3)

    def work_for_ever(cluster: int) -> None:
        started.wait()
        while True:
            copy(image, cluster)
            image.release(image.unlink(cluster, 1))

    def worker(cluster: int) -> None:
        with pytest.raises(ImageError, match="dropped"):
            work_for_ever(cluster)

    def dropper() -> None:
        started.wait()
        image.drop()

    _run(lambda: worker(0), lambda: worker(600), dropper)
    assert image.used_bytes == 0
    assert not any(image.host_offset(cluster) for cluster in range(CLUSTERS))
