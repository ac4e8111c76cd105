"""What a server is told at its start: a TOML file, or the same settings from the command line.

listen = ["127.0.0.1:10809"]            # none of the two: 127.0.0.1:10809 and nbd.sock in the runtime folder
unix = ["/run/fleecing/nbd.sock"]
unix-mode = "0600"                      # permissions of these, and the group that they belong to
unix-group = "kvm"                      # (none: the server's own)
control = "/run/fleecing/control.sock"
control-group = "backup"                # its members may use the control socket, as root and the server's user do
metrics = ["127.0.0.1:9847"]            # where Prometheus gets its figures, and nothing else (none: nowhere)
state-dir = "/var/lib/fleecing"
temp-dir = "/var/tmp/fleecing"          # or several: ["/a", "/b"]; none: temp files lie in the state folder
temp-watermark = 80                     # percent of a temp limit from which on there is a warning
tls = "off"                             # TCP: off, allow, require; or one by one, as {address = ..., tls = ...}
tls-unix = "off"                        # the same of the Unix sockets
tls-dir = "/etc/fleecing/tls"           # server-cert.pem, server-key.pem, ca-cert.pem, ca-crl.pem
tls-verify-client = false               # whether clients must have a certificate of ca-cert.pem
insecure-listen = false                 # whether TCP may be open to more than this machine without TLS
drain-seconds = 10                      # how long requests in flight may take when the server stops
log-format = "auto"                     # text, json, journald; auto: journald where stderr is the journal's, else text
log-level = "info"                      # debug, info, warning, error
debug-exports = []                      # exports whose every request is logged

[limits]                                # of NBD clients
clients = 1024

[[access]]                              # who may do what; none: all may do everything (see access.py)
export = "vda@*"
allow = ["read", "trim"]
user = "backup"

[guest.web]                             # how a machine is frozen for snapshots with --quiesce
agent = "/run/vm/web-agent.sock"        # of QEMU's guest agent
before = "/etc/fleecing/before"         # commands, with or without an agent
after = "/etc/fleecing/after"
hook-seconds = 10                       # of each of these

[disk.vda]
path = "/srv/vda.img"                   # relative paths start at the folder of this file
format = "raw"
cluster-size = "64K"
image-lock = "on"                       # off: QEMU's programs are not kept away from the image
guest = "web"
"""

from __future__ import annotations

import ipaddress
import os
import re
import tomllib
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    model_validator,
)

from fleecing.block.qcow2.refcounts import WATERMARK
from fleecing.control.access import AccessRule
from fleecing.control.accounts import Group
from fleecing.control.fields import ClusterSize, ExportName, Name, Size
from fleecing.control.logs import LogFormat, LogLevel
from fleecing.control.paths import default_control_path, default_state_dir, default_unix_path
from fleecing.control.sizes import DEFAULT_CLUSTER
from fleecing.control.sockets import check_socket_path
from fleecing.errors import ConfigError
from fleecing.nbd.constants import MAX_STRING
from fleecing.nbd.conversation import TlsMode
from fleecing.server.limits import LEAST_IN_FLIGHT, LEAST_NAME, LEAST_OPTION, LEAST_READ_MEMORY, Limits
from fleecing.units import format_size

DEFAULT_PORT = 10809

_LIMITS = Limits()

_PLAIN = {
    "missing": "is missing",
    "extra_forbidden": "is no known setting",
    "too_short": "there must be at least one",
    "tuple_type": "must be a list, in brackets",
}


class _Settings(BaseModel):
    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        alias_generator=lambda field: field.replace("_", "-"),
        populate_by_name=True,
    )


