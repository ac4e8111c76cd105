"""TempImage: place, link, unlink, release and the readers, one behaviour each."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fleecing.block.qcow2.node import TempImage
from fleecing.errors import ImageError, TempLimitReached
from fleecing.units import KiB, MiB, TiB
from tests.block.qcow2.tools import (
    CLUSTER,
    RecordingFile,
    check,
    copy,
    make_backing,
    make_image,
    pattern,
    qemu_img,
    qemu_map,
    qemu_read,
    read,
)

CLUSTER_SIZES = [1 << bits for bits in range(9, 22)]


def recording(folder: Path, size: int = 64 * MiB, cluster_size: int = CLUSTER) -> tuple[TempImage, RecordingFile]:
    """An image whose file remembers what is written."""
    file = RecordingFile.create(str(folder / "temp.qcow2"))
    assert isinstance(file, RecordingFile)
    image = make_image(folder, size, cluster_size, file=file)
    file.writes.clear()
    return image, file


# What is in the image


@pytest.mark.parametrize("cluster_size", CLUSTER_SIZES)
def test_copied_clusters_are_what_qemu_reads(tmp_path: Path, cluster_size: int) -> None:
    per_table = cluster_size // 8
    size = 5 * cluster_size + 512 if cluster_size > 16 * KiB else 2 * per_table * cluster_size + 512
    image = make_image(tmp_path, size, cluster_size)
    last = image.clusters - 1
    expected = bytearray(image.size)
    for first, count in ((0, 1), (3, 2), (per_table - 1, 2), (last, 1)):
        if first + count <= image.clusters and not image.host_offset(first):
            copy(image, first, count)
            for cluster in range(first, first + count):
                expected[cluster * cluster_size : (cluster + 1) * cluster_size] = pattern(image, cluster)
    assert check(image) == {}
    assert qemu_read(image, tmp_path) == bytes(expected[: image.size])
    image.release(image.unlink(0, image.clusters))
    assert check(image) == {}
    assert qemu_map(image) == []


def test_clusters_not_copied_come_from_the_backing_file(tmp_path: Path) -> None:
    image = make_image(tmp_path, MiB)
    make_backing(tmp_path, MiB, content=b"backing!" * (MiB // 8))
    copy(image, 2)
    image.link_zero(5, 3)
    expected = bytearray(b"backing!" * (MiB // 8))
    expected[2 * CLUSTER : 3 * CLUSTER] = pattern(image, 2)
    expected[5 * CLUSTER : 8 * CLUSTER] = bytes(3 * CLUSTER)
    assert qemu_read(image, tmp_path) == expected
    assert qemu_map(image) == [(2 * CLUSTER, CLUSTER, "data"), (5 * CLUSTER, 3 * CLUSTER, "zero")]


def test_rebased_image_compares_equal_to_a_raw_copy(tmp_path: Path) -> None:
    image = make_image(tmp_path, MiB)
    copy(image, 0, 16)
    (tmp_path / "copy.raw").write_bytes(b"".join(pattern(image, i) for i in range(16)))
    assert "identical" in qemu_img("compare", "-f", "qcow2", "-F", "raw", image.path, tmp_path / "copy.raw")


def test_placed_clusters_that_are_not_linked_do_not_bother_qemu(tmp_path: Path) -> None:
    image = make_image(tmp_path, 64 * MiB)
    for host, count in image.place(5):
        image.file.write(host, b"x" * count * CLUSTER)
    copy(image, 0)
    assert check(image) == {}
    assert qemu_map(image) == [(0, CLUSTER, "data")]


# Space


def test_place_gives_neighbours_in_one_run(tmp_path: Path) -> None:
    image = make_image(tmp_path, 64 * MiB)
    assert [count for _, count in image.place(16)] == [16]
    assert image.place(0) == []


def test_place_leaves_room_for_the_refcount_block_of_a_new_range(tmp_path: Path) -> None:
    image = make_image(tmp_path, 1 * MiB, 512)
    per_block = 256
    runs = copy(image, 0, 700)
    used = {offset // 512 + i for offset, count in runs for i in range(count)}
    assert len(used) == 700 and not used & {per_block, 2 * per_block}
    assert check(image) == {}


def test_freed_run_is_reused_first(tmp_path: Path) -> None:
    image = make_image(tmp_path, 64 * MiB)
    copy(image, 0, 10)
    end = image.used_bytes
    freed = image.unlink(3, 4)
    image.release(freed)
    assert image.place(4) == freed
    assert image.used_bytes == end


def test_space_that_was_placed_in_vain_is_reused(tmp_path: Path) -> None:
    image = make_image(tmp_path, 64 * MiB)
    runs = image.place(8)
    image.release(runs)
    assert image.place(8) == runs


def test_unlinked_space_is_not_reused_before_it_is_released(tmp_path: Path) -> None:
    image = make_image(tmp_path, 64 * MiB)
    copy(image, 0)
    used = image.used_bytes
    (freed,) = image.unlink(0, 1)
    assert image.used_bytes == used
    assert image.place(1)[0] != freed


def test_short_free_runs_are_used_when_the_limit_leaves_nothing_else(tmp_path: Path) -> None:
    image = make_image(tmp_path, 64 * MiB, limit=20 * CLUSTER)
    copy(image, 0, 15)
    for cluster in range(0, 15, 2):
        image.release(image.unlink(cluster, 1))
    assert sum(count for _, count in image.place(8)) == 8
    with pytest.raises(TempLimitReached):
        image.place(1)


def test_limit_refuses_before_anything_changes(tmp_path: Path) -> None:
    image = make_image(tmp_path, 64 * MiB, limit=16 * CLUSTER)
    before = image.used_bytes
    with pytest.raises(TempLimitReached, match=f"temp limit of {16 * CLUSTER} bytes reached"):
        image.place(1000)
    assert image.used_bytes == before
    (room,) = image.place((16 * CLUSTER - before) // CLUSTER)
    with pytest.raises(TempLimitReached):
        image.place(1)
    with pytest.raises(TempLimitReached):  # no room for its L2 table
        image.link(0, room[0], 1)
    with pytest.raises(TempLimitReached):
        image.link_zero(0, 1)
    assert image.host_offset(0) == 0
    image.release([room])
    assert image.used_bytes == before
    assert check(image) == {}


def test_limit_counts_the_refcount_block_of_a_new_range(tmp_path: Path) -> None:
    image = make_image(tmp_path, MiB, 512, limit=257 * 512)
    image.place(256 - image.used_bytes // 512)  # all that the first block counts
    with pytest.raises(TempLimitReached):  # one cluster is left, but it needs a second block
        image.place(1)
    assert image.used_bytes == 256 * 512


def test_peak_stays_when_space_is_freed(tmp_path: Path) -> None:
    image = make_image(tmp_path, 64 * MiB)
    copy(image, 0, 10)
    peak = image.used_bytes
    image.release(image.unlink(0, 10))
    assert (image.used_bytes, image.peak_bytes) == (peak - 10 * CLUSTER, peak)


def test_release_gives_space_back_to_the_host(tmp_path: Path) -> None:
    image = make_image(tmp_path, 64 * MiB)
    copy(image, 0, 100)
    image.sync()
    full = image.allocated()
    image.release(image.unlink(0, 100))
    assert image.allocated() <= full - 100 * CLUSTER
    image.release([])


def test_all_tables_but_one_go_when_everything_is_trimmed(tmp_path: Path) -> None:
    image = make_image(tmp_path, 64 * MiB, 4 * KiB)  # 32 L2 tables
    empty = image.used_bytes
    copy(image, 0, image.clusters)
    image.release(image.unlink(0, image.clusters))
    # The range of 2048 clusters that each refcount block counts stays known, and one empty table is kept.
    assert image.used_bytes <= empty + 4 * KiB * (1 + image.clusters // 2048 + 1)
    assert check(image) == {}


def test_table_that_is_filled_again_is_not_freed_when_another_becomes_empty(tmp_path: Path) -> None:
    image = make_image(tmp_path, MiB, 512)  # 64 clusters a table
    copy(image, 64)
    copy(image, 0)
    image.release(image.unlink(0, 1))
    copy(image, 1)
    image.release(image.unlink(64, 1))
    assert read(image, 512, 512) == pattern(image, 1)
    assert check(image) == {}


def test_cluster_copied_and_trimmed_over_and_over_keeps_its_table(tmp_path: Path) -> None:
    image, file = recording(tmp_path)
    for serial in range(3):
        copy(image, 7, serial=serial)
        file.writes.clear()
        image.release(image.unlink(7, 1))
        assert sorted(length for _, length in file.writes) == [2, 8]
    copy(image, 7)
    assert len(file.writes) == 2 + 3


def test_punched_run_is_one_call_and_free_of_the_lock_and_not_reusable_meanwhile(tmp_path: Path) -> None:
    placed = []

    class PlacingFile(RecordingFile):
        def punch(self, offset: int, length: int) -> bool:
            placed.append(image.place(1)[0][0])  # would never return if the lock were held
            return super().punch(offset, length)

    file = PlacingFile.create(str(tmp_path / "temp.qcow2"))
    assert isinstance(file, PlacingFile)
    image = make_image(tmp_path, 64 * MiB, file=file)
    copy(image, 0, 4)
    freed = image.unlink(2, 2) + image.unlink(0, 2)
    image.release(freed)
    (punched,) = file.punches
    assert punched == (min(freed)[0], 4 * CLUSTER)
    assert not punched[0] <= placed[0] < sum(punched)


def test_host_that_cannot_punch_is_reused_all_the_same(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class FullFile(RecordingFile):
        def punch(self, offset: int, length: int) -> bool:
            raise OSError(5, "made to fail")

    image = make_image(tmp_path, 64 * MiB, file=FullFile.create(str(tmp_path / "temp.qcow2")))
    copy(image, 0, 3)
    for cluster in range(3):
        image.release(image.unlink(cluster, 1))
    assert len(image.place(3)) == 1
    assert caplog.text.count("cannot be given back") == 1


# What it costs


def test_copy_of_one_cluster_is_two_small_writes_besides_the_data(tmp_path: Path) -> None:
    image, file = recording(tmp_path)
    copy(image, 0)
    file.writes.clear()
    copy(image, 1)
    assert sorted(length for _, length in file.writes) == [2, 8, CLUSTER]


def test_neighbours_are_linked_with_two_writes(tmp_path: Path) -> None:
    image, file = recording(tmp_path)
    copy(image, 0)
    file.writes.clear()
    copy(image, 10, 100)
    assert sorted(length for _, length in file.writes) == [200, 800, 100 * CLUSTER]


def test_count_goes_up_before_the_link_and_down_after_the_unlink(tmp_path: Path) -> None:
    image, file = recording(tmp_path)
    copy(image, 0)
    file.writes.clear()
    copy(image, 1)
    assert [length for _, length in file.writes] == [CLUSTER, 2, 8]
    file.writes.clear()
    image.unlink(1, 1)
    assert [length for _, length in file.writes] == [8, 2]


def test_huge_unlink_of_a_sparse_image_touches_only_its_tables(tmp_path: Path) -> None:
    image, file = recording(tmp_path, 64 * TiB)
    ends = (0, image.clusters // 2, image.clusters - 1)
    for cluster in ends:
        copy(image, cluster)
    file.writes.clear()
    freed = image.unlink(0, image.clusters)
    assert sum(count for _, count in freed) == 3
    assert len(file.writes) <= 3 + 3 + 2 * 2
    assert [image.host_offset(cluster) for cluster in ends] == [0, 0, 0]


def test_terabyte_of_zero_clusters_takes_tables_only_and_shares_them_in_memory(tmp_path: Path) -> None:
    image, file = recording(tmp_path, 1 * TiB, 2 * MiB)
    image.link_zero(0, image.clusters)
    assert len(file.writes) == 3 * 2
    assert image.next_change(0, image.clusters) == (True, image.clusters)
    assert check(image) == {}
    assert qemu_map(image) == [(0, TiB, "zero")]
    assert image.unlink(0, image.clusters) == []
    assert qemu_map(image) == []


# Zero clusters


def test_zero_clusters_take_no_space_and_read_as_zeroes(tmp_path: Path) -> None:
    image = make_image(tmp_path, 64 * MiB)
    copy(image, 0)
    used = image.used_bytes
    image.link_zero(1, 50)
    image.link_zero(40, 50)
    image.link_zero(3, 0)
    assert image.used_bytes == used
    assert [image.host_offset(i) for i in (1, 50, 89, 90)] == [1, 1, 1, 0]
    assert read(image, CLUSTER, CLUSTER) == bytes(CLUSTER)
    assert image.unlink(1, 90) == []
    assert check(image) == {}


def test_whole_zero_table_can_be_changed_in_part(tmp_path: Path) -> None:
    image = make_image(tmp_path, 4 * MiB, 4 * KiB)  # 512 clusters a table
    image.link_zero(0, 1024)
    image.unlink(600, 2)
    copy(image, 600)
    assert [image.host_offset(i) for i in (0, 599, 601, 602)] == [1, 1, 0, 1]
    assert qemu_map(image)[1] == (600 * 4 * KiB, 4 * KiB, "data")
    assert check(image) == {}


def test_linked_cluster_is_not_linked_again(tmp_path: Path) -> None:
    image = make_image(tmp_path, 64 * MiB)
    copy(image, 0, 2)
    before = read(image, 0, 2 * CLUSTER)
    (run,) = image.place(2)
    for first in (0, 1):
        with pytest.raises(ImageError, match="linked already"):
            image.link(first, run[0], 2)
    with pytest.raises(ImageError, match="have data already"):
        image.link_zero(1, 2)
    assert read(image, 0, 2 * CLUSTER) == before
    image.release([run])
    assert check(image) == {}


# Reading


def test_read_merges_clusters_that_are_neighbours_in_the_host(tmp_path: Path) -> None:
    reads = []

    class ReadingFile(RecordingFile):
        def read_into(self, offset: int, buffer: memoryview) -> int:
            reads.append(len(buffer))
            return super().read_into(offset, buffer)

    image = make_image(tmp_path, 64 * MiB, file=ReadingFile.create(str(tmp_path / "temp.qcow2")))
    copy(image, 4, 4)
    copy(image, 2, 2)
    image.link_zero(8, 2)
    copy(image, 10)
    expected = b"".join(bytes(CLUSTER) if i in (8, 9) else pattern(image, i) for i in range(2, 11))
    assert read(image, 2 * CLUSTER + 100, 9 * CLUSTER - 300) == expected[100:-200]
    assert reads == [2 * CLUSTER - 100, 4 * CLUSTER, CLUSTER - 200]


def test_read_crosses_l2_tables(tmp_path: Path) -> None:
    image = make_image(tmp_path, MiB, 512)
    copy(image, 0, 200)
    for offset, length in ((0, 200 * 512), (63 * 512, 1024), (64 * 512 - 1, 2), (127 * 512 + 3, 700)):
        expected = b"".join(pattern(image, i) for i in range(200))[offset : offset + length]
        assert read(image, offset, length) == expected


@pytest.mark.parametrize("offset, length", [(0, 10), (0, 3 * CLUSTER), (CLUSTER, 2 * CLUSTER), (CLUSTER - 1, 2)])
def test_read_of_an_unmapped_cluster_is_an_error(tmp_path: Path, offset: int, length: int) -> None:
    image = make_image(tmp_path, MiB)
    copy(image, 1)
    with pytest.raises(ImageError, match=r"guest cluster [02] is not mapped"):
        read(image, offset, length)


def test_read_beyond_the_end_of_the_file_is_zeroes(tmp_path: Path) -> None:
    image = make_image(tmp_path, MiB)
    (run,) = image.place(1)
    image.file.write(run[0], b"short")
    image.link(0, run[0], 1)
    os.truncate(image.path, run[0] + 5)
    assert read(image, 0, CLUSTER) == b"short" + bytes(CLUSTER - 5)
    assert read(image, 100, 50) == bytes(50)


def test_large_zero_run_is_filled(tmp_path: Path) -> None:
    image = make_image(tmp_path, 8 * MiB)
    image.link_zero(0, 128)
    assert read(image, 3, 5 * MiB + 7) == bytes(5 * MiB + 7)


# Block status


def test_next_change_tells_runs_of_zero_from_runs_of_data(tmp_path: Path) -> None:
    image = make_image(tmp_path, 2 * MiB, 512)  # 64 clusters a table
    kinds = [False] * 70 + [True] * 200 + [False] * 1 + [True] * 1 + [False] * 128 + [True] * 3
    for cluster, is_zero in enumerate(kinds):
        if is_zero:
            image.link_zero(cluster, 1)
        else:
            copy(image, cluster)
    found = []
    cluster = 0
    while cluster < len(kinds):
        is_zero, count = image.next_change(cluster, len(kinds))
        found += [is_zero] * count
        cluster += count
    assert found == kinds
    for cluster, end in ((0, 1), (0, 70), (5, 71), (100, 101), (100, 140), (265, 275), (270, 271)):
        is_zero, count = image.next_change(cluster, end)
        assert kinds[cluster : cluster + count] == [is_zero] * count
        assert cluster + count == end or kinds[cluster + count] != is_zero


# Unlink


def test_unlink_gives_merged_runs_in_the_order_of_the_file(tmp_path: Path) -> None:
    image = make_image(tmp_path, 64 * MiB)
    copy(image, 0)
    copy(image, 9, 2)
    copy(image, 5, 2)
    image.link_zero(7, 2)
    start = image.host_offset(9)
    assert image.unlink(1, 20) == [(start, 4)]
    assert image.unlink(1, 20) == []
    assert image.unlink(0, 0) == []
    assert check(image) == {}


# The end


def test_drop_frees_everything_while_descriptors_are_open(tmp_path: Path) -> None:
    image = make_image(tmp_path, 64 * MiB)
    copy(image, 0, 100)
    other = os.open(image.path, os.O_RDONLY)
    image.drop()
    image.drop()
    assert os.fstat(other).st_blocks == image.allocated() == image.used_bytes == 0
    assert image.host_offset(0) == 0
    assert image.unlink(0, 100) == []
    image.release([(10 * CLUSTER, 4)])
    os.close(other)
    with pytest.raises(ImageError, match="dropped"):
        image.place(1)
    with pytest.raises(ImageError, match="dropped"):
        image.link_zero(0, 1)
    with pytest.raises(ImageError, match="dropped"):
        image.link(0, 10 * CLUSTER, 1)
    with pytest.raises(ImageError, match="not mapped"):
        read(image, 0, 100)
    assert image.used_bytes == 0
    image.close()
    image.close()
