"""What a pull shows while it runs: a bar on a terminal, lines of JSON, or a plain line now and then."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import IO, Any, Final, Protocol, Self

import click

from fleecing.cli.on_demand import load
from fleecing.pull.options import Progress
from fleecing.units import format_size

TempCall = Callable[[], int | None]
"""Bytes of temp space that the snapshot takes on the server; None where nobody knows."""

_LINE_SECONDS: Final = 10.0
"""How often a plain line is printed where there is no terminal."""


class Display(Protocol):
    """A pull's progress call that has an end."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def __call__(self, progress: Progress) -> None: ...


def eta(progress: Progress) -> float | None:
    """Seconds that it will take at this run's rate up to now, zeroes included; None as long as nobody can tell."""
    done = progress.done - progress.resumed
    if not done or not progress.seconds:
        return None
    return (progress.total - progress.done) * progress.seconds / done


def rate(bytes_per_second: float) -> str:
    return f"{format_size(round(bytes_per_second))}/s"


class _Quiet:
    """The beginning and the end of a display that has neither."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None


class JsonLines(_Quiet):
    """A line a second, and those that `event` is given."""

    def __init__(self, stream: IO[str], temp: TempCall, seconds: float = 1.0) -> None:
        self._stream = stream
        self._temp = temp
        self._seconds = seconds
        self._next = 0.0

    def __call__(self, progress: Progress) -> None:
        now = time.monotonic()
        if now < self._next and progress.done < progress.total:
            return
        self._next = now + self._seconds
        self.event(
            "progress",
            done=progress.done,
            total=progress.total,
            data=progress.data,
            rate=round(progress.rate),
            eta=_rounded(eta(progress)),
            temp=self._temp(),
            reconnects=progress.reconnects,
        )

    def event(self, name: str, **fields: Any) -> None:
        """One line, an object whose "event" is the name."""
        self._stream.write(json.dumps({"event": name, **fields}) + "\n")
        self._stream.flush()


class PlainLines(_Quiet):
    """A line every ten seconds on stderr."""

    def __init__(self, temp: TempCall) -> None:
        self._temp = temp
        self._next = time.monotonic() + _LINE_SECONDS

    def __call__(self, progress: Progress) -> None:
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + _LINE_SECONDS
        left = eta(progress)
        parts = [
            f"Pulled {format_size(progress.done)} of {format_size(progress.total)}",
            rate(progress.rate),
            *([] if left is None else [f"{left:.0f} s left"]),
            *temp_words(self._temp()),
        ]
        click.echo(", ".join(parts), err=True)


def choose(temp: TempCall) -> Display:
    """What suits stderr."""
    display: Display = load("pull_bar:BarDisplay")(temp) if sys.stderr.isatty() else PlainLines(temp)
    return display


def temp_words(temp: int | None) -> list[str]:
    """The temp space, if it is known."""
    return [] if temp is None else [f"temp {format_size(temp)}"]


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 1)
