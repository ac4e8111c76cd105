"""The commands that talk to a running server: snapshot, disk, map."""

from __future__ import annotations

import math
from typing import Any

import click

from fleecing.block.copy_before_write import OnCbwError
from fleecing.cli.control_client import ControlClient
from fleecing.cli.output import fields, format_seconds, local_time, print_json, table
from fleecing.cli.params import EXPORT, GRACE, NAME, NEW_LIMIT, TEMP_LIMIT, control_option, json_option
from fleecing.control.models import DEFAULT_CBW_TIMEOUT, DEFAULT_READ_ONCE_GRACE
from fleecing.control.names import snapshot_path
from fleecing.errors import ControlError
from fleecing.units import format_size


@click.group()
def snapshot() -> None:
    """Make, look at and delete snapshots: frozen views of disks that go on being written."""


@snapshot.command(
    epilog="""\b
Examples:
  fleecing snapshot create vda
  fleecing snapshot create vda vdb --name monday --temp-limit 20G
  fleecing snapshot create vda --checkpoint tuesday --since monday --or-full
  qemu-img convert -f raw -O qcow2 "$(fleecing snapshot create vda --read-once)" vda.qcow2
"""
)
@click.argument("disks", metavar="DISK...", nargs=-1, required=True, type=NAME)
@click.option("--name", type=NAME, help="Name of the snapshot; else the time in UTC, as in 20261123-063000.")
@click.option("--temp-limit", type=TEMP_LIMIT, help="Most temp space a disk, as in 20G; reaching it is a copy error.")
@click.option(
    "--on-cbw-error",
    type=click.Choice([policy.value for policy in OnCbwError]),
    default=OnCbwError.BREAK_SNAPSHOT.value,
    show_default=True,
    help="What to give up when old contents cannot be saved: the snapshot, or the guest's write.",
)
@click.option(
    "--cbw-timeout",
    type=click.FloatRange(0, 86400),
    default=DEFAULT_CBW_TIMEOUT,
    show_default=True,
    metavar="SECONDS",
    help="How long a guest write may wait for its copy; longer is a copy error. 0 = no limit.",
)
@click.option(
    "--durable", is_flag=True, help="Outlive the loss of power, too; a guest write that copies waits for the disk."
)
@click.option("--quiesce", is_flag=True, help="Freeze the guest around the instant, as the server is configured to.")
@click.option(
    "--checkpoint", type=NAME, help="Make this checkpoint, too: what changes from this instant on is tracked."
)
@click.option("--since", type=NAME, metavar="CHECKPOINT", help="Incremental: only what changed since this checkpoint.")
@click.option("--or-full", is_flag=True, help="With --since: a full snapshot where the changes are not known.")
@click.option(
    "--bitmap",
    type=NAME,
    metavar="CHECKPOINT",
    help="Full, with what changed since this checkpoint as a dirty bitmap.",
)
@click.option("--bitmap-name", type=NAME, help="Name of the dirty bitmap; else that of the checkpoint it begins with.")
@click.option(
    "--read-once", is_flag=True, help="Trim by itself what was read, for clients that send no TRIM (qemu-img, nbdcopy)."
)
@click.option(
    "--read-once-grace",
    type=GRACE,
    help=f"What was read last and can be read again; else {format_size(DEFAULT_READ_ONCE_GRACE)}.",
)
@click.option("--tcp", is_flag=True, help="Print URIs over TCP, where the server has a Unix socket, too.")
@control_option
@json_option
def create(
    *,
    disks: tuple[str, ...],
    name: str | None,
    temp_limit: int | None,
    on_cbw_error: str,
    cbw_timeout: float,
    durable: bool,
    quiesce: bool,
    checkpoint: str | None,
    since: str | None,
    or_full: bool,
    bitmap: str | None,
    bitmap_name: str | None,
    read_once: bool,
    read_once_grace: int | None,
    tcp: bool,
    control: str,
    as_json: bool,
) -> None:
    """Freeze one or several DISKs, all at the same instant, and print one NBD URI for each.

    Give the URI to any NBD client, read it, and send TRIM for what was read: that frees its temp space at once. The
    URIs are the only output on stdout; they are those over a Unix socket where the server has one. --json prints all
    there is to know, with the URIs of every listener.

    An incremental snapshot (--since) shows what changed and nothing else, and has one dirty bitmap that says where.
    With --or-full, a disk whose changes are not known gets a full one; which and why is told on stderr.

    A snapshot with --read-once is for one reader, which may read everything once, over any number of connections, and
    what it read last (--read-once-grace) again when its connection broke. A second reader would find nothing.
    """
    if not math.isfinite(cbw_timeout):
        raise click.BadParameter(f"{cbw_timeout} is no number of seconds", param_hint="--cbw-timeout")
    repeated = sorted({disk for disk in disks if disks.count(disk) > 1})
    if repeated:
        raise click.UsageError(f"DISK '{repeated[0]}' is named twice.")
    if since is not None and bitmap is not None:
        raise click.UsageError(
            "--since and --bitmap do not go together: an incremental snapshot has its bitmap anyway."
        )
    if or_full and since is None:
        raise click.UsageError("--or-full goes with --since only.")
    if bitmap_name is not None and since is None and bitmap is None:
        raise click.UsageError("--bitmap-name goes with --since or --bitmap only.")
    if read_once_grace is not None and not read_once:
        raise click.UsageError("--read-once-grace goes with --read-once only.")
    body = {
        "disks": disks,
        "name": name,
        "temp_limit": temp_limit,
        "on_cbw_error": on_cbw_error,
        "cbw_timeout": cbw_timeout,
        "durable": durable,
        "quiesce": quiesce,
        "checkpoint": checkpoint,
        "since": since,
        "or_full": or_full,
        "bitmap": bitmap,
        "bitmap_name": bitmap_name,
        "read_once": read_once,
        "read_once_grace": read_once_grace,
    }
    client = ControlClient(control)
    if tcp and not any(map(_is_tcp, client.request("GET", "/v1/disks")["disks"][0]["uris"])):
        raise ControlError(409, "the server has no TCP listener: leave --tcp out, or serve with --listen HOST:PORT")
    answer = client.request("POST", "/v1/snapshots", body)
    if as_json:
        print_json(answer["snapshots"])
        return
    for made in answer["snapshots"]:
        if made["reason"] is not None:
            click.echo(f"{made['export']}: full, not incremental: {made['reason']}", err=True)
        click.echo(next(uri for uri in made["uris"] if _is_tcp(uri) or not tcp))


