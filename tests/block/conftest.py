"""Fixtures of the block layer's tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.block.rig import Rig


@pytest.fixture
def make_rig(tmp_path: Path) -> Iterator[Callable[..., Rig]]:
    """Makes a disk with these contents, of `size` bytes or as many as they are; it is closed at the end of the test."""
    rigs: list[Rig] = []

    def make(contents: bytes, size: int | None = None) -> Rig:
        folder = tmp_path / f"rig{len(rigs)}"
        folder.mkdir()
        rigs.append(Rig(folder, contents, size))
        return rigs[-1]

    yield make
    for rig in rigs:
        rig.close()
