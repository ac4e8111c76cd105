"""`fleecing demo` as a user runs it: what it reports, what it notices, and that it leaves nothing behind."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner, Result

from fleecing.cli import demo as demo_module
from fleecing.cli.control_client import ControlClient
from fleecing.cli.demo_guest import Writer
from fleecing.cli.demo_server import DemoServer
from fleecing.cli.main import main
from fleecing.client.dial import connect
from fleecing.nbd.uri import NbdUri
from fleecing.pull.engine import pull
from fleecing.pull.options import PullReport
from tests.peers import DEADLINE, Child, describe
from tests.serving import ROOT

COMMAND = [sys.executable, "-m", "fleecing", "demo"]
SMALL = ["--size", "8M", "--seconds", "0.1", "--seed", "1"]


@pytest.fixture
def scratch(tmp_path: Path) -> Path:
    """The folder that the demo takes for /tmp."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    return folder


def environment(scratch: Path) -> dict[str, str]:
    return {"TMPDIR": str(scratch), "PYTHONPATH": str(ROOT)}


def run_demo(scratch: Path, *options: str, expect: int = 0) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, **environment(scratch)}
    result = subprocess.run(
        [*COMMAND, *options], capture_output=True, text=True, env=env, timeout=DEADLINE, check=False
    )
    assert result.returncode == expect, describe(result)
    return result


def in_process(scratch: Path, monkeypatch: pytest.MonkeyPatch, *options: str) -> Result:
    """The demo in this process, so that parts of it can be replaced."""
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(scratch))
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    return CliRunner().invoke(main, ["demo", *options])


def figure(text: str, pattern: str) -> int:
    match = re.search(pattern, text)
    assert match is not None, text
    return int(match.group(1).replace(",", ""))


@pytest.mark.parametrize(
    "size, cluster",
    [("8M", "64K"), ("5000001", "4K"), ("1M", "2M"), ("1048577", "64K"), ("33000960", "256K")],
)
def test_every_byte_is_verified(scratch: Path, size: str, cluster: str) -> None:
    report = run_demo(scratch, "--size", size, "--cluster-size", cluster, "--seconds", "0.1").stdout
    count = {"8M": 8 << 20, "1M": 1 << 20}.get(size) or int(size)
    assert f"{count:,} bytes of the copy, each as it was at the instant of creation" in report
    assert "FAILED" not in report
    assert os.listdir(scratch) == []


def test_the_report_has_all_figures(scratch: Path) -> None:
    report = run_demo(scratch, "--size", "32M", "--seconds", "0.3").stdout
    assert [line.split("  ")[0] for line in report.splitlines()] == [
        "verified", "disk", "snapshot", "guest writes", "clusters", "temp", "pull",
    ]  # fmt: skip
    assert figure(report, r"([\d,]+) in all") > figure(report, r"guest writes +([\d,]+)")
    assert figure(report, r"([\d,]+) overwritten but never copied thanks to TRIM") > 0
    assert figure(report, r"([\d,]+) copied before") <= 512
    assert re.search(r"temp +[\d.]+ [KM]iB at the peak, [\d.]+ KiB at the end", report)
    assert re.search(r"pull +[\d.]+ s for [\d.]+ MiB of data, [\d.]+ [KMG]iB/s", report)


def test_talk_goes_to_stderr_in_plain_lines(scratch: Path) -> None:
    talk = run_demo(scratch, *SMALL).stderr
    assert "\x1b" not in talk
    assert "--seed 1" in talk
    assert re.search(r"^Pulled 8 MiB of 8 MiB, .*/s, temp ", talk, re.MULTILINE)


def test_a_terminal_gets_a_progress_bar(scratch: Path) -> None:
    terminal, slave = pty.openpty()
    env = {**os.environ, **environment(scratch), "TERM": "xterm", "COLUMNS": "100"}
    with subprocess.Popen([*COMMAND, *SMALL], stdout=subprocess.DEVNULL, stderr=slave, env=env) as process:
        os.close(slave)
        said = b""
        while True:
            try:
                piece = os.read(terminal, 4096)
            except OSError:  # EIO: the last who had the terminal open is gone
                break
            said += piece
        assert process.wait(DEADLINE) == 0
    os.close(terminal)
    assert b"Pulling" in said
    assert b"8.4/8.4" in said or b"8.0/8.0 MiB" in said
    assert b"Pulled" not in said


def test_the_scratch_folder_can_be_kept(scratch: Path) -> None:
    result = run_demo(scratch, *SMALL, "--keep")
    (folder,) = scratch.iterdir()
    assert f"Kept: {folder}" in result.stderr
    assert {"disk.img", "copy.img", "server.log"} <= {path.name for path in folder.iterdir()}
    assert (folder / "copy.img").stat().st_size == (folder / "disk.img").stat().st_size == 8 << 20


@pytest.mark.parametrize(
    "number, moment, seconds",
    [
        (signal.SIGINT, "Making a disk", "1"),
        (signal.SIGINT, "Serving it", "600"),
        (signal.SIGINT, "The guest writes", "600"),
        (signal.SIGINT, "The guest goes on", "1"),
        (signal.SIGTERM, "The guest writes", "600"),
        (signal.SIGHUP, "The guest writes", "600"),
    ],
)
def test_a_signal_ends_everything(
    scratch: Path, tmp_path: Path, number: signal.Signals, moment: str, seconds: str
) -> None:
    with Child([*COMMAND, "--size", "16M", "--seconds", seconds], tmp_path, env=environment(scratch)) as child:
        child.wait_for_line(moment)
        child.signal(number)
        assert child.wait() == 1
        assert "Aborted!" in child.stderr
        assert "Traceback" not in child.stderr
        served = re.search(r"process (\d+)", child.stderr)
    if served is not None:
        assert not Path(f"/proc/{served.group(1)}").exists()
    assert os.listdir(scratch) == []


