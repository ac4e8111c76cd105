"""A scratch folder of the benchmark for disks as small as can be."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from fleecing.units import MiB
from scripts.benchmark.house import House, Settings


@pytest.fixture
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    settings = Settings(16 * MiB, seconds=0.1, repeats=1, touch=MiB, writes=10)
    with House(tmp_path_factory.mktemp("h"), settings) as made:
        yield made
