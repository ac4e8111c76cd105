"""A copy steps back for the machine whose CPUs it takes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from fleecing.nbd.uri import NbdUri
from fleecing.pull.engine import NICENESS, pull
from fleecing.pull.target import RawTarget, Target
from fleecing.units import MiB
from tests.images import make_image
from tests.serving import Server


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    make_image(tmp_path / "disk.img", 8 * MiB)
    running = Server(tmp_path / "server", tmp_path / "disk.img")
    yield running
    running.stop()


def niceness() -> int:
    """Of this thread."""
    return os.getpriority(os.PRIO_PROCESS, 0)


class Asking(RawTarget):
    """Notes how nice its writers are."""

    seen: set[int]

    def write(self, offset: int, data: memoryview) -> None:
        self.seen.add(niceness())
        super().write(offset, data)


def copied_with(uri: str, copy: Path, *, own: int = 0) -> set[int]:
    """How nice the threads are that copy it, for a caller that is as nice as the tests are, or `own` more."""
    seen: set[int] = set()

    def make(size: int) -> Target:
        target = Asking.create(str(copy), size)
        assert isinstance(target, Asking)
        target.seen = seen
        return target

    def run() -> None:
        if own:
            os.setpriority(os.PRIO_PROCESS, 0, niceness() + own)
        pull(NbdUri.parse(uri), make)

    with ThreadPoolExecutor(1) as caller:
        caller.submit(run).result()
    copy.unlink()
    return seen


def test_snapshots_on_this_host_are_copied_nicely(server: Server, tmp_path: Path) -> None:
    ours = niceness()
    copy = tmp_path / "copy"
    expected = NICENESS if ours == 0 else ours
    server.snapshot(name="far")
    server.snapshot(name="near")
    server.snapshot(name="chosen")
    assert copied_with(server.uri("vda@near"), copy) == {expected}
    assert copied_with(server.uri("vda@far", tcp=True), copy) == {ours}
    assert copied_with(server.uri("vda@chosen"), copy, own=3) == {ours + 3}
    assert copied_with(server.uri(), copy) == copied_with(server.uri(tcp=True), copy) == {ours}
    assert niceness() == ours
