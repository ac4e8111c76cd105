"""The life of the server process."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from fleecing.errors import ControlError
from fleecing.units import KiB, MiB
from tests.peers import Children, require, run
from tests.serving import ROOT, Serve


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "vda.img"
    path.write_bytes(b"\1" * MiB)
    return path


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_with_0_and_leaves_no_socket(serve: Serve, image: Path, number: signal.Signals) -> None:
    server = serve(image)
    server.child.signal(number)
    assert server.child.wait() == 0
    assert not server.unix.exists()
    assert not server.control_path.exists()


def test_a_client_that_stays_connected_does_not_keep_it_alive(serve: Serve, image: Path, libnbd: Any) -> None:
    server = serve(image)
    client = libnbd.NBD()
    client.connect_uri(server.uri())
    client.pwrite(b"\2" * 4096, 0)
    server.stop()
    assert server.child.returncode == 0
    assert image.read_bytes()[:4096] == b"\2" * 4096


def test_a_full_temp_folder_refuses_the_snapshot_and_nothing_else(
    children: Children, image: Path, tmp_path: Path
) -> None:
    temp = tmp_path / "temp"
    temp.mkdir()
    control = tmp_path / "c.sock"
    serve = [sys.executable, "-m", "fleecing", "serve", str(image), "--unix", str(tmp_path / "n.sock")]
    serve += ["--control", str(control), "--state-dir", str(tmp_path / "state"), "--temp-dir", str(temp)]
    # A mount of its own, which needs no root and goes with the process
    mounted = ["unshare", "--map-root-user", "--mount", require("sh"), "-c"]
    script = 'mount -t tmpfs -o size=256k tmpfs "$1" && shift && exec "$@"'
    server = children.start(*mounted, script, "sh", str(temp), *serve, env={"PYTHONPATH": str(ROOT)})
    server.wait_for_line("^Ready")
    command = ("-m", "fleecing", "snapshot", "create", "vda", "--control", str(control))
    refused = children.start(sys.executable, *command, env={"PYTHONPATH": str(ROOT)})
    assert refused.wait() == 1
    assert refused.stdout == ""
    assert f"temp folder {temp} is full: free some space there" in refused.stderr
    assert list((tmp_path / "state" / "vda" / "snapshots").iterdir()) == []
    run("qemu-io", "-f", "raw", "-c", "write -P 2 0 1M", f"nbd+unix:///vda?socket={tmp_path}/n.sock")


def test_the_lines_to_paste_work(serve: Serve, image: Path) -> None:
    server = serve(image, "--name", "disk.one")
    snapshot = server.child.wait_for_line(r"^  snapshot +(.*)").group(1)
    uri = run("sh", "-c", snapshot).strip()
    assert run("nbdinfo", "--size", uri) == f"{MiB}\n"
    drive = server.child.wait_for_line(r"^  QEMU +-drive (.*)").group(1)
    plain = run("sh", "-c", f"echo {drive}").strip()
    address = plain.partition(",")[0].removeprefix("file=")
    assert address == server.uri("disk.one")
    assert plain.endswith(",format=raw,if=virtio,discard=unmap")


def test_a_broken_snapshot_is_told_in_the_log_in_show_and_to_readers(serve: Serve, image: Path, libnbd: Any) -> None:
    server = serve(image)
    uri = server.snapshot(name="s", temp_limit=512 * KiB)
    run("qemu-io", "-f", "raw", "-c", "write -P 2 0 1M", server.uri())
    reason = "temp limit of 524288 bytes reached"
    server.child.wait_for_line(f"ERROR snapshot vda@s is broken: .*{reason}")
    assert reason in server.show("vda@s")["broken"]
    client = libnbd.NBD()
    client.connect_uri(uri)
    with pytest.raises(libnbd.Error, match="Invalid argument"):
        client.pread(4096, 0)
    assert server.delete("vda@s")
    with pytest.raises(ControlError, match="has no snapshot 's'"):
        server.show("vda@s")


def test_deleting_a_snapshot_that_is_read_frees_its_space(serve: Serve, image: Path, libnbd: Any) -> None:
    server = serve(image)
    client = libnbd.NBD()
    client.connect_uri(server.snapshot(name="s"))
    run("qemu-io", "-f", "raw", "-c", "write -P 2 0 1M", server.uri())
    assert client.pread(4096, 0) == b"\1" * 4096
    temp = server.temp("vda@s")
    assert server.delete("vda@s")
    assert not temp.exists()
    with pytest.raises(libnbd.Error):
        client.pread(4096, 0)


def test_disks_of_one_configuration_are_served_together(serve: Serve, image: Path, tmp_path: Path) -> None:
    other = tmp_path / "vdb.img"
    other.write_bytes(b"\3" * 4096)
    server = serve({"vda": image, "vdb": other})
    assert run("nbdinfo", "--size", server.uri("vdb")) == "4096\n"
    assert run("nbdinfo", "--size", server.uri("vda")) == f"{MiB}\n"
