"""What an operator types, checked before anything is asked of a server: misuse ends with exit code 2."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

import click

from fleecing.control.names import check_export, check_name, split_export
from fleecing.control.paths import default_control_path
from fleecing.control.sizes import check_cluster_size, check_temp_limit
from fleecing.control.sockets import check_socket_path
from fleecing.errors import ConfigError
from fleecing.nbd.uri import NbdUri
from fleecing.units import parse_size

Command = TypeVar("Command", bound=Callable[..., Any])


class Checked:
    """A parameter's type: a function that makes the value of its text, or raises ValueError with a sentence."""

    def __init__(self, name: str, make: Callable[[str], Any]) -> None:
        self.__name__ = name  # what click shows in the place of the value
        self._make = make

    def __call__(self, text: str) -> Any:
        try:
            return self._make(text)
        except ValueError as e:
            raise click.BadParameter(str(e)) from None


def _filled(text: str) -> str:
    if not text:
        raise ValueError("is empty")  # a variable of a script that was not set
    return text


FILLED = Checked("TEXT", _filled)
NAME = Checked("NAME", check_name)
EXPORT = Checked("DISK@SNAPSHOT", split_export)
ANY_EXPORT = Checked("DISK|DISK@SNAPSHOT", check_export)
CLUSTER_SIZE = Checked("SIZE", lambda text: check_cluster_size(parse_size(text)))
TEMP_LIMIT = Checked("SIZE", lambda text: check_temp_limit(parse_size(text)))
GRACE = Checked("SIZE", parse_size)
NEW_LIMIT = Checked("SIZE|none", lambda text: 0 if text == "none" else check_temp_limit(parse_size(text)))
SOCKET = Checked("PATH", lambda text: check_socket_path(os.path.abspath(text)))


def control_option(command: Command) -> Command:
    """--control PATH; the command gets `control`, a path, whether given or not."""
    option = click.option(
        "--control",
        type=SOCKET,
        default=default_control_path,
        help="Control socket of the server; else $FLEECING_CONTROL, else control.sock in the runtime folder "
        "(/run/fleecing as root, $XDG_RUNTIME_DIR/fleecing otherwise).",
    )
    return option(command)


def tls_options(command: Command) -> Command:
    """--tls-certificates DIR and --tls-hostname NAME, for the URIs that a server tells of itself."""
    folder = "For TLS: folder with ca-cert.pem and, where the server asks for them, client-cert.pem and client-key.pem."
    name = "For TLS: whom the server's certificate must be for; else the host that it is reached at."
    for option in (
        click.option("--tls-hostname", metavar="NAME", help=name),
        click.option("--tls-certificates", metavar="DIR", help=folder),
    ):
        command = option(command)
    return command


def json_option(command: Command) -> Command:
    """--json; the command gets `as_json`."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON instead.")(command)


def choose_uri(uris: list[str], certificates: str | None, hostname: str | None) -> NbdUri:
    """Of a snapshot's addresses the first; the first with TLS where options for it are given. Raises ConfigError."""
    wants_tls = bool(certificates or hostname)
    for text in uris:
        uri = NbdUri.parse(text)
        if uri.tls or not wants_tls:
            return uri.with_tls(certificates, hostname)
    raise ConfigError("--tls-certificates and --tls-hostname are for TLS, which the server does not offer.")
