"""Fixtures of the tests against real programs."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture
def shared_memory() -> Iterator[Path]:
    """A folder on a tmpfs, which anybody may have: /dev/shm."""
    folder = Path(tempfile.mkdtemp(prefix="fleecing-test-", dir="/dev/shm"))
    yield folder
    shutil.rmtree(folder)
