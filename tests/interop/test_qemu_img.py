"""qemu-img against the server: what most backup scripts are made of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.images import IS_ROOT, KIB, MIB, ODD_SIZES, loop_device, make_image, make_sparse, padded, random_bytes
from tests.peers import run, run_any
from tests.serving import Serve, Server


def qemu_map(server: Server, export: str, context: str | None = None) -> list[dict[str, Any]]:
    """`qemu-img map` of an export. QEMU shows another context as if it were base:allocation: 1 = hole, 2 = zero."""
    options = f"driver=nbd,server.type=unix,server.path={server.unix},export={export}"
    if context is not None:
        options += f",x-dirty-bitmap={context}"
    entries: list[dict[str, Any]] = json.loads(run("qemu-img", "map", "--output=json", "--image-opts", options))
    return entries


def data_runs(entries: list[dict[str, Any]]) -> list[tuple[int, int]]:
    """(start, length) of the runs that are data and not zeroes."""
    return [(entry["start"], entry["length"]) for entry in entries if entry["data"] and not entry["zero"]]


@pytest.mark.parametrize("size", ODD_SIZES)
def test_convert_pulls_a_snapshot_while_the_guest_has_overwritten_it(serve: Serve, tmp_path: Path, size: int) -> None:
    old = make_image(tmp_path / "disk.raw", size)
    new = make_image(tmp_path / "new.raw", size, seed=1)
    server = serve(tmp_path / "disk.raw")
    server.snapshot(name="s")
    run("nbdcopy", str(tmp_path / "new.raw"), server.uri())
    for tcp in (False, True):
        uri = server.uri("vda@s", tcp=tcp)
        run("qemu-img", "convert", "-f", "raw", "-O", "raw", uri, str(tmp_path / "pulled.raw"))
        assert (tmp_path / "pulled.raw").read_bytes() == padded(old)
        run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", uri, str(tmp_path / "pulled.qcow2"))
        run("qemu-img", "compare", "-f", "raw", "-F", "qcow2", uri, str(tmp_path / "pulled.qcow2"))
    server.stop()
    assert (tmp_path / "disk.raw").read_bytes() == new


def test_convert_fills_the_active_disk_out_of_order(serve: Serve, tmp_path: Path) -> None:
    contents = make_image(tmp_path / "source.raw", 5 * MIB + 512)
    old = make_image(tmp_path / "disk.raw", 5 * MIB + 512, seed=1)
    server = serve(tmp_path / "disk.raw")
    frozen = server.snapshot()
    run(
        "qemu-img",
        "convert",
        "-n",
        "-W",
        "-m",
        "8",
        "-f",
        "raw",
        "-O",
        "raw",
        str(tmp_path / "source.raw"),
        server.uri(),
    )
    run("qemu-img", "compare", "-f", "raw", "-F", "raw", str(tmp_path / "source.raw"), server.uri())
    run("nbdcopy", frozen, str(tmp_path / "frozen.raw"))
    assert (tmp_path / "frozen.raw").read_bytes() == old
    server.stop()
    assert (tmp_path / "disk.raw").read_bytes() == contents


def test_compare_finds_a_snapshot_and_the_changed_disk_different(serve: Serve, tmp_path: Path) -> None:
    make_image(tmp_path / "disk.raw", 2 * MIB)
    server = serve(tmp_path / "disk.raw")
    frozen = server.snapshot()
    run("qemu-img", "compare", "-f", "raw", "-F", "raw", frozen, server.uri())
    run("qemu-io", "-f", "raw", "-c", "write -P 7 1M 4k", server.uri())
    assert "1048576" in run("qemu-img", "compare", "-f", "raw", "-F", "raw", frozen, server.uri(), expect=1)


def test_map_tells_holes_of_the_disk_and_of_the_frozen_contents(serve: Serve, tmp_path: Path) -> None:
    make_sparse(tmp_path / "disk.raw", 8 * MIB, {MIB: random_bytes(MIB), 5 * MIB: random_bytes(64 * KIB)})
    server = serve(tmp_path / "disk.raw")
    server.snapshot(name="s")
    frozen = [(MIB, MIB), (5 * MIB, 64 * KIB)]
    assert data_runs(qemu_map(server, "vda")) == frozen
    assert data_runs(qemu_map(server, "vda@s")) == frozen
    # The guest fills a hole, makes another one, and overwrites the data at 5 MiB, with holes behind it.
    run("qemu-io", "-f", "raw", "-d", "unmap", "-c", "write -P 1 0 64k", "-c", "discard 1M 512k",
        "-c", "write -P 2 5M 64k", server.uri())  # fmt: skip
    assert data_runs(qemu_map(server, "vda")) == [(0, 64 * KIB), (3 * MIB // 2, MIB // 2), (5 * MIB, 64 * KIB)]
    assert data_runs(qemu_map(server, "vda@s")) == frozen


def test_map_tells_where_the_frozen_contents_lie(serve: Serve, tmp_path: Path) -> None:
    make_image(tmp_path / "disk.raw", MIB)
    server = serve(tmp_path / "disk.raw")
    server.snapshot(name="s")
    run("qemu-io", "-f", "raw", "-c", "write -P 1 100k 4k", server.uri())
    copied = [(entry["start"], entry["length"]) for entry in qemu_map(server, "vda@s", "qemu:allocation-depth")
              if not entry["present"]]  # fmt: skip
    assert copied == [(64 * KIB, 64 * KIB)]
    states = qemu_map(server, "vda@s", "fleecing:cluster-state")
    assert [(e["start"], e["length"]) for e in states if not e["present"]] == copied


def test_the_temp_image_is_a_qcow2_above_the_disk(serve: Serve, tmp_path: Path) -> None:
    make_image(tmp_path / "disk.raw", 3 * MIB + 700)
    server = serve(tmp_path / "disk.raw", "--cluster-size", "128K")
    server.snapshot(name="s")
    info = json.loads(run("qemu-img", "info", "-U", "--output=json", str(server.temp("vda@s"))))
    assert info["format"] == "qcow2"
    assert info["cluster-size"] == 128 * KIB
    assert info["virtual-size"] == len(padded(bytes(3 * MIB + 700)))
    assert info["full-backing-filename"] == str(tmp_path / "disk.raw")
    assert info["backing-filename-format"] == "raw"


BENCHES = [
    ["-w", "-c", "2000"],
    ["-w", "-c", "2000", "--flush-interval=64"],
    ["-w", "-c", "400", "-o", "513", "-s", "9999"],
]


def test_bench_runs_while_snapshots_are_there(serve: Serve, tmp_path: Path) -> None:
    old = make_image(tmp_path / "disk.raw", 4 * MIB)
    server = serve(tmp_path / "disk.raw")
    for number, arguments in enumerate(BENCHES):
        frozen = server.snapshot(name=f"s{number}")
        run("qemu-img", "bench", "-f", "raw", "-d", "64", f"--pattern={number + 1}", *arguments, server.uri())
        run("qemu-img", "bench", "-f", "raw", "-d", "64", "-c", "2000", frozen)
    run("nbdcopy", server.uri("vda@s0"), str(tmp_path / "frozen.raw"))
    assert (tmp_path / "frozen.raw").read_bytes() == old
    # -c 2000 steps of 4 KiB go around the 4 MiB of the disk.
    run("qemu-io", "-r", "-f", "raw", "-c", "read -P 1 0 4M", server.uri("vda@s1"))
    run("qemu-io", "-r", "-f", "raw", "-c", "read -P 2 0 4M", server.uri("vda@s2"))
    run("qemu-io", "-r", "-f", "raw", "-c", "read -P 3 513 3999600", "-c", "read -P 2 0 513", server.uri())


def test_a_disk_that_is_one_hole_is_pulled_without_reading_it(serve: Serve, tmp_path: Path) -> None:
    with (tmp_path / "disk.raw").open("wb") as image:
        image.truncate(1 << 40)
        image.seek(1 << 39)
        image.write(b"\7" * 4096)
    server = serve(tmp_path / "disk.raw")
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", server.snapshot(name="s"), str(tmp_path / "pulled.qcow2"))
    read = server.child.wait_for_line(r"left vda@s: \d+ requests, (\d+) bytes read").group(1)
    assert int(read) < MIB
    run("qemu-io", "-r", "-c", "read -P 0 0 64k", "-c", "read -P 7 512G 4k", str(tmp_path / "pulled.qcow2"))


def test_an_export_that_is_not_there_is_refused_with_its_name(serve: Serve, tmp_path: Path) -> None:
    make_image(tmp_path / "disk.raw", 4096)
    result = run_any("qemu-img", "info", serve(tmp_path / "disk.raw").uri("vda@nosuch"))
    assert result.returncode == 1
    assert "vda@nosuch" in result.stderr


def test_a_block_device_is_served_frozen_and_trimmed_like_a_file(serve: Serve, tmp_path: Path) -> None:
    image = tmp_path / "disk.raw"
    old = make_image(image, 4 * MIB + 512)
    if not IS_ROOT:  # nobody else may open a block device: the refusal is one sentence
        device = next(Path("/dev").glob("loop[0-9]*"))
        with pytest.raises(pytest.fail.Exception, match=f"{device} .*Permission denied"):
            serve(device)
        return
    with loop_device(image) as device:
        server = serve(device)
        frozen = server.snapshot(name="s")
        run("qemu-io", "-f", "raw", "-d", "unmap", "-c", "write -P 1 0 1M", "-c", "write -z 1000k 100k",
            "-c", "discard 2M 1M", "-c", "write -P 3 4M 512", "-c", "write -P 2 3145735 77", "-c", "flush",
            server.uri())  # fmt: skip
        run("qemu-img", "check", "-U", str(server.temp("vda@s")))
        run("qemu-img", "convert", "-f", "raw", "-O", "raw", frozen, str(tmp_path / "pulled.raw"))
        assert (tmp_path / "pulled.raw").read_bytes() == old
        run("qemu-img", "convert", "-U", "-O", "raw", str(server.temp("vda@s")), str(tmp_path / "by-temp.raw"))
        assert (tmp_path / "by-temp.raw").read_bytes() == old
        server.stop()
    new = bytearray(old)
    new[:MIB] = b"\1" * MIB
    new[1000 * KIB : 1100 * KIB] = bytes(100 * KIB)
    new[2 * MIB : 3 * MIB] = bytes(MIB)
    new[4 * MIB :] = b"\3" * 512
    new[3145735 : 3145735 + 77] = b"\2" * 77
    assert image.read_bytes() == new
