"""A pull from a server on the same host has its data in memory that both ends have (docs/shared-memory.md)."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from fleecing.client.connection import Connection
from fleecing.client.request import MakeBuffer, Request
from fleecing.nbd.uri import NbdUri
from fleecing.pull.engine import pull
from fleecing.pull.options import PullOptions
from fleecing.pull.target import RawTarget
from fleecing.units import KiB, MiB
from tests.images import random_bytes
from tests.raw_client import WRITE, RawClient
from tests.serving import Server

SIZE = 24 * MiB + 777


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    image = tmp_path / "disk.img"
    image.write_bytes(random_bytes(SIZE))
    running = Server(tmp_path / "server", image)
    yield running
    running.stop()


@pytest.fixture
def came(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How many reads were asked for in which way."""
    ways: Counter[str] = Counter()
    submit = Connection.submit_late_read

    def noted(connection: Connection, offset: int, length: int, make_buffer: MakeBuffer) -> Request:
        request = submit(connection, offset, length, make_buffer)
        ways["socket" if request.position is None else "memory"] += 1
        return request

    monkeypatch.setattr(Connection, "submit_late_read", noted)
    return ways


@pytest.mark.parametrize("piece", [64 * KiB, MiB])
def test_all_of_it_comes_that_way_while_the_machine_writes(
    server: Server, tmp_path: Path, came: Counter[str], piece: int
) -> None:
    server.snapshot(name="s")
    ended = threading.Event()

    def write() -> None:
        with RawClient(server.unix, "vda") as machine:
            junk = random_bytes(96 * KiB, seed=1)
            for offset in range(0, SIZE - len(junk), 64 * KiB):
                assert machine.request(WRITE, 0, offset, len(junk), junk).error == 0
            while not ended.is_set():
                assert machine.request(WRITE, 0, 0, len(junk), junk).error == 0

    writer = threading.Thread(target=write)
    writer.start()
    options = PullOptions(connections=3, depth=4, most_depth=4, piece=piece)
    report = pull(
        NbdUri.parse(server.uri("vda@s")), lambda size: RawTarget.create(str(tmp_path / "copy"), size), options
    )
    ended.set()
    writer.join()
    assert (tmp_path / "copy").read_bytes() == random_bytes(SIZE)
    assert report.trimmed == SIZE
    assert came["memory"] >= SIZE // piece and not came["socket"]


def test_over_tcp_it_comes_through_the_socket(server: Server, tmp_path: Path, came: Counter[str]) -> None:
    uri = NbdUri.parse(server.uri("vda", tcp=True))
    pull(uri, lambda size: RawTarget.create(str(tmp_path / "copy"), size), PullOptions())
    assert (tmp_path / "copy").read_bytes() == random_bytes(SIZE)
    assert came["socket"] and not came["memory"]


def test_requests_beyond_the_shared_buffers_come_through_the_socket(
    server: Server, tmp_path: Path, came: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    share = Connection.share_memory
    monkeypatch.setattr(Connection, "share_memory", lambda self, count, length: share(self, 1, length))
    uri = NbdUri.parse(server.uri())
    options = PullOptions(connections=2, depth=4, piece=256 * KiB)
    pull(uri, lambda size: RawTarget.create(str(tmp_path / "copy"), size), options)
    assert (tmp_path / "copy").read_bytes() == random_bytes(SIZE)
    assert came["socket"] and came["memory"]