def test_a_start_that_is_interrupted_ends_the_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(1 << 20))
    server = DemoServer(image, tmp_path, cluster_size=65536)

    def interrupted(timeout: float) -> bool:
        raise KeyboardInterrupt

    monkeypatch.setattr(server._said, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt), server:
        pass
    assert not Path(f"/proc/{server.pid}").exists()


def test_a_killed_demo_takes_its_server_with_it(scratch: Path, tmp_path: Path) -> None:
    with Child([*COMMAND, "--size", "8M", "--seconds", "600"], tmp_path, env=environment(scratch)) as child:
        pid = int(child.wait_for_line(r"process (\d+)").group(1))
        server = os.pidfd_open(pid)
        child.kill()
    ended = select.poll()
    ended.register(server, select.POLLIN)
    assert ended.poll(DEADLINE * 1000)
    os.close(server)


# What must be noticed


def spoiled(change: Callable[[Path], None]) -> Callable[..., PullReport]:
    """A pull whose copy is changed afterwards."""

    def pull_and_change(uri: NbdUri, open_target: Callable[[int], Any], **more: Any) -> PullReport:
        targets: list[Any] = []

        def remembering(size: int) -> Any:
            targets.append(open_target(size))
            return targets[0]

        report = pull(uri, remembering, **more)
        change(Path(targets[0].path))
        return report

    return pull_and_change


def flip_a_byte(copy: Path) -> None:
    data = bytearray(copy.read_bytes())
    data[5_000_000] ^= 1
    copy.write_bytes(data)


def cut_it(copy: Path) -> None:
    os.truncate(copy, 8_000_000)


@pytest.mark.parametrize(
    "change, sentence",
    [
        (flip_a_byte, "1 sectors of the copy differ, the first at offset 4999680"),
        (cut_it, "the copy has 8000000 bytes instead of 8388608"),
    ],
)
def test_a_copy_that_differs_is_noticed(
    scratch: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], None], sentence: str
) -> None:
    monkeypatch.setattr(demo_module, "pull", spoiled(change))
    result = in_process(scratch, monkeypatch, *SMALL)
    assert result.exit_code == 1
    assert f"FAILED: {sentence}" in result.stdout
    assert os.listdir(scratch) == []


def test_a_copy_of_the_active_disk_is_noticed(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a server without snapshots would give: the disk while it is written."""

    def pull_the_active_disk(uri: NbdUri, *arguments: Any, **more: Any) -> PullReport:
        return pull(NbdUri(export="demo", socket=uri.socket), *arguments, **more)

    monkeypatch.setattr(demo_module, "pull", pull_the_active_disk)
    result = in_process(scratch, monkeypatch, *SMALL)
    assert result.exit_code == 1
    assert "sectors of the copy differ" in result.stdout


def test_a_lost_guest_write_is_noticed(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compare = demo_module._Demo._compare_active

    def lose_one(self: Any, writers: list[Writer]) -> None:
        writers[0].versions[0] += 1
        compare(self, writers)

    monkeypatch.setattr(demo_module._Demo, "_compare_active", lose_one)
    result = in_process(scratch, monkeypatch, *SMALL)
    assert result.exit_code == 1
    assert "FAILED: 1 sectors of the active disk differ, the first at offset 0" in result.stdout


def test_a_broken_snapshot_is_told_and_leaves_nothing(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Limited(ControlClient):
        """Asks for a temp that is soon full."""

        def request(self, method: str, path: str, body: Any = None) -> Any:
            return super().request(method, path, body and {**body, "temp_limit": "1M"})

    def pull_late(uri: NbdUri, *arguments: Any, **more: Any) -> PullReport:
        with connect(NbdUri(export="demo", socket=uri.socket)) as guest:
            guest.write(0, b"x" * guest.size)
        return pull(uri, *arguments, **more)

    monkeypatch.setattr(demo_module, "ControlClient", Limited)
    monkeypatch.setattr(demo_module, "pull", pull_late)
    result = in_process(scratch, monkeypatch, *SMALL)
    assert result.exit_code == 1
    assert "Error: snapshot broken: " in result.stderr
    assert os.listdir(scratch) == []


# Bad input


@pytest.mark.parametrize("options", [["--size", "big"], ["--size", "1000K"], ["--size", "2T"], ["--cluster-size", "5K"],
                                     ["--seconds", "-1"]])  # fmt: skip
def test_misuse_exits_with_2_before_anything_is_made(scratch: Path, options: list[str]) -> None:
    assert "Error: Invalid value" in run_demo(scratch, *options, expect=2).stderr
    assert os.listdir(scratch) == []


def test_too_little_space_is_told_before_anything_is_made(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=10 << 20))
    result = in_process(scratch, monkeypatch, *SMALL)
    assert result.exit_code == 1
    assert f"the demo needs 24 MiB in {scratch}, where 10 MiB are free" in result.stderr
    assert os.listdir(scratch) == []


def test_a_server_that_does_not_start_is_told_with_its_own_words(tmp_path: Path) -> None:
    folder = tmp_path / ("x" * 100)
    folder.mkdir()
    talk = run_demo(folder, *SMALL, expect=1).stderr
    assert "the server did not start" in talk
    assert "socket" in talk.splitlines()[-1]
    assert os.listdir(folder) == []