def _is_tcp(uri: str) -> bool:
    return uri.startswith("nbd://")


@snapshot.command("list")
@control_option
@json_option
def list_(*, control: str, as_json: bool) -> None:
    """List all snapshots, one line each."""
    snapshots = ControlClient(control).request("GET", "/v1/snapshots")["snapshots"]
    if as_json:
        print_json(snapshots)
    elif not snapshots:
        click.echo("There is no snapshot; `fleecing snapshot create DISK` makes one.", err=True)
    else:
        click.echo(snapshot_table(snapshots))


def snapshot_table(snapshots: list[dict[str, Any]]) -> str:
    """One line a snapshot; the reason of a broken one is in its last column."""
    heads = ("SNAPSHOT", "CREATED", "SIZE", "COPIED", "TRIMMED", "TEMP", "PEAK", "LIMIT", "CLIENTS", "STATE")
    rows = [
        (
            s["export"],
            local_time(s["created"]),
            format_size(s["size"]),
            format_size(s["clusters"]["copied"] * s["cluster_size"]),
            format_size(s["clusters"]["trimmed"] * s["cluster_size"]),
            format_size(s["temp"]["used"]),
            format_size(s["temp"]["peak"]),
            "none" if s["temp"]["limit"] is None else format_size(s["temp"]["limit"]),
            str(s["clients"]),
            f"broken: {s['broken']}" if s["state"] == "broken" else s["state"] + ", read once" * s["read_once"],
        )
        for s in snapshots
    ]
    return table(heads, rows)


