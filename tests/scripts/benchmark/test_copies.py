"""Copies by clients of one server: what they are given, and what is told of them."""

from __future__ import annotations

import pytest

from fleecing.units import MiB
from scripts.benchmark import house as scratch
from scripts.benchmark.contenders.table import OURS
from scripts.benchmark.copies import copies, open_tools
from scripts.benchmark.house import House
from scripts.benchmark.load import MB, snapshot
from scripts.benchmark.model import Image, Snapshot, Stage
from scripts.benchmark.process import run


def test_the_rate_of_a_copy_of_scattered_data_is_that_of_the_data(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scratch, "SCATTERED_DATA", MiB)
    file = house.scattered_image.stat()
    assert (file.st_size, file.st_blocks * 512) == (1 << 40, MiB)
    stage = Stage(image=Image.SCATTERED, snapshot=Snapshot.LASTING, tools=True)
    with open_tools(house, stage) as give, give(OURS) as offer:
        assert int(run(["nbdinfo", "--size", offer.snapshot], house.log)) == 1 << 40
        figures = copies(house, "qcow2", snapshot, data=MiB)(offer)
    assert figures["mb"] * figures["seconds"] == pytest.approx(MiB / MB)
