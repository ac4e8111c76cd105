"""`fleecing pull`: copy a snapshot, or any NBD export, into a file, a device, another export or a pipe."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from typing import Any

import click

from fleecing.cli import pull_display
from fleecing.cli.chain_pull import SnapshotFacts, add_point, pull_point
from fleecing.cli.on_demand import load
from fleecing.cli.params import FILLED, Checked, choose_uri, control_option, tls_options
from fleecing.cli.pull_display import JsonLines
from fleecing.control.names import snapshot_path, split_export
from fleecing.errors import ControlError, FleecingError, sentence
from fleecing.nbd.uri import NbdUri
from fleecing.pull.chain import new_chain
from fleecing.pull.destination import Destination, Format
from fleecing.pull.engine import pull
from fleecing.pull.limiter import Bandwidth
from fleecing.pull.options import CONNECTIONS, DEPTH, MOST_CONNECTIONS, MOST_DEPTH, Check, PullOptions, PullReport, Trim
from fleecing.pull.qcow2_codec import Compression
from fleecing.units import format_size, parse_size

RECONNECT = 30.0
"""Seconds; about what a restart of the server takes, with room."""


def _rate(text: str) -> int:
    size = parse_size(text)
    if not size:
        raise ValueError("a bandwidth of 0 would never come to an end")
    return size


BANDWIDTH = Checked("SIZE", _rate)
NEW_BANDWIDTH = Checked("SIZE|none", lambda text: 0 if text == "none" else _rate(text))


@click.command(
    "pull",
    short_help="Copy a snapshot, or any NBD export.",
    epilog="""\b
Examples:
  fleecing pull vda@monday vda.qcow2
  fleecing pull nbd://host/vda@monday vda.img --bandwidth 50M
  fleecing pull vda@monday vda.img --resume          after a run that was cut off
  fleecing pull vda@monday - | restic backup --stdin --stdin-filename vda.img
  fleecing pull vda@monday nbd+unix:///?socket=/tmp/other.sock
