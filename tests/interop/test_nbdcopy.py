"""nbdcopy against the server: pulls and restores, over one connection and over four."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.images import KIB, MIB, ODD_SIZES, allocated, make_image, make_sparse, random_bytes
from tests.peers import Children, listen_unix, run, run_any
from tests.serving import Serve

CONNECTIONS = pytest.mark.parametrize("connections", ["1", "4"])


@pytest.mark.parametrize("size", [*ODD_SIZES, 40 * MIB + 1])
def test_a_snapshot_is_pulled_and_a_disk_restored(serve: Serve, tmp_path: Path, size: int) -> None:
    contents = [make_image(tmp_path / "disk.raw", size)]
    server = serve(tmp_path / "disk.raw")
    for connections, tcp in (("1", False), ("4", False), ("1", True), ("4", True)):
        uri = server.snapshot(tcp=tcp)
        contents.append(make_image(tmp_path / "new.raw", size, seed=len(contents)))
        run("nbdcopy", "-C", connections, str(tmp_path / "new.raw"), server.uri(tcp=tcp))
        run("nbdcopy", "-C", connections, uri, str(tmp_path / "pulled.raw"))
        assert (tmp_path / "pulled.raw").read_bytes() == contents[-2]
    server.stop()
    assert (tmp_path / "disk.raw").read_bytes() == contents[-1]


@CONNECTIONS
def test_a_pull_is_exact_while_the_guest_writes(
    serve: Serve, tmp_path: Path, children: Children, connections: str
) -> None:
    old = make_image(tmp_path / "disk.raw", 32 * MIB)
    server = serve(tmp_path / "disk.raw")
    uri = server.snapshot()
    guest = children.start(
        *("qemu-img", "bench", "-f", "raw", "-w", "--pattern=85", "-c", "6000", "-d", "8"),
        *("-s", "4096", "-S", "53248", server.uri()),
    )
    run("nbdcopy", "-C", connections, "--request-size=65536", uri, str(tmp_path / "pulled.raw"))
    assert guest.wait() == 0
    assert (tmp_path / "pulled.raw").read_bytes() == old


def test_a_pull_keeps_the_holes(serve: Serve, tmp_path: Path) -> None:
    data = {5 * MIB: random_bytes(MIB), 63 * MIB: random_bytes(64 * KIB)}
    old = make_sparse(tmp_path / "disk.raw", 64 * MIB, data)
    server = serve(tmp_path / "disk.raw")
    uri = server.snapshot()
    run("qemu-io", "-f", "raw", "-c", "write -P 1 20M 4M", server.uri())
    (tmp_path / "pulled.raw").touch()
    run("nbdcopy", uri, str(tmp_path / "pulled.raw"))
    assert (tmp_path / "pulled.raw").read_bytes() == old
    assert allocated(tmp_path / "pulled.raw") < 2 * MIB


@pytest.mark.parametrize("how", ["--synchronous", "--no-extents", "--flush", "--allocated", "--destination-is-zero"])
def test_a_restore_is_exact_however_it_is_done(serve: Serve, tmp_path: Path, how: str) -> None:
    contents = make_sparse(tmp_path / "source.raw", 8 * MIB + 513, {MIB: random_bytes(3 * MIB)})
    disk = tmp_path / "disk.raw"
    if how == "--destination-is-zero":
        make_sparse(disk, len(contents), {})
    else:
        make_image(disk, len(contents))
    server = serve(disk)
    uri = server.snapshot()
    run("nbdcopy", how, str(tmp_path / "source.raw"), server.uri())
    run("nbdcopy", how, server.snapshot(name="after"), str(tmp_path / "after.raw"))
    assert (tmp_path / "after.raw").read_bytes() == contents
    run("nbdcopy", uri, "null:")


def test_one_disk_is_copied_to_another_of_the_same_server(serve: Serve, tmp_path: Path) -> None:
    contents = make_image(tmp_path / "vda.raw", 8 * MIB + 1)
    make_sparse(tmp_path / "vdb.raw", 8 * MIB + 1, {})
    server = serve({"vda": tmp_path / "vda.raw", "vdb": tmp_path / "vdb.raw"})
    run("nbdcopy", server.snapshot("vda"), server.uri("vdb", tcp=True))
    server.stop()
    assert (tmp_path / "vdb.raw").read_bytes() == contents


def test_a_snapshot_is_no_destination(serve: Serve, tmp_path: Path) -> None:
    contents = make_image(tmp_path / "disk.raw", MIB)
    uri = serve(tmp_path / "disk.raw").snapshot()
    result = run_any("nbdcopy", str(tmp_path / "disk.raw"), uri)
    assert result.returncode == 1
    assert "Operation not permitted" in result.stderr
    assert (tmp_path / "disk.raw").read_bytes() == contents


def test_a_pull_ends_in_an_error_when_its_snapshot_is_deleted(serve: Serve, tmp_path: Path, children: Children) -> None:
    """The pull goes through a proxy that holds each read up, so that it is under way for sure."""
    make_image(tmp_path / "disk.raw", 8 * MIB)
    server = serve(tmp_path / "disk.raw")
    uri = server.snapshot(name="s")
    slow = tmp_path / "slow.sock"
    proxy = children.start(
        *("nbdkit", "-fv", "--filter=delay", "nbd", f"uri={uri}", "delay-read=100ms"), activate=listen_unix(slow)
    )
    pull = children.start(
        "nbdcopy", "-C", "1", "-R", "1", "--request-size=65536", f"nbd+unix:///?socket={slow}", "null:"
    )
    proxy.wait_for_line("delay: pread count=65536 offset=131072")
    temp = server.temp("vda@s")
    assert server.delete("vda@s")
    assert not temp.exists()
    assert pull.wait() == 1
    run("nbdinfo", "--size", server.uri())
