"""Data for stdout: JSON for programs, aligned columns for people, one line a thing for both."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from typing import Any

import click


def format_seconds(seconds: float | None) -> str:
    """A time for people, of two digits: "12 us", "3.4 ms"; "-" = there is none."""
    if seconds is None:
        return "-"
    value, unit = seconds * 1e6, "us"
    for larger in ("ms", "s"):
        if value >= 999.5:
            value, unit = value / 1000, larger
    return f"{value:.1f} {unit}" if value < 9.95 else f"{value:.0f} {unit}"


def print_json(value: Any) -> None:
    """Indented JSON."""
    click.echo(json.dumps(value, indent=2))


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Left-aligned columns, two spaces apart, never cut: lines may be longer than the terminal is wide."""
    lines = [heads, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(heads))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def fields(pairs: Sequence[tuple[str, str]]) -> str:
    """One "name  value" a line."""
    width = max(len(name) for name, _ in pairs)
    return "\n".join(f"{name.ljust(width)}  {value}".rstrip() for name, value in pairs)


def local_time(text: str) -> str:
    """An ISO time of the server as this machine's clock shows it."""
    return datetime.fromisoformat(text).astimezone().strftime("%Y-%m-%d %H:%M:%S")