""",
)
@click.argument("source", metavar="URI|DISK@SNAPSHOT")
@click.argument("target", metavar="TARGET", type=FILLED)
@click.option(
    "--format", "form", type=click.Choice([f.value for f in Format]), help="Of a new file; else by its ending."
)
@click.option(
    "--compress",
    type=click.Choice(["none", "deflate", "zstd"]),
    default="none",
    show_default=True,
    help="Clusters of a qcow2 file.",
)
@click.option("--no-trim", is_flag=True, help="Do not trim the snapshot behind the read head.")
@click.option("--resume", is_flag=True, help="Go on where a run that was cut off ended; start where there was none.")
@click.option("--existing", is_flag=True, help="Write over TARGET, a file that is there.")
@click.option("--journal", metavar="FILE", help="Where a run can be resumed from; else TARGET.journal for a new file.")
@click.option("--bitmap", metavar="NAME", help="Copy what this dirty bitmap of the export says; else its only one.")
@click.option("--no-bitmap", is_flag=True, help="Copy everything, whatever dirty bitmap the export has.")
@click.option(
    "--connections",
    type=click.IntRange(1, 64),
    help=f"To the server; else one a CPU, up to 4; for other than snapshots up to {MOST_CONNECTIONS} as they help.",
)
@click.option(
    "--depth",
    type=click.IntRange(1, 64),
    help=f"Requests a connection; else {DEPTH}, and up to {MOST_DEPTH} where that is seen to help.",
)
@click.option("--bandwidth", type=BANDWIDTH, help="Most bytes a second, as in 50M.")
@click.option(
    "--reconnect",
    type=click.FloatRange(0, 86400),
    default=RECONNECT,
    show_default=True,
    metavar="SECONDS",
    help="How long a lost connection is tried again; 0 = a loss is a failure.",
)
@click.option("--no-check", is_flag=True, help="Keep no checksums for a later --resume.")
@click.option("--no-sync", is_flag=True, help="Do not wait for TARGET's disk: a loss of power may cost the copy.")
@click.option("--chain", is_flag=True, help="TARGET is a folder of backups; add the snapshot to it.")
@click.option("--json", "as_json", is_flag=True, help="Tell progress and the end as lines of JSON.")
@tls_options
@control_option
def pull_command(*, source: str, target: str, form: str | None, control: str, **options: Any) -> None:
    """Copy a snapshot (DISK@SNAPSHOT of the server at --control), or any export by its URI, to TARGET.

    TARGET is a new file (raw, or qcow2 where its name ends in .qcow2), a block device, the URI of another export, or -
    for stdout; with --chain the folder of backups. Only what is allocated is read, and where the export has a dirty
    bitmap, only what is dirty. What the target has is trimmed: the snapshot's temp space is free at once, and it can
    be read once only.

    A file is called TARGET.part until it is whole. A run that was killed or failed is continued with --resume.
    """
    if options["bitmap"] and options["no_bitmap"]:
        raise click.UsageError("--bitmap and --no-bitmap do not go together.")
    if options["chain"]:
        _check_chain_options(form, options)
        _pull_into_chain(source, target, control, options)
        return
    try:
        destination = Destination(
            target,
            format=_format(form, target, options["compress"]),
            compression=Compression[options["compress"].upper()],
            resume=options["resume"],
            existing=options["existing"],
            journal_path=options["journal"],
            waits=not options["no_sync"],
        )
    except ValueError as e:
        raise click.BadParameter(str(e), param_hint="TARGET") from None
    if destination.format is Format.QCOW2 and not destination.is_new_file:
        raise click.UsageError("The format qcow2 is for new files; this TARGET is written over as it is.")
    stream = sys.stderr if destination.is_stream else sys.stdout
    uri, temp = resolve(source, control, options)
    lines = JsonLines(stream, temp) if options["as_json"] else None
    display = lines or pull_display.choose(temp)
    _tell(lines, target, lambda: _run(uri, destination, make_options(**options), display))


def _tell(lines: JsonLines | None, target: str, run: Callable[[], PullReport | None]) -> None:
    """Run, and say how it ended."""
    try:
        report = run()
    except (FleecingError, OSError) as e:
        if lines is not None:
            lines.event("failed", error=sentence(e))
        raise
    if lines is not None:
        lines.event("done", target=target, **(dataclasses.asdict(report) if report else {}))
    else:
        click.echo(summary(report, target), err=True)


def _check_chain_options(form: str | None, options: dict[str, Any]) -> None:
    for name in ("existing", "journal", "bitmap", "no_bitmap", "no_check", "no_sync"):
        if options[name]:
            raise click.UsageError(f"--{name.replace('_', '-')} does not go with --chain.")
    if form == "raw":
        raise click.UsageError("--format raw does not go with --chain: its files are qcow2.")


def _pull_into_chain(source: str, folder: str, control: str, options: dict[str, Any]) -> None:
    uri, temp = resolve(source, control, options)
    facts = _facts(source, uri, control)
    lines = JsonLines(sys.stdout, temp) if options["as_json"] else None
    display = lines or pull_display.choose(temp)
    compression = Compression[options["compress"].upper()]

    def run() -> PullReport | None:
        with new_chain(folder) as chain:
            try:
                with display:
                    report = pull_point(
                        chain,
                        uri,
                        facts,
                        make_options(**options),
                        display,
                        compression=compression,
                        resume=options["resume"],
                    )
            except BaseException:
                if chain.is_begun(facts.name):
                    click.echo(f"What there is of {facts.name} is kept; --resume goes on from there.", err=True)
                raise
            add_point(chain, facts, report.size if report is not None else chain.size_of(facts.name))
        return report

    _tell(lines, folder, run)


def _facts(source: str, uri: NbdUri, control: str) -> SnapshotFacts:
    """What the server at the control socket tells of the snapshot; asked for by its URI, it may be another's."""
    try:
        which = split_export(source if "://" not in source else uri.export)
        return SnapshotFacts.of(_ask(control, "GET", snapshot_path(which)))
    except (ControlError, ValueError):
        if "://" not in source:
            raise
        return SnapshotFacts.unknown(uri.export)


