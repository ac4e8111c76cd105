"""The README's reference is that of the code: every option, key, call, figure, limit, place and error."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import click
import pytest

from fleecing.block.extent import MAX_RUNS, ClusterState
from fleecing.cli.main import main
from fleecing.control import creation, manager, paths, quiesce, sockets
from fleecing.control.access import AccessRule
from fleecing.control.api import make_app
from fleecing.control.config import DEFAULT_PORT, DiskSettings, GuestSettings, LimitSettings, ServerSettings
from fleecing.control.event_stream import KEPT, LOST, EventRing, EventStream
from fleecing.control.jobs import Jobs
from fleecing.control.logs import Logs
from fleecing.control.metrics import Metrics
from fleecing.control.models import DEFAULT_CBW_TIMEOUT
from fleecing.control.names import NAME_RULE
from fleecing.control.report import Reporter
from fleecing.events import Event
from fleecing.server import export, meta_context
from fleecing.server.limits import Limits
from fleecing.units import KiB, format_size
from tests.console import read_blocks
from tests.images import MIB, make_image
from tests.peers import run
from tests.serving import ROOT, Serve

PAGE = (ROOT / "README.md").read_text()
WORDS = " ".join(PAGE.replace("`", "").split())


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "vda.img"
    make_image(path, 16 * MIB)
    return path


def table(section: str) -> list[list[str]]:
    """The cells of a section's table, without its head."""
    start = PAGE.index(f"# {section}\n")
    body = PAGE[start : PAGE.find("\n#", start)]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in body.splitlines() if line.startswith("| ")][1:]


def rows(section: str) -> dict[str, str]:
    """First cell without quotes: the last one."""
    return {cells[0].strip("`"): cells[-1] for cells in table(section)}


def commands(command: click.Command, name: str) -> Iterator[tuple[str, click.Command]]:
    if isinstance(command, click.Group):
        context = click.Context(command)
        for word in command.list_commands(context):
            inner = command.get_command(context, word)
            assert inner is not None
            yield from commands(inner, f"{name} {word}")
    else:
        yield name, command


def test_the_command_line_is_complete() -> None:
    usage = next(block for block in read_blocks(PAGE) if block.section == "Command line")
    shown = re.split(r"\n(?=fleecing)", "\n".join(usage.lines))
    known = dict(commands(main, "fleecing"))
    assert len(shown) == len(known)
    for name, command in known.items():
        (line,) = (text for text in shown if text.startswith(f"{name} "))
        assert set(re.findall(r"--[a-z-]+", line)) == {
            option.opts[0] for option in command.params if isinstance(option, click.Option)
        }


def test_the_rule_of_names_is_that_of_the_code() -> None:
    assert f"are {NAME_RULE}." in WORDS


def test_the_configuration_is_complete() -> None:
    keys = rows("Configuration")
    server, guest, disk = (
        [str(field.alias) for field in model.model_fields.values()]
        for model in (ServerSettings, GuestSettings, DiskSettings)
    )
    tables = {"guest": "[guest.NAME]", "disk": "[disk.NAME]", "limits": "[limits]", "access": "[[access]]"}
    assert list(keys) == [tables.get(key, key) for key in server[:-1]] + guest + ["[disk.NAME]"] + disk
    assert server[-2:] == ["guest", "disk"]
    assert keys["temp-watermark"] == f"{ServerSettings.model_fields['temp_watermark'].default}"
    assert keys["hook-seconds"] == f"{GuestSettings(before='x').hook_seconds:g}"
    assert f"127.0.0.1:{DEFAULT_PORT}" in keys["listen"]
    assert keys["drain-seconds"] == f"{ServerSettings.model_fields['drain_seconds'].default:g}"
    assert keys["cluster-size"] == f"{DiskSettings(path='/x').cluster_size // KiB}K"


def test_the_keys_of_a_rule_are_complete() -> None:
    assert list(rows("Rules")) == list(AccessRule.model_fields)


def test_the_control_api_is_complete() -> None:
    class NoReporter:
        manager = None

    routes = make_app(
        cast(Reporter, NoReporter()),
        cast(Jobs, None),
        EventStream(cast(EventRing, None)),
        cast(Logs, None),
        cast(Metrics, None),
    ).router.routes()
    known = {f"{route.method} {route.resource.canonical}" for route in routes if route.resource is not None}
    assert set(rows("Control API")) == {route for route in known if not route.startswith("HEAD")}


