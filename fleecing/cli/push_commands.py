"""`fleecing push` and `fleecing job`: copies that the server makes itself."""

from __future__ import annotations

import os
import time
from typing import Any, Final

import click

from fleecing.cli.control_client import ControlClient
from fleecing.cli.output import print_json, table
from fleecing.cli.params import FILLED, control_option, json_option
from fleecing.cli.pull_command import BANDWIDTH, NEW_BANDWIDTH
from fleecing.errors import ControlError
from fleecing.units import format_size

_POLL_SECONDS: Final = 0.1


@click.command(epilog="\b\nExamples:\n  fleecing push vda /srv/vda.qcow2\n  fleecing push vda@monday nbd://host/copy\n")
@click.argument("source", metavar="DISK|DISK@SNAPSHOT")
@click.argument("target", metavar="TARGET", type=FILLED)
@click.option("--format", "form", type=click.Choice(["raw", "qcow2"]), help="Of a new file; else by its ending.")
@click.option("--compress", type=click.Choice(["none", "deflate", "zstd"]), default="none", show_default=True)
@click.option("--bandwidth", type=BANDWIDTH, help="Most bytes a second, as in 50M.")
@click.option("--no-trim", is_flag=True, help="Do not give up what was copied of the snapshot.")
@click.option("--quiesce", is_flag=True, help="Freeze DISK's guest around the instant, as the server is configured to.")
@click.option("--no-wait", is_flag=True, help="Return at once, and print the job's number.")
@control_option
@json_option
def push(
    *,
    source: str,
    target: str,
    form: str | None,
    compress: str,
    bandwidth: int | None,
    no_trim: bool,
    no_wait: bool,
    quiesce: bool,
    control: str,
    as_json: bool,
) -> None:
    """Let the server copy a snapshot, or DISK as it is now, to TARGET: a new file, a block device, or an NBD URI.

    The server writes TARGET with its own rights. Ctrl-C cancels.
    """
    if "://" not in target:
        form = form or ("qcow2" if target.endswith(".qcow2") else "raw")
        target = os.path.abspath(target)
    body = {
        "source": source,
        "target": target,
        "format": form or "raw",
        "compress": compress,
        "bandwidth": bandwidth,
        "trim": not no_trim,
        "quiesce": quiesce,
    }
    client = ControlClient(control)
    job = client.request("POST", "/v1/jobs", body)
    if not no_wait:
        job = _wait(client, job)
    if as_json:
        print_json(job)
    elif no_wait:
        click.echo(job["id"])
    if job["state"] in ("failed", "cancelled"):
        raise ControlError(500, f"job {job['id']}: {job['error'] or job['state']}")
    if not no_wait:
        click.echo(f"Pushed {format_size(job['data'])} of {job['source']} to {target}", err=True)


def _wait(client: ControlClient, job: dict[str, Any]) -> dict[str, Any]:
    try:
        while job["state"] == "running":
            time.sleep(_POLL_SECONDS)
            job = client.request("GET", f"/v1/jobs/{job['id']}")
    except KeyboardInterrupt:
        return dict(client.request("DELETE", f"/v1/jobs/{job['id']}"))
    return job


@click.group()
def job() -> None:
    """Look at pushes, change and cancel them."""


@job.command("list")
@control_option
@json_option
def list_jobs(*, control: str, as_json: bool) -> None:
    """List the pushes since the server's start, those that ended among them."""
    jobs = ControlClient(control).request("GET", "/v1/jobs")["jobs"]
    if as_json:
        print_json(jobs)
    else:
        click.echo(_table(jobs))


@job.command()
@click.argument("number", metavar="ID", type=int)
@control_option
@json_option
def show(*, number: int, control: str, as_json: bool) -> None:
    """Show one push."""
    _print(ControlClient(control).request("GET", f"/v1/jobs/{number}"), as_json=as_json)


@job.command("set")
@click.argument("number", metavar="ID", type=int)
@click.option("--bandwidth", type=NEW_BANDWIDTH, required=True, help="Most bytes a second, as in 50M, or none.")
@control_option
@json_option
def set_job(*, number: int, bandwidth: int, control: str, as_json: bool) -> None:
    """Change a push that runs."""
    change = {"bandwidth": bandwidth or None}
    _print(ControlClient(control).request("PATCH", f"/v1/jobs/{number}", change), as_json=as_json)


@job.command()
@click.argument("number", metavar="ID", type=int)
@control_option
@json_option
def cancel(*, number: int, control: str, as_json: bool) -> None:
    """Stop a push; returns when it has ended, and left neither file nor snapshot."""
    _print(ControlClient(control).request("DELETE", f"/v1/jobs/{number}"), as_json=as_json)


def _print(found: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        print_json(found)
    else:
        click.echo(_table([found]))


def _table(jobs: list[dict[str, Any]]) -> str:
    rows = [
        (
            str(job["id"]),
            job["source"],
            job["target"],
            format_size(job["done"]) + ("" if job["total"] is None else f" of {format_size(job['total'])}"),
            f"{format_size(job['rate'])}/s"
            + (f", limit {format_size(job['bandwidth'])}/s" if job["bandwidth"] else ""),
            job["state"] + (f": {job['error']}" if job["error"] else ""),
        )
        for job in jobs
    ]
    return table(("JOB", "SOURCE", "TARGET", "DONE", "RATE", "STATE"), rows)
