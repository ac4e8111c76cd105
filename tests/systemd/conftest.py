"""The machine with systemd."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.guest.guest import Guest
from tests.systemd.machine import DEADLINE, SYSTEMD, Machine, make_root


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    disk = ["-drive", f"file={make_root(tmp_path)},if=virtio,format=raw"]
    with Guest(tmp_path, disk, memory=512, options=f"system={SYSTEMD}", deadline=DEADLINE) as guest:
        yield Machine(guest)