def test_the_events_are_complete() -> None:
    start = PAGE.index("### Events and logs\n")
    section = PAGE[start : PAGE.index("\n### ", start)]
    assert set(re.findall(r"^event: ([a-z-]+)$|`([a-z]+-[a-z-]+)`", section, re.MULTILINE)) == {
        ("", str(event)) if f"`{event}`" in section else (str(event), "") for event in [*Event, LOST]
    }
    assert f"keeps the last {KEPT}," in section


def test_the_figures_for_prometheus_are_complete(serve: Serve, image: Path) -> None:
    server = serve(image)
    server.snapshot(temp_limit="1M")
    run("qemu-io", "-f", "raw", "-c", "write 0 64k", server.uri())
    text = run("curl", "-s", "--unix-socket", str(server.control_path), "http://localhost/metrics")
    assert set(re.findall(r"`(fleecing_\w+)`", PAGE)) == set(re.findall(r"^# HELP (fleecing_\w+)", text, re.MULTILINE))


@pytest.mark.parametrize("kind", ["active disk", "snapshot"])
def test_the_meta_contexts_are_those_of_the_exports(serve: Serve, image: Path, kind: str) -> None:
    server = serve(image)
    name = "vda" if kind == "active disk" else server.freeze("vda")[0]["export"]
    where = ["all"] if kind == "active disk" else ["all", "snapshots"]
    offered = re.findall(r"^\t\t([\w:-]+)$", run("nbdinfo", server.uri(name)), re.MULTILINE)
    assert offered == [cells[0].strip("`") for cells in table("Meta contexts") if cells[1] in where]


def test_the_states_of_clusters_are_those_of_the_code() -> None:
    states = [f"{state.value} {state.name.lower().replace('_', ' ')}" for state in ClusterState]
    assert rows("Meta contexts")[meta_context.CLUSTER_STATE] == ", ".join(states)


def test_the_limits_are_those_of_the_code() -> None:
    limits = Limits()
    assert list(rows("Limits").values()) == [
        f"{limits.clients}",
        "none",
        f"{limits.handshake_seconds:g} s",
        f"{limits.requests_in_flight}",
        format_size(limits.bytes_in_flight),
        f"{limits.all_requests_in_flight}",
        format_size(limits.all_bytes_in_flight),
        format_size(limits.option_bytes),
        f"{limits.name_bytes} bytes",
        format_size(limits.read_memory),
        f"{limits.send_seconds:g} s",
        f"{limits.keepalive_seconds:g} s",
        format_size(export.MAXIMUM_PAYLOAD),
        "4 KiB to 2 MiB",
        f"{quiesce.END_SECONDS:g} s, then the next server thaws them",
        f"{manager.DRAIN_SECONDS:g} s, then it is refused",
        f"{creation.REMOVE_SECONDS:g} s, then ask again",
        f"{sockets.MAX_PATH} bytes",
    ]
    assert {cells[1].strip("`") for cells in table("Limits")} - {""} == {
        field.alias for field in LimitSettings.model_fields.values()
    }
    assert f"The default of {DEFAULT_CBW_TIMEOUT:g} is below" in WORDS
    assert f"more than {MAX_RUNS:,} runs" in WORDS


@pytest.mark.parametrize("user, column", [(0, 1), (1000, 2)])
def test_the_default_places_are_those_of_the_code(monkeypatch: pytest.MonkeyPatch, user: int, column: int) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: user)
    monkeypatch.setenv("XDG_STATE_HOME", "$XDG_STATE_HOME")
    environ = {"XDG_RUNTIME_DIR": "$XDG_RUNTIME_DIR"}
    assert [cells[column].split("`")[1] for cells in table("Files")] == [
        paths.default_control_path(environ),
        paths.default_unix_path(environ),
        paths.default_state_dir(),
    ]


def test_links_inside_the_page_lead_somewhere() -> None:
    headings = [re.sub(r"[^a-z -]", "", text.lower()).replace(" ", "-") for text in re.findall(r"\n#+ (.*)", PAGE)]
    assert set(re.findall(r"\]\(#([a-z-]+)\)", WORDS)) <= set(headings)


