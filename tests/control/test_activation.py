"""Sockets that somebody else made: systemd's own program, and a parent that keeps them over a restart."""

from __future__ import annotations

import os
import socket
import sys
import threading
from pathlib import Path

import pytest

from fleecing.control.activation import take_sockets
from fleecing.control.config import make_settings
from fleecing.control.daemon import check_inherited
from fleecing.errors import ConfigError
from tests.peers import Child, Children, free_port, listen_unix, run
from tests.serving import ROOT


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "vda.img"
    path.write_bytes(b"\1" * 65536)
    return path


def serve_command(image: Path, *options: str) -> list[str]:
    state = str(image.parent / "state")
    return [sys.executable, "-m", "fleecing", "serve", str(image), "--state-dir", state, *options]


def test_systemd_passes_tcp_unix_and_control(children: Children, image: Path, tmp_path: Path) -> None:
    port = free_port()
    nbd, control = tmp_path / "n.sock", tmp_path / "c.sock"
    listen = ["-l", f"127.0.0.1:{port}", "-l", str(nbd), "-l", str(control), "--fdname=nbd:nbd:control"]
    activate = children.start("systemd-socket-activate", *listen, f"-EPYTHONPATH={ROOT}", *serve_command(image))
    activate.wait_for_line("Listening on .*c.sock")
    run("nbdinfo", "--size", f"nbd+unix:///vda?socket={nbd}")  # the first client starts the server
    activate.wait_for_line("^Ready")
    run("nbdinfo", "--size", f"nbd://127.0.0.1:{port}/vda")
    status = run("curl", "-s", "--unix-socket", str(control), "http://localhost/v1/status")
    assert f'"listeners":["tcp:127.0.0.1:{port}","unix:{nbd}"],"control":"{control}"' in status


def start(image: Path, listener: socket.socket, name: str) -> Child:
    """A server on a socket that this process keeps, as systemd does."""
    control = str(image.parent / "c.sock")
    command = serve_command(image, "--control", control)
    return Child(command, image.parent, name=name, env={"PYTHONPATH": str(ROOT)}, activate=listener.dup())


def test_a_restart_refuses_no_connection(image: Path, tmp_path: Path) -> None:
    """Whoever connects between the servers waits. Whom the first one had accepted connects again, as after any stop."""
    path = tmp_path / "n.sock"
    uri = f"nbd+unix:///vda?socket={path}"
    refused: list[str] = []
    enough = threading.Event()
    connected = threading.Semaphore(0)

    def connect() -> None:
        while not enough.is_set():
            with socket.socket(socket.AF_UNIX) as client:
                client.settimeout(60)
                try:
                    client.connect(str(path))
                except OSError as e:
                    refused.append(str(e))
                try:
                    client.recv(8)  # nothing comes where the server that ends had accepted it already
                except ConnectionError:
                    pass
                except OSError as e:
                    refused.append(f"no answer: {e}")
            connected.release()

    with listen_unix(path) as listener:
        with start(image, listener, "first") as first:
            first.wait_for_line("^Ready")
            clients = threading.Thread(target=connect)
            clients.start()
            assert connected.acquire(timeout=60)
            assert first.stop() == 0
        assert path.exists()
        with start(image, listener, "second") as second:
            run("nbdinfo", "--size", uri)
            enough.set()
            clients.join(60)
            assert second.stop() == 0
    assert refused == []


def environ(count: int, names: str) -> dict[str, str]:
    return {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": str(count), "LISTEN_FDNAMES": names}


def test_sockets_for_another_process_are_left_alone() -> None:
    variables = environ(1, "nbd") | {"LISTEN_PID": "1"}
    inherited = take_sockets(variables)
    assert (inherited.nbd, inherited.control, variables) == ((), None, {})


def test_what_does_not_listen_is_refused(tmp_path: Path) -> None:
    fd = os.open(tmp_path, os.O_RDONLY)
    try:
        with pytest.raises(ConfigError, match=r"'x' .* is no listening stream socket"):
            take_sockets(environ(1, "x"), first=fd)
    finally:
        os.close(fd)


def test_the_control_api_is_not_for_the_network() -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    with pytest.raises(ConfigError, match="no Unix socket"):
        take_sockets(environ(1, "control"), first=listener.detach())


def test_programs_that_the_server_starts_do_not_get_them(tmp_path: Path) -> None:
    listener = listen_unix(tmp_path / "s")
    fd = listener.detach()
    os.set_inheritable(fd, True)
    (taken,) = take_sockets(environ(1, "nbd"), first=fd).nbd
    with taken:
        assert not os.get_inheritable(taken.fileno())


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_a_tcp_socket_of_systemd_must_not_be_open_to_a_network_by_mistake(host: str) -> None:
    """What holds for `listen` holds for it. It is only bound here, nobody could connect."""
    disk = {"disk": {"a": {"path": "x"}}}
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as taken:
        taken.bind((host, 0))
        with pytest.raises(ConfigError, match=r"systemd passes a socket: .* is open to the network without encryption"):
            check_inherited(make_settings(disk, "test", activated=True), taken)
        for allowed in ({"insecure-listen": True}, {"tls": "require", "tls-dir": "/tls"}):
            check_inherited(make_settings(disk | allowed, "test", activated=True), taken)
    with socket.create_server(("127.0.0.1", 0)) as local:
        check_inherited(make_settings(disk, "test", activated=True), local)
