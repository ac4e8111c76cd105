"""Fixtures of the server's tests."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fleecing.nbd.constants import ReplyMode
from fleecing.server.export import Export
from tests.server.rig import Disk, Line, MakeDisk, MakeLine


@pytest.fixture(params=list(ReplyMode), ids=lambda mode: mode.value)
def mode(request: pytest.FixtureRequest) -> ReplyMode:
    """Each of the three kinds of replies in turn."""
    assert isinstance(request.param, ReplyMode)
    return request.param


@pytest.fixture
def make_disk(tmp_path: Path) -> Iterator[MakeDisk]:
    """Makes a disk with these contents."""
    disks: list[Disk] = []

    def make(contents: bytes) -> Disk:
        folder = tmp_path / f"disk{len(disks)}"
        folder.mkdir()
        disks.append(Disk(folder, contents))
        return disks[-1]

    yield make
    for disk in disks:
        disk.close()


@pytest.fixture
def line(make_disk: MakeDisk) -> Iterator[MakeLine]:
    """Makes connections. They end before the disks do, and need nothing to be held up any more to end."""
    lines: list[Line] = []

    def make(export: Export, mode: ReplyMode, *arguments: Any, **options: Any) -> Line:
        lines.append(Line(export, mode, *arguments, **options))
        return lines[-1]

    yield make
    for made in lines:
        made.give_up()


@pytest.fixture(autouse=True)
def _no_errors(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Nothing that a client does is worth an ERROR in the log."""
    yield
    errors = [record for record in caplog.get_records("call") if record.levelno >= logging.ERROR]
    assert not errors, [record.getMessage() for record in errors]