# Errors on the wire.


def refusal(nbd: ModuleType, handle: Any, request: Callable[[], object]) -> tuple[str, str]:
    """What the server answers a request that it refuses: (error, text)."""
    said: list[str] = []

    def listen(_: str, message: str) -> int:
        said.append(message.partition("server message: ")[2])
        return 0

    handle.set_debug_callback(listen)
    handle.set_debug(True)
    with pytest.raises(nbd.Error) as caught:
        request()
    handle.set_debug(False)
    (text,) = filter(None, said)
    return errno.errorcode[caught.value.errnum], text


def assert_listed(refused: tuple[str, str]) -> None:
    """The table has a row of this error and this text."""
    error, text = refused
    words = {r"\bN\b": r"\\d+", r"\bREQUEST\b": "[A-Z_]+", r"\bCAUSE\b": ".+"}
    known, last = [], ""
    for _, listed, cell in table("Errors on the wire"):
        last = last if cell == "the same" else cell
        pattern = re.escape(last.strip("`")).replace("\\ ", " ")
        for word, meaning in words.items():
            pattern = re.sub(word, meaning, pattern)
        known.append((listed, pattern))
    assert [row for row in known if row[0] == error and re.fullmatch(row[1], text)], (refused, known)


@pytest.fixture
def connect(libnbd: ModuleType) -> Callable[[str], Any]:
    def handle(uri: str) -> Any:
        made = libnbd.NBD()
        made.set_strict_mode(0)
        made.add_meta_context("base:allocation")
        made.connect_uri(uri)
        return made

    return handle


def test_what_is_trimmed_or_written_is_refused_as_listed(
    serve: Serve, image: Path, libnbd: ModuleType, connect: Callable[[str], Any]
) -> None:
    handle = connect(serve(image).snapshot())
    handle.trim(64 * KiB, 0)
    assert_listed(refusal(libnbd, handle, lambda: handle.pread(1, 0)))
    assert_listed(refusal(libnbd, handle, lambda: handle.cache(1, 0)))
    assert_listed(refusal(libnbd, handle, lambda: handle.block_status(1, 0, lambda *_: 0)))
    assert_listed(refusal(libnbd, handle, lambda: handle.pwrite(b"x", 0)))
    assert_listed(refusal(libnbd, handle, lambda: handle.zero(1, 0)))


@pytest.mark.parametrize("end", ["broken", "deleted"])
def test_a_snapshot_that_has_ended_refuses_as_listed(
    serve: Serve, image: Path, libnbd: ModuleType, connect: Callable[[str], Any], end: str
) -> None:
    server = serve(image)
    handle = connect(server.snapshot(name="s", temp_limit="512K"))
    if end == "broken":
        run("qemu-io", "-f", "raw", "-c", "write 0 1M", server.uri())
    else:
        server.delete("vda@s")
    for request in (
        lambda: handle.pread(1, 0),
        lambda: handle.cache(1, 0),
        lambda: handle.block_status(1, 0, lambda *_: 0),
        lambda: handle.trim(64 * KiB, 0),
    ):
        refused = refusal(libnbd, handle, request)
        assert_listed(refused)
        assert (refused[1] == "snapshot broken: deleted") == (end == "deleted")
    assert end == "deleted" or server.show("vda@s")["state"] == "broken"


def test_the_active_disk_refuses_as_listed(
    serve: Serve, image: Path, libnbd: ModuleType, connect: Callable[[str], Any]
) -> None:
    server = serve(image)
    handle = connect(server.uri())
    size = handle.get_size()
    assert_listed(refusal(libnbd, handle, lambda: handle.pwrite(b"x", size)))
    assert_listed(refusal(libnbd, handle, lambda: handle.zero(1, size)))
    assert_listed(refusal(libnbd, handle, lambda: handle.pread(1, size)))
    assert_listed(refusal(libnbd, handle, lambda: handle.trim(1, size)))
    server.snapshot(temp_limit="512K", on_cbw_error="break-guest-write")
    assert_listed(refusal(libnbd, handle, lambda: handle.pwrite(bytes(512 * KiB), 0)))
