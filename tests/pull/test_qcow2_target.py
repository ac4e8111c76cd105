"""The qcow2 writer of pulls, judged by qemu-img: mapping, compression, backing files, resuming."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fleecing.block.hostfile import HostFile
from fleecing.errors import ImageError
from fleecing.pull.qcow2_codec import (
    CLUSTER,
    Compression,
    compress,
    compressed_entry,
    compressed_range,
    decompress,
    parse_header,
)
from fleecing.pull.qcow2_reader import Qcow2File
from fleecing.pull.qcow2_target import Qcow2Options, Qcow2Target
from fleecing.units import MiB, align_up
from tests.peers import run

SIZE = 40 * MiB + 4321
EVERY = pytest.mark.parametrize("how", list(Compression))


def contents() -> bytes:
    """Random clusters, text, zeroes, and a tail that is no whole cluster."""
    chance = random.Random(8)
    data = bytearray(SIZE)
    data[: 2 * MiB] = chance.randbytes(2 * MiB)
    text = b"the quick brown fox " * 70000
    data[5 * MiB + 77 : 5 * MiB + 77 + len(text)] = text
    for at in range(20 * MiB, 22 * MiB, 3 * CLUSTER):
        data[at : at + CLUSTER] = chance.randbytes(CLUSTER)
    data[-100:] = chance.randbytes(100)
    return bytes(data)


DATA = contents()


def write_all(target: Qcow2Target, data: bytes = DATA, seed: int = 1) -> None:
    """Pieces of up to 8 clusters, in any order."""
    starts = list(range(0, len(data), 8 * CLUSTER))
    random.Random(seed).shuffle(starts)
    for start in starts:
        piece = data[start : start + 8 * CLUSTER]
        if any(piece):
            target.write(start, memoryview(piece))
        else:
            target.zero(start, len(piece))


def assert_is(path: Path, data: bytes) -> None:
    """qemu-img finds no error and reads these bytes; so does our reader."""
    run("qemu-img", "check", "-f", "qcow2", str(path))
    raw = path.with_suffix(".raw")
    run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", str(path), str(raw))
    assert raw.read_bytes() == data.ljust(align_up(len(data), 512), b"\0")


@EVERY
def test_a_file_is_what_was_written(tmp_path: Path, how: Compression) -> None:
    path = tmp_path / "disk.qcow2"
    target = Qcow2Target.create(str(path), SIZE, Qcow2Options(how))
    write_all(target)
    assert not path.exists()
    target.finish()
    assert_is(path, DATA)
    file = Qcow2File.open(str(path))
    assert file.read(0, SIZE) == DATA
    file.close()
    assert path.stat().st_size < 6 * MiB


@EVERY
def test_a_reader_takes_nothing_for_an_image_before_it_is_whole(tmp_path: Path, how: Compression) -> None:
    path = tmp_path / "disk.qcow2"
    target = Qcow2Target.create(str(path), SIZE, Qcow2Options(how))
    write_all(target)
    target.suspend()
    run("qemu-img", "info", "-f", "qcow2", f"{path}.part", expect=1)


@EVERY
def test_what_a_killed_run_had_written_is_found_again(tmp_path: Path, how: Compression) -> None:
    """Half by one run, whose last words were lost, half by the next one, which writes some of it once more."""
    path = tmp_path / "disk.qcow2"
    options = Qcow2Options(how)
    half = 6 * MiB
    first = Qcow2Target.create(str(path), SIZE, options)
    write_all(first, DATA[:half])
    first._space.take(3)  # allocated, never written
    with open(f"{path}.part", "r+b") as part:
        part.seek(0, os.SEEK_END)
        part.write(b"never linked" * 10000)
    first.suspend()
    second = Qcow2Target.resume(str(path), SIZE, options)
    assert second.read(0, half) == DATA[:half]
    for start in range(half - 8 * CLUSTER, SIZE, 4 * CLUSTER):
        piece = DATA[start : start + 4 * CLUSTER]
        second.write(start, memoryview(piece))
    second.finish()
    assert_is(path, DATA)


def test_an_overlay_shows_what_it_has_and_its_backing_file_elsewhere(tmp_path: Path) -> None:
    base = Qcow2Target.create(str(tmp_path / "base.qcow2"), SIZE, Qcow2Options(Compression.ZSTD))
    write_all(base)
    base.finish()
    path = tmp_path / "top.qcow2"
    top = Qcow2Target.create(str(path), SIZE, Qcow2Options(Compression.DEFLATE, backing="base.qcow2"))
    top.zero(0, MiB)
    top.write(30 * MiB, memoryview(b"new" * (CLUSTER // 3) + b"\0" * (CLUSTER + 1)))
    top.finish()
    expected = bytearray(DATA)
    expected[:MiB] = bytes(MiB)
    expected[30 * MiB : 30 * MiB + 2 * CLUSTER] = (b"new" * (CLUSTER // 3)).ljust(2 * CLUSTER, b"\0")
    assert_is(path, bytes(expected))
    info = json.loads(run("qemu-img", "info", "--output=json", str(path)))
    assert (info["backing-filename"], info["backing-filename-format"]) == ("base.qcow2", "qcow2")
    file = Qcow2File.open(str(path))
    assert file.header.backing == "base.qcow2"
    with pytest.raises(ImageError, match="lacks the cluster"):
        file.read(2 * MiB, CLUSTER)
    file.close()


def test_a_sparse_disk_of_1_tib_takes_little(tmp_path: Path) -> None:
    path = tmp_path / "large.qcow2"
    target = Qcow2Target.create(str(path), 1 << 40, Qcow2Options())
    target.write((1 << 40) - CLUSTER, memoryview(DATA[:CLUSTER]))
    target.zero(0, 1 << 39)
    target.finish()
    run("qemu-img", "check", "-f", "qcow2", str(path))
    assert path.stat().st_size < MiB
    run("qemu-io", "-f", "qcow2", "-r", "-c", "read -P 0 512G 1M", str(path))


def test_a_disk_beyond_the_format_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="use the raw format"):
        Qcow2Target.create(str(tmp_path / "huge.qcow2"), 1 << 62, Qcow2Options())
    assert os.listdir(tmp_path) == []


@given(st.integers(0, (1 << 54) - 1), st.integers(1, CLUSTER - 1))
def test_a_compressed_entry_covers_its_bytes_and_less_than_a_sector_more(offset: int, length: int) -> None:
    found, covered = compressed_range(compressed_entry(offset, length))
    assert found == offset
    assert length <= covered < length + 512


@settings(max_examples=30)
@given(st.binary(max_size=300), st.sampled_from([Compression.DEFLATE, Compression.ZSTD]), st.binary(max_size=600))
def test_compression_is_undone_whatever_follows_the_stream(data: bytes, how: Compression, behind: bytes) -> None:
    cluster = (data * (CLUSTER // len(data) + 1))[:CLUSTER] if data else bytes(CLUSTER)
    packed = compress(cluster, how)
    assert packed is None or decompress(packed + behind, how) == cluster


@pytest.mark.parametrize("how", [Compression.DEFLATE, Compression.ZSTD])
@pytest.mark.parametrize("data", [b"", b"nonsense", b"\x28\xb5\x2f\xfd"])
def test_damaged_compressed_data_is_a_value_error(how: Compression, data: bytes) -> None:
    with pytest.raises(ValueError, match="compressed data"):
        decompress(data, how)


def test_other_peoples_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", str(path), "1M")
    with pytest.raises(ImageError, match="no pull has written"):
        Qcow2File.open(str(path))
    with pytest.raises(ImageError, match="is no qcow2 image"):
        parse_header("x", b"\0" * CLUSTER)
    assert HostFile.open(str(path)).length()
