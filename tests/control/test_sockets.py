"""Listening sockets."""

from __future__ import annotations

import os
import socket
import stat
from pathlib import Path

import pytest

from fleecing.control.sockets import bind_tcp, bind_unix, check_socket_path, remove_socket
from fleecing.errors import ConfigError


def test_a_unix_socket_is_its_owners_alone(tmp_path: Path) -> None:
    path = tmp_path / "new" / "s"
    before = os.umask(0)
    try:
        with bind_unix(str(path)):
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
    finally:
        assert os.umask(before) == 0


def test_a_socket_of_a_dead_server_is_replaced(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    bind_unix(path).close()
    with bind_unix(path), socket.socket(socket.AF_UNIX) as client:
        client.connect(path)


def test_a_socket_of_a_live_server_is_left_alone(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    with bind_unix(path), socket.socket(socket.AF_UNIX) as client:
        with pytest.raises(ConfigError, match="in use by a running server"):
            bind_unix(path)
        client.connect(path)


def test_what_is_no_socket_is_never_replaced(tmp_path: Path) -> None:
    path = tmp_path / "s"
    path.write_text("mine")
    with pytest.raises(ConfigError, match="is no socket"):
        bind_unix(str(path))
    assert path.read_text() == "mine"


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "f").touch()
    with pytest.raises(ConfigError, match=f"folder {tmp_path}/f of socket"):
        bind_unix(str(tmp_path / "f" / "s"))


def test_a_path_may_have_107_bytes(tmp_path: Path) -> None:
    longest = str(tmp_path / ("x" * (106 - len(str(tmp_path)))))
    assert len(longest) == 107
    bind_unix(check_socket_path(longest)).close()
    with pytest.raises(ValueError, match="108 bytes and the system allows 107"):
        check_socket_path(longest + "x")


def test_the_length_of_a_path_is_counted_in_bytes() -> None:
    with pytest.raises(ValueError, match="allows 107"):
        check_socket_path("/" + "ü" * 54)


def test_removing_a_socket_twice_does_no_harm(tmp_path: Path) -> None:
    path = tmp_path / "s"
    bind_unix(str(path)).close()
    remove_socket(str(path))
    remove_socket(str(path))
    assert not path.exists()


def test_port_0_takes_a_free_port() -> None:
    (listener,) = bind_tcp("127.0.0.1", 0)
    with listener:
        assert listener.getsockname()[1] > 0


def test_a_host_with_several_addresses_has_one_port() -> None:
    listeners = bind_tcp("localhost", 0)
    ports = {listener.getsockname()[1] for listener in listeners}
    for listener in listeners:
        listener.close()
    assert len(ports) == 1


def test_a_port_in_use_is_named() -> None:
    (listener,) = bind_tcp("127.0.0.1", 0)
    with listener:
        port = listener.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"cannot listen on 127\.0\.0\.1:{port}: Address already in use"):
            bind_tcp("127.0.0.1", port)


@pytest.mark.parametrize("host", ["192.0.2.1", "host.invalid"])
def test_an_address_that_is_not_ours_is_named(host: str) -> None:
    with pytest.raises(ConfigError, match=f"cannot listen on {host}:1"):
        bind_tcp(host, 1)


def test_a_unix_socket_can_be_a_groups(tmp_path: Path) -> None:
    path = tmp_path / "new" / "s"
    group = os.getegid()
    before = os.umask(0o077)
    try:
        with bind_unix(str(path), 0o660, group):
            info = path.stat()
            assert (stat.S_IMODE(info.st_mode), info.st_gid) == (0o660, group)
    finally:
        os.umask(before)


def test_nobody_can_connect_before_the_socket_has_its_group_and_mode(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(tmp_path / "s")
    seen = []

    def chmod(name: str, mode: int) -> None:
        with socket.socket(socket.AF_UNIX) as client, pytest.raises(ConnectionRefusedError):
            client.connect(path)
        seen.append(stat.S_IMODE(os.stat(name).st_mode))
        real(name, mode)

    real = os.chmod
    monkeypatch.setattr(os, "chmod", chmod)
    bind_unix(path, 0o666).close()
    assert seen == [0o600]
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o666


def test_a_group_that_cannot_be_had_leaves_no_socket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def chown(*_: object, **__: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "chown", chown)
    with pytest.raises(ConfigError, match="cannot be given mode 0660 and group 61234: Operation not permitted"):
        bind_unix(str(tmp_path / "s"), 0o660, 61234)
    assert list(tmp_path.iterdir()) == []