def make_options(
    *,
    no_trim: bool = False,
    bitmap: str | None = None,
    no_bitmap: bool = False,
    connections: int | None = None,
    depth: int | None = None,
    bandwidth: int | None = None,
    reconnect: float = RECONNECT,
    no_check: bool = False,
    **_: Any,
) -> PullOptions:
    """The engine's options from those of the command line."""
    return PullOptions(
        connections=connections or CONNECTIONS,
        depth=depth or DEPTH,
        most_connections=0 if connections else MOST_CONNECTIONS,
        most_depth=0 if depth else MOST_DEPTH,
        trim=Trim.NEVER if no_trim else Trim.SNAPSHOT,
        reconnect=reconnect,
        bandwidth=None if bandwidth is None else Bandwidth(bandwidth),
        bitmap="" if no_bitmap else bitmap,
        check=Check.NONE if no_check else Check.CRC32,
    )


def resolve(source: str, control: str, options: dict[str, Any]) -> tuple[NbdUri, pull_display.TempCall]:
    """The URI of the source, and how to learn what temp space it takes. Raises ControlError and click's errors."""
    tls = options["tls_certificates"], options["tls_hostname"]
    if "://" in source:
        try:
            uri = NbdUri.parse(source)
        except ValueError as e:
            raise click.BadParameter(str(e), param_hint="URI") from None
        if any(tls) and not uri.tls:
            raise click.UsageError("--tls-certificates and --tls-hostname go with a URI of nbds.")
        return uri.with_tls(*tls), _temp_call(control, uri.export)
    try:
        which = split_export(source)
    except ValueError as e:
        raise click.BadParameter(str(e), param_hint="URI|DISK@SNAPSHOT") from None
    info = _ask(control, "GET", snapshot_path(which))
    return choose_uri(info["uris"], *tls), _temp_call(control, source)


def _ask(control: str, method: str, path: str, **options: Any) -> Any:
    """Of the server at the control socket, if there is anything to ask: an HTTP client takes long to import."""
    return load("control_client:ControlClient")(control, **options).request(method, path)


def _temp_call(control: str, export: str) -> pull_display.TempCall:
    """Asks the server at the control socket, until it does not know the snapshot."""
    try:
        path = snapshot_path(split_export(export))
    except ValueError:
        path = ""

    def temp() -> int | None:
        nonlocal path
        try:
            return int(_ask(control, "GET", path, timeout=5)["temp"]["used"]) if path else None
        except ControlError:
            path = ""
            return None

    return temp


def _format(form: str | None, target: str, compress: str) -> Format:
    found = Format(form) if form else Format.QCOW2 if target.endswith(".qcow2") and "://" not in target else Format.RAW
    if compress != "none" and found is not Format.QCOW2:
        raise click.UsageError("--compress goes with the format qcow2.")
    return found


def _run(
    uri: NbdUri, destination: Destination, options: PullOptions, display: pull_display.Display
) -> PullReport | None:
    """None where an earlier run had done everything."""
    if (earlier := destination.finished(uri)) is not None:
        earlier.remove(durably=destination.waits)
        return None
    journal = destination.prepare()
    try:
        with display:
            report = pull(uri, destination.open, options, journal=journal, progress=display)
        if journal is not None:
            journal.remove(durably=destination.waits)
    except BaseException:
        if journal is not None:
            journal.close()
        if journal is not None and journal.was_lost:
            what = "All" if not journal.is_of_use else "Some"
            click.echo(f"{what} of {destination.name} is lost: its disk did not take what was written.", err=True)
        if journal is not None and journal.is_of_use:
            click.echo(f"What there is of {destination.name} is kept; --resume goes on from there.", err=True)
        elif (told := destination.give_up()) is not None:
            click.echo(told, err=True)
        raise
    return report


def summary(report: PullReport | None, target: str) -> str:
    """What was done, for people."""
    if report is None:
        return f"{target} was finished by the earlier run."
    parts = [f"Pulled {format_size(report.data)} of data in {report.seconds:.1f} s, {pull_display.rate(report.rate)}"]
    for count, what in (
        (report.zeroes, "of zeroes"),
        (report.clean, f"not changed since {report.bitmap}"),
        (report.resumed, "by the earlier run"),
        (report.trimmed, "trimmed"),
    ):
        if count:
            parts.append(f"{format_size(count)} {what}")
    if report.reconnects:
        parts.append(f"connected again {report.reconnects} times")
    return "; ".join(parts)
