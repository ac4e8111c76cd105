"""`fleecing events` and `fleecing log`, as an operator types them."""

from __future__ import annotations

import json
import re
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from fleecing.cli.main import main
from fleecing.units import MiB
from tests.peers import Child, Children, run
from tests.serving import ROOT, Server


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    image = tmp_path / "vda.img"
    image.write_bytes(bytes(MiB))
    server = Server(tmp_path, image)
    yield server
    server.stop()


def listen(children: Children, server: Server, *options: str) -> Child:
    """The command, with what it prints on its stderr, whose lines can be waited for."""
    command = [sys.executable, "-m", "fleecing", "events", "--control", str(server.control_path), *options]
    env = {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    return children.start("bash", "-c", 'exec "$@" >&2', "bash", *command, env=env)


def ask(server: Server, command: str, code: int = 0) -> str:
    result = CliRunner().invoke(main, command.split(), env={"FLEECING_CONTROL": str(server.control_path)})
    assert result.exit_code == code, result.stderr
    return result.stdout if code == 0 else result.stderr


def test_events_are_printed_for_people_and_as_json_until_the_server_stops(children: Children, server: Server) -> None:
    run("nbdinfo", "--size", server.uri())
    server.child.wait_for_line("left vda")
    people = listen(children, server, "--after", "x")  # of another server: so what is kept comes first, and they listen
    programs = listen(children, server, "--json", "--after", "x")
    people.wait_for_line("client-left")
    programs.wait_for_line("client-left")
    server.snapshot(name="s")
    server.stop()
    assert people.wait() == programs.wait() == 0
    lines = people.stderr.splitlines()
    assert lines[0].startswith(" " * 21 + "events-lost")
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d  [a-z-]+ +\w", line) for line in lines[1:])
    assert lines[-1][21:].split(maxsplit=1) == ["server-stopping", "stopping: requests in flight have 10 s to end"]
    events = [json.loads(line) for line in programs.stderr.splitlines()]
    assert [event["event"] for event in events] == [line[21:].split()[0] for line in lines]
    assert events[-2]["snapshot"] == "s"
    assert re.fullmatch(r"[0-9a-f]{8}-\d+", events[-1]["id"])


def test_ctrl_c_is_the_way_to_end_it_and_a_lost_server_is_an_error(children: Children, server: Server) -> None:
    stopped, lost = listen(children, server, "--after", "x"), listen(children, server, "--after", "x")
    stopped.wait_for_line("disk-opened")
    stopped.signal(signal.SIGINT)
    assert stopped.wait() == 0
    lost.wait_for_line("disk-opened")
    server.kill()
    assert lost.wait() == 1
    assert "went away" in lost.stderr or "failed" in lost.stderr


def test_the_log_is_looked_at_and_changed(server: Server) -> None:
    assert ask(server, "log show").split() == ["format", "text", "level", "info", "debug", "exports", "none"]
    ask(server, "log set --debug-export vda --debug-export vda@s --level warning")
    assert json.loads(ask(server, "log show --json")) == {
        "format": "text",
        "level": "warning",
        "debug_exports": ["vda", "vda@s"],
    }
    assert ask(server, "log set --no-debug-exports").endswith("debug exports  none\n")
    assert "level          warning" in ask(server, "log show")


@pytest.mark.parametrize(
    "command, sentence",
    [
        ("log set", "Say what to change"),
        ("log set --debug-export vda --no-debug-exports", "do not go together"),
        ("log set --debug-export a@b@c", "is no name"),
        ("log set --level loud", "is not one of"),
    ],
)
def test_misuse_changes_nothing(command: str, sentence: str) -> None:
    result = CliRunner().invoke(main, command.split())
    assert result.exit_code == 2
    assert sentence in result.stderr
