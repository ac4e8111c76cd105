"""What people type: configuration files and command lines. A sentence and exit code 1 or 2, never a traceback."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from click.testing import CliRunner
from hypothesis import strategies as st

from fleecing.cli.main import main
from fleecing.control.config import TcpAddress, read_config
from fleecing.control.names import split_export
from fleecing.errors import ConfigError
from fleecing.nbd.uri import NbdUri
from fleecing.units import format_size, parse_size
from scripts.fuzzing.target import Case, Finding

_KEYS = """
    listen unix control state-dir temp-dir tls tls-unix tls-dir tls-verify-client insecure-listen drain-seconds limits
    disk path format cluster-size clients handshake-seconds bytes-in-flight read-memory send-seconds host port address
""".split()  # noqa: SIM905
_SIZES = ["0", "1", "64K", "1.5 GiB", "1e9", "-1", "9" * 400, "9" * 5000, "1." + "9" * 400, "٣", "64 KK", "0.1B", "9E"]
_URIS = """
    nbd://h/x nbd+unix:///a?socket=s nbds://[::1]:99999/x nbd://[::1 nbd://h:x nbd://u@h:0/ nbd: nbd://h/%ff nbd://h/%00
    nbd+unix://h/x?socket=s nbd+unix:///?socket=%ff
""".split()  # noqa: SIM905
_WORDS = ["raw", "qcow2", "require", "vda@s", "@", "a@", "none", "", "\0", "\udcff", "-", "nbd://h/" + "x" * 5000]
_texts = st.one_of(
    st.sampled_from(
        [
            *_SIZES,
            *_URIS,
            "nbd://h/" + "x" * 5000,
            "raw",
            "qcow2",
            "require",
            "vda@s",
            "@",
            "a@",
            "none",
            "",
            "\0",
            "\udcff",
            "-",
        ]
    ),
    st.text(st.characters(), max_size=30),
    st.from_regex(r"[0-9]{1,6}(\.[0-9]{1,6})? ?[KMGTPE]?(i?B)?", fullmatch=True),
    st.from_regex(r"nbds?(\+unix)?://[a-z0-9@:%\[\]./?=&#]{0,30}", fullmatch=True),
    st.from_regex(r"\[?[0-9a-f:.%]{0,20}\]?(:[0-9]{0,6})?", fullmatch=True),
)

# TOML, written from values so that most of it is TOML


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_word(key)} = {_toml(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    if isinstance(value, bool):
        return str(value).lower()
    return _word(value) if isinstance(value, str) else str(value)


def _word(text: str) -> str:
    plain = text.replace("\\", "\\\\").replace('"', '\\"')
    return '"' + "".join(c if c.isprintable() else f"\\U{ord(c):08x}" for c in plain) + '"'


_values = st.recursive(
    st.one_of(
        _texts, st.booleans(), st.integers(-(2**70), 2**70), st.floats(), st.sampled_from(["1979-05-27", "07:32"])
    ),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(_KEYS), inner, max_size=4),
)
_base = {"disk": {"a": {"path": "image"}}, "unix": ["s"], "control": "c", "state-dir": "st"}
_tables = st.dictionaries(st.sampled_from(_KEYS), _values, max_size=5).map(lambda more: _base | more)
_scraps = st.sampled_from(["[", "]", "[[disk]]", "[disk.a]", "path='x'", "=", "a.b=1", "\n", '"""', "{", "#"])
_files = st.one_of(
    _tables.map(lambda table: "\n".join(f"{_word(key)} = {_toml(value)}" for key, value in table.items())),
    st.text(max_size=200),
    st.lists(_scraps, max_size=30).map("".join),
).map(lambda text: text.encode("utf-8", "surrogatepass"))


