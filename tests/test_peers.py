"""The helpers that run real programs."""

from __future__ import annotations

import signal
import socket
from pathlib import Path
from types import ModuleType

import pytest

from tests.peers import Child, Children, free_port, listen_tcp, listen_unix, port_of, require, run, run_any

Failed = pytest.fail.Exception

SAYS_READY_AND_WAITS = "import sys, time; print('ready on port 7', file=sys.stderr, flush=True); time.sleep(600)"


def python(script: str) -> list[str]:
    return [require("python3"), "-c", script]


def test_a_missing_program_fails_the_test_with_the_name_of_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.peers._SEARCH", "/nowhere")
    with pytest.raises(Failed, match="qemu-img is missing: install the package qemu-utils"):
        require("qemu-img")


def test_a_program_that_ends_with_the_wrong_code_fails_the_test_with_what_it_said() -> None:
    with pytest.raises(Failed, match="No such file"):
        run("qemu-img", "info", "/nowhere/disk.raw")


def test_a_program_may_be_expected_to_fail() -> None:
    assert run_any("qemu-img", "info", "/nowhere/disk.raw").returncode == 1
    run("qemu-img", "info", "/nowhere/disk.raw", expect=1)


def test_a_line_is_waited_for_and_its_match_returned(tmp_path: Path) -> None:
    with Child(python(SAYS_READY_AND_WAITS), tmp_path) as child:
        assert child.wait_for_line(r"ready on port (\d+)").group(1) == "7"
        assert child.returncode is None
    assert child.returncode == -signal.SIGTERM


def test_a_child_that_ends_without_the_line_fails_the_test_with_what_it_said(tmp_path: Path) -> None:
    with (
        Child(python("import sys; sys.exit('no such image')"), tmp_path) as child,
        pytest.raises(Failed, match=r"ended with 1 and never said 'ready', but:\nno such image"),
    ):
        child.wait_for_line("ready")


def test_a_child_that_never_says_the_line_fails_the_test_at_the_deadline(tmp_path: Path) -> None:
    with (
        Child(python(SAYS_READY_AND_WAITS), tmp_path) as child,
        pytest.raises(Failed, match="still running"),
    ):
        child.wait_for_line("never", deadline=0.05)


def test_a_child_that_ignores_sigterm_is_killed(tmp_path: Path) -> None:
    script = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); " + SAYS_READY_AND_WAITS
    child = Child(python(script), tmp_path)
    child.wait_for_line("ready")
    assert child.stop(deadline=0.05) == -signal.SIGKILL
    assert child.stop() == -signal.SIGKILL


def test_output_that_nobody_reads_never_blocks_a_child(tmp_path: Path) -> None:
    script = "import sys; [print('y' * 999, file=sys.stderr) for _ in range(1000)]"
    with Child(python(script), tmp_path) as child:
        assert child.wait() == 0
        assert len(child.stderr) == 1000 * 1000 - 1


def test_standard_output_is_kept_apart(tmp_path: Path) -> None:
    with Child(python("import sys; print('data'); print('talk', file=sys.stderr)"), tmp_path) as child:
        assert child.wait() == 0
        assert (child.stdout, child.stderr) == ("data\n", "talk")


def test_a_server_gets_its_tcp_socket_before_it_starts(children: Children) -> None:
    listener = listen_tcp()
    port = port_of(listener)
    children.start("nbdkit", "-f", "memory", "3M", activate=listener)
    assert run("nbdinfo", "--size", f"nbd://127.0.0.1:{port}") == f"{3 << 20}\n"


def test_a_server_gets_its_unix_socket_before_it_starts(children: Children, tmp_path: Path) -> None:
    image = tmp_path / "disk.raw"
    image.write_bytes(b"\1" * 65536)
    children.start("qemu-nbd", "-t", "-f", "raw", "-x", "vda", str(image), activate=listen_unix(tmp_path / "s"))
    assert run("nbdinfo", "--size", f"nbd+unix:///vda?socket={tmp_path}/s") == "65536\n"


def test_a_free_port_can_be_bound() -> None:
    with socket.create_server(("127.0.0.1", free_port())):
        pass


def test_libnbd_talks_from_this_interpreter(libnbd: ModuleType, children: Children, tmp_path: Path) -> None:
    children.start("nbdkit", "-f", "memory", "1M", activate=listen_unix(tmp_path / "s"))
    handle = libnbd.NBD()
    handle.connect_unix(str(tmp_path / "s"))
    handle.pwrite(b"libnbd", 0)
    assert handle.pread(6, 0) == b"libnbd"
    handle.shutdown()
