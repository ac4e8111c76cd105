"""`fleecing map`: a picture of the clusters of a snapshot.

The picture has a fixed number of cells; each stands for the same number of neighbouring clusters and shows the state
that most of its bytes are in. Runs are added to the cells as their pages come in: memory does not grow with the disk.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import click
from rich.console import Console
from rich.text import Text

from fleecing.cli.control_client import ControlClient
from fleecing.cli.params import EXPORT, control_option, json_option
from fleecing.control.names import snapshot_path
from fleecing.units import div_up, format_size

MAX_ROWS = 16


class _Look(NamedTuple):
    sign: str
    style: str
    meaning: str


# Told apart by their signs where there are no colours
_LOOKS = {
    "untouched": _Look(".", "green", "untouched, read from the active image"),
    "copied": _Look("#", "yellow", "copied to temp before the guest overwrote it"),
    "trimmed": _Look("-", "blue", "trimmed, given up by its reader"),
    "not_in_bitmap": _Look("o", "bright_black", "not in the bitmap of this snapshot"),
}


class Picture:
    """Bytes by state in each cell of a row-wise grid."""

    def __init__(self, size: int, cluster_size: int, most_cells: int) -> None:
        clusters = div_up(size, cluster_size)
        self.cell_size = div_up(clusters, max(1, most_cells)) * cluster_size
        self.cells: list[dict[str, int]] = [{} for _ in range(div_up(size, self.cell_size))]
        self.totals: dict[str, int] = {}

    def add(self, offset: int, length: int, state: str) -> None:
        """Count a run, in bytes."""
        self.totals[state] = self.totals.get(state, 0) + length
        while length:
            number = offset // self.cell_size
            n = min(length, (number + 1) * self.cell_size - offset)
            cell = self.cells[number]
            cell[state] = cell.get(state, 0) + n
            offset += n
            length -= n

    def states(self) -> list[str]:
        """The state that most bytes of each cell are in."""
        return [max(cell, key=lambda state: cell[state]) for cell in self.cells]


@click.command("map", epilog="\b\nExamples:\n  fleecing map vda@monday\n  fleecing map vda@monday --json | jq .runs\n")
@click.argument("which", metavar="DISK@SNAPSHOT", type=EXPORT)
@control_option
@json_option
def map_(*, which: tuple[str, str], control: str, as_json: bool) -> None:
    """Draw the clusters of a snapshot: untouched, copied, trimmed or not in its bitmap.

    --json prints the runs: offset and length in bytes, and the state.
    """
    pages = _pages(ControlClient(control), which)
    first = next(pages)
    if as_json:
        _print_runs(first, pages)
        return
    console = Console(highlight=False)
    width = max(16, console.width)
    picture = Picture(first["size"], first["cluster_size"], width * MAX_ROWS)
    for page in _with_first(first, pages):
        for run in page["runs"]:
            picture.add(run["offset"], run["length"], run["state"])
    _draw(console, picture, first, width)


def _pages(client: ControlClient, which: tuple[str, str]) -> Iterator[dict[str, Any]]:
    offset: int | None = 0
    while offset is not None:
        page = client.request("GET", f"{snapshot_path(which)}/map?offset={offset}")
        yield page
        offset = page["next"]


def _with_first(first: dict[str, Any], rest: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    yield first
    yield from rest


def _print_runs(first: dict[str, Any], rest: Iterator[dict[str, Any]]) -> None:
    """One JSON document, written as its runs come in."""
    head = {key: first[key] for key in ("disk", "name", "size", "cluster_size")}
    click.echo(json.dumps(head)[:-1] + ', "runs": [', nl=False)
    separator = "\n  "
    for page in _with_first(first, rest):
        for run in page["runs"]:
            click.echo(separator + json.dumps(run), nl=False)
            separator = ",\n  "
    click.echo("\n]}")


def _draw(console: Console, picture: Picture, info: dict[str, Any], width: int) -> None:
    console.print(
        f"{info['disk']}@{info['name']}: {format_size(info['size'])}, clusters of {format_size(info['cluster_size'])}, "
        f"each sign is {format_size(picture.cell_size)}",
        markup=False,
        soft_wrap=True,
    )
    states = picture.states()
    for start in range(0, len(states), width):
        console.print(_row(states[start : start + width]))
    for state, look in _LOOKS.items():
        total = picture.totals.get(state, 0)
        line = Text.assemble((look.sign, look.style), f"  {format_size(total):>10}  {look.meaning}")
        console.print(line, soft_wrap=True)


def _row(states: Sequence[str]) -> Text:
    row = Text(no_wrap=True)
    for state in states:
        look = _LOOKS[state]
        row.append(look.sign, style=look.style)
    return row
