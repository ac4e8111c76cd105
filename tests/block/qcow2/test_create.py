"""New images: what qemu-img says of them, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from fleecing.block.hostfile import HostFile
from fleecing.block.qcow2.node import TempImage
from fleecing.errors import ImageError
from fleecing.units import GiB, KiB, MiB, TiB, align_up
from tests.block.qcow2.tools import RecordingFile, check, copy, make_image, qemu_img, qemu_map

CLUSTER_SIZES = [1 << bits for bits in range(9, 22)]
ODD_SIZES = [1, 511, 512, 513, 65535, 65536, 65537, 10 * MiB - 1, 10 * MiB + 1]


@pytest.fixture
def file(tmp_path: Path) -> Iterator[HostFile]:
    """A new, empty file."""
    file = HostFile.create(str(tmp_path / "t.qcow2"))
    yield file
    file.close()


@pytest.mark.parametrize("cluster_size", CLUSTER_SIZES)
def test_new_image_is_clean_at_any_cluster_size(tmp_path: Path, cluster_size: int) -> None:
    image = make_image(tmp_path, 64 * MiB, cluster_size)
    assert check(image) == {}
    info = json.loads(qemu_img("info", "--output=json", image.path))
    assert (info["format"], info["virtual-size"], info["cluster-size"]) == ("qcow2", 64 * MiB, cluster_size)
    assert info["full-backing-filename"] == str(tmp_path / "disk.raw")
    assert info["backing-filename-format"] == "raw"
    assert info["format-specific"]["data"]["refcount-bits"] == 16


@pytest.mark.parametrize("size", ODD_SIZES)
def test_odd_size_is_rounded_up_to_512(tmp_path: Path, size: int) -> None:
    image = make_image(tmp_path, size)
    assert image.size == align_up(size, 512)
    copy(image, image.clusters - 1)
    assert check(image) == {}
    assert json.loads(qemu_img("info", "--output=json", image.path))["virtual-size"] == image.size


@pytest.mark.parametrize(
    "size, cluster_size",
    [(64 * TiB, 64 * KiB), (7 * TiB, 4 * KiB), (120 * GiB, 512), (1 << 50, 2 * MiB)],
)
def test_huge_disk_is_made_without_touching_its_tables(tmp_path: Path, size: int, cluster_size: int) -> None:
    image = make_image(tmp_path, 1 * MiB, cluster_size)  # for its backing file only
    file = RecordingFile.create(str(tmp_path / "huge.qcow2"))
    assert isinstance(file, RecordingFile)
    image = TempImage.create(
        file, size=size, cluster_size=cluster_size, backing_file=image.backing_file, backing_format="raw", limit=None
    )
    assert len(file.writes) == 3
    # A count of two bytes for each cluster of the tables, whatever these map: what the limits of QEMU allow at most.
    assert sum(length for _, length in file.writes) <= 2 * (40 * MiB // cluster_size + 600)
    assert image.allocated() <= 256 * KiB
    for cluster in (0, image.clusters // 2, image.clusters - 1):
        copy(image, cluster)
    assert check(image) == {}
    last = (image.clusters - 1) * cluster_size
    assert qemu_map(image)[-1] == (last, size - last, "data")


def test_creation_costs_the_same_for_a_small_and_a_huge_disk(tmp_path: Path) -> None:
    costs = []
    for i, size in enumerate((1 * GiB, 1 * TiB)):
        file = RecordingFile.create(str(tmp_path / f"{i}.qcow2"))
        assert isinstance(file, RecordingFile)
        TempImage.create(
            file, size=size, cluster_size=64 * KiB, backing_file="/d", backing_format="raw", limit=None
        ).close()
        costs.append([length for _, length in file.writes])
    assert costs[0] == costs[1]


@pytest.mark.parametrize(
    "size, cluster_size, way_out",
    [
        (8 * TiB, 4 * KiB, "use 8 KiB or more"),
        (64 * TiB, 4 * KiB, "use 16 KiB or more"),
        (1 * TiB, 512, "use 2 KiB or more"),
        (1 << 60, 2 * MiB, "no cluster size is large enough"),
    ],
)
def test_disk_too_large_for_the_cluster_size_is_refused(
    file: HostFile, size: int, cluster_size: int, way_out: str
) -> None:
    with pytest.raises(ImageError, match=f"too large for clusters of .*: {way_out}"):
        TempImage.create(
            file, size=size, cluster_size=cluster_size, backing_file="/d", backing_format="raw", limit=None
        )
    assert file.length() == 0


@pytest.mark.parametrize("cluster_size", [0, 1, 256, 3000, 4 * MiB, -4096])
def test_cluster_size_that_qcow2_does_not_have_is_refused(tmp_path: Path, cluster_size: int) -> None:
    with pytest.raises(ImageError, match=f"cluster size {cluster_size} is no power of two"):
        make_image(tmp_path, MiB, cluster_size)


def test_empty_disk_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="a disk of 0 bytes"):
        make_image(tmp_path, 0)


@pytest.mark.parametrize(
    "backing_file, cluster_size, text",
    [
        ("/" + "x" * 1023, 64 * KiB, "1024 bytes, qcow2 takes 1023"),
        ("/" + "x" * 400, 512, "401 bytes, clusters of 512 bytes take"),
        ("disk.raw", 64 * KiB, "no absolute path"),
    ],
)
def test_backing_path_that_does_not_fit_is_refused(
    file: HostFile, backing_file: str, cluster_size: int, text: str
) -> None:
    with pytest.raises(ImageError, match=text):
        TempImage.create(
            file, size=MiB, cluster_size=cluster_size, backing_file=backing_file, backing_format="raw", limit=None
        )


def test_backing_path_of_1023_bytes_that_is_no_utf8_is_kept(file: HostFile) -> None:
    name = "/" + "\udcff" * 1022
    TempImage.create(file, size=MiB, cluster_size=4096, backing_file=name, backing_format="raw", limit=None)
    assert TempImage.open(file).backing_file == name


def test_limit_below_the_metadata_is_refused_and_names_what_it_takes(tmp_path: Path) -> None:
    with pytest.raises(
        ImageError, match="limit of 262144 bytes is too small: a temp of one cluster takes 393216 bytes"
    ):
        make_image(tmp_path, MiB, limit=4 * 64 * KiB)


def test_least_limit_holds_one_cluster(tmp_path: Path) -> None:
    image = make_image(tmp_path, MiB, limit=393216)
    copy(image, 3)
    assert image.used_bytes == 393216
    assert check(image) == {}
