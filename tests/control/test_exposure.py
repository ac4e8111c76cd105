"""What check-config warns about: everything that is open, and nothing else."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from fleecing.cli.main import main
from fleecing.control.config import read_config
from fleecing.control.exposure import open_ends
from tests.users import open_folder

CLOSED = """
unix = ["run/nbd.sock"]
control = "run/control.sock"
state-dir = "state"
"""
ALL = "no access rules"


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder that others can enter, with a disk, a state and sockets' folder that they cannot."""
    with open_folder() as path:
        (path / "vda.img").write_bytes(bytes(4096))
        (path / "vda.img").chmod(0o600)
        for name in ("run", "state"):
            (path / name).mkdir(mode=0o700)
        yield path


def warnings(folder: Path, text: str = "", *, closed: str = CLOSED, mode: int = 0o600) -> list[str]:
    """Those of a configuration with these lines before its disk."""
    path = folder / "fleecing.toml"
    path.write_text(f'{closed}\n{text}\n[disk.vda]\npath = "vda.img"\n')
    path.chmod(mode)
    return [warning.replace(str(folder), "DIR") for warning in open_ends(read_config(str(path)), str(path))]


def rule(allow: str, export: str = "*", whom: str = "") -> str:
    return f'[[access]]\nallow = "{allow}"\nexport = "{export}"\n{whom}\n'


def test_nothing_is_said_where_nothing_is_open(folder: Path) -> None:
    assert warnings(folder) == []
    assert warnings(folder, rule("all", whom="user = 0")) == []
    assert warnings(folder, 'unix-mode = "0666"\n' + rule("all", whom="user = 0")) == []


TCP = 'listen = ["{0}"]\n'
TLS = 'tls = "{0}"\ntls-dir = "tls"\n'
VERIFY = "tls-verify-client = true\n"
LOOPBACK, NETWORK = TCP.format("127.0.0.1:1"), TCP.format("0.0.0.0:1") + "insecure-listen = true\n"


@pytest.mark.parametrize(
    "text, expected",
    [
        (LOOPBACK, ["127.0.0.1:1 does not ask who a client is: every user of this machine may read and write all"]),
        (TCP.format("[::1]:1"), ["[::1]:1 does not ask who a client is: every user of this machine may read and"]),
        (NETWORK, ["0.0.0.0:1 has no TLS", "0.0.0.0:1 does not ask who a client is: whoever reaches it may read and"]),
        (LOOPBACK + TLS.format("allow") + VERIFY, ["127.0.0.1:1 takes clients without TLS, too"]),
        (LOOPBACK + TLS.format("require"), ["127.0.0.1:1 asks clients for no certificate: every user of this machine"]),
        (LOOPBACK + TLS.format("require") + VERIFY, []),
        (TCP.format("0.0.0.0:1") + TLS.format("require"), ["0.0.0.0:1 asks clients for no certificate: whoever"]),
        (TCP.format("0.0.0.0:1") + TLS.format("require") + VERIFY, []),
        ('tls-unix = "allow"\ntls-dir = "tls"\n' + VERIFY, ["the Unix sockets take clients without TLS, too"]),
        # Rules decide what those who get in may do.
        (LOOPBACK + rule("all", whom="user = 0"), []),
        (LOOPBACK + rule("trim", "vda@*", "address = '127.0.0.0/8'"), ["may trim vda@SNAPSHOT"]),
        (NETWORK + rule("read", "vda", "address = '0.0.0.0/0'"), ["has no TLS", "whoever reaches it may read vda"]),
        (NETWORK + rule("read", "vda", "address = '10.0.0.0/8'"), ["has no TLS"]),
    ],
)
def test_listeners(folder: Path, text: str, expected: list[str]) -> None:
    found = warnings(folder, text)
    assert len(found) == len(expected), found
    for warning, part in zip(found, expected, strict=True):
        assert part in warning


@pytest.mark.parametrize(
    "text, expected",
    [
        ('unix-mode = "0666"', "every user of this machine may connect to DIR/run/nbd.sock (unix-mode 0666) and may"),
        ('unix-mode = "0660"', "every member of the server's group may connect to DIR/run/nbd.sock (unix-mode 0660)"),
        ('unix-mode = "0660"\nunix-group = 7', "every member of group 7 may connect to DIR/run/nbd.sock"),
        ("control-group = 7", "every member of group 7 may do everything over the control socket, rules or not"),
        (
            'unix-mode = "0660"\nunix-group = 7\n' + rule("read", "vda", "group = 7"),
            "every member of group 7 may connect to DIR/run/nbd.sock (unix-mode 0660) and may read vda",
        ),
    ],
)
def test_sockets(folder: Path, text: str, expected: str) -> None:
    (found,) = warnings(folder, text)
    assert found.startswith(expected)


@pytest.mark.parametrize(
    "text, expected",
    [
        (rule("write"), "access rule 1 lets everybody who gets in write *: say whom it is for"),
        (rule("all", "vda", "address = ['::/0', '10.0.0.0/8']"), "access rule 1 lets everybody who gets in write vda"),
        (rule("read", "vdb", "user = 0"), "access rule 1: 'vdb' fits no disk: there are vda"),
        (rule("read", "vda", "user = 0") + rule("trim", "vdb@*", "user = 0"), "access rule 2: 'vdb@*' fits no disk"),
    ],
)
def test_rules(folder: Path, text: str, expected: str) -> None:
    (found,) = warnings(folder, text)
    assert found.startswith(expected)


