"""`fleecing verify`, `restore`, `prune` and `points`: what can be done with a folder of backups."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from fleecing.cli.ending import undone_when_ended
from fleecing.cli.output import local_time, print_json, table
from fleecing.cli.params import FILLED
from fleecing.errors import FleecingError, sentence
from fleecing.pull.chain import Chain, chains_in, open_chain, orphans_in
from fleecing.pull.chain_read import ProgressCall
from fleecing.pull.chain_read import restore as restore_chain
from fleecing.pull.chain_read import verify as verify_point
from fleecing.pull.destination import Destination, Format
from fleecing.pull.prune import prune as prune_chain
from fleecing.pull.qcow2_codec import Compression
from fleecing.units import format_size

COMPRESS = click.Choice(["none", "deflate", "zstd"])


@contextmanager
def progress_bar(what: str, total: int) -> Iterator[ProgressCall]:
    """A bar where stderr is a terminal; nothing otherwise."""
    if not sys.stderr.isatty():
        yield lambda count: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True), TimeRemainingColumn())
    with Bar(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(what, total=total)
        yield lambda count: bar.update(task, advance=count)


@click.command(epilog="\b\nExample:\n  fleecing points backups/vda\n")
@click.argument("folder", metavar="DIR")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead.")
def points(*, folder: str, as_json: bool) -> None:
    """List the points in time that a folder of backups can restore, the oldest first."""
    found: list[dict[str, Any]] = []
    for name in chains_in(folder):
        with open_chain(name) as chain:
            found += [_facts(chain, index) for index in range(len(chain.points))]
    if as_json:
        print_json(found)
        return
    heads = ("POINT", "CREATED", "KIND", "DISK", "DATA", "FILE", "PATH")
    rows = [
        (
            point["name"],
            local_time(point["created"]),
            point["kind"],
            format_size(point["size"]),
            format_size(point["data"]),
            "missing" if point["file_bytes"] is None else format_size(point["file_bytes"]),
            point["path"],
        )
        for point in found
    ]
    click.echo(table(heads, rows))


def _facts(chain: Chain, index: int) -> dict[str, Any]:
    point = chain.points[index]
    path = chain.path(point.file)
    return {
        "name": point.name,
        "checkpoint": point.checkpoint,
        "since": point.since,
        "created": point.created,
        "kind": "full" if point.backing is None else "incremental",
        "size": point.size,
        "data": point.data,
        "file_bytes": path.stat().st_size if path.exists() else None,
        "path": str(path),
    }


@click.command(epilog="\b\nExample:\n  fleecing verify backups/\n")
@click.argument("folder", metavar="DIR")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead.")
def verify(*, folder: str, as_json: bool) -> None:
    """Read all backups in DIR (one disk's folder, or that of `fleecing backup`) and compare them with their checksums.

    Every point is looked at, whatever is wrong with another one. Exit code 1 when anything is.
    """
    results: list[dict[str, Any]] = []
    for name in chains_in(folder):
        results += _verify(name)
    results += [_result(name, "has backups, but no manifest.json to say what they are") for name in orphans_in(folder)]
    if as_json:
        print_json(results)
    else:
        for result in results:
            click.echo(f"{result['path']}: {result['problem'] or 'ok'}")
    bad = sum(result["problem"] is not None for result in results)
    if not results:
        raise click.ClickException(f"{folder} holds no backup yet")
    if bad:
        raise click.ClickException(f"{bad} of {len(results)} points are damaged; those that stand on them are, too")


def _verify(name: str) -> list[dict[str, Any]]:
    try:
        with open_chain(name) as chain:
            return [_verified(chain, index) for index in range(len(chain.points))]
    except (FleecingError, OSError) as e:
        return [_result(name, sentence(e))]


def _result(path: str, problem: str) -> dict[str, Any]:
    """What is said of a folder as a whole."""
    return {"name": None, "path": path, "data": None, "problem": problem}


def _verified(chain: Chain, index: int) -> dict[str, Any]:
    point = chain.points[index]
    problem: str | None = None
    try:
        with progress_bar(point.name, point.size) as progress:
            verify_point(chain, index, progress)
    except (FleecingError, OSError) as e:
        problem = sentence(e)
    return {"name": point.name, "path": str(chain.path(point.file)), "data": point.data, "problem": problem}


@click.command(
    epilog="""\b
Examples:
  fleecing restore backups/vda vda.img
  fleecing restore backups/vda --at 20261123-063000 /dev/vg0/vda
  fleecing restore backups/vda nbd+unix:///vda?socket=/run/fleecing/nbd.sock
"""
)
@click.argument("folder", metavar="DIR")
@click.argument("target", metavar="TARGET", type=FILLED)
@click.option("--at", metavar="POINT", help="A point or checkpoint; else the last one.")
@click.option(
    "--format", "form", type=click.Choice([f.value for f in Format]), help="Of a new file; else by its ending."
)
@click.option("--compress", type=COMPRESS, default="none", show_default=True, help="Clusters of a qcow2 file.")
@click.option("--existing", is_flag=True, help="Write over TARGET, a file that is there.")
def restore(*, folder: str, target: str, at: str | None, form: str | None, compress: str, existing: bool) -> None:
    """Write the disk as it was at a point in time to TARGET, and compare every byte with its checksum on the way.

    TARGET is a new file (raw, or qcow2 where its name ends in .qcow2), a block device, the URI of an NBD export, or -
    for stdout. A file is called TARGET.part until it is whole.
    """
    found = Format(form) if form else Format.QCOW2 if target.endswith(".qcow2") and "://" not in target else Format.RAW
    try:
        destination = Destination(target, format=found, compression=Compression[compress.upper()], existing=existing)
    except ValueError as e:
        raise click.BadParameter(str(e), param_hint="TARGET") from None
    if found is Format.QCOW2 and not destination.is_new_file:
        raise click.UsageError("The format qcow2 is for new files; this TARGET is written over as it is.")
    if compress != "none" and found is not Format.QCOW2:
        raise click.UsageError("--compress goes with the format qcow2.")
    with undone_when_ended(), open_chain(folder) as chain:
        index = chain.find(at)
        point = chain.points[index]
        destination.prepare()
        try:
            with progress_bar("Restoring", point.size) as progress:
                restore_chain(chain, index, destination.open(point.size), progress)
        except BaseException:
            if (told := destination.give_up()) is not None:
                click.echo(told, err=True)
            raise
    click.echo(f"Restored {point.name}, {format_size(point.size)}, to {target}", err=True)


@click.command(epilog="\b\nExample:\n  fleecing prune backups/vda --keep 14\n")
@click.argument("folder", metavar="DIR")
@click.option("--keep", type=click.IntRange(1), required=True, help="How many points stay, the last ones.")
@click.option("--compress", type=COMPRESS, default="zstd", show_default=True, help="Clusters of the merged file.")
def prune(*, folder: str, keep: int, compress: str) -> None:
    """Remove the oldest points of each disk in DIR; what the others stand on is merged into the oldest one that stays.

    The merged file takes its space before the old ones are removed. Killed at any moment, DIR restores every point
    that it lists.
    """
    for name in chains_in(folder):
        with open_chain(name, writing=True) as chain:
            total = chain.points[-1].size if chain.points else 0
            with progress_bar("Merging", total) as progress:
                gone = prune_chain(chain, keep, progress, compression=Compression[compress.upper()])
            click.echo(f"{name}: {len(gone)} points removed, {len(chain.points)} left", err=True)
