"""The command `fleecing`: its groups, and how every failure becomes one sentence and an exit code."""

from __future__ import annotations

from typing import Any

import click

import fleecing
from fleecing.cli.backup_command import backup
from fleecing.cli.chain_commands import points, prune, restore, verify
from fleecing.cli.checkpoint_commands import checkpoint
from fleecing.cli.control_commands import disk, snapshot
from fleecing.cli.demo import demo
from fleecing.cli.map_command import map_
from fleecing.cli.pull_command import pull_command
from fleecing.cli.push_commands import job, push
from fleecing.cli.serve import check_config, serve
from fleecing.cli.status_command import status
from fleecing.errors import FleecingError


class _Sentences(click.Group):
    """Says what failed in one sentence on stderr, with exit code 1; click itself ends misuse with 2."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise
        except FleecingError as e:
            raise click.ClickException(str(e)) from e
        except OSError as e:
            raise click.ClickException(f"{e.filename}: {e.strerror}" if e.filename else str(e)) from e


@click.group(
    cls=_Sentences,
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


for command in (serve, check_config, snapshot, checkpoint, disk, status, map_, demo):
    main.add_command(command)
main.add_command(pull_command)
for command in (push, job):
    main.add_command(command)
for command in (backup, points, verify, restore, prune):
    main.add_command(command)