class Configuration:
    """Files of the configuration."""

    cases = st.fixed_dictionaries({"file": _files | st.binary(max_size=200) | st.just(b"a=" + b"[" * 100_000)})

    def __init__(self, folder: Path) -> None:
        self._path = folder / "fleecing.toml"

    def run(self, case: Case) -> None:
        self._path.write_bytes(case["file"])
        try:
            settings = read_config(str(self._path))
        except ConfigError as e:
            _is_a_sentence(str(e))
            expected = 1
        else:
            assert settings.disk
            settings.limits.limits()
            expected = 0
        result = CliRunner().invoke(main, ["check-config", str(self._path), "--json"])
        if result.exit_code != expected or (result.exception and not isinstance(result.exception, SystemExit)):
            raise Finding(f"check-config ended with {result.exit_code}: {result.exception!r}") from result.exception

    def close(self) -> None:
        """There is nothing to end."""


# The command line


def _checked(make: Callable[[str], object]) -> Callable[[str], object]:
    """A parser of ours: it raises ValueError with a sentence, and nothing else."""

    def parse(text: str) -> object:
        try:
            return make(text)
        except ValueError as e:
            _is_a_sentence(str(e))
            return None

    return parse


def _uri(text: str) -> object:
    uri = NbdUri.parse(text)
    again = NbdUri.parse(str(uri))
    if again != uri:
        raise Finding(f"{uri!r} is written as {uri}, and that is read as {again!r}")
    return uri


_PARSERS: list[Callable[[str], object]] = [
    _checked(lambda text: format_size(parse_size(text))),
    _checked(_uri),
    _checked(lambda text: TcpAddress.parse(str(TcpAddress.parse(text)))),
    _checked(split_export),
]
_DEAD = ["--control", "/nonexistent/control.sock"]
_COMMANDS = [
    ["snapshot", "create", "?", "--name", "?", "--temp-limit", "?", "--cbw-timeout", "?", *_DEAD],
    ["snapshot", "show", "?", *_DEAD], ["snapshot", "delete", "?", *_DEAD],
    ["snapshot", "set", "?", "--temp-limit", "?", *_DEAD], ["map", "?", *_DEAD],
    ["checkpoint", "delete", "?", "?", *_DEAD], ["checkpoint", "export", "?", "?", "/nonexistent/out", *_DEAD],
    ["serve", "/nonexistent/image", "--listen", "?", "--cluster-size", "?", "--limit", "?", "--name", "?"],
    ["serve", "--config", "?"], ["status", "--control", "?"],
    ["pull", "?", "/nonexistent/target", "--bandwidth", "?", "--connections", "?", "--reconnect", "0", *_DEAD],
    ["pull", "nbd+unix:///x?socket=/nonexistent/sock", "?", "--reconnect", "0", *_DEAD],
    ["push", "?", "?", "--compress", "?", *_DEAD], ["restore", "?", "/nonexistent/target"],
    ["verify", "?"], ["points", "?"], ["prune", "?", "--keep", "?"], ["job", "show", "?", *_DEAD],
    ["backup", "?", "/nonexistent/folder", "--keep", "?", *_DEAD],
]  # fmt: skip


class CommandLine:
    """Words of the command line, where nothing can be reached and nothing can be made."""

    cases = st.one_of(
        st.fixed_dictionaries({"text": _texts}),
        st.fixed_dictionaries(
            {"command": st.integers(0, len(_COMMANDS) - 1), "words": st.lists(_texts, min_size=5, max_size=5)}
        ),
    )

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def run(self, case: Case) -> None:
        if "text" in case:
            for parse in _PARSERS:
                parse(case["text"])
            return
        words = iter(case["words"])
        command = [next(words) if word == "?" else word for word in _COMMANDS[case["command"]]]
        with CliRunner().isolated_filesystem(self._folder):
            result = CliRunner().invoke(main, command)
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise Finding(f"{command} raised {result.exception!r}") from result.exception
        if result.exit_code not in (0, 1, 2):
            raise Finding(f"{command} ended with {result.exit_code}")

    def close(self) -> None:
        """There is nothing to end."""


def _is_a_sentence(text: str) -> None:
    if not text.strip():
        raise Finding("an error without a word")
