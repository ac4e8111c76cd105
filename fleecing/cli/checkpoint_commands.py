"""`fleecing checkpoint`: points in time from which changed blocks are tracked."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import click

from fleecing.cli.control_client import ControlClient
from fleecing.cli.output import local_time, print_json, table
from fleecing.cli.params import NAME, control_option, json_option
from fleecing.units import format_size

_AGES = ((86400, "d"), (3600, "h"), (60, "min"), (1, "s"))


@click.group()
def checkpoint() -> None:
    """Look at, delete and export checkpoints: points in time from which changed blocks are tracked.

    `fleecing snapshot create DISK --checkpoint NAME` makes one. They outlive the server, kill -9 and the loss of power.
    """


@checkpoint.command("list", epilog="\b\nExample:\n  fleecing checkpoint list vda\n")
@click.argument("disk", required=False, type=NAME)
@control_option
@json_option
def list_(*, disk: str | None, control: str, as_json: bool) -> None:
    """List the checkpoints of DISK, or all: how old each is, and how much changed since."""
    path = "/v1/checkpoints" if disk is None else f"/v1/checkpoints?disk={disk}"
    checkpoints = ControlClient(control).request("GET", path)["checkpoints"]
    if as_json:
        print_json(checkpoints)
    elif not checkpoints:
        click.echo("There is no checkpoint; `fleecing snapshot create DISK --checkpoint NAME` makes one.", err=True)
    else:
        click.echo(_table(checkpoints))


def _table(checkpoints: list[dict[str, Any]]) -> str:
    heads = ("DISK", "CHECKPOINT", "CREATED", "AGE", "CHANGED", "STATE")
    rows = [
        (
            c["disk"],
            c["name"],
            local_time(c["created"]),
            _age(c["created"]),
            "?" if c["changed"] is None else format_size(c["changed"]),
            f"inconsistent: {c['inconsistent']}" if c["inconsistent"] is not None else c["state"],
        )
        for c in checkpoints
    ]
    return table(heads, rows)


def _age(created: str) -> str:
    seconds = max(0, int((datetime.now(UTC) - datetime.fromisoformat(created)).total_seconds()))
    size, unit = next(((size, unit) for size, unit in _AGES if seconds >= size), _AGES[-1])
    return f"{seconds // size} {unit}"


@checkpoint.command(epilog="\b\nExample:\n  fleecing checkpoint delete vda monday\n")
@click.argument("disk", type=NAME)
@click.argument("name", type=NAME)
@control_option
@json_option
def delete(*, disk: str, name: str, control: str, as_json: bool) -> None:
    """Forget the checkpoint NAME of DISK, in any order; no other checkpoint loses a change.

    Deleting one that is gone already is no error. Without any checkpoint nothing is tracked.
    """
    answer = ControlClient(control).request("DELETE", f"/v1/checkpoints/{disk}@{name}")
    if as_json:
        print_json(answer)
        return
    done = "deleted" if answer["deleted"] else "not there, nothing to delete"
    click.echo(f"checkpoint {name} of {disk}: {done}", err=True)


@checkpoint.command(
    epilog="""\b
Examples:
  fleecing checkpoint export vda monday monday.bits
  fleecing checkpoint export vda monday --json

\b
The file, all numbers big-endian:
  0     "FLEEBITS", u32 version (1), u32 bytes a bit, u64 bytes of the disk, u64 bits
  4096  the bits, least significant first, 1 = changed; a whole number of bytes
"""
)
@click.argument("disk", type=NAME)
@click.argument("name", type=NAME)
@click.argument("out", required=False)
@control_option
@json_option
def export(*, disk: str, name: str, out: str | None, control: str, as_json: bool) -> None:
    """Write what changed on DISK since the checkpoint NAME until now as bits to the file OUT, - = stdout.

    --json prints the changed ranges instead.
    """
    if as_json == (out is not None):
        raise click.UsageError("Give the file OUT, or --json for the changed ranges on stdout.")
    client = ControlClient(control)
    path = f"/v1/checkpoints/{disk}@{name}"
    if as_json:
        pages = list(_pages(client, f"{path}/extents"))
        whole = {key: pages[0][key] for key in ("disk", "name", "size", "granularity")}
        print_json({**whole, "extents": [extent for page in pages for extent in page["extents"]]})
        return
    assert out is not None
    content = client.download(f"{path}/bitmap")
    if out == "-":
        sys.stdout.buffer.write(content)
        return
    replace = not os.path.exists(out) or os.path.isfile(out)  # /dev/stdout and the like are written to as they are
    temp = f"{out}.part" if replace else out
    with open(temp, "wb") as file:
        file.write(content)
    if replace:
        os.replace(temp, out)


def _pages(client: ControlClient, path: str) -> Iterator[dict[str, Any]]:
    offset: int | None = 0
    while offset is not None:
        page = client.request("GET", f"{path}?offset={offset}")
        yield page
        offset = page["next"]
