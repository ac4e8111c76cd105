"""The configuration file, and the same settings from elsewhere."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from fleecing.control.config import TcpAddress, make_settings, read_config
from fleecing.errors import ConfigError
from fleecing.server.limits import Limits
from fleecing.units import KiB, MiB

FULL = """
listen = ["127.0.0.1:10810", "[::1]:0"]
unix = ["nbd.sock"]
control = "/run/c.sock"
state-dir = "state"
temp-dir = "/var/tmp/f"
drain-seconds = 3

[disk.vda]
path = "vda.img"
format = "raw"
cluster-size = "128K"

[disk.vdb]
path = "/dev/vdb"
"""


def write(folder: Path, text: str) -> str:
    path = folder / "fleecing.toml"
    path.write_text(text)
    return str(path)


def test_a_full_file_is_read(tmp_path: Path) -> None:
    settings = read_config(write(tmp_path, FULL))
    assert [str(address) for address in settings.listen] == ["127.0.0.1:10810", "[::1]:0"]
    assert settings.temp_dir == ("/var/tmp/f",)
    assert settings.drain_seconds == 3
    assert list(settings.disk) == ["vda", "vdb"]
    assert settings.disk["vda"].cluster_size == 128 * KiB
    assert settings.disk["vdb"].cluster_size == 64 * KiB


def test_relative_paths_start_at_the_files_folder(tmp_path: Path) -> None:
    settings = read_config(write(tmp_path, FULL))
    assert settings.disk["vda"].path == str(tmp_path / "vda.img")
    assert settings.disk["vdb"].path == "/dev/vdb"
    assert settings.unix == (str(tmp_path / "nbd.sock"),)
    assert settings.state_dir == str(tmp_path / "state")


def test_there_may_be_several_temp_folders(tmp_path: Path) -> None:
    settings = read_config(write(tmp_path, FULL.replace('"/var/tmp/f"', '["/a", "b"]')))
    assert settings.temp_dir == ("/a", str(tmp_path / "b"))


def test_limits_come_from_the_file_and_single_ones_from_elsewhere(tmp_path: Path) -> None:
    path = write(tmp_path, FULL + "[limits]\nclients = 7\nread-memory = '65M'\nsend-seconds = 1.5\n")
    expected = Limits(clients=7, read_memory=65 * MiB, send_seconds=1.5)
    assert read_config(path).limits.limits() == expected
    changed = read_config(path, {"limits": {"clients": "8"}}).limits.limits()
    assert changed == dataclasses.replace(expected, clients=8)
    assert make_settings({"disk": {"a": {"path": "x"}}}, "test").limits.limits() == Limits()


def test_without_listeners_both_defaults_are_taken() -> None:
    settings = make_settings({"disk": {"a": {"path": "x"}}}, "test")
    assert [str(address) for address in settings.listen] == ["127.0.0.1:10809"]
    assert settings.unix[0].endswith("/nbd.sock")


@pytest.mark.parametrize("one, none", [({"listen": ["[::1]:1"]}, "unix"), ({"unix": ["/run/s"]}, "listen")])
def test_one_listener_is_the_only_one(one: dict[str, object], none: str) -> None:
    assert getattr(make_settings({"disk": {"a": {"path": "x"}}, **one}, "test"), none) == ()


def test_changes_replace_what_the_file_says(tmp_path: Path) -> None:
    settings = read_config(write(tmp_path, FULL), {"unix": ["/run/other.sock"], "state-dir": "/srv/state"})
    assert settings.unix == ("/run/other.sock",)
    assert settings.state_dir == "/srv/state"


@pytest.mark.parametrize(
    "text, sentence",
    [
        ("", "disk: is missing"),
        ("[disk]", "disk: there must be at least one"),
        ("[disk.vda]", "disk.vda.path: is missing"),
        ("unix = \"s\"\n[disk.vda]\npath = 'x'", "unix: must be a list, in brackets"),
        ('[disk.vda]\npath = ""', "disk.vda.path: "),
        ('[disk."a/b"]\npath = "x"', "'a/b' is no name"),
        ('[disk.vda]\npath = "x"\ncluster-size = "3K"', "cluster size 3 KiB is not possible"),
        ('[disk.vda]\npath = "x"\ncluster-size = "4M"', "cluster size 4 MiB is not possible"),
        ('[disk.vda]\npath = "x"\ncluster-size = "much"', "'much' is no size"),
        ('[disk.vda]\npath = "x"\ncluster-size = true', "disk.vda.cluster-size: "),
        ('[disk.vda]\npath = "x"\nformat = "qcow2"', "format 'qcow2' is not served in this release"),
        ('[disk.vda]\npath = "x"\nsize = 1', "disk.vda.size: is no known setting"),
        ('listne = []\n[disk.vda]\npath = "x"', "listne: is no known setting"),
        ('listen = ["localhost:http"]\n[disk.vda]\npath = "x"', "'localhost:http' is no HOST:PORT"),
        ('unix = ["/' + "x" * 107 + '"]\n[disk.vda]\npath = "x"', "108 bytes and the system allows 107"),
        ('unix = ["/run/s"]\ncontrol = "/run/s"\n[disk.vda]\npath = "x"', "a socket path is named twice"),
        ('[disk.vda]\npath = "x"\n[disk.vdb]\npath = "./x"', "disks 'vda' and 'vdb' are the same image"),
        ("[limits]\nclients = 0\n[disk.vda]\npath = 'x'", "limits.clients: Input should be greater than or equal to 1"),
        ("[limits]\nusers = 0\n[disk.vda]\npath = 'x'", "limits.users: is no known setting"),
        ("limits = 3\n[disk.vda]\npath = 'x'", "limits: "),
        ("[limits]\nread-memory = '1M'\n[disk.vda]\npath = 'x'", "1 MiB is too little: give 64 MiB or more"),
        ("[limits]\nbytes-in-flight = '4K'\n[disk.vda]\npath = 'x'", "4 KiB is too little: give 1 MiB or more"),
        ("disk = 3", "disk: "),
        ("[disk\n", "is no TOML"),
        ("a = " + "[" * 100_000, "is no TOML"),
        ("a = " + "9" * 5000, "is no TOML"),
        (f"listen = ['localhost:{'9' * 5000}']\n[disk.vda]\npath = 'x'", "is no HOST:PORT"),
        ("[limits]\nread-memory = 9223372036854775808\n[disk.vda]\npath = 'x'", "limits.read-memory: "),
        ("drain-seconds = nan\n[disk.vda]\npath = 'x'", "drain-seconds: "),
    ],
)
def test_a_mistake_is_named_with_its_place(tmp_path: Path, text: str, sentence: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        read_config(path)
    assert str(caught.value).startswith(f"configuration {path}")
    assert sentence in str(caught.value)
    assert "\n" not in sentence


def test_every_mistake_is_named_at_once(tmp_path: Path) -> None:
    path = write(tmp_path, 'x = 1\n[disk.vda]\npath = "x"\nformat = "qcow2"')
    with pytest.raises(ConfigError, match=r"format 'qcow2'.*; x: is no known setting"):
        read_config(path)


@pytest.mark.parametrize("make", [lambda path: None, lambda path: path.mkdir(), lambda path: path.write_bytes(b"\xff")])
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, make: object) -> None:
    path = tmp_path / "f.toml"
    assert callable(make)
    make(path)
    with pytest.raises(ConfigError, match=f"configuration {path} (cannot be read|is no TOML)"):
        read_config(str(path))


@pytest.mark.parametrize(
    "text, host, port",
    [
        ("127.0.0.1:0", "127.0.0.1", 0),
        ("host", "host", 10809),
        ("[::1]:65535", "::1", 65535),
        ("[fe80::1]", "fe80::1", 10809),
    ],
)
def test_addresses_are_read_and_written(text: str, host: str, port: int) -> None:
    address = TcpAddress.parse(text)
    assert (address.host, address.port) == (host, port)
    assert TcpAddress.parse(str(address)) == address


@pytest.mark.parametrize(
    "text", ["", ":1", "h:", "h:x", "h:65536", "h:-1", "::1", "[::1", "[::1]x", "[]:1", "h:1:2", "h:²"]
)
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is no HOST:PORT"):
        TcpAddress.parse(text)
