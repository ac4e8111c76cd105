"""qemu-nbd and nbd-client against the server: lists of exports, and QEMU's server on top of ours."""

from __future__ import annotations

from pathlib import Path

from tests.images import MIB, make_image, padded
from tests.peers import Children, listen_unix, run, run_any
from tests.serving import Serve


def test_qemu_nbd_lists_the_exports_with_all_it_is_told(serve: Serve, tmp_path: Path) -> None:
    make_image(tmp_path / "disk.raw", MIB + 1)
    server = serve(tmp_path / "disk.raw")
    server.snapshot(name="s")
    for where in (["-k", str(server.unix)], ["-b", "127.0.0.1", "-p", str(server.port)]):
        text = run("qemu-nbd", "--list", *where)
        assert "exports available: 2" in text
        active, frozen = text.split("export: ")[1:]
        assert "'vda'" in active
        assert "description: active disk, read-write" in active
        assert f"size:  {MIB + 1}" in active
        assert "( flush fua trim zeroes df multi cache fast-zero )" in active
        assert "'vda@s'" in frozen
        assert "( flush fua trim df multi cache )" in frozen
        assert "fleecing:cluster-state" in frozen
        assert "min block: 1" in frozen
        assert "opt block: 65536" in frozen


def test_qemu_nbd_serves_a_snapshot_on(serve: Serve, tmp_path: Path, children: Children) -> None:
    old = make_image(tmp_path / "disk.raw", 4 * MIB + 700)
    server = serve(tmp_path / "disk.raw")
    above = tmp_path / "above.sock"
    children.start("qemu-nbd", "-t", "-r", "-f", "raw", "-x", "again", server.snapshot(), activate=listen_unix(above))
    run("qemu-io", "-f", "raw", "-c", "write -P 3 1M 1M", server.uri())
    run("nbdcopy", f"nbd+unix:///again?socket={above}", str(tmp_path / "pulled.raw"))
    assert (tmp_path / "pulled.raw").read_bytes() == padded(old)


def test_nbd_client_lists_the_exports(serve: Serve, tmp_path: Path) -> None:
    make_image(tmp_path / "disk.raw", MIB)
    server = serve(tmp_path / "disk.raw")
    server.snapshot(name="s")
    # Its list is on standard output behind "Negotiation: ..".
    listed = run("nbd-client", "-l", "127.0.0.1", "-p", str(server.port)).splitlines()
    assert [line.partition(":")[0] for line in listed if line.startswith("vda")] == ["vda", "vda@s"]


def test_nbddump_shows_the_frozen_bytes(serve: Serve, tmp_path: Path) -> None:
    (tmp_path / "disk.raw").write_bytes(b"old contents".ljust(4096, b"\0"))
    server = serve(tmp_path / "disk.raw")
    frozen = server.snapshot()
    run("qemu-io", "-f", "raw", "-c", "write -P 0x41 0 4k", server.uri())
    assert "old contents" in run("nbddump", frozen)
    assert "AAAAAAAAAAAAAAAA" in run("nbddump", server.uri())


def test_a_connection_that_is_hung_up_at_once_leaves_no_line_in_the_log(serve: Serve, tmp_path: Path) -> None:
    """Port scanners and health checks do it all day."""
    make_image(tmp_path / "disk.raw", MIB)
    server = serve(tmp_path / "disk.raw")
    before = server.log
    assert run_any("bash", "-c", f"exec 3<>/dev/tcp/127.0.0.1/{server.port}; exec 3>&-").returncode == 0
    run("nbdinfo", "--size", server.uri(tcp=True))
    server.stop()
    said = server.log.removeprefix(before).splitlines()
    assert [line for line in said if "client" in line and "vda" not in line] == []
