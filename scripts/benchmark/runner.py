"""Takes the samples: stage by stage, row by row, all contenders in turn in each repeat."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from itertools import groupby

from scripts.benchmark.contenders.table import why_not
from scripts.benchmark.copies import open_tools
from scripts.benchmark.house import House, make_dirty
from scripts.benchmark.machine import Spinners, quiet_since, watch
from scripts.benchmark.model import Row, Stage
from scripts.benchmark.process import BenchError
from scripts.benchmark.results import Result
from scripts.benchmark.stages import Opener, open_stage

_SAMPLE_OVERHEAD = 0.5
"""Seconds that a sample takes besides its own, about."""

Tell = Callable[[str], None]


class Runner:
    """Runs rows until `deadline` (time.monotonic); rows that do not fit in are left out, and say so."""

    def __init__(self, house: House, spinners: Spinners, deadline: float, tell: Tell) -> None:
        self._house = house
        self._spinners = spinners
        self._deadline = deadline
        self._tell = tell

    def run(self, rows: Sequence[Row]) -> list[Result]:
        """All rows; those of a stage stand together. Ctrl-C leaves out the rest."""
        results = [Result(row) for row in rows]
        try:
            for stage, group in groupby(results, key=lambda result: result.row.stage):
                self._run_stage(stage, list(group))
        except KeyboardInterrupt:
            for result in results:
                if not result.samples:
                    result.left_out = "interrupted"
        return results

    def _run_stage(self, stage: Stage, results: list[Result]) -> None:
        rows = [result.row for result in results]
        if not self._has_time_for(rows[0]):
            for result in results:
                result.left_out = "no time left"
            return
        reasons = {
            name: why_not(self._house, name, stage.transport)
            for name in dict.fromkeys(name for row in rows for name in row.contenders)
        }
        names = [name for name, reason in reasons.items() if not reason]
        failures: dict[str, str] = {}
        if stage.tools:
            stand = open_tools(self._house, stage)
        else:
            stand = open_stage(self._house, stage, names, failures.__setitem__)
        with stand as give:
            for result in results:
                mine = result.row.contenders
                result.absent = {name: text for name, text in reasons.items() if text and name in mine}
                result.errors = {name: text for name, text in failures.items() if name in mine}
                if self._has_time_for(result.row):
                    self._run_row(result, give)
                else:
                    result.left_out = "no time left"

    def _has_time_for(self, row: Row) -> bool:
        settings = self._house.settings
        seconds = max(row.seconds, settings.seconds) + _SAMPLE_OVERHEAD
        needed = len(row.contenders) * settings.repeats * seconds
        return time.monotonic() + needed < self._deadline

    def _run_row(self, result: Result, give: Opener) -> None:
        names = [n for n in result.row.contenders if n not in result.errors and n not in result.absent]
        result.samples = {name: [] for name in names}
        for repeat in range(self._house.settings.repeats):
            if time.monotonic() > self._deadline:
                return
            turn = repeat % max(1, len(names))
            for name in names[turn:] + names[:turn]:
                self._tell(f"{result.row.name}: {name}, {repeat + 1} of {self._house.settings.repeats}")
                self._sample(result, give, name)

    def _sample(self, result: Result, give: Opener, name: str) -> None:
        if name in result.errors:
            return
        row = result.row
        try:
            if row.dirties:
                make_dirty(self._house.image)
            with give(name) as offer, self._spinners.awake() if row.awake else nullcontext():
                start = watch()
                figures = row.measure(offer)
                result.quiet.append(quiet_since(start))
        except (BenchError, OSError) as e:
            result.errors[name] = str(e)
        else:
            result.samples[name].append(figures)
