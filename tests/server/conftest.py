"""Fixtures of the server's tests."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fleecing.block.snapshot_access import SnapshotAccess
from fleecing.nbd.constants import ReplyMode
from fleecing.server.export import Export
from tests.block.rig import Rig, pattern
from tests.server.rig import Disk, Line, MakeDisk, MakeLine
from tests.server.world import START, Served
from tests.serving import Server


@pytest.fixture(params=list(ReplyMode), ids=lambda mode: mode.value)
def mode(request: pytest.FixtureRequest) -> ReplyMode:
    """Each of the three kinds of replies in turn."""
    assert isinstance(request.param, ReplyMode)
    return request.param


@pytest.fixture
def rig(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Rig]:
    """A disk whose snapshots have a temp with faults; as large as SIZE of the test's module says."""
    made = Rig(tmp_path, pattern(request.module.SIZE))
    yield made
    made.close()


@pytest.fixture
def snapshot(rig: Rig) -> SnapshotAccess:
    """Of the rig."""
    return rig.snapshot()[0]


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


NERVOUS = (
    "import sys; sys.setswitchinterval(2e-6); sys.argv[:] = ['fleecing', *sys.argv[4:]];"
    "from fleecing.cli.main import main; main()"
)
"""Runs the server with threads that take turns a thousand times as often: what can come in between, does."""


@pytest.fixture(scope="package", params=["calm", "nervous"])
def served(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[Served]:
    """One server for all tests that use it; its disk is reset by writing."""
    folder = tmp_path_factory.mktemp("served")
    image = folder / "disk.img"
    image.write_bytes(START)
    wrapper = (sys.executable, "-c", NERVOUS) if request.param == "nervous" else ()
    server = Server(folder / "server", image, "--cluster-size", "4K", wrapper=wrapper)
    yield Served(server, image)
    server.stop()
