"""Who may use the sockets: a second user of the machine, with curl and nbdinfo."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import pytest
from aiohttp import web

from fleecing.control.api import make_app
from fleecing.control.config import make_settings
from fleecing.control.event_stream import EventRing, EventStream
from fleecing.control.jobs import Jobs
from fleecing.control.logs import Logs
from fleecing.control.metrics import Metrics
from fleecing.control.report import Reporter
from fleecing.control.sockets import bind_unix
from fleecing.errors import ConfigError
from fleecing.units import MiB
from tests.peers import require, run, run_any
from tests.serving import Serve, Server
from tests.users import STRANGER, as_user, mode_of, open_folder

GROUP = STRANGER + 1


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "vda.img"
    path.write_bytes(b"\1" * MiB)
    return path


@pytest.fixture
def folder() -> Iterator[Path]:
    with open_folder() as path:
        yield path


def call(control: Path, *front: str) -> tuple[int, Any]:
    """(status, JSON) of a call."""
    form = ["--silent", "--unix-socket", str(control), "--write-out", "\n%{http_code}", "http://localhost/v1/disks"]
    result = run_any(*front, "curl", *form)
    body, _, status = result.stdout.rpartition("\n")
    return int(status), json.loads(body) if body else None


def serve_in(serve: Serve, image: Path, folder: Path, *options: str) -> tuple[Server, Path]:
    """A server whose control socket all users could reach."""
    server = serve(image, "--unix", str(folder / "n.sock"), *options)
    control = folder / "c.sock"
    control.hardlink_to(server.control_path)
    return server, control


def test_the_control_socket_is_closed_to_other_users(serve: Serve, image: Path, folder: Path) -> None:
    server, control = serve_in(serve, image, folder)
    assert mode_of([server.control_path, folder / "n.sock"]) == ["0600", "0600"]
    assert call(control)[0] == 200
    stranger = as_user(STRANGER)
    assert call(control, *stranger) == (0, None)
    assert "Permission denied" in run_any(*stranger, "nbdinfo", f"nbd+unix:///vda?socket={folder}/n.sock").stderr


def test_a_user_that_can_open_the_control_socket_is_still_looked_at(serve: Serve, image: Path, folder: Path) -> None:
    server, control = serve_in(serve, image, folder)
    control.chmod(0o666)
    status, answer = call(control, *as_user(STRANGER, STRANGER, os.getegid()))
    assert status == 403
    assert answer["error"].startswith(f"user {STRANGER} may not use this control socket: root, the server's user and")
    server.child.wait_for_line(f"WARNING control socket: GET /v1/disks refused to user {STRANGER}")
    assert call(control)[0] == 200


@pytest.mark.parametrize("groups", [(GROUP,), (STRANGER, 5, GROUP)])
def test_the_members_of_the_control_group_get_in(
    serve: Serve, image: Path, folder: Path, groups: tuple[int, ...]
) -> None:
    """Also those who have it as a supplementary group; and nobody else, whatever the mode is by then."""
    server, control = serve_in(serve, image, folder, "--control-group", str(GROUP))
    assert mode_of([server.control_path]) == ["0660"]
    assert server.control_path.stat().st_gid == GROUP
    assert call(control, *as_user(STRANGER, *groups))[0] == 200
    assert call(control, *as_user(STRANGER)) == (0, None)
    control.chmod(0o666)
    assert call(control, *as_user(STRANGER))[0] == 403


def test_a_server_that_is_not_root_serves_its_own_user_and_root(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    users = [as_user(STRANGER), [], as_user(STRANGER + 1, STRANGER)]
    control = folder / "c.sock"
    form = ["--silent", "--output", "/dev/null", "--write-out", "%{http_code}", "--unix-socket", str(control)]

    async def ask(*front: str) -> str:
        command = [*front, require("curl"), *form, "http://localhost/openapi.json"]
        process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
        return (await process.communicate())[0].decode()

    async def talk(*users: Sequence[str]) -> list[str]:
        class NoReporter:
            manager = None

        runner = web.AppRunner(
            make_app(
                cast(Reporter, NoReporter()),
                cast(Jobs, None),
                EventStream(cast(EventRing, None)),
                cast(Logs, None),
                cast(Metrics, None),
            )
        )
        await runner.setup()
        await web.SockSite(runner, bind_unix(str(control), 0o666)).start()
        answers = [await ask(*front) for front in users]
        await runner.cleanup()
        return answers

    monkeypatch.setattr(os, "geteuid", lambda: STRANGER)
    assert asyncio.run(talk(*users)) == ["200", "200", "403"]


def test_the_nbd_sockets_can_be_a_groups(serve: Serve, image: Path, folder: Path) -> None:
    serve(image, "--unix", str(folder / "new/n.sock"), "--unix-mode", "0660", "--unix-group", str(GROUP))
    uri = f"nbd+unix:///vda?socket={folder}/new/n.sock"
    assert mode_of([folder / "new", folder / "new/n.sock"]) == ["0711", "0660"]
    assert run(*as_user(STRANGER, STRANGER, GROUP), "nbdinfo", "--size", uri) == f"{MiB}\n"
    assert "Permission denied" in run_any(*as_user(STRANGER), "nbdinfo", uri).stderr


@pytest.mark.parametrize(
    "values, sentence",
    [
        ({"unix-mode": "0668"}, "unix-mode: '0668' is no mode of a socket"),
        ({"unix-mode": "0066"}, "unix-mode: '0066' is no mode of a socket"),
        ({"unix-mode": 432}, "unix-mode: Input should be a valid string"),
        ({"unix-group": "no-such-group"}, "there is no group 'no-such-group' on this machine"),
        ({"control-group": "no-such-group"}, "there is no group 'no-such-group' on this machine"),
        ({"control-group": -1}, "control-group"),
    ],
)
def test_a_mistake_is_named(values: dict[str, object], sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make_settings({"disk": {"a": {"path": "x"}}, **values}, "test")
    assert sentence in str(caught.value)
