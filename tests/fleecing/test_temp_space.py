"""Temp runs out of space: a limit of ours, a limit of the operating system, a full file system."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fleecing.errors import ControlError
from fleecing.nbd.constants import ReplyMode
from tests.images import FULL, KIB, MIB, allocated, little_space, make_image, random_bytes
from tests.peers import run, run_any
from tests.raw_client import BLOCK_STATUS, EINVAL, ENOSPC, READ, TRIM, WRITE, RawClient
from tests.serving import Serve, Server

SIZE = 4 * MIB
OLD = random_bytes(SIZE)
NEW = random_bytes(SIZE, seed=1)
CLUSTER = 64 * KIB
LIMIT = 2 * MIB

CAUSES = {
    "temp limit": r"temp limit of 2097152 bytes reached",
    "file size limit": "File too large",
    "full file system": "No space left on device",
}


@contextmanager
def short_of_temp(serve: Serve, folder: Path, how: str, policy: str) -> Iterator[Server]:
    """A server whose snapshot "vda@s" cannot take all of the disk's old contents."""
    make_image(folder / "disk.raw", SIZE)
    if how == "temp limit":
        server = serve(folder / "disk.raw")
        server.snapshot(name="s", on_cbw_error=policy, temp_limit=LIMIT)
        yield server
        return
    with little_space(how, folder / "temp", SIZE) as (temp_dir, wrapper):
        server = serve(folder / "disk.raw", "--temp-dir", str(temp_dir), wrapper=wrapper)
        server.snapshot(name="s", on_cbw_error=policy)
        yield server
        server.stop()


HOW = pytest.mark.parametrize("how", ["temp limit", *FULL])


@HOW
def test_with_break_snapshot_the_guest_goes_on_and_everybody_learns_why(serve: Serve, tmp_path: Path, how: str) -> None:
    with short_of_temp(serve, tmp_path, how, "break-snapshot") as server:
        reader = RawClient(server.unix, "vda@s", ReplyMode.STRUCTURED, ["base:allocation", "fleecing:cluster-state"])
        with RawClient(server.unix, "vda", ReplyMode.STRUCTURED) as guest:
            assert reader.read(0, SIZE) == OLD
            for offset in range(0, SIZE, 256 * KIB):
                assert guest.request(WRITE, 0, offset, 0, NEW[offset : offset + 256 * KIB]).error == 0
            assert guest.read(0, SIZE) == NEW
            shown = server.show("vda@s")
            assert shown["state"] == "broken"
            server.child.wait_for_line(f"snapshot vda@s is broken: .*{CAUSES[how]}")
            for command, offset in ((READ, 0), (READ, SIZE - 1), (BLOCK_STATUS, 0)):
                reply = reader.request(command, 0, offset, 1)
                assert reply.error == EINVAL
                assert shown["broken"] in reply.text
            assert reader.request(READ, 0, 0, SIZE).error == EINVAL
            with RawClient(server.unix, "vda@s") as later:
                assert shown["broken"] in later.request(READ, 0, 0, 512).text
            # Another one is made and works: a broken snapshot is in nobody's way.
            assert server.delete("vda@s")
            assert reader.request(READ, 0, 0, 1).error == EINVAL
            server.snapshot(name="next")
            assert guest.request(WRITE, 0, 0, 0, OLD[:MIB]).error == 0
            with RawClient(server.unix, "vda@next") as client:
                assert client.read(0, SIZE) == NEW
        reader.close()


@HOW
def test_with_break_guest_write_the_guest_gets_the_error_and_the_snapshot_stays_exact(
    serve: Serve, tmp_path: Path, how: str
) -> None:
    with short_of_temp(serve, tmp_path, how, "break-guest-write") as server:
        now = bytearray(OLD)
        errors = 0
        with RawClient(server.unix, "vda", ReplyMode.STRUCTURED) as guest:
            for offset in range(0, SIZE, CLUSTER):
                reply = guest.request(WRITE, 0, offset, 0, NEW[offset : offset + CLUSTER])
                if reply.error == 0:
                    now[offset : offset + CLUSTER] = NEW[offset : offset + CLUSTER]
                else:
                    assert reply.error == ENOSPC
                    errors += 1
            assert errors
            assert guest.read(0, SIZE) == now
            assert guest.request(WRITE, 0, 100, 0, b"in a copied cluster").error == 0
            with RawClient(server.unix, "vda@s") as reader:
                assert server.show("vda@s")["state"] == "ready"
                assert reader.read(0, SIZE) == OLD
                # What the backup gives up makes room for the guest again.
                assert reader.request(TRIM, 0, 0, MIB).error == 0
                assert guest.request(WRITE, 0, SIZE - CLUSTER, 0, bytes(CLUSTER)).error == 0
                assert reader.read(MIB, SIZE - MIB) == OLD[MIB:]
            run("qemu-img", "check", "-U", str(server.temp("vda@s")))


