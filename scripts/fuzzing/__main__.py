"""./scripts/fuzz: see run.py for how a target is shot at."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from random import SystemRandom

import click

from scripts.fuzzing.run import Hit, fire, replay, scratch
from scripts.fuzzing.targets import TARGETS


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--seconds", type=click.FloatRange(min=0), default=60.0, show_default=True, help="How long, all in all.")
@click.option("--seed", type=click.IntRange(min=0), help="Of everything that is random; printed, and else a new one.")
@click.option("--target", "names", type=click.Choice(list(TARGETS)), multiple=True, help="Else all; may be repeated.")
@click.option(
    "--keep", type=click.Path(path_type=Path, file_okay=False), default=".", help="Folder for inputs that hit."
)
@click.argument("inputs", nargs=-1, type=click.Path(path_type=Path, dir_okay=False, exists=True))
def main(*, seconds: float, seed: int | None, names: tuple[str, ...], keep: Path, inputs: tuple[Path, ...]) -> None:
    """Shoot nonsense and damage at everything that takes bytes from outside, or shoot the INPUTS that were kept.

    A hit is an error that nobody expected (a traceback in a log counts), memory or time without bound, somebody else
    who is not served on, and above all: data that is wrong and does not say so. Hits are made small and kept as files;
    the exit code is 1 then.
    """
    if inputs:
        hits = [hit for path in inputs if (hit := replay(path, _tell)) is not None]
        raise SystemExit(1 if hits else 0)
    if seed is None:
        seed = SystemRandom().randrange(1 << 32)
    chosen = list(names) or list(TARGETS)
    _tell(f"--seed {seed}, {seconds:g} s for {', '.join(chosen)}")
    found: list[Hit] = []
    begin = time.monotonic()
    for number, name in enumerate(chosen):
        left = begin + seconds - time.monotonic()
        with scratch() as folder:
            hit = fire(name, Path(folder), seed, left / (len(chosen) - number), keep, _tell)
        if hit is not None:
            found.append(hit)
    if found:
        _tell(f"{len(found)} of {len(chosen)} targets were hit; --seed {seed}")
        raise SystemExit(1)
    _tell("nothing was hit")


def _tell(line: str) -> None:
    sys.stderr.write(f"{time.strftime('%H:%M:%S')} {line}\n")
    sys.stderr.flush()


if __name__ == "__main__":
    main(prog_name="fuzz")
