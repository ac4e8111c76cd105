"""What every test may use."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import HealthCheck, settings

from tests.peers import Children, load_libnbd

# No test asserts a time, and a busy machine is no fault: pytest-timeout catches what hangs.
settings.register_profile(
    "fleecing", deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)
settings.load_profile("fleecing")


@pytest.fixture
def children(tmp_path: Path) -> Iterator[Children]:
    """Starts real programs beside the test, with their output in tmp_path; ends and reaps them when the test ends."""
    with ExitStack() as stack:
        yield Children(tmp_path, stack)


@pytest.fixture(scope="session")
def libnbd() -> ModuleType:
    """libnbd's Python module, which can be told to send illegal requests (`set_strict_mode(0)`)."""
    return load_libnbd()
