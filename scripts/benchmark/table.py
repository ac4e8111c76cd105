"""The report on the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from scripts.benchmark.contenders.table import CONTENDERS, OURS
from scripts.benchmark.model import METRICS
from scripts.benchmark.results import Result, Summary

WIDTH = 190
"""Columns where the output is no terminal."""


def number(value: float) -> str:
    """Three figures that matter."""
    if value >= 100_000:
        return f"{value / 1000:.0f} k"
    if value >= 10_000:
        return f"{value / 1000:.1f} k"
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def show(console: Console, results: Sequence[Result]) -> None:
    """The table of ratios, then what is in doubt or was left out."""
    peers = [name for name in CONTENDERS if any(name in result.peers for result in results)]
    table = Table(title="medians; ours / peer", header_style="bold", padding=(0, 1, 0, 0), box=box.SIMPLE_HEAD)
    table.add_column("row", no_wrap=True)
    table.add_column("figure", no_wrap=True)
    table.add_column(OURS, justify="right", no_wrap=True)
    table.add_column("+-", justify="right")
    table.add_column("best peer", justify="right", no_wrap=True)
    for name in ("/best", *(f"/{name}" for name in peers)):
        table.add_column(name, justify="right")
    table.add_column("goal", no_wrap=True)
    for result in results:
        if not result.left_out:
            _add(table, result, peers)
    console.print(table)
    for result in results:
        if doubts := [doubt.splitlines()[0] for doubt in result.doubts()]:
            text = escape("; ".join(doubts))
            console.print(f"[yellow]? {result.row.name}[/] is not to be trusted: {text}", highlight=False)
    for reason in dict.fromkeys(result.left_out for result in results if result.left_out):
        out = [result.row.name for result in results if result.left_out == reason]
        console.print(f"left out, {reason}: {', '.join(out)}", highlight=False)


def _add(table: Table, result: Result, peers: Sequence[str]) -> None:
    doubtful = "?" if result.doubts() else ""
    for i, metric in enumerate(result.row.shown):
        best = result.best(metric)
        table.add_row(
            f"{result.row.name}[yellow]{doubtful}[/]" if not i else "",
            METRICS[metric].unit,
            _median(result.summary(OURS, metric)),
            _spread(result.summary(OURS, metric)),
            f"{_median(result.summary(best, metric))} {best}" if best else "",
            _ratio(result.ratio(metric, best)),
            *(_ratio(result.ratio(metric, peer)) for peer in peers),
            _goal(result, metric),
        )


def _median(summary: Summary | None) -> str:
    return number(summary.median) if summary else "-"


def _spread(summary: Summary | None) -> str:
    return f"{summary.spread / 2:.0%}" if summary else ""


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _goal(result: Result, metric: str) -> str:
    texts = []
    for verdict in result.verdicts():
        if verdict.goal.metric == metric:
            word = "[green]met[/]" if verdict.met else "[red]missed[/]"
            value = "not measured" if verdict.value is None else f"{verdict.value:.3g}"
            texts.append(f"{word} {value} {verdict.goal} {verdict.goal.against}")
    return "; ".join(texts)
