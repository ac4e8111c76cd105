"""What a pull shows while it runs: rate, time left, temp space; of an earlier run's work, that it is done."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fleecing.cli.pull_display import eta
from fleecing.pull.options import Progress
from tests.images import MIB, make_image
from tests.peers import DEADLINE
from tests.serving import ROOT, Serve, Server

SIZE = 12 * MIB
ENV = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm", "COLUMNS": "120"}


@pytest.fixture
def server(serve: Serve, tmp_path: Path) -> Server:
    image = tmp_path / "vda.img"
    make_image(image, SIZE)
    server = serve(image)
    server.snapshot(name="s")
    return server


def command(server: Server, *words: str) -> list[str]:
    return [sys.executable, "-m", "fleecing", "pull", *words, "--control", str(server.control_path)]


@pytest.mark.parametrize(
    "progress, expected",
    [
        (Progress(done=0, total=100, rate=0, seconds=1), None),
        (Progress(done=5, total=100, rate=0), None),
        (Progress(done=25, total=100, rate=0, seconds=2), 6),
        (Progress(done=100, total=100, rate=0, seconds=2), 0),
        (Progress(done=80, total=100, rate=0, seconds=2, resumed=80), None),
        (Progress(done=90, total=100, rate=0, seconds=2, resumed=80), 2),
    ],
)
def test_time_left_goes_by_what_this_run_has_done(progress: Progress, expected: float | None) -> None:
    assert eta(progress) == expected


def test_lines_of_json_tell_the_time_left(server: Server, tmp_path: Path) -> None:
    words = command(server, "vda@s", str(tmp_path / "copy"), "--bandwidth", "4M", "--json")
    said = subprocess.run(words, env=ENV, capture_output=True, text=True, timeout=DEADLINE, check=True).stdout
    lines = [json.loads(line) for line in said.splitlines()]
    told = [line["eta"] for line in lines if line["event"] == "progress"]
    assert any(told[:-1]) and told[-1] == 0


def shown(words: list[str], kill_at: int | None = None) -> str:
    """What it says on a terminal; `kill_at`: percent of the bar's bytes at which it is killed."""
    terminal, slave = pty.openpty()
    with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=slave, env=ENV) as process:
        os.close(slave)
        said = ""
        while True:
            try:
                said += os.read(terminal, 4096).decode()
            except OSError:  # EIO: the last who had the terminal open is gone
                break
            if kill_at is not None and any(float(n) >= kill_at for n in re.findall(r"([\d.]+)/12\.0 MiB", said)):
                process.send_signal(signal.SIGKILL)
        assert process.wait(DEADLINE) == (0 if kill_at is None else -signal.SIGKILL)
    os.close(terminal)
    return said


def test_a_terminal_gets_a_bar_with_rate_time_left_and_temp_space(server: Server, tmp_path: Path) -> None:
    words = command(server, "vda@s", str(tmp_path / "copy"), "--bandwidth", "4M", "--no-trim")
    shown(words, kill_at=6)
    said = shown([*words, "--resume"])
    assert "Pulling" in said and "12.0/12.0 MiB" in said
    assert re.search(r"[\d.]+ MiB/s  temp ", said)
    assert re.search(r"0:00:\d\d", said)
    first = re.search(r"([\d.]+)/12\.0 MiB", said)
    assert first is not None and float(first[1]) > 4