class TcpAddress(_Settings):
    """Where to listen: a host name or address, and a port (0 = any free one). `tls` goes before the server's."""

    host: str
    port: int = Field(default=DEFAULT_PORT, ge=0, le=65535)
    tls: TlsMode | None = None

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine reaches it. A name other than localhost may be anything."""
        try:
            return ipaddress.ip_address(self.host.partition("%")[0]).is_loopback
        except ValueError:
            return self.host == "localhost"

    @classmethod
    def parse(cls, text: str) -> Self:
        """HOST:PORT, HOST, [ADDRESS]:PORT or [ADDRESS]. Raises ValueError."""
        wrong = f"'{text}' is no HOST:PORT, as in 127.0.0.1:10809 or [::1]:10809; port 0 takes any free one"
        if text.startswith("["):
            host, bracket, rest = text[1:].partition("]")
            if not bracket or (rest and not rest.startswith(":")):
                raise ValueError(wrong)
            port = rest[1:] if rest else str(DEFAULT_PORT)
        else:
            host, colon, port = text.partition(":")
            port = port if colon else str(DEFAULT_PORT)
        if not host or not (port.isascii() and port.isdecimal() and len(port) < 20) or int(port) > 65535:
            raise ValueError(wrong)
        return cls(host=host, port=int(port))

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def _address(value: object) -> object:
    if isinstance(value, dict) and isinstance(text := value.get("address"), str):
        place = TcpAddress.parse(text)
        return {"host": place.host, "port": place.port, **{k: v for k, v in value.items() if k != "address"}}
    return TcpAddress.parse(value) if isinstance(value, str) else value


def metrics_address(text: str) -> TcpAddress:
    """HOST:PORT; there is no default port. Raises ValueError."""
    if not re.search(r":\d+$", text):
        raise ValueError(f"'{text}' has no port: give HOST:PORT, as in 127.0.0.1:9847; port 0 takes any free one")
    return TcpAddress.parse(text)


def _metrics_address(value: object) -> object:
    return metrics_address(value) if isinstance(value, str) else value


def _at_least(least: int) -> AfterValidator:
    def check(value: int) -> int:
        if value < least:
            raise ValueError(f"{format_size(value)} is too little: give {format_size(least)} or more")
        return value

    return AfterValidator(check)


def _one_or_several(value: object) -> object:
    return (value,) if isinstance(value, str) else value


def _check_mode(value: str) -> str:
    if not re.fullmatch("0?[0-7]{3}", value) or int(value, 8) & 0o600 != 0o600:
        raise ValueError(f"'{value[:20]}' is no mode of a socket: give octal digits as text, as in \"0660\"")
    return value


def _check_format(value: str) -> str:
    if value != "raw":
        raise ValueError(
            f"format '{value}' is not served in this release, only raw: "
            "convert the image, for instance with `qemu-img convert -O raw IMAGE IMAGE.raw`"
        )
    return value


Address = Annotated[TcpAddress, BeforeValidator(_address)]
MetricsAddress = Annotated[TcpAddress, BeforeValidator(_metrics_address)]
SocketPath = Annotated[str, Field(min_length=1), AfterValidator(os.path.abspath), AfterValidator(check_socket_path)]
AbsolutePath = Annotated[str, Field(min_length=1), AfterValidator(os.path.abspath)]
Mode = Annotated[str, AfterValidator(_check_mode)]
ImageFormat = Annotated[str, AfterValidator(_check_format)]


class DiskSettings(_Settings):
    """One disk: its image, the cluster size of its snapshots (bytes), whether QEMU's programs are kept away from it,
    and the guest whose disk it is."""

    path: AbsolutePath
    format: ImageFormat | None = None
    cluster_size: ClusterSize = DEFAULT_CLUSTER
    image_lock: bool = True
    guest: Name | None = None


class GuestSettings(_Settings):
    """How a guest is frozen for a snapshot that asks for it, and thawed: `before`, then the agent, and back."""

    agent: SocketPath | None = None
    before: Annotated[str, Field(min_length=1)] | None = None
    after: Annotated[str, Field(min_length=1)] | None = None
    hook_seconds: float = Field(default=10.0, gt=0, le=3600)

    @model_validator(mode="after")
    def _something_to_do(self) -> Self:
        if self.agent is None and self.before is None and self.after is None:
            raise ValueError("there is nothing to freeze it with: give agent, or before and after")
        return self


class LimitSettings(_Settings):
    """What NBD clients may have: the fields of `Limits`, checked."""

    handshake_seconds: float = Field(default=_LIMITS.handshake_seconds, gt=0, le=3600)
    clients: int = Field(default=_LIMITS.clients, ge=1, le=100_000)
    clients_per_address: int = Field(default=_LIMITS.clients_per_address, ge=0, le=100_000)
    requests_in_flight: int = Field(default=_LIMITS.requests_in_flight, ge=1, le=4096)
    bytes_in_flight: Annotated[Size, _at_least(LEAST_IN_FLIGHT)] = _LIMITS.bytes_in_flight
    all_requests_in_flight: int = Field(default=_LIMITS.all_requests_in_flight, ge=1, le=1_000_000)
    all_bytes_in_flight: Annotated[Size, _at_least(LEAST_IN_FLIGHT)] = _LIMITS.all_bytes_in_flight
    option_bytes: Annotated[Size, _at_least(LEAST_OPTION)] = _LIMITS.option_bytes
    name_bytes: int = Field(default=_LIMITS.name_bytes, ge=LEAST_NAME, le=MAX_STRING)
    read_memory: Annotated[Size, _at_least(LEAST_READ_MEMORY)] = _LIMITS.read_memory
    send_seconds: float = Field(default=_LIMITS.send_seconds, ge=0, le=86400)
    keepalive_seconds: float = Field(default=_LIMITS.keepalive_seconds, ge=0, le=86400)

    def limits(self) -> Limits:
        """For the server."""
        return Limits(**self.model_dump())


class ServerSettings(_Settings):
    """All of a server's settings, complete: defaults are filled in."""

    listen: tuple[Address, ...] = ()
    unix: tuple[SocketPath, ...] = ()
    unix_mode: Mode = "0600"
    unix_group: Group | None = None
    control: SocketPath = Field(default_factory=default_control_path, validate_default=True)
    control_group: Group | None = None
    metrics: Annotated[tuple[MetricsAddress, ...], BeforeValidator(_one_or_several)] = ()
    state_dir: AbsolutePath = Field(default_factory=default_state_dir)
    temp_dir: Annotated[tuple[AbsolutePath, ...], BeforeValidator(_one_or_several)] = ()
    temp_watermark: int = Field(default=WATERMARK, ge=1, le=100)
    tls: TlsMode = TlsMode.OFF
    tls_unix: TlsMode = TlsMode.OFF
    tls_dir: AbsolutePath | None = None
    tls_verify_client: bool = False
    insecure_listen: bool = False
    drain_seconds: float = Field(default=10.0, ge=0, le=3600)
    log_format: LogFormat = LogFormat.AUTO
    log_level: LogLevel = LogLevel.INFO
    debug_exports: tuple[ExportName, ...] = ()
    limits: LimitSettings = LimitSettings()
    access: tuple[AccessRule, ...] | None = None
    guest: dict[Name, GuestSettings] = {}
    disk: dict[Name, DiskSettings] = Field(min_length=1)

    @model_validator(mode="after")
    def _guests_are_known(self) -> Self:
        for name, disk in self.disk.items():
            if disk.guest is not None and disk.guest not in self.guest:
                raise ValueError(f"disk '{name}' is of guest '{disk.guest}', and there is no [guest.{disk.guest}]")
        return self

    @model_validator(mode="before")
    @classmethod
    def _default_listeners(cls, data: Any, info: ValidationInfo) -> Any:
        if info.context:  # systemd passes the listeners
            return data
        if isinstance(data, dict) and not data.get("listen") and not data.get("unix"):
            return {**data, "listen": [f"127.0.0.1:{DEFAULT_PORT}"], "unix": [default_unix_path()]}
        return data

    @model_validator(mode="after")
    def _each_image_and_socket_once(self) -> Self:
        images: dict[str, str] = {}
        for name, disk in self.disk.items():
            other = images.setdefault(os.path.realpath(disk.path), name)
            if other != name:
                raise ValueError(f"disks '{other}' and '{name}' are the same image {disk.path}: name it once")
        sockets = [*self.unix, self.control]
        if len(set(sockets)) < len(sockets):
            raise ValueError("a socket path is named twice: every listener and the control socket needs its own")
        return self

    @model_validator(mode="after")
    def _nothing_open_by_mistake(self) -> Self:
        if self.uses_tls and self.tls_dir is None:
            raise ValueError("TLS needs tls-dir (--tls-dir), the folder of server-cert.pem and server-key.pem")
        if self.tls_verify_client and not self.uses_tls:
            raise ValueError('tls-verify-client needs TLS: give tls = "require" (--tls require), too')
        if not self.tls_verify_client and any(rule.needs_certificate for rule in self.access or ()):
            raise ValueError("access: cn, dn and san are of verified certificates: give tls-verify-client = true, too")
        for address in self.listen:
            self.check_open(address)
        for address in self.metrics:
            if not (address.is_loopback or self.insecure_listen):
                raise ValueError(
                    f"metrics on {address} are open to the network, and tell names and figures to whoever asks: take "
                    "an address of this machine alone, or allow it with insecure-listen (--insecure-listen)"
                )
        return self

    def check_open(self, address: TcpAddress) -> None:
        """Raises ValueError where this listener is open to a network by mistake."""
        if not (address.is_loopback or self.insecure_listen or self.tls_of(address) is TlsMode.REQUIRE):
            raise ValueError(
                f"{address} is open to the network without encryption: whoever reaches it can read and write the "
                "disks; require TLS (--tls require --tls-dir DIR), or allow it with insecure-listen "
                "(--insecure-listen) in a network that you trust"
            )

    def tls_of(self, address: TcpAddress) -> TlsMode:
        """What holds for clients of this TCP address."""
        return self.tls if address.tls is None else address.tls

    @property
    def uses_tls(self) -> bool:
        """Whether any listener may have it; sockets that are handed over follow `tls` and `tls_unix`."""
        modes = [self.tls, self.tls_unix, *(self.tls_of(address) for address in self.listen)]
        return any(mode is not TlsMode.OFF for mode in modes)


