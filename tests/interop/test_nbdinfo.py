"""nbdinfo against the server: what it offers, and what it says of its exports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.images import KIB, MIB, make_sparse, random_bytes
from tests.peers import run, run_any
from tests.serving import Serve, Server

SIZE = 3 * MIB + 700


@pytest.fixture
def server(serve: Serve, tmp_path: Path) -> Server:
    make_sparse(tmp_path / "disk.raw", SIZE, {0: random_bytes(MIB), 3 * MIB: random_bytes(700)})
    return serve(tmp_path / "disk.raw")


def info(uri: str) -> dict[str, Any]:
    exports: list[dict[str, Any]] = json.loads(run("nbdinfo", "--json", uri))["exports"]
    assert len(exports) == 1
    return exports[0]


def extents(uri: str, context: str) -> list[tuple[int, int, int]]:
    """(offset, length, status) of a whole export, neighbours merged as nbdinfo does."""
    found = json.loads(run("nbdinfo", "--json", f"--map={context}", uri))
    return [(extent["offset"], extent["length"], extent["type"]) for extent in found]


COMMON = {
    "contexts": ["base:allocation", "qemu:allocation-depth"],
    "is_rotational": False,
    "is_read_only": False,
    "can_cache": True,
    "can_df": True,
    "can_flush": True,
    "can_fua": True,
    "can_multi_conn": True,
    "can_trim": True,
    "block_size_minimum": 1,
    "block_size_preferred": 64 * KIB,
    "block_size_maximum": 64 * MIB,
    "export-size": SIZE,
}


def test_the_active_disk_offers_all_that_a_disk_can(server: Server) -> None:
    want = COMMON | {"export-name": "vda", "can_zero": True, "can_fast_zero": True}
    contexts = ["base:allocation", "qemu:allocation-depth"]
    for tcp in (False, True):
        want["contexts"] = contexts if tcp else [*contexts, "fleecing:shared-memory"]
        found = info(server.uri(tcp=tcp))
        assert {key: found[key] for key in want} == want


def test_a_snapshot_offers_trim_and_no_zeroing(server: Server) -> None:
    want = COMMON | {"export-name": "vda@s", "can_zero": False, "can_fast_zero": False}
    contexts = ["base:allocation", "qemu:allocation-depth", "fleecing:cluster-state", "fleecing:read-once"]
    server.snapshot(name="s")
    for tcp in (False, True):
        want["contexts"] = contexts if tcp else [*contexts, "fleecing:shared-memory"]
        found = info(server.uri("vda@s", tcp=tcp))
        assert {key: found[key] for key in want} == want


def test_the_preferred_block_size_is_the_cluster(serve: Serve, server: Server, tmp_path: Path) -> None:
    server.stop()
    other = serve(tmp_path / "disk.raw", "--cluster-size", "4K")
    assert info(other.uri())["block_size_preferred"] == 4096
    assert info(other.snapshot())["block_size_preferred"] == 4096


def test_the_list_has_all_exports_with_their_descriptions(server: Server) -> None:
    server.snapshot(name="monday")
    server.snapshot(name="tuesday")
    exports = json.loads(run("nbdinfo", "--list", "--json", server.uri("", tcp=True)))["exports"]
    assert [export["export-name"] for export in exports] == ["vda", "vda@monday", "vda@tuesday"]
    assert exports[0]["description"] == "active disk, read-write"
    assert exports[1]["description"].startswith("snapshot of vda, 20")
    assert [export["export-size"] for export in exports] == [SIZE] * 3


def test_the_empty_name_is_the_only_disk(server: Server) -> None:
    server.snapshot()
    assert run("nbdinfo", "--size", server.uri("")) == f"{SIZE}\n"


def test_the_empty_name_means_nothing_where_there_are_two_disks(serve: Serve, server: Server, tmp_path: Path) -> None:
    server.stop()
    (tmp_path / "other.raw").write_bytes(b"\1" * 512)
    other = serve({"vda": tmp_path / "disk.raw", "vdb": tmp_path / "other.raw"})
    result = run_any("nbdinfo", "--size", other.uri(""))
    assert result.returncode == 1
    assert run("nbdinfo", "--size", other.uri("vdb")) == "512\n"


def test_an_export_that_is_not_there_is_refused(server: Server) -> None:
    result = run_any("nbdinfo", "--size", server.uri("vda@nosuch"))
    assert result.returncode == 1
    assert "vda@nosuch" in result.stderr


def test_a_deleted_snapshot_is_not_there_any_more(server: Server) -> None:
    uri = server.snapshot(name="s")
    server.delete("vda@s")
    assert run_any("nbdinfo", "--size", uri).returncode == 1
    assert run("nbdinfo", "--size", server.uri()) == f"{SIZE}\n"


def test_the_map_tells_holes_and_data(server: Server) -> None:
    frozen = server.snapshot()
    want = [(0, MIB, 0), (MIB, 2 * MIB, 3), (3 * MIB, 700, 0)]
    assert extents(server.uri(), "base:allocation") == want
    run("qemu-io", "-f", "raw", "-d", "unmap", "-c", "write -P 1 2M 64k", "-c", "discard 0 512k", server.uri())
    assert extents(server.uri(), "base:allocation") == [
        (0, MIB // 2, 3),
        (MIB // 2, MIB // 2, 0),
        (MIB, MIB, 3),
        (2 * MIB, 64 * KIB, 0),
        (2 * MIB + 64 * KIB, MIB - 64 * KIB, 3),
        (3 * MIB, 700, 0),
    ]
    assert extents(frozen, "base:allocation") == want
    assert "hole,zero" in run("nbdinfo", "--map", "--totals", frozen)


def test_the_map_tells_the_layer_and_the_state_of_each_cluster(server: Server) -> None:
    frozen = server.snapshot(name="s")
    assert extents(server.uri(), "qemu:allocation-depth") == [(0, SIZE, 1)]
    assert extents(frozen, "qemu:allocation-depth") == [(0, SIZE, 2)]
    assert extents(frozen, "fleecing:cluster-state") == [(0, SIZE, 0)]
    run("qemu-io", "-f", "raw", "-c", "write -P 1 65535 2", "-c", f"write -P 2 {3 * MIB + 699} 1", server.uri())
    assert extents(frozen, "qemu:allocation-depth") == [
        (0, 128 * KIB, 1),
        (128 * KIB, 3 * MIB - 128 * KIB, 2),
        (3 * MIB, 700, 1),
    ]
    run("qemu-io", "-f", "raw", "-d", "unmap", "-c", "discard 64k 128k", "-c", "discard 1M 1", frozen)
    states = [
        (0, 64 * KIB, 1),
        (64 * KIB, 128 * KIB, 2),
        (192 * KIB, 3 * MIB - 192 * KIB, 0),
        (3 * MIB, 700, 1),
    ]
    assert extents(frozen, "fleecing:cluster-state") == states
    names = ["untouched", "copied", "trimmed"]
    assert server.map("vda@s") == [(offset, length, names[state]) for offset, length, state in states]


@pytest.mark.parametrize("context", ["base:allocation", "qemu:allocation-depth"])
def test_the_map_of_a_trimmed_range_is_refused(server: Server, context: str) -> None:
    frozen = server.snapshot()
    run("qemu-io", "-f", "raw", "-d", "unmap", "-c", "discard 1M 64k", frozen)
    result = run_any("nbdinfo", f"--map={context}", frozen)
    assert result.returncode == 1
    assert "Invalid argument" in result.stderr


def test_the_map_of_a_context_that_is_not_there_is_refused(server: Server) -> None:
    assert run_any("nbdinfo", "--map=fleecing:cluster-state", server.uri()).returncode == 1
