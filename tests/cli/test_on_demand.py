"""What a command does not need it does not import: a small pull would wait for it longer than for its data."""

from __future__ import annotations

import sys

import click

from fleecing.cli.main import main
from tests.peers import run

_NAMED = """
import sys, click
from fleecing.cli.main import main
assert main.get_command(click.Context(main), "pull") is not None
print(*sorted({name.partition(".")[0] for name in sys.modules} | {name for name in sys.modules if "fleecing" in name}))
"""


def test_a_pull_imports_no_server() -> None:
    imported = set(run(sys.executable, "-c", _NAMED).split())
    assert "fleecing.pull.engine" in imported
    for costly in (
        "aiohttp",
        "pydantic",
        "prometheus_client",
        "rich",
        "uvloop",
        "asyncio",
        "http",
        "fleecing.control.daemon",
    ):
        assert costly not in imported
    assert not any(name.startswith("fleecing.server") for name in imported)


_COLLECTED = """
import gc, click
from fleecing.cli.main import main
before = gc.get_stats()
main.get_command(click.Context(main), "serve")
print(gc.isenabled(), [now["collections"] - then["collections"] for then, now in zip(before, gc.get_stats())])
print(gc.get_freeze_count() > 10000)
"""


def test_modules_are_no_garbage_to_be_looked_for() -> None:
    """With collections, `serve` imported for 88 ms longer."""
    assert run(sys.executable, "-c", _COLLECTED).split("\n") == ["True [0, 0, 0]", "True", ""]


def test_every_command_is_where_the_table_says() -> None:
    context = click.Context(main)
    for word in main.list_commands(context):
        command = main.get_command(context, word)
        assert command is not None and command.name == word
