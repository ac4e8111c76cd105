"""The command `fleecing`: its groups, and how every failure becomes one sentence and an exit code."""

from __future__ import annotations

import os
import sys
from typing import Any, Final

import click

import fleecing
from fleecing.cli.on_demand import load
from fleecing.errors import FleecingError, sentence

_COMMANDS: Final = {
    "backup": "backup_command:backup",
    "check-config": "serve:check_config",
    "checkpoint": "checkpoint_commands:checkpoint",
    "demo": "demo:demo",
    "disk": "control_commands:disk",
    "events": "watch_commands:events",
    "job": "push_commands:job",
    "log": "watch_commands:log",
    "map": "map_command:map_",
    "points": "chain_commands:points",
    "prune": "chain_commands:prune",
    "pull": "pull_command:pull_command",
    "push": "push_commands:push",
    "restore": "chain_commands:restore",
    "serve": "serve:serve",
    "snapshot": "control_commands:snapshot",
    "status": "status_command:status",
    "verify": "chain_commands:verify",
}
"""Word: where its command is, see `load`."""


def _open_standard_files() -> None:
    """Where the caller has closed one, the next socket would get its number, and what is said would go there.

    Nothing can be written to what takes its place: a disk on its way to standard output is not to vanish.
    """
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDONLY)  # the lowest number that is free: this one
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC), "r+"))


class _Commands(click.Group):
    """The commands, each imported when it is named.

    Says what failed in one sentence on stderr, with exit code 1; click itself ends misuse with 2.
    """

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        command: click.Command | None = load(_COMMANDS[cmd_name]) if cmd_name in _COMMANDS else None
        return command

    def invoke(self, ctx: click.Context) -> Any:
        _open_standard_files()
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise
        except FleecingError as e:
            raise click.ClickException(str(e)) from e
        except OSError as e:
            raise click.ClickException(sentence(e)) from e


@click.group(
    cls=_Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="""\b
A first tour:
  truncate -s 1G vda.img
  fleecing serve vda.img                            in one shell, goes on running
  uri=$(fleecing snapshot create vda --name now)    in another one
  nbdcopy "$uri" backup.img
  fleecing status
  fleecing snapshot delete vda@now

Every command explains itself: fleecing COMMAND --help
""",
)
@click.version_option(fleecing.__version__, prog_name="fleecing")
def main() -> None:
    """Instant, frozen views of disks that go on being written, over NBD.

    `serve` stands between a machine and its disk image. `snapshot create` freezes one or several disks at an instant
    and prints where a backup tool reads them, while the machine goes on writing.
    """
