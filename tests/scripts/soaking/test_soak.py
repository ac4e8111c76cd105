"""What a soak is made of, and what it holds the resources to; the soak itself is in test_minute.py."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from fleecing.units import MiB
from scripts.soaking.gauges import Sample, grown
from scripts.soaking.load import Guest
from tests.crash.ledger import Ledger

LEVEL = Sample(memory=80 * MiB, descriptors=30, threads=20, disk=40960, files=10)


def test_a_guest_that_may_go_and_must_rest_at_once_rests(tmp_path: Path) -> None:
    guest = Guest(tmp_path / "nobody listens here", "vda", Ledger(8), 0, 8, seed=1)
    for _ in range(300):
        guest.go()
        guest.rest()
    guest.end()


def test_what_comes_back_to_its_level_is_no_growth() -> None:
    assert grown(LEVEL, LEVEL) == []
    assert grown(LEVEL, replace(LEVEL, memory=90 * MiB, threads=22)) == []


@pytest.mark.parametrize("what", ["memory", "descriptors", "threads", "disk", "files"])
def test_each_resource_is_held_to_its_level(what: str) -> None:
    (problem,) = grown(LEVEL, replace(LEVEL, **{what: 2 * getattr(LEVEL, what)}))
    assert problem.startswith(f"{what} went from")
