"""A guest goes first: who copies a snapshot gives way while the guest is served, for a moment, and never else."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from fleecing.block import turns
from fleecing.nbd.constants import Cmd, ReplyMode
from fleecing.pull.node_source import NodeSource
from fleecing.server.export import active_export, snapshot_export
from fleecing.units import KiB, MiB
from tests.block.rig import CLUSTER, Rig, pattern
from tests.server.rig import MakeLine


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    made = Rig(tmp_path, pattern(2 * MiB))
    yield made
    made.close()


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    found: list[float] = []
    monkeypatch.setattr("fleecing.block.turns.sleep", found.append)
    return found


def test_a_guest_is_busy_while_its_requests_are_served(
    rig: Rig, line: MakeLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bool] = []
    read = rig.disk.read_cached

    def looking(offset: int, buffer: memoryview) -> bool:
        seen.append(rig.disk.turns.guest_busy)
        return read(offset, buffer)

    monkeypatch.setattr(rig.disk, "read_cached", looking)
    guest = line(active_export("vda", "", rig.disk, cluster_size=CLUSTER), ReplyMode.STRUCTURED)
    assert guest.ask(Cmd.READ, 0, 100).data == pattern(2 * MiB)[:100]
    guest.end()
    assert seen == [True] and not rig.disk.turns.guest_busy


@pytest.mark.parametrize("busy", [True, False])
def test_a_copy_gives_way_once_for_each_large_piece(
    rig: Rig, line: MakeLine, mode: ReplyMode, pauses: list[float], busy: bool
) -> None:
    backup = line(snapshot_export("vda@s", "", rig.snapshot()[0]), mode)
    rig.disk.turns.guest_busy = busy
    for offset in range(0, MiB, 256 * KiB):
        assert backup.ask(Cmd.READ, offset, 256 * KiB).data == pattern(2 * MiB)[offset : offset + 256 * KiB]
    assert pauses == [turns.PAUSE] * 4 * busy
    assert rig.disk.turns.guest_busy == busy, "what a copy is served with is no guest's"
    assert backup.ask(Cmd.READ, 0, 4 * KiB).data == pattern(2 * MiB)[: 4 * KiB]
    assert len(pauses) == 4 * busy, "small reads wait for nobody"


def test_a_push_gives_way_too(rig: Rig, pauses: list[float]) -> None:
    rig.disk.turns.guest_busy = True
    source = NodeSource(rig.snapshot()[0], "vda@s")
    request = source.first.submit_late_read(0, 512 * KiB, lambda length: memoryview(bytearray(length)))
    assert request.buffer is not None
    assert (bytes(request.buffer), pauses) == (pattern(2 * MiB)[: 512 * KiB], [turns.PAUSE])
