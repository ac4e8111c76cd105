"""What systemd is told: against a socket that takes the place of systemd's."""

from __future__ import annotations

import os
import re
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fleecing.control.notify import Notifier
from tests.peers import DEADLINE, Children
from tests.serving import ROOT


@pytest.fixture
def systemd(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(tmp_path / "notify"))
        listener.settimeout(DEADLINE)
        yield listener


def messages(listener: socket.socket, until: str) -> list[list[str]]:
    """The lines of the messages up to the first that has this line."""
    found: list[list[str]] = []
    while not found or until not in found[-1]:
        found.append(listener.recv(4096).decode().splitlines())
    return found


def test_the_life_of_a_server_is_told(children: Children, systemd: socket.socket, tmp_path: Path) -> None:
    image = tmp_path / "vda.img"
    image.write_bytes(bytes(65536))
    places = ["--unix", "n.sock", "--control", "c.sock", "--state-dir", "state"]
    places[1::2] = [str(tmp_path / name) for name in places[1::2]]
    command = [sys.executable, "-m", "fleecing", "serve", str(image), *places]
    env = {"PYTHONPATH": str(ROOT), "NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "300000"}
    server = children.start(*command, env=env)
    assert messages(systemd, "READY=1") == [["READY=1", "STATUS=1 disks, 0 clients, 0 snapshots"]]
    for _ in range(3):
        assert messages(systemd, "WATCHDOG=1")[-1][1] == "STATUS=1 disks, 0 clients, 0 snapshots"
    for _ in range(2):
        server.signal(signal.SIGHUP)
        told = messages(systemd, "READY=1")
        begin = next(message for message in told if message[0] == "RELOADING=1")
        assert re.fullmatch(r"MONOTONIC_USEC=\d+", begin[1])
        assert told[-1] == ["READY=1", "STATUS=1 disks, 0 clients, 0 snapshots"]
    server.signal(signal.SIGTERM)
    messages(systemd, "STOPPING=1")
    assert server.wait() == 0


def test_a_reload_ends_in_ready_whatever_comes_of_it(systemd: socket.socket) -> None:
    notifier = Notifier({"NOTIFY_SOCKET": str(systemd.getsockname())})
    with pytest.raises(ValueError, match="bad"), notifier.reloading(lambda: "as before"):
        raise ValueError("bad")
    begin, end = messages(systemd, "READY=1")
    assert begin[0] == "RELOADING=1"
    assert begin[1].startswith("MONOTONIC_USEC=")
    assert end == ["READY=1", "STATUS=as before"]
    notifier.close()


def test_a_line_cannot_hold_another_one(systemd: socket.socket) -> None:
    notifier = Notifier({"NOTIFY_SOCKET": str(systemd.getsockname())})
    notifier.ready("x\nMAINPID=1")
    assert messages(systemd, "READY=1") == [["READY=1", "STATUS=x MAINPID=1"]]
    notifier.close()


def test_what_the_server_starts_is_not_meant(tmp_path: Path) -> None:
    environ = {"NOTIFY_SOCKET": str(tmp_path / "s"), "WATCHDOG_USEC": "5", "WATCHDOG_PID": str(os.getpid() + 1)}
    notifier = Notifier(environ)
    assert environ == {}
    assert notifier.watchdog is None
    notifier.ready("nobody listens, and that does no harm")
    notifier.close()


@pytest.mark.parametrize("environ", [{}, {"NOTIFY_SOCKET": "relative"}, {"WATCHDOG_USEC": "x"}])
def test_without_systemd_nothing_is_told(environ: dict[str, str]) -> None:
    notifier = Notifier(environ)
    notifier.ready("x")
    notifier.stopping()
    assert notifier.watchdog is None
