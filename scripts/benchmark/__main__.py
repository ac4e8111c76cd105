"""./scripts/bench: ours and its peers side by side."""

from __future__ import annotations

import fnmatch
import json
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from datetime import UTC, datetime
from itertools import chain
from pathlib import Path

import click
from rich.console import Console
from rich.status import Status

from fleecing.units import GiB, MiB
from scripts.benchmark import chart, machine, micro, micro_stages, table
from scripts.benchmark.contenders.table import OURS
from scripts.benchmark.house import House, Settings
from scripts.benchmark.model import Row
from scripts.benchmark.process import BenchError, adopt_orphans
from scripts.benchmark.results import Result
from scripts.benchmark.rows import all_rows
from scripts.benchmark.runner import Runner

QUICK = Settings(size=GiB, seconds=0.4, repeats=3, touch=GiB, writes=6000)
MICRO = Settings(size=256 * MiB, seconds=0, repeats=1, touch=256 * MiB, writes=0)
FULL = Settings(size=2 * GiB, seconds=0.7, repeats=3, touch=6 * GiB, writes=12000)

QUICK_MINUTES, FULL_MINUTES = 3, 30
_LAST_WORDS = 8.0
"""Seconds kept for the end of the last row and the report."""

OUTPUT = Path(__file__).parents[2] / ".cache" / "bench"

_TOOLS = ("fio", "nbdcopy", "nbdinfo", "qemu-img", "setpriv")
_VERSIONS = (
    ["fio", "--version"],
    ["nbdcopy", "--version"],
    ["qemu-storage-daemon", "--version"],
    ["nbdkit", "--version"],
    ["nbd-server", "-V"],
)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("names", metavar="[ROW]...", nargs=-1)
@click.option(
    "--quick", is_flag=True, help=f"The rows that matter most, short samples: {QUICK_MINUTES} minutes at most."
)
@click.option(
    "--micro", "micro_only", is_flag=True, help="Ours alone: ns of CPU a request and a stage. Needs no quiet machine."
)
@click.option("--list", "list_rows", is_flag=True, help="List the rows, and measure nothing.")
@click.option("--repeats", type=click.IntRange(1, 99), help="Samples of each contender in each row; else 3.")
@click.option("--seconds", type=click.FloatRange(0.1, 60), help="Length of a sample; else 0.7, or 0.4 with --quick.")
@click.option("--minutes", type=click.FloatRange(min=0), help="Start no row that would end later; else 30 or 3.")
@click.option("--scratch", type=click.Path(path_type=Path), help="Folder for images and temp files; else the system's.")
@click.option(
    "--output", type=click.Path(path_type=Path, file_okay=False), default=OUTPUT, show_default=".cache/bench",
    help="Folder for the results: bench.json and bench.svg.",
)  # fmt: skip
def main(
    names: tuple[str, ...],
    *,
    quick: bool,
    list_rows: bool,
    micro_only: bool,
    repeats: int | None,
    seconds: float | None,
    minutes: float | None,
    scratch: Path | None,
    output: Path,
) -> None:
    """Measure Fleecing and the peers that are installed: interleaved, on the same image, with medians and ratios.

    ROW is the name of a row or a pattern, as in 'rr-*' or '*-tcp'. Exit code 0: it ran, whether or not the goals
    were met; 1: ours failed in a row, or nothing could be measured.
    """
    base = QUICK if quick else FULL
    settings = Settings(base.size, seconds or base.seconds, repeats or base.repeats, base.touch, base.writes)
    console = Console(width=None if sys.stdout.isatty() else table.WIDTH)
    talk = Console(stderr=True)
    end = time.monotonic() + 60 * (minutes or (QUICK_MINUTES if quick else FULL_MINUTES)) - _LAST_WORDS
    try:
        check_tools()
        if micro_only:
            measure_micro(console, scratch, output)
            return
        with House(scratch or Path(tempfile.gettempdir()), settings) as house:
            rows = choose(all_rows(house), names, quick=quick)
            if list_rows:
                for row in rows:
                    console.print(f"{row.name:28} {row.title}", highlight=False, markup=False)
                return
            environment = machine.describe(_VERSIONS)
            results = measure(house, rows, end, talk)
            report(console, output, house, environment, results)
            if any(OURS in result.errors for result in results):
                raise BenchError("ours failed in a row")
    except BenchError as e:
        raise click.ClickException(str(e)) from None


def check_tools() -> None:
    """Raise BenchError where a load generator is missing. A missing peer is only left out."""
    if missing := [tool for tool in _TOOLS if shutil.which(tool) is None]:
        raise BenchError(f"missing: {', '.join(missing)}; on Debian: fio libnbd-bin qemu-utils util-linux")


def choose(rows: Sequence[Row], names: Sequence[str], *, quick: bool) -> list[Row]:
    """The rows named; without names all, or the quick ones. Raises BenchError where a name matches no row."""
    for name in names:
        if not any(fnmatch.fnmatchcase(row.name, name) for row in rows):
            raise BenchError(f"there is no row '{name}': --list names them all")
    if names:
        return [row for row in rows if any(fnmatch.fnmatchcase(row.name, name) for name in names)]
    return [row for row in rows if row.quick or not quick]


def measure(house: House, rows: Sequence[Row], end: float, talk: Console) -> list[Result]:
    """Take the samples, with a line of progress on a terminal."""
    adopt_orphans()
    for number in (signal.SIGTERM, signal.SIGHUP):  # as Ctrl-C: everything started is ended, the scratch folder goes
        signal.signal(number, signal.default_int_handler)
    with closing(machine.Spinners(house)) as spinners, talk.status("making the image") as status:
        return Runner(house, spinners, end, progress(talk, status)).run(rows)


def progress(talk: Console, status: Status) -> Callable[[str], None]:
    """Shows "ROW: what goes on": in the status line of a terminal, else a line when a row begins."""
    shown = ""

    def tell(text: str) -> None:
        nonlocal shown
        row = text.partition(":")[0]
        if talk.is_terminal:
            status.update(text)
        elif row != shown:
            talk.print(row, highlight=False)
        shown = row

    return tell


def measure_micro(console: Console, scratch: Path | None, output: Path) -> None:
    """The costs of a request, as lines that fit a commit message, and as JSON."""
    figures: dict[str, float] = {}
    with House(scratch or Path(tempfile.gettempdir()), MICRO) as house:
        for title, nanoseconds in chain(micro_stages.stages(house), micro.requests(house)):
            figures[title] = nanoseconds
            console.print(f"{title:56} {nanoseconds:10,.0f} ns", highlight=False)
    output.mkdir(parents=True, exist_ok=True)
    (output / "micro.json").write_text(json.dumps(figures, indent=1) + "\n")


def report(console: Console, output: Path, house: House, environment: dict[str, object], results: list[Result]) -> None:
    """The table, the JSON, the picture."""
    table.show(console, results)
    for note in house.notes:
        console.print(f"note: {note}", highlight=False)
    now = datetime.now(UTC)
    whole = {
        "date": now.isoformat(timespec="seconds"),
        "environment": environment,
        "settings": vars(house.settings),
        "notes": house.notes,
        "rows": [result.as_json() for result in results],
    }
    output.mkdir(parents=True, exist_ok=True)
    (output / "bench.json").write_text(json.dumps(whole, indent=1) + "\n")
    (output / "bench.svg").write_text(chart.svg(results, f"Fleecing: times better than each peer ({now:%Y-%m-%d})"))
    console.print(f"{output / 'bench.json'}\n{output / 'bench.svg'}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
