"""`fleecing events` and `fleecing log`: what happens in a running server, and how much of it is logged."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import click

from fleecing.cli.control_client import ControlClient
from fleecing.cli.output import fields, local_time, print_json
from fleecing.cli.params import ANY_EXPORT, control_option, json_option
from fleecing.errors import ControlError
from fleecing.events import Event

SILENCE = 60.0
"""Seconds without a sign of life, which comes every 15, after which the server is taken for dead."""

_LEVELS = ["debug", "info", "warning", "error"]


@click.command(epilog="\b\nExamples:\n  fleecing events\n  fleecing events --json | jq -c 'select(.disk == \"vda\")'\n")
@click.option("--after", metavar="ID", help="Begin behind the event of this id, as --json shows it.")
@control_option
@json_option
def events(*, after: str | None, control: str, as_json: bool) -> None:
    """Print what happens in the running server as it happens, one line each, until the server stops or Ctrl-C.

    Snapshots made, broken and deleted, temp that fills up, clients, checkpoints, pushes, guests frozen and thawed,
    images that changed behind the server's back. --json prints one JSON object a line, with its id.
    """
    headers = {} if after is None else {"Last-Event-ID": after}
    last = None
    try:
        for event in _events(ControlClient(control, SILENCE).lines("/v1/events", headers)):
            last = event["event"]
            click.echo(json.dumps(event) if as_json else _line(event))
    except KeyboardInterrupt:
        return  # the way to end it
    if last != Event.SERVER_STOPPING:
        raise ControlError(502, f"the server on control socket {control} went away or dropped this listener")


def _events(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    """Out of the lines of the stream (HTML standard, "Interpreting an event stream"), each with its `id`."""
    number = data = None
    for line in lines:
        name, _, value = line.partition(": ")
        if name == "id":
            number = value
        elif name == "data":
            data = value
        elif not line and data is not None:
            yield {"id": number, **json.loads(data)}
            number = data = None


def _line(event: dict[str, Any]) -> str:
    time = local_time(event["time"]) if "time" in event else " " * 19
    return f"{time}  {event['event'].ljust(23)}  {event['message']}"


@click.group()
def log() -> None:
    """Look at what the running server logs, and change it."""


@log.command()
@control_option
@json_option
def show(*, control: str, as_json: bool) -> None:
    """Show format, level, and whose requests are logged."""
    _print(ControlClient(control).request("GET", "/v1/log"), as_json=as_json)


@log.command(
    "set", epilog="\b\nExamples:\n  fleecing log set --debug-export vda\n  fleecing log set --no-debug-exports\n"
)
@click.option("--level", type=click.Choice(_LEVELS), help="Least level of what is logged.")
@click.option(
    "--debug-export", "exports", type=ANY_EXPORT, multiple=True, help="Log every request of this export, and no others."
)
@click.option("--no-debug-exports", "none", is_flag=True, help="Log single requests of no export any more.")
@control_option
@json_option
def set_(*, level: str | None, exports: tuple[str, ...], none: bool, control: str, as_json: bool) -> None:
    """Log more or less from now on, until the server ends."""
    if none and exports:
        raise click.UsageError("--debug-export and --no-debug-exports do not go together.")
    if level is None and not exports and not none:
        raise click.UsageError("Say what to change: --level, --debug-export or --no-debug-exports.")
    change = {"level": level, "debug_exports": list(exports) if exports or none else None}
    _print(ControlClient(control).request("PATCH", "/v1/log", change), as_json=as_json)


def _print(now: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        print_json(now)
        return
    exports = ", ".join(now["debug_exports"]) or "none"
    click.echo(fields([("format", now["format"]), ("level", now["level"]), ("debug exports", exports)]))
