"""The program that the benchmark sets beside Fleecing: on its disks the guest does not go first."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from fleecing.block import turns
from fleecing.server.export import snapshot_export
from fleecing.server.shares import Shares
from scripts.benchmark.contenders.impartial import nobody_first
from tests.block.rig import Rig, pattern


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    made = Rig(tmp_path, pattern(1 << 20))
    yield made
    made.close()


def test_a_copy_makes_no_pause_for_a_busy_guest(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr("fleecing.block.turns.sleep", pauses.append)
    rig.disk.turns.guest_busy = True
    with nobody_first():
        impartial = snapshot_export("vda@s", "", rig.snapshot()[0])
        assert impartial.give_way is not None
        impartial.give_way()
        assert not pauses
    fair = snapshot_export("vda@t", "", rig.snapshot("t")[0])
    assert fair.give_way is not None
    fair.give_way()
    assert pauses == [turns.PAUSE]


def test_a_machine_waits_its_turn() -> None:
    with nobody_first():
        assert not Shares(8, 1024).share(8, 1024, machine=True).machine
    assert Shares(8, 1024).share(8, 1024, machine=True).machine
