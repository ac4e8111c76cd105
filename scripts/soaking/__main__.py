"""./scripts/soak: see story.py for what it does."""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from pathlib import Path
from random import SystemRandom

import click

from fleecing.units import format_size
from scripts.soaking.story import Story


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--minutes", type=click.FloatRange(min=0), default=1.0, show_default=True, help="How long.")
@click.option("--every", type=click.FloatRange(0, 3600), default=3.0, show_default=True, metavar="SECONDS",
              help="How long the guests have for themselves between two backups, at most.")  # fmt: skip
@click.option("--seed", type=click.IntRange(min=0), help="Of everything that is random; printed, and else a new one.")
@click.option(
    "--scratch", type=click.Path(path_type=Path, file_okay=False), help="Folder for the files; else a new one."
)
def main(*, minutes: float, every: float, seed: int | None, scratch: Path | None) -> None:
    """Keep a real server busy; compare every backup with a model, and its resources with those of the start.

    Guests write to two disks all the time. In rounds, both are frozen with a checkpoint, what changed is pulled and
    trimmed, and the backup is compared sector by sector. The server is stopped and killed in between. At the end of
    each round memory, file descriptors, threads and temp space must be back at the level of the process's first
    rounds. Exits with 1 where anything is wrong; the files are kept then.
    """
    if seed is None:
        seed = SystemRandom().randrange(1 << 32)
    folder = Path(tempfile.mkdtemp(prefix="soak-", dir=scratch))  # short: sockets are in it
    begin = time.monotonic()
    _tell(f"--seed {seed}, in {folder}")
    story = Story(folder, seed, every, _tell)
    try:
        story.run(minutes * 60)
    except (Exception, KeyboardInterrupt) as e:
        _tell(f"FAILED in round {story.rounds}, --seed {seed}: {type(e).__name__}: {e}")
        _tell(f"The files are in {folder}, and the server's log beside its sockets")
        raise SystemExit(1) from e
    finally:
        story.close()
    changes = sum(guest.changes for guest in story.guests)
    _tell(
        f"{time.monotonic() - begin:.0f} s, {story.rounds} rounds, {changes:,} guest changes, "
        f"{format_size(story.pulled)} of backups compared, {story.stops} stops and {story.kills} kills: all data right"
    )
    _tell(f"resources compared {story.compared} times, most memory at a rest: {story.worst}")
    shutil.rmtree(folder)


def _tell(line: str) -> None:
    sys.stderr.write(f"{time.strftime('%H:%M:%S')} {line}\n")
    sys.stderr.flush()


if __name__ == "__main__":
    main(prog_name="soak")
