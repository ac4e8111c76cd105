"""`fleecing serve` and `fleecing check-config`: from the command line to the daemon's settings."""

from __future__ import annotations

import functools
import os
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from fleecing.cli.output import print_json
from fleecing.cli.params import ANY_EXPORT, CLUSTER_SIZE, NAME, SOCKET, Checked, json_option
from fleecing.control import daemon
from fleecing.control.access import AccessRule
from fleecing.control.activation import take_sockets
from fleecing.control.config import ServerSettings, TcpAddress, make_settings, metrics_address, read_config
from fleecing.control.exposure import open_ends
from fleecing.control.logs import LogFormat, LogLevel, Logs
from fleecing.control.names import clean_name
from fleecing.errors import ConfigError
from fleecing.nbd.conversation import TlsMode
from fleecing.units import format_size


def _split_limit(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not (key and equals and value):
        raise ValueError(f"'{text}' is no KEY=VALUE, as in clients=100")
    return key, value


ADDRESS = Checked("HOST:PORT", TcpAddress.parse)
METRICS_ADDRESS = Checked("HOST:PORT", metrics_address)
LIMIT = Checked("KEY=VALUE", _split_limit)
TLS = click.Choice([mode.value for mode in TlsMode])


@click.command(
    short_help="Serve a disk image over NBD.",
    epilog="""\b
Examples:
  fleecing serve vda.img
  fleecing serve /dev/vg0/web --name web --listen 0.0.0.0:10809 --tls require --tls-dir /etc/fleecing/tls
  fleecing serve vda.img --unix /tmp/nbd.sock --control /tmp/control.sock --state-dir /tmp/state
  fleecing serve --config /etc/fleecing.toml
""",
)
@click.argument("image", required=False)
@click.option("--config", metavar="FILE", help="Serve the disks of a TOML file instead of IMAGE.")
@click.option("--name", type=NAME, help="Name of the disk and its export; else IMAGE's file name without its ending.")
@click.option("--format", "image_format", metavar="raw", help="Format of IMAGE. This release serves raw images.")
@click.option("--listen", type=ADDRESS, multiple=True, help="TCP address for NBD clients; port 0 takes any free port.")
@click.option("--unix", type=SOCKET, multiple=True, help="Unix socket for NBD clients.")
@click.option("--unix-mode", metavar="MODE", help="Permissions of the Unix sockets, as in 0660; else 0600.")
@click.option("--unix-group", metavar="GROUP", help="Group that the Unix sockets belong to.")
@click.option("--tls", type=TLS, help="TLS on TCP: off (default), allow, or require.")
@click.option("--tls-unix", type=TLS, help="The same on Unix sockets.")
@click.option("--tls-dir", metavar="DIR", help="Folder with server-cert.pem, server-key.pem and ca-cert.pem.")
@click.option("--tls-verify-client", is_flag=True, default=None, help="Clients need a certificate of ca-cert.pem, too.")
@click.option(
    "--insecure-listen", is_flag=True, default=None, help="Let --listen be open to a network without encryption."
)
@click.option(
    "--control",
    type=SOCKET,
    help="Control socket; else $FLEECING_CONTROL, else control.sock in /run/fleecing "
    "as root, in $XDG_RUNTIME_DIR/fleecing otherwise.",
)
@click.option(
    "--control-group",
    metavar="GROUP",
    help="Group whose members may use the control socket; root and the server's user always may.",
)
@click.option(
    "--metrics",
    type=METRICS_ADDRESS,
    multiple=True,
    help="TCP address where Prometheus gets its figures, and nothing else.",
)
@click.option(
    "--state-dir", metavar="DIR", help="State folder; else /var/lib/fleecing as root, else $XDG_STATE_HOME/fleecing."
)
@click.option(
    "--temp-dir",
    metavar="DIR",
    multiple=True,
    help="Folder for the temp files of snapshots; else the state folder. Of several, the one with the most free space.",
)
@click.option(
    "--temp-watermark",
    type=click.IntRange(1, 100),
    metavar="PERCENT",
    help="Of a snapshot's temp limit: with so much in use there is a warning; else 80.",
)
@click.option("--cluster-size", type=CLUSTER_SIZE, help="Unit of copying, 4K to 2M, a power of two; else 64K.")
@click.option(
    "--image-lock",
    type=click.Choice(["on", "off"]),
    help="Lock IMAGE as QEMU does, so that QEMU and qemu-img do not write to it, and not serve what they use; else on.",
)
@click.option(
    "--limit",
    type=LIMIT,
    multiple=True,
    help="A limit of NBD clients, as in clients=100 or send-seconds=30; check-config FILE --json shows them all.",
)
@click.option(
    "--guest-agent",
    metavar="PATH",
    help="Socket of the guest agent (QEMU's), for snapshots that are to freeze the guest.",
)
@click.option("--before", metavar="COMMAND", help="Run before such a snapshot by the shell, before the agent freezes.")
@click.option("--after", metavar="COMMAND", help="Run after it, whatever came of it, when the agent has thawed.")
@click.option(
    "--hook-seconds",
    type=click.FloatRange(0, 3600, min_open=True),
    metavar="SECONDS",
    help="Time limit of the agent's freeze and thaw, of --before and of --after; else 10.",
)
@click.option(
    "--log-format",
    type=click.Choice([form.value for form in LogFormat]),
    help="auto (default): fields for the journal where stderr is the journal's, else text.",
)
@click.option(
    "--log-level",
    type=click.Choice([level.value for level in LogLevel]),
    help="Least level of what is logged; else info.",
)
@click.option(
    "--debug-export", "debug_exports", type=ANY_EXPORT, multiple=True, help="Log every request of this export, too."
)
@click.option("--verbose", is_flag=True, help="Log every protocol message, too: the same as --log-level debug.")
def serve(
    *,
    image: str | None,
    config: str | None,
    name: str | None,
    image_format: str | None,
    cluster_size: int | None,
    image_lock: str | None,
    guest_agent: str | None,
    before: str | None,
    after: str | None,
    hook_seconds: float | None,
    verbose: bool,
    **options: Any,
) -> None:
    """Serve IMAGE, a raw file or a block device, as a disk over NBD, and snapshots of it.

    Without --listen and --unix the server listens on 127.0.0.1:10809 and on nbd.sock beside the default control
    socket. Lines to paste into QEMU and into a shell are printed on stderr. SIGTERM or Ctrl-C ends it: requests in
    flight are finished first, and the exit code is 0. SIGHUP has the certificates of --tls-dir and the access rules of
    FILE read again.
    """
    for_image = {"path": image, "format": image_format, "cluster-size": cluster_size, "image-lock": image_lock}
    for_guest = _given({"agent": guest_agent, "before": before, "after": after, "hook-seconds": hook_seconds})
    inherited = take_sockets()
    activated = bool(inherited.nbd)
    if verbose:
        options["log_level"] = LogLevel.DEBUG
    options["limits"] = dict(options.pop("limit")) or None
    reread: Callable[[], ServerSettings] | None = None
    if config is not None:
        if image is not None or name is not None or for_guest or _given(for_image):
            raise click.UsageError(
                "IMAGE, --name, --format, --cluster-size, --image-lock, --guest-agent, --before, --after and "
                "--hook-seconds do not go with --config FILE: say it there."
            )
        reread = functools.partial(read_config, config, _given(options), activated=activated)
        settings = reread()
    elif image is None:
        raise click.UsageError("Name the IMAGE to serve, or a --config FILE.")
    else:
        name = name or clean_name(Path(image).stem)
        if for_guest:
            options["guest"] = {name: for_guest}
            for_image["guest"] = name
        settings = make_settings(
            {"disk": {name: _given(for_image)}, **_given(options)}, "command line", activated=activated
        )
    logs = Logs(settings.log_format, settings.log_level, settings.debug_exports)
    daemon.run(
        settings,
        program=_program(),
        announce=lambda text: click.echo(text, err=True),
        logs=logs,
        inherited=inherited,
        reread=reread,
    )


def _given(options: dict[str, Any]) -> dict[str, Any]:
    """The options that were given, under their names in the configuration."""
    return {key.replace("_", "-"): value for key, value in options.items() if value not in (None, ())}


def _program() -> str:
    """What starts this program in a shell, wherever that shell stands."""
    beside = os.path.join(os.path.dirname(sys.executable), "fleecing")
    if not os.path.exists(beside):
        return f"{shlex.quote(sys.executable)} -m fleecing"
    found = shutil.which("fleecing")
    return "fleecing" if found and os.path.samefile(found, beside) else shlex.quote(beside)


@click.command("check-config", epilog="\b\nExample:\n  fleecing check-config /etc/fleecing.toml\n")
@click.argument("file")
@click.option("--strict", is_flag=True, help="Exit with code 1 where there is a warning.")
@json_option
def check_config(*, file: str, strict: bool, as_json: bool) -> None:
    """Say whether FILE can be given to `serve --config`, and what it comes to with all defaults filled in.

    Warnings on stderr name all that is open: listeners, rules, and files and folders that others can read or change.
    The images are not opened. Exit code 1 and one line that names every mistake where FILE cannot be used.
    """
    settings = read_config(file)
    warnings = open_ends(settings, file)
    if as_json:
        print_json({**settings.model_dump(mode="json", by_alias=True), "warnings": warnings})
    else:
        click.echo(_described(settings))
    for warning in warnings:
        click.echo(f"Warning: {warning}", err=True)
    if strict and warnings:
        raise ConfigError(f"configuration {file} has warnings ({len(warnings)}), and --strict takes none")


def _described(settings: ServerSettings) -> str:
    lines = [f"listen     {_address(address)}{_tls(settings.tls_of(address))}" for address in settings.listen]
    lines += [f"unix       {path}{_tls(settings.tls_unix)}{_unix(settings)}" for path in settings.unix]
    group = "" if settings.control_group is None else f", group {settings.control_group}"
    lines += [f"control    {settings.control}{group}", f"state-dir  {settings.state_dir}"]
    lines += [f"metrics    {_address(address)}" for address in settings.metrics]
    lines += [f"temp-dir   {path}" for path in settings.temp_dir or [settings.state_dir]]
    for rule in settings.access or ():
        lines.append(f"access     {', '.join(rule.export)}: {', '.join(rule.allow)} for {_whom(rule)}")
    for name, guest in settings.guest.items():
        steps = [f"{key} {value}" for key, value in guest.model_dump(exclude={"hook_seconds"}).items() if value]
        lines.append(f"guest      {name}: {', '.join(steps)}, {guest.hook_seconds:g} s each")
    for name, disk in settings.disk.items():
        guest_of = "" if disk.guest is None else f", of guest {disk.guest}"
        lines.append(f"disk       {name}: {disk.path}, raw, clusters of {format_size(disk.cluster_size)}{guest_of}")
    return "\n".join(lines)


def _address(address: TcpAddress) -> str:
    return f"{address} (any free port)" if not address.port else str(address)


def _whom(rule: AccessRule) -> str:
    whom = rule.model_dump(exclude={"export", "allow"}, exclude_none=True)
    return ", ".join(f"{key} {' or '.join(map(str, values))}" for key, values in whom.items()) or "everybody"


def _unix(settings: ServerSettings) -> str:
    mode = "" if int(settings.unix_mode, 8) == 0o600 else f", mode {settings.unix_mode}"
    return mode + ("" if settings.unix_group is None else f", group {settings.unix_group}")


def _tls(mode: TlsMode) -> str:
    return {TlsMode.OFF: "", TlsMode.ALLOW: ", TLS allowed", TlsMode.REQUIRE: ", TLS required"}[mode]
