"""What every test may use."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import HealthCheck, settings

from tests.peers import Children, load_libnbd
from tests.serving import Serve, Server

# No test asserts a time, and a busy machine is no fault: pytest-timeout catches what hangs.
settings.register_profile(
    "fleecing", deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)
settings.load_profile("fleecing")

# A shell's job in the background has SIGINT ignored, and so would all that the tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)


LONGEST = (
    "systemd/test_machine.py",
    "scripts/soaking/test_minute.py",
    "test_readme.py",
    "fleecing/test_dying_disks.py",
    "guest/test_quiesce_guest.py",
    "guest/test_guest.py",
    "cli/test_chain_under_load.py",
    "cli/test_backup_kills.py",
    "server/test_machine.py",
    "fleecing/test_filling_temp.py",
    "cli/test_backup.py",
    "fuzz/test_talk.py",
    "control/test_logs.py",
)
"""The files that take longest, in tests/; they come first, or one process works on the last of them alone.

pytest-xdist puts those with the most tests first where it is not told to leave the order alone (scripts/test)."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    rank = {Path(__file__).parent / name: i for i, name in enumerate(LONGEST)}
    assert all(path.exists() for path in rank)
    items.sort(key=lambda item: rank.get(item.path, len(rank)))


@pytest.fixture
def children(tmp_path: Path) -> Iterator[Children]:
    """Starts real programs beside the test, with their output in tmp_path; ends and reaps them when the test ends."""
    with ExitStack() as stack:
        yield Children(tmp_path, stack)


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    """Starts the real server: `serve(image, *options)`, or `serve({"vda": image, "vdb": other})`.

    Its process is forked, for its time (tests/forking.py), unless `wrapper` or `forked` says otherwise.
    Each one ends with the test, which fails where one does not end well (see Server.stop).
    """
    with ExitStack() as stack:
        started = 0

        def start(
            images: Path | Mapping[str, Path],
            *options: str,
            wrapper: Sequence[str] = (),
            config: str = "",
            forked: bool = True,
        ) -> Server:
            nonlocal started
            started += 1
            folder = tmp_path / f"server{started}"
            server = Server(folder, images, *options, wrapper=wrapper, config=config, forked=forked and not wrapper)
            stack.callback(server.stop)
            return server

        yield start


@pytest.fixture(scope="session")
def libnbd() -> ModuleType:
    """libnbd's Python module, which can be told to send illegal requests (`set_strict_mode(0)`)."""
    return load_libnbd()
