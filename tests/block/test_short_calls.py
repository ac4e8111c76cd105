"""A system that does less than it was asked for, as it may at any call: nothing above notices."""

from __future__ import annotations

import os
from pathlib import Path
from random import Random
from typing import Any

import pytest

from fleecing.block import hostfile
from fleecing.units import KiB
from tests.block.qcow2.tools import check
from tests.block.rig import Rig, pattern

SIZE = 300 * KiB + 77
CLUSTER = 4 * KiB


class ShortCalls:
    """The module `os`, whose reads and writes end early, often after a single byte."""

    def __init__(self, random: Random) -> None:
        self.shortened = 0
        self._random = random

    def _part(self, length: int) -> int:
        part = self._random.choice([length, self._random.randint(1, length), 1]) if length else 0
        self.shortened += part < length
        return part

    def preadv(self, fd: int, buffers: tuple[memoryview], offset: int, flags: int = 0) -> int:
        (buffer,) = buffers
        return os.preadv(fd, (buffer[: self._part(len(buffer))],), offset, flags)

    def pwrite(self, fd: int, data: Any, offset: int) -> int:
        return os.pwrite(fd, memoryview(data)[: self._part(len(data))], offset)

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)


@pytest.mark.parametrize("seed", range(3))
def test_everything_is_exact_though_calls_are_cut_short(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    random = Random(seed)
    calls = ShortCalls(random)
    monkeypatch.setattr(hostfile, "os", calls)
    old = pattern(SIZE)
    rig = Rig(tmp_path, old)
    snapshot, _ = rig.snapshot(cluster_size=CLUSTER)
    now = bytearray(old)
    for _ in range(60):
        offset = random.randrange(SIZE - 1)
        length = random.randint(1, min(30 * KiB, SIZE - offset))
        data = pattern(length, random.randrange(99))
        if random.random() < 0.2:
            data = bytes(length)
            rig.disk.write_zeroes(offset, length)
        else:
            rig.disk.write(offset, data)
        now[offset : offset + length] = data
        where = random.randrange(SIZE - 1)
        assert snapshot.read(where, min(40 * KiB, SIZE - where)) == old[where : where + 40 * KiB]
        buffer = bytearray(min(100, SIZE - where))
        if snapshot.read_cached(where, memoryview(buffer)):
            assert buffer == old[where : where + len(buffer)]
    assert rig.disk.read(0, SIZE) == now
    assert snapshot.read(0, SIZE) == old
    assert calls.shortened > 100
    assert check(snapshot.temp) == {}
    rig.close()
    assert rig.path.read_bytes() == now
