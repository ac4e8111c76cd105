"""What the benchmark makes of its samples: medians, ratios, goals, doubts."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

import pytest

from scripts.benchmark.chart import svg
from scripts.benchmark.machine import Quiet
from scripts.benchmark.model import Against, Figures, Goal, Offer, Row, Stage
from scripts.benchmark.results import Result

QUIET = Quiet(steal=0.0, others=0.0)


def never(offer: Offer) -> Figures:
    raise AssertionError("nothing is measured here")


def result(metric: str, *goals: Goal, **samples: list[float]) -> Result:
    """A row of one metric; names of contenders with _ for -."""
    row = Row("row", "a row", Stage(), tuple(samples), never, shown=(metric,), goals=goals)
    figures = {name.replace("_", "-", 1): [{metric: value} for value in values] for name, values in samples.items()}
    return Result(row, figures, [QUIET])


def test_the_median_counts_and_not_the_mean() -> None:
    summary = result("rate", ours=[1.0, 2.0, 30.0]).summary("ours", "rate")
    assert summary is not None and (summary.median, summary.low, summary.high) == (2.0, 1.0, 30.0)


def test_the_best_peer_has_most_where_more_is_better() -> None:
    assert result("rate", ours=[9.0], nbdkit=[2.0], nbd_server=[3.0]).best("rate") == "nbd-server"


def test_the_best_peer_has_least_where_less_is_better() -> None:
    assert result("p99", ours=[9.0], nbdkit=[2.0], nbd_server=[3.0]).best("p99") == "nbdkit"


def test_a_ratio_is_ours_divided_by_the_peers() -> None:
    assert result("rate", ours=[3.0], nbdkit=[2.0]).ratio("rate", "nbdkit") == 1.5


@pytest.mark.parametrize("ours, met", [(13.0, True), (12.9, False)])
def test_a_goal_against_the_best_peer(ours: float, met: bool) -> None:
    verdicts = result("rate", Goal("rate", 1.3), ours=[ours], nbdkit=[10.0], qsd_threads=[4.0]).verdicts()
    assert [verdict.met for verdict in verdicts] == [met]


def test_a_goal_against_qsd_looks_at_no_other_peer() -> None:
    one = result("rate", Goal("rate", 4.0, Against.QSD), ours=[16.0], nbdkit=[100.0], qsd_threads=[4.0])
    assert one.verdicts()[0].value == 4.0


def test_an_absolute_goal_needs_no_peer() -> None:
    one = result("rss", Goal("rss", 100, Against.NOTHING, at_most=True), ours=[99.0])
    assert one.verdicts()[0].met


def test_a_goal_that_was_not_measured_is_not_met() -> None:
    verdict = result("rate", Goal("rate", 1.3), nbdkit=[10.0]).verdicts()[0]
    assert verdict.value is None and not verdict.met


def test_steady_samples_on_a_quiet_machine_leave_no_doubt() -> None:
    assert result("rate", ours=[10.0, 10.1, 10.2], nbdkit=[7.0, 7.1, 7.0]).doubts() == []


@pytest.mark.parametrize(
    "quiet, word", [(Quiet(steal=0.2, others=0.0), "host"), (Quiet(steal=0.0, others=0.5), "other programs")]
)
def test_a_machine_that_is_not_quiet_is_a_doubt(quiet: Quiet, word: str) -> None:
    one = result("rate", ours=[10.0, 10.0, 10.0])
    one.quiet = [quiet]
    assert len(one.doubts()) == 1 and word in one.doubts()[0]


def test_samples_far_apart_are_a_doubt() -> None:
    assert "ours varies by 50%" in result("rate", ours=[10.0, 15.0, 10.0]).doubts()


def test_few_repeats_are_a_doubt() -> None:
    assert "only 2 repeats" in result("rate", ours=[10.0, 10.0]).doubts()


def test_a_contender_that_failed_is_a_doubt_and_has_no_ratio() -> None:
    one = result("rate", ours=[10.0, 10.0, 10.0])
    one.errors["nbdkit"] = "it ended"
    assert one.doubts() == ["nbdkit failed: it ended"]
    assert one.ratio("rate", "nbdkit") is None


def test_the_chart_is_xml_and_leaves_out_what_was_not_measured() -> None:
    empty = result("rate")
    picture = svg([result("rate", Goal("rate", 1.3), ours=[3.0], nbdkit=[2.0]), empty], "a <title>")
    texts = [element.text for element in ElementTree.fromstring(picture).iter() if element.tag.endswith("text")]
    assert texts.count("row ?") == 1
    assert "a <title>" in texts
