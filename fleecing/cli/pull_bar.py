"""What a pull shows on a terminal."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from fleecing.cli.pull_display import TempCall, rate, temp_words
from fleecing.pull.options import Progress


class BarDisplay:
    """A bar on the terminal that stderr is."""

    def __init__(self, temp: TempCall) -> None:
        self._temp = temp
        columns = (
            TextColumn("Pulling"),
            BarColumn(),
            DownloadColumn(binary_units=True),
            TextColumn("{task.fields[words]}"),
            TimeRemainingColumn(),
        )
        self._bar = Bar(*columns, console=Console(stderr=True))
        self._has_begun = False
        self._task = self._bar.add_task("pull", total=None, words="")

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def __call__(self, progress: Progress) -> None:
        if not self._has_begun:
            self._has_begun = True
            self._bar.reset(self._task, completed=progress.resumed)  # or it would count as done in a moment
        words = [rate(progress.rate), *temp_words(self._temp())]
        if progress.reconnects:
            words.append(f"connected again {progress.reconnects} times")
        self._bar.update(self._task, total=progress.total, completed=progress.done, words="  ".join(words))
