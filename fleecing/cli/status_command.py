"""`fleecing status`: the whole server on one screen, once or again and again."""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import click
from rich.console import Console
from rich.live import Live
from rich.text import Text

from fleecing.cli.control_client import ControlClient
from fleecing.cli.control_commands import disk_table, snapshot_table
from fleecing.cli.output import local_time, print_json, table
from fleecing.cli.params import control_option, json_option
from fleecing.units import format_size


@click.command(epilog="\b\nExamples:\n  fleecing status\n  fleecing status --watch --interval 5\n")
@click.option("--watch", is_flag=True, help="Go on until Ctrl-C; with --json one line of JSON each time.")
@click.option(
    "--interval",
    type=click.FloatRange(0.1, 3600),
    default=1.0,
    show_default=True,
    metavar="SECONDS",
    help="Time between two looks of --watch.",
)
@control_option
@json_option
def status(*, watch: bool, interval: float, control: str, as_json: bool) -> None:
    """Show disks, snapshots, clients and temp use of the running server."""
    client = ControlClient(control)
    if not watch:
        now = client.request("GET", "/v1/status")
        if as_json:
            print_json(now)
        else:
            click.echo(_screen(now))
        return
    try:
        if as_json or not sys.stdout.isatty():
            _print_on(client, interval, as_json=as_json)
        else:
            _watch(client, interval)
    except KeyboardInterrupt:
        pass  # the way to end it


def _print_on(client: ControlClient, interval: float, *, as_json: bool) -> None:
    while True:
        now = client.request("GET", "/v1/status")
        click.echo(json.dumps(now) if as_json else _screen(now) + "\n")
        time.sleep(interval)


def _watch(client: ControlClient, interval: float) -> None:
    def look() -> Text:
        # Names and reasons are no markup, and a line is cut rather than wrapped
        return Text(_screen(client.request("GET", "/v1/status")), no_wrap=True, overflow="ellipsis")

    with Live(look(), console=Console(), screen=True, auto_refresh=False) as live:
        while True:
            time.sleep(interval)
            live.update(look(), refresh=True)


def _screen(now: dict[str, Any]) -> str:
    head = f"fleecing {now['version']}, process {now['pid']}, since {local_time(now['started'])}, NBD on " + ", ".join(
        now["listeners"]
    )
    parts = [head, disk_table(now["disks"])]
    if now["snapshots"]:
        parts.append(snapshot_table(now["snapshots"]))
    if now["clients"]:
        parts.append(_client_table(now["clients"]))
    return "\n\n".join(parts)


def _client_table(clients: list[dict[str, Any]]) -> str:
    heads = ("CLIENT", "EXPORT", "REQUESTS", "READ", "WRITTEN")
    rows = [
        (
            c["peer"],
            c["export"],
            str(c["requests"]),
            format_size(c["bytes_read"]),
            format_size(c["bytes_written"]),
        )
        for c in clients
    ]
    return table(heads, rows)
