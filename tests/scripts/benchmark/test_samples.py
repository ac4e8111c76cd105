"""Samples of rows, on disks as small as can be: what is served to them, and what they find."""

from __future__ import annotations

import time
from contextlib import closing
from pathlib import Path

import pytest

from scripts.benchmark.contenders import ours
from scripts.benchmark.contenders.table import IMPARTIAL, OURS
from scripts.benchmark.guest import during_pull, pull_to_nowhere
from scripts.benchmark.house import House
from scripts.benchmark.machine import Spinners
from scripts.benchmark.model import Figures, Offer, Row, Snapshot, Stage
from scripts.benchmark.runner import Runner
from scripts.benchmark.stages import open_stage


def test_a_guest_writes_while_our_client_pulls_from_a_server_where_it_does_not_go_first(house: House) -> None:
    stage = Stage(snapshot=Snapshot.FRESH, alone=True)
    with open_stage(house, stage, (OURS, IMPARTIAL), fail) as give, give(IMPARTIAL) as offer:
        command = Path(f"/proc/{offer.server.child.pid}/cmdline").read_text()
        figures = during_pull(house, depth=4, by_ours=True)(offer)
    assert ours.IMPARTIAL in command
    assert 0 < figures["p50"] <= figures["p99"]
    assert figures["rate"] > 0 and figures["pull_mb"] > 0


def test_our_client_pulls_and_trims_all_of_a_snapshot(house: House) -> None:
    with open_stage(house, Stage(snapshot=Snapshot.FRESH, alone=True), (OURS,), fail) as give, give(OURS) as offer:
        before = time.time()
        report = pull_to_nowhere(house, offer.snapshot)
    assert (report["bytes"], report["trimmed"]) == (house.settings.size, house.settings.size)
    assert before < report["began"] < report["ended"] < time.time()


@pytest.mark.parametrize("seconds, left_out", [(40.0, "no time left"), (0.0, "")])
def test_a_row_that_takes_long_is_left_out_where_it_would_end_too_late(
    house: House, seconds: float, left_out: str
) -> None:
    row = Row("row", "a row", Stage(alone=True), (OURS,), nothing, seconds=seconds)
    with closing(Spinners(house)) as spinners:
        runner = Runner(house, spinners, time.monotonic() + 30, lambda text: None)
        assert [result.left_out for result in runner.run([row])] == [left_out]


def nothing(offer: Offer) -> Figures:
    return {"rate": 1.0}


def fail(name: str, reason: str) -> None:
    raise AssertionError(f"{name}: {reason}")
