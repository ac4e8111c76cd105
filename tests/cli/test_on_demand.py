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


def test_every_command_is_where_the_table_says() -> None:
    context = click.Context(main)
    for word in main.list_commands(context):
        command = main.get_command(context, word)
        assert command is not None and command.name == word
