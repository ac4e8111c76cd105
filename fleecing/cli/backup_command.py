"""`fleecing backup`: one command for cron and timers."""

from __future__ import annotations

from dataclasses import asdict

import click

from fleecing.cli.backup_run import Backup, BackupOptions, BackupResult
from fleecing.cli.chain_commands import COMPRESS
from fleecing.cli.control_client import ControlClient
from fleecing.cli.ending import undone_when_ended
from fleecing.cli.output import print_json
from fleecing.cli.params import FILLED, NAME, TEMP_LIMIT, control_option, json_option, tls_options
from fleecing.cli.pull_command import BANDWIDTH, RECONNECT, make_options
from fleecing.cli.pull_display import choose
from fleecing.pull.qcow2_codec import Compression
from fleecing.units import format_size

FELL_BACK = 3
"""Exit code: all is backed up, but in full where an increment was to be."""


@click.command(
    short_help="Back up disks, full or what changed.",
    epilog="""\b
Examples:
  fleecing backup vda /srv/backups
  fleecing backup vda vdb /srv/backups --keep 14
  fleecing restore /srv/backups/vda vda.img
""",
)
@click.argument("disks", metavar="DISK...", nargs=-1, required=True, type=NAME)
@click.argument("folder", metavar="DIR", type=FILLED)
@click.option("--full", is_flag=True, help="A full backup, whatever there is.")
@click.option("--keep", type=click.IntRange(1), help="Then prune: leave this many points of each disk.")
@click.option("--compress", type=COMPRESS, default="zstd", show_default=True, help="Clusters of the qcow2 files.")
@click.option("--bandwidth", type=BANDWIDTH, help="Most bytes a second, as in 50M.")
@click.option("--temp-limit", type=TEMP_LIMIT, help="Most temp space a disk, as in 20G.")
@click.option("--quiesce", is_flag=True, help="Freeze the guest around the instant, as the server is configured to.")
@tls_options
@control_option
@json_option
def backup(
    *,
    disks: tuple[str, ...],
    folder: str,
    full: bool,
    keep: int | None,
    compress: str,
    bandwidth: int | None,
    temp_limit: int | None,
    quiesce: bool,
    tls_certificates: str | None,
    tls_hostname: str | None,
    control: str,
    as_json: bool,
) -> None:
    """Back up DISKs, all at one instant, into DIR/DISK: what changed since the last time, else everything.

    The snapshot, its checkpoint and unfinished files are gone when it fails; what a killed run leaves is put in order
    by the next one. A checkpoint is given up only when the backup that follows it was read again and is right. Where
    another command works on DIR, its end is waited for.

    Exit code 0: done. 1: failed, and nothing was changed. 3: done, but in full, because what changed was not known,
    or the files that an increment stands on are gone; the reason is told.
    """
    repeated = sorted({disk for disk in disks if disks.count(disk) > 1})
    if repeated:
        raise click.UsageError(f"DISK '{repeated[0]}' is named twice.")
    options = BackupOptions(
        full=full,
        keep=keep,
        compression=Compression[compress.upper()],
        pull=make_options(bandwidth=bandwidth, reconnect=RECONNECT),
        snapshot={"temp_limit": temp_limit, "quiesce": quiesce},
        tls_certificates=tls_certificates,
        tls_hostname=tls_hostname,
    )
    display = choose(lambda: None)
    with undone_when_ended(), display:  # the snapshot is not left to grow until the next run
        results = Backup(ControlClient(control), folder, disks, options, lambda text: click.echo(text, err=True)).run(
            lambda disk, progress: display(progress)
        )
    if as_json:
        print_json([asdict(result) for result in results])
    else:
        for result in results:
            click.echo(_line(result))
    if not full and any(result.reason is not None for result in results):
        raise SystemExit(FELL_BACK)


def _line(result: BackupResult) -> str:
    kind = "full" if result.since is None else f"what changed since {result.since}"
    reason = "" if result.reason is None else f" ({result.reason})"
    return f"{result.disk}: {result.point}, {kind}{reason}, {format_size(result.data)} of data, {result.file}"