@pytest.mark.parametrize(
    "pattern", ["vda", "vda@*", "*", "v?a@x", "*@*-daily", "*-daily", "vda?monday", "**a", "vda@?"]
)
def test_patterns_that_fit_a_disk_or_can_fit_a_snapshot(folder: Path, pattern: str) -> None:
    assert warnings(folder, rule("read", pattern, "user = 0")) == []


@pytest.mark.parametrize("pattern", ["vd", "vda@", "vdb@*", "*@a@b", "vda??@*", "b*", "a"])
def test_patterns_that_cannot(folder: Path, pattern: str) -> None:
    assert len(warnings(folder, rule("read", pattern, "user = 0"))) == 1


@pytest.mark.parametrize(
    "name, mode, expected",
    [
        ("run", 0o777, ["the folder of socket DIR/run/nbd.sock", "the folder of socket DIR/run/control.sock"]),
        ("run", 0o1777, []),
        ("run", 0o755, []),
        ("state", 0o755, ["state-dir, DIR/state: others can read there"]),
        ("state", 0o733, ["state-dir, DIR/state: others can write there"]),
        ("state", 0o1777, ["state-dir, DIR/state: others can read and write there"]),
        ("state", 0o711, []),
        ("temp", 0o770, ["temp-dir, DIR/temp: others can read and write there"]),
        ("vda.img", 0o644, ["disk vda: every user of this machine can read DIR/vda.img"]),
        ("vda.img", 0o666, ["disk vda: every user of this machine can read and write DIR/vda.img"]),
        ("vda.img", 0o660, []),
        ("fleecing.toml", 0o666, ["configuration DIR/fleecing.toml: others can write it, and then change who"]),
        ("fleecing.toml", 0o644, []),
        ("tls/server-key.pem", 0o640, ["the private key DIR/tls/server-key.pem: others can read it, and then be"]),
        ("tls/ca-cert.pem", 0o666, ["the certificate DIR/tls/ca-cert.pem: others can write it, and then say"]),
        ("tls/server-cert.pem", 0o644, []),
        ("tls/ca-key.pem", 0o600, ["DIR/tls/ca-key.pem can make certificates for everybody"]),
        ("tls", 0o777, ["tls-dir, DIR/tls: others can write there"]),
    ],
)
def test_files_and_folders(folder: Path, name: str, mode: int, expected: list[str]) -> None:
    (folder / "tls").mkdir(mode=0o755)
    (folder / "temp").mkdir(mode=0o700)
    path = folder / name
    if not path.exists():
        path.touch()
    path.chmod(mode)
    text = 'temp-dir = "temp"\ntls-unix = "require"\ntls-dir = "tls"\ntls-verify-client = true\n'
    kept = mode if name == "fleecing.toml" else 0o600
    found = warnings(folder, text, mode=kept)
    assert len(found) == len(expected), found
    for warning, part in zip(found, expected, strict=True):
        assert warning.startswith(part)
    folder.chmod(0o700)  # a folder above keeps others out
    assert warnings(folder, text, mode=kept) == [warning for warning in found if "ca-key" in warning]


# The command.


def check(*words: object) -> Result:
    return CliRunner().invoke(main, ["check-config", *map(str, words)])


def test_warnings_are_told_and_are_no_error_unless_that_is_asked_for(folder: Path) -> None:
    path = folder / "fleecing.toml"
    warnings(folder, LOOPBACK)
    for options, code in (([], 0), (["--strict"], 1)):
        result = check(path, *options)
        assert result.exit_code == code
        assert "Warning: 127.0.0.1:1 does not ask who a client is" in result.stderr
        assert "Warning" not in result.stdout
        assert ("has warnings (1), and --strict takes none" in result.stderr) == bool(code)
        result = check(path, "--json", *options)
        assert result.exit_code == code
        (warning,) = json.loads(result.stdout)["warnings"]
        assert warning.startswith("127.0.0.1:1 does not ask")
        assert f"Warning: {warning}" in result.stderr


def test_rules_are_shown_and_a_closed_configuration_is_strict_enough(folder: Path) -> None:
    warnings(folder, rule("read", "vda@*", "user = [0, 'root']\ngroup = 5") + rule("see", "vda"))
    result = check(folder / "fleecing.toml", "--strict")
    assert (result.exit_code, result.stderr) == (0, "")
    assert "access     vda@*: read for user 0 or root, group 5\n" in result.stdout
    assert "access     vda: see for everybody\n" in result.stdout
    assert json.loads(check(folder / "fleecing.toml", "--json").stdout)["warnings"] == []


def test_a_configuration_that_is_not_there_has_no_warnings(folder: Path) -> None:
    result = check(folder / "none.toml")
    assert result.exit_code == 1
    assert "Warning" not in result.stderr
    assert os.listdir(folder / "state") == []