def make_settings(values: dict[str, Any], source: str, *, activated: bool = False) -> ServerSettings:
    """Settings from plain values. Raises ConfigError, one sentence, beginning with `source`.

    `activated`: systemd passes listeners, so there are no default ones.
    """
    try:
        return ServerSettings.model_validate(values, context=activated)
    except ValidationError as e:
        raise ConfigError(f"{source}: {explain(e)}") from None


def read_config(path: str, changes: dict[str, Any] | None = None, *, activated: bool = False) -> ServerSettings:
    """The settings of a TOML file; `changes` replace its top-level entries, and single `limits`. Raises ConfigError.

    Relative paths in the file start at the file's folder, those in `changes` at the current one.
    """
    try:
        values = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as e:
        raise ConfigError(f"configuration {path} cannot be read: {e.strerror}") from None
    except (ValueError, RecursionError) as e:  # TOMLDecodeError, UnicodeDecodeError, and numbers without end
        raise ConfigError(f"configuration {path} is no TOML: {e}") from None
    _root_paths(values, os.path.dirname(os.path.abspath(path)))
    changes = dict(changes or {})
    if isinstance(values.get("limits"), dict):
        changes["limits"] = values["limits"] | changes.get("limits", {})
    return make_settings(values | changes, f"configuration {path}", activated=activated)


def _root_paths(values: dict[str, Any], folder: str) -> None:
    """Make the relative paths of the file absolute, in place. What is no text is left for the validation to refuse."""

    def rooted(value: Any) -> Any:
        return os.path.join(folder, value) if isinstance(value, str) and value else value

    for key in ("control", "state-dir", "temp-dir", "tls-dir"):
        if key in values:
            values[key] = rooted(values[key])
    for key in ("unix", "temp-dir"):
        if isinstance(values.get(key), list):
            values[key] = [rooted(path) for path in values[key]]
    for table, key in (("disk", "path"), ("guest", "agent")):
        if isinstance(values.get(table), dict):
            for entry in values[table].values():
                if isinstance(entry, dict) and key in entry:
                    entry[key] = rooted(entry[key])


def explain(error: ValidationError) -> str:
    """All that is wrong, as "where: what; where: what"."""
    problems = []
    for item in error.errors(include_url=False):
        where = ".".join(str(part) for part in item["loc"] if part != "[key]")
        what = _PLAIN.get(item["type"], item["msg"].removeprefix("Value error, "))
        problems.append(f"{where}: {what}" if where else what)
    return "; ".join(problems)
