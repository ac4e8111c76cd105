"""The helper that runs the real server."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fleecing.errors import ControlError
from tests.peers import run
from tests.serving import Serve, Server

Failed = pytest.fail.Exception
BOTH = pytest.mark.parametrize("forked", [False, True], ids=["by the interpreter", "forked"])


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.raw"
    path.write_bytes(bytes(range(256)) * 4096)
    return path


@BOTH
def test_a_snapshot_is_made_read_shown_and_deleted(serve: Serve, image: Path, forked: bool) -> None:
    server = serve(image, forked=forked)
    assert run("nbdinfo", "--size", server.snapshot(name="monday")) == f"{1 << 20}\n"
    assert server.show("vda@monday")["state"] == "ready"
    assert server.map("vda@monday") == [(0, 1 << 20, "untouched")]
    assert server.temp("vda@monday").exists()
    assert server.delete("vda@monday")
    assert not server.delete("vda@monday")
    assert server.status()["snapshots"] == []


def test_exports_are_reached_over_tcp_too(serve: Serve, image: Path) -> None:
    server = serve(image)
    assert run("nbdinfo", "--size", server.uri(tcp=True)) == f"{1 << 20}\n"
    assert run("nbdinfo", "--size", server.snapshot(tcp=True)) == f"{1 << 20}\n"


def test_several_disks_are_frozen_at_once(serve: Serve, image: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.raw"
    other.write_bytes(b"\1" * 4096)
    server = serve({"vda": image, "vdb": other})
    made = server.freeze("vda", "vdb", name="s")
    assert [one["export"] for one in made] == ["vda@s", "vdb@s"]


@BOTH
def test_a_server_that_cannot_start_fails_the_test_with_what_it_said(tmp_path: Path, forked: bool) -> None:
    with pytest.raises(Failed, match="No such file"):
        Server(tmp_path / "server", tmp_path / "nowhere.raw", forked=forked)


@BOTH
def test_it_is_started_with_what_is_the_tests_own(
    serve: Serve, image: Path, monkeypatch: pytest.MonkeyPatch, forked: bool
) -> None:
    monkeypatch.chdir(image.parent)
    monkeypatch.setenv("FLEECING_TEST", "yes")
    server = serve(Path(image.name), forked=forked)
    process = Path("/proc", str(server.child.pid))
    assert (process / "cwd").readlink() == image.parent
    assert (process / "fd" / "0").readlink() == Path("/dev/null")
    assert (process / "fd" / "1").readlink() == server.child.out_path
    assert "Ready" in server.log
    assert os.getpgid(server.child.pid) == os.getpgid(0)


@BOTH
def test_a_stop_ends_the_server_and_can_be_repeated(serve: Serve, image: Path, forked: bool) -> None:
    server = serve(image, forked=forked)
    server.stop()
    server.stop()
    assert server.child.returncode == 0
    with pytest.raises(ControlError, match="no server answers"):
        server.status()


@BOTH
def test_a_server_that_was_killed_fails_no_test(serve: Serve, image: Path, forked: bool) -> None:
    server = serve(image, forked=forked)
    server.kill()
    server.stop()
