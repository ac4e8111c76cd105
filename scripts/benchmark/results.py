"""What came out of a row: medians, spread, ratios, goals, and whether to trust it."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from typing import Any

from scripts.benchmark.contenders.table import OURS, QSDS
from scripts.benchmark.machine import OTHERS_LIMIT, STEAL_LIMIT, Quiet
from scripts.benchmark.model import METRICS, Against, Figures, Goal, Row

SPREAD_LIMIT = 0.30
"""(Largest - smallest) / median above which a row is not to be trusted."""

FEWEST_REPEATS = 3


@dataclass(frozen=True)
class Summary:
    """The samples of one metric of one contender."""

    median: float
    low: float
    high: float

    @property
    def spread(self) -> float:
        """(Largest - smallest) / median."""
        return (self.high - self.low) / self.median if self.median else 0.0


@dataclass(frozen=True)
class Verdict:
    """A goal, what ours is by its measure (a ratio, or the figure itself), and whether that is enough."""

    goal: Goal
    value: float | None
    met: bool


@dataclass
class Result:
    """The samples of a row, by contender, in the order in which they were taken.

    `errors`: why a contender failed; `absent`: why it could not take part at all. `left_out`: why nothing was measured.
    """

    row: Row
    samples: dict[str, list[Figures]] = field(default_factory=dict)
    quiet: list[Quiet] = field(default_factory=list)
    errors: dict[str, str] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    left_out: str = ""

    def summary(self, name: str, metric: str) -> Summary | None:
        """One contender's figure; None where it has none."""
        values = [figures[metric] for figures in self.samples.get(name, ()) if metric in figures]
        return Summary(statistics.median(values), min(values), max(values)) if values else None

    @property
    def peers(self) -> list[str]:
        """The others, with samples."""
        return [name for name, samples in self.samples.items() if name != OURS and samples]

    def best(self, metric: str, among: tuple[str, ...] | None = None) -> str | None:
        """The peer with the best median."""
        known = {
            name: summary.median
            for name in self.peers
            if (among is None or name in among) and (summary := self.summary(name, metric)) is not None
        }
        choose = max if METRICS[metric].more_is_better else min
        return choose(known, key=lambda name: known[name]) if known else None

    def ratio(self, metric: str, peer: str | None) -> float | None:
        """Ours divided by that peer's."""
        ours = self.summary(OURS, metric)
        other = self.summary(peer, metric) if peer is not None else None
        return ours.median / other.median if ours is not None and other is not None and other.median else None

    def verdicts(self) -> list[Verdict]:
        """How ours stands to the goals. One that could not be measured is not met."""
        found = []
        for goal in self.row.goals:
            if goal.against is Against.NOTHING:
                ours = self.summary(OURS, goal.metric)
                value = ours.median if ours is not None else None
            else:
                among = QSDS if goal.against is Against.QSD else None
                value = self.ratio(goal.metric, self.best(goal.metric, among))
            found.append(Verdict(goal, value, value is not None and goal.met(value)))
        return found

    def doubts(self) -> list[str]:
        """Why the row is not to be trusted; empty where it is."""
        if self.left_out:
            return []
        found = [f"{name} is absent: {text}" for name, text in self.absent.items()]
        found += [f"{name} failed: {text}" for name, text in self.errors.items()]
        repeats = min((len(samples) for name, samples in self.samples.items() if name not in self.errors), default=0)
        if repeats < FEWEST_REPEATS:
            found.append(f"only {repeats} repeats")
        if self.quiet:
            steal = statistics.median(quiet.steal for quiet in self.quiet)
            others = statistics.median(quiet.others for quiet in self.quiet)
            if steal > STEAL_LIMIT:
                found.append(f"the host took {steal:.0%} of the CPUs")
            if others > OTHERS_LIMIT:
                found.append(f"other programs took {others:.0%} of the CPUs")
        metric = self.row.shown[0]
        for name in (OURS, self.best(metric)):
            summary = self.summary(name, metric) if name else None
            if summary is not None and summary.spread > SPREAD_LIMIT:
                found.append(f"{name} varies by {summary.spread:.0%}")
        return found

    def as_json(self) -> dict[str, Any]:
        """All of it, with every sample."""
        metrics = {name: sorted({m for figures in self.samples[name] for m in figures}) for name in self.samples}
        return {
            "name": self.row.name,
            "title": self.row.title,
            "left_out": self.left_out,
            "doubts": self.doubts(),
            "steal": [round(quiet.steal, 4) for quiet in self.quiet],
            "others": [round(quiet.others, 4) for quiet in self.quiet],
            "contenders": {
                name: {metric: self._metric_json(name, metric) for metric in metrics[name]} for name in self.samples
            },
            "ratios": {
                metric: {peer: self.ratio(metric, peer) for peer in self.peers} | {"best": self.best(metric)}
                for metric in self.row.shown
            },
            "goals": [
                {
                    "metric": v.goal.metric,
                    "against": v.goal.against,
                    "goal": str(v.goal),
                    "value": v.value,
                    "met": v.met,
                }
                for v in self.verdicts()
            ],
        }

    def _metric_json(self, name: str, metric: str) -> dict[str, Any]:
        summary = self.summary(name, metric)
        assert summary is not None
        samples = [figures[metric] for figures in self.samples[name] if metric in figures]
        return {"median": summary.median, "low": summary.low, "high": summary.high, "samples": samples}
