"""NBD URIs, read and written (NBD document, "The NBD Uniform Resource Indicator (URI) format", doc/uri.md).

    nbd://HOST:PORT/EXPORT      nbd+unix:///EXPORT?socket=PATH      nbds://..., nbds+unix://... : with TLS

What is written here can be pasted into a shell without quotes but for the `?`, which shells leave alone where no file
matches: everything but letters, digits and a few harmless signs is percent-encoded. `@` stays as it is: vda@monday.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final
from urllib.parse import SplitResult, quote, unquote, urlsplit

from fleecing.nbd.constants import DEFAULT_PORT, MAX_STRING

_SCHEMES: Final = {"nbd": (False, False), "nbds": (True, False), "nbd+unix": (False, True), "nbds+unix": (True, True)}
"""Scheme to (TLS, Unix socket)."""
_HARMLESS: Final = "/@:,"
_TLS_TYPES: Final = ("anon", "x509", "psk")


@dataclass(frozen=True, kw_only=True)
class NbdUri:
    """Where an export is. Either `socket` is set (a path), or `host` and `port` count."""

    export: str = ""
    host: str = "localhost"
    port: int = DEFAULT_PORT
    socket: str | None = None
    """Path of the Unix socket; bytes that are not UTF-8 as os.fsdecode gives them; a leading NUL = abstract."""
    tls: bool = False
    username: str | None = None
    tls_type: str | None = None
    tls_hostname: str | None = None
    tls_verify_peer: bool | None = None
    tls_certificates: str | None = None
    """Folder of ca-cert.pem and, for clients that show one, client-cert.pem and client-key.pem, as libnbd has it."""

    @classmethod
    def parse(cls, text: str) -> NbdUri:
        """The URI in `text`; raises ValueError with a sentence that says what is wrong with it."""
        try:
            return _parse(text)
        except ValueError as error:
            raise ValueError(f"'{text}' is no NBD URI: {error}") from None

    def with_tls(self, certificates: str | None, hostname: str | None) -> NbdUri:
        """The same, with what it leaves open of TLS; a URI without TLS stays without."""
        if not self.tls:
            return self
        return replace(
            self,
            tls_certificates=self.tls_certificates or certificates,
            tls_hostname=self.tls_hostname or hostname,
        )

    def __str__(self) -> str:
        scheme = ("nbds" if self.tls else "nbd") + ("+unix" if self.socket is not None else "")
        user = "" if self.username is None else quote(self.username, safe="") + "@"
        authority = user
        if self.socket is None:
            host = f"[{self.host}]" if ":" in self.host else quote(self.host, safe="")
            authority += host + ("" if self.port == DEFAULT_PORT else f":{self.port}")
        parameters = {
            "socket": self.socket,
            "tls-type": self.tls_type,
            "tls-hostname": self.tls_hostname,
            "tls-verify-peer": None if self.tls_verify_peer is None else str(int(self.tls_verify_peer)),
            "tls-certificates": self.tls_certificates,
        }
        query = "&".join(f"{key}={_quote(value)}" for key, value in parameters.items() if value is not None)
        return f"{scheme}://{authority}/{_quote(self.export)}" + (f"?{query}" if query else "")


def _parse(text: str) -> NbdUri:
    parts = urlsplit(text)
    if parts.scheme not in _SCHEMES:
        raise ValueError(f"its scheme is none of {', '.join(_SCHEMES)}")
    if not text[len(parts.scheme) :].startswith("://"):
        raise ValueError("'://' is missing behind the scheme")
    if parts.fragment or text.endswith("#"):
        raise ValueError("a '#' in a name is written %23")
    tls, unix = _SCHEMES[parts.scheme]
    parameters = _parameters(parts.query)
    socket = parameters.get("socket")
    if unix and not socket:
        raise ValueError("a parameter 'socket=PATH' is missing")
    if unix and (parts.hostname or parts.netloc.rpartition("@")[2]):
        raise ValueError(f"'{parts.netloc}' stands where a Unix socket has no host; is a '/' missing?")
    if not unix and socket is not None:
        raise ValueError(f"'socket=' goes with the scheme {parts.scheme}+unix")
    host, port = _host_and_port(parts)
    return NbdUri(
        export=_export(parts.path),
        host=host,
        port=port,
        socket=socket,
        tls=tls,
        username=None if parts.username is None else unquote(parts.username),
        tls_type=_one_of(parameters, "tls-type", _TLS_TYPES),
        tls_hostname=parameters.get("tls-hostname"),
        tls_certificates=parameters.get("tls-certificates"),
        tls_verify_peer={None: None, "0": False, "1": True}[_one_of(parameters, "tls-verify-peer", ("0", "1"))],
    )


def _parameters(query: str) -> dict[str, str]:
    """The query's parameters. A plus sign is a plus sign: this is no HTML form."""
    known = ("socket", "tls-type", "tls-hostname", "tls-verify-peer", "tls-certificates")
    found: dict[str, str] = {}
    for part in filter(None, query.split("&")):
        key, _, value = part.partition("=")
        if key in found:
            raise ValueError(f"the parameter '{key}' appears twice")
        if key not in known:
            # "Any other query parameters which the client does not understand SHOULD be diagnosed"
            raise ValueError(f"the parameter '{key}' is not known; known are {', '.join(known)}")
        found[key] = unquote(value, errors="surrogateescape")
    return found


def _one_of(parameters: dict[str, str], key: str, allowed: tuple[str, ...]) -> str | None:
    value = parameters.get(key)
    if value is not None and value not in allowed:
        raise ValueError(f"{key}={value} is none of {', '.join(allowed)}")
    return value


def _host_and_port(parts: SplitResult) -> tuple[str, int]:
    port = parts.port  # ValueError when it is none
    if port == 0:
        raise ValueError("port 0 cannot be connected to")
    return unquote(parts.hostname or "localhost"), DEFAULT_PORT if port is None else port


def _export(path: str) -> str:
    """The name in the path: "the path part of the URI except for the leading `/` character"."""
    try:
        name = unquote(path.removeprefix("/"), errors="strict")
    except UnicodeDecodeError:
        raise ValueError("the export name is not UTF-8") from None
    if "\0" in name:
        raise ValueError("an export name cannot contain NUL")
    if len(name.encode()) > MAX_STRING:
        raise ValueError(f"the export name is above the limit of {MAX_STRING} bytes")
    return name


def _quote(text: str) -> str:
    return quote(text, safe=_HARMLESS, errors="surrogateescape")