@snapshot.command(epilog="\b\nExample:\n  fleecing snapshot show vda@monday\n")
@click.argument("which", metavar="DISK@SNAPSHOT", type=EXPORT)
@control_option
@json_option
def show(*, which: tuple[str, str], control: str, as_json: bool) -> None:
    """Show one snapshot: its URIs, clusters and temp space, and why it broke if it did."""
    s = ControlClient(control).request("GET", snapshot_path(which))
    if as_json:
        print_json(s)
        return
    counts, size, temp = s["clusters"], s["cluster_size"], s["temp"]
    pairs = [
        ("snapshot", s["export"]),
        ("state", s["state"]),
        *([("broken", s["broken"])] if s["state"] == "broken" else []),
        ("created", local_time(s["created"])),
        ("mode", s["mode"] if s["since"] is None else f"incremental, changes since {s['since']}"),
        *([("reason", s["reason"])] if s["reason"] is not None else []),
        *([("checkpoint", s["checkpoint"])] if s["checkpoint"] is not None else []),
        *([("dirty bitmap", s["bitmap"])] if s["bitmap"] is not None else []),
        ("size", f"{format_size(s['size'])} in clusters of {format_size(size)}"),
        *((state.replace("_", " "), f"{n} clusters, {format_size(n * size)}") for state, n in counts.items()),
        ("copied ever", f"{s['copied_total']} clusters"),
        ("temp file", temp["path"]),
        ("temp used", f"{format_size(temp['used'])}, at most {format_size(temp['peak'])} so far"),
        ("temp limit", "none" if temp["limit"] is None else format_size(temp["limit"])),
        ("on-cbw-error", s["on_cbw_error"]),
        ("durable", "yes" if s["durable"] else "no"),
        ("quiesced", "yes" if s["quiesced"] else "no"),
        ("read once", f"yes, grace {format_size(s['read_once_grace'])}" if s["read_once"] else "no"),
        ("cbw-timeout", f"{s['cbw_timeout']:g} s" if s["cbw_timeout"] else "none"),
        ("clients", str(s["clients"])),
        ("guest latency", _latency(s["guest_latency"])),
        *(("uri", uri) for uri in s["uris"]),
    ]
    click.echo(fields(pairs))


def _latency(latency: dict[str, Any]) -> str:
    """Of the guest's requests, lately."""
    if not latency["requests"]:
        return "no request in the last minute"
    p50, p99 = format_seconds(latency["p50"]), format_seconds(latency["p99"])
    return f"p50 {p50}, p99 {p99}, {latency['requests']:,} requests in the last minute"


@snapshot.command("set", epilog="\b\nExample:\n  fleecing snapshot set vda@monday --temp-limit 40G\n")
@click.argument("which", metavar="DISK@SNAPSHOT", type=EXPORT)
@click.option("--temp-limit", type=NEW_LIMIT, required=True, help="Most temp space, as in 40G; none = no limit.")
@control_option
@json_option
def set_(*, which: tuple[str, str], temp_limit: int, control: str, as_json: bool) -> None:
    """Change the temp limit of a snapshot that is in use; a restart of the server keeps it.

    It cannot go below what is in use: TRIM gives space back.
    """
    s = ControlClient(control).request("PATCH", snapshot_path(which), {"temp_limit": temp_limit or None})
    if as_json:
        print_json(s)
        return
    limit = "none" if s["temp"]["limit"] is None else format_size(s["temp"]["limit"])
    click.echo(f"{s['export']}: temp limit {limit}, {format_size(s['temp']['used'])} in use", err=True)


@snapshot.command(epilog="\b\nExample:\n  fleecing snapshot delete vda@monday\n")
@click.argument("which", metavar="DISK@SNAPSHOT...", nargs=-1, required=True, type=EXPORT)
@control_option
@json_option
def delete(*, which: tuple[tuple[str, str], ...], control: str, as_json: bool) -> None:
    """Delete snapshots, in any order, whoever reads them; returns when their temp space is free.

    Clients that still read get errors. Deleting one that is gone already is no error.
    """
    answers = [ControlClient(control).request("DELETE", snapshot_path(one)) for one in which]
    if as_json:
        print_json(answers)
        return
    for answer in answers:
        done = "deleted" if answer["deleted"] else "not there, nothing to delete"
        click.echo(f"{answer['disk']}@{answer['name']}: {done}", err=True)


@click.group()
def disk() -> None:
    """Look at the disks of a running server."""


@disk.command("list")
@control_option
@json_option
def list_disks(*, control: str, as_json: bool) -> None:
    """List all disks, one line each."""
    disks = ControlClient(control).request("GET", "/v1/disks")["disks"]
    if as_json:
        print_json(disks)
    else:
        click.echo(disk_table(disks))


def disk_table(disks: list[dict[str, Any]]) -> str:
    """One line a disk; what is wrong with an image is in the last column.

    P50 and P99 are latencies of the guest's requests of the last minute.
    """
    heads = ("DISK", "SIZE", "CLUSTER", "CLIENTS", "P50", "P99", "SNAPSHOTS", "TEMP FREE", "URI", "STATE")
    rows = [
        (
            d["name"],
            format_size(d["size"]),
            format_size(d["cluster_size"]),
            str(d["clients"]),
            format_seconds(d["guest_latency"]["p50"]),
            format_seconds(d["guest_latency"]["p99"]),
            str(len(d["snapshots"])),
            format_size(d["temp_free"]),
            d["uris"][0],
            d["problem"] or "ok",
        )
        for d in disks
    ]
    return table(heads, rows)