def test_only_the_snapshot_that_has_no_room_breaks(serve: Serve, tmp_path: Path) -> None:
    make_image(tmp_path / "disk.raw", SIZE)
    server = serve(tmp_path / "disk.raw")
    server.snapshot(name="small", temp_limit=LIMIT)
    wide = server.snapshot(name="wide")
    run("qemu-io", "-f", "raw", "-c", "write -P 1 0 4M", server.uri())
    assert {name: server.show(f"vda@{name}")["state"] for name in ("small", "wide")} == {
        "small": "broken",
        "wide": "ready",
    }
    run("nbdcopy", wide, str(tmp_path / "pulled.raw"))
    assert (tmp_path / "pulled.raw").read_bytes() == OLD


def test_a_client_of_qemu_sees_a_broken_snapshot_as_an_error(serve: Serve, tmp_path: Path) -> None:
    make_image(tmp_path / "disk.raw", SIZE)
    server = serve(tmp_path / "disk.raw")
    uri = server.snapshot(temp_limit=LIMIT)
    run("qemu-io", "-f", "raw", "-c", "write -P 1 0 4M", server.uri())
    for program in (["qemu-img", "convert", "-f", "raw", "-O", "raw"], ["nbdcopy"]):
        result = run_any(*program, uri, str(tmp_path / "pulled.raw"))
        assert result.returncode == 1
        assert "Invalid argument" in result.stderr


def test_a_limit_keeps_temp_below_it(serve: Serve, tmp_path: Path) -> None:
    make_image(tmp_path / "disk.raw", SIZE)
    server = serve(tmp_path / "disk.raw")
    server.snapshot(name="s", temp_limit=LIMIT, on_cbw_error="break-guest-write")
    # Cluster by cluster: of a longer write, what comes in together is saved together or not at all.
    writes = [part for offset in range(0, SIZE, CLUSTER) for part in ("-c", f"write -P 1 {offset} {CLUSTER}")]
    run_any("qemu-io", "-f", "raw", *writes, server.uri())
    temp = server.show("vda@s")["temp"]
    assert temp["used"] <= temp["peak"] <= LIMIT
    assert allocated(server.temp("vda@s")) <= LIMIT
    assert temp["peak"] > LIMIT - 4 * CLUSTER


def test_holes_and_zeroes_are_copied_within_a_tiny_limit(serve: Serve, tmp_path: Path) -> None:
    (tmp_path / "disk.raw").write_bytes(bytes(SIZE))
    server = serve(tmp_path / "disk.raw")
    server.snapshot(name="s", temp_limit=8 * CLUSTER)
    run("qemu-io", "-f", "raw", "-c", "write -P 1 0 4M", server.uri())
    assert server.show("vda@s")["state"] == "ready"


def test_a_limit_that_is_too_small_for_anything_is_refused_and_nothing_is_left(serve: Serve, tmp_path: Path) -> None:
    make_image(tmp_path / "disk.raw", SIZE)
    server = serve(tmp_path / "disk.raw")
    before = sorted(server.state_dir.rglob("*"))
    with pytest.raises(ControlError, match="a temp limit of 4096 bytes is too small"):
        server.snapshot(name="s", temp_limit=4096)
    assert server.status()["snapshots"] == []
    assert sorted(server.state_dir.rglob("*")) == before
    assert run("nbdinfo", "--size", server.snapshot(name="s")) == f"{SIZE}\n"


def test_a_temp_folder_without_any_space_is_refused_and_nothing_is_left(serve: Serve, tmp_path: Path) -> None:
    make_image(tmp_path / "disk.raw", SIZE)
    for how in FULL:
        with little_space(how, tmp_path / how, 32 * KIB) as (temp_dir, wrapper):
            server = serve(tmp_path / "disk.raw", "--temp-dir", str(temp_dir), wrapper=wrapper)
            with pytest.raises(ControlError, match=f"temp folder {temp_dir}.* (is full|File too large)"):
                server.snapshot(name="s")
            assert server.status()["snapshots"] == []
            assert not list(temp_dir.rglob("*.qcow2"))
            server.stop()


def test_a_deletion_frees_the_space_even_while_a_client_holds_on(serve: Serve, tmp_path: Path) -> None:
    make_image(tmp_path / "disk.raw", SIZE)
    server = serve(tmp_path / "disk.raw")
    server.snapshot(name="s")
    run("qemu-io", "-f", "raw", "-c", "write -P 1 0 4M", server.uri())
    temp = server.temp("vda@s")
    with temp.open("rb") as held, RawClient(server.unix, "vda@s") as reader:
        assert os.fstat(held.fileno()).st_blocks * 512 >= SIZE
        assert reader.read(0, SIZE) == OLD
        assert server.delete("vda@s")
        assert os.fstat(held.fileno()).st_blocks == 0
        assert not temp.exists()
        reply = reader.request(READ, 0, 0, 512)
        assert (reply.error, "deleted" in reply.text) == (EINVAL, True)
        assert reader.request(TRIM, 0, 0, SIZE).error != 0
