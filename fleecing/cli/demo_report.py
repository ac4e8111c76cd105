"""What the demo shows: progress while it pulls, and the report at the end."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Final, Self

import click
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

from fleecing.cli.output import fields
from fleecing.pull import options
from fleecing.units import format_size

_PLAIN_LINES: Final = 4
"""How many lines a pull prints where there is no terminal."""


def say(text: str) -> None:
    """Talk, as opposed to data: on stderr."""
    click.echo(text, err=True)


def rate(bytes_per_second: float) -> str:
    return f"{format_size(round(bytes_per_second))}/s"


class PullDisplay:
    """A progress bar on a terminal, a line now and then otherwise. `temp` tells the temp space in use, in bytes.

    An instance is the pull's progress call; it keeps the largest temp use that it saw.
    """

    def __init__(self, total: int, temp: Callable[[], int]) -> None:
        self.temp_seen = 0
        self._temp = temp
        self._next_line = total // _PLAIN_LINES
        self._step = max(1, total // _PLAIN_LINES)
        self._bar: Progress | None = None
        if sys.stderr.isatty():
            columns = (
                TextColumn("Pulling"),
                BarColumn(),
                DownloadColumn(binary_units=True),
                TextColumn("{task.fields[rate]}  temp {task.fields[temp]}"),
            )
            self._bar = Progress(*columns, console=Console(stderr=True))
            self._task = self._bar.add_task("pull", total=total, rate="", temp="")

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, progress: options.Progress) -> None:
        temp = self._temp()
        self.temp_seen = max(self.temp_seen, temp)
        if self._bar is not None:
            self._bar.update(self._task, completed=progress.done, rate=rate(progress.rate), temp=format_size(temp))
        elif progress.done >= self._next_line:
            self._next_line = progress.done // self._step * self._step + self._step
            done = f"Pulled {format_size(progress.done)} of {format_size(progress.total)}"
            say(f"{done}, {rate(progress.rate)}, temp {format_size(temp)}")


@dataclass
class DemoReport:
    """What came out; sizes in bytes. `faults` has a sentence for everything that is not as it must be."""

    size: int
    cluster_size: int
    verified: int = 0
    creation_seconds: float = 0.0
    writes_at_creation: int = 0
    writes_during_pull: int = 0
    bytes_during_pull: int = 0
    writes_in_all: int = 0
    clusters_copied: int = 0
    clusters_never_copied: int = 0
    temp_peak: int = 0
    temp_end: int = 0
    pull_seconds: float = 0.0
    pull_data: int = 0
    faults: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.faults

    def text(self) -> str:
        """For people: a verdict, and a line for each figure."""
        verified = f"{self.verified:,} bytes of the copy, each as it was at the instant of creation"
        pairs = [
            ("verified", verified if self.ok else f"{self.verified:,} bytes of the copy are right"),
            ("disk", f"{format_size(self.size)}, clusters of {format_size(self.cluster_size)}"),
            (
                "snapshot",
                f"made in {self.creation_seconds * 1000:.0f} ms, {self.writes_at_creation} guest writes around it",
            ),
            (
                "guest writes",
                f"{self.writes_during_pull:,} ({format_size(self.bytes_during_pull)}) during the pull, "
                f"{self.writes_in_all:,} in all, none lost",
            ),
            (
                "clusters",
                f"{self.clusters_copied:,} copied before the guest overwrote them, "
                f"{self.clusters_never_copied:,} overwritten but never copied thanks to TRIM",
            ),
            ("temp", f"{format_size(self.temp_peak)} at the peak, {format_size(self.temp_end)} at the end"),
            (
                "pull",
                f"{self.pull_seconds:.2f} s for {format_size(self.pull_data)} of data, "
                f"{rate(self.pull_data / self.pull_seconds if self.pull_seconds else 0)}"
                + ("; the rest was zeroes" if self.pull_data < self.size else ""),
            ),
        ]
        return "\n".join([*(f"FAILED: {fault}" for fault in self.faults), fields(pairs)])
