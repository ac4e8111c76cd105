"""Where a running server is reached, and what to paste into the programs that use it."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from fleecing.nbd.uri import NbdUri

_ANY = {"0.0.0.0": "127.0.0.1", "::": "::1"}
"""A server on all addresses is named by one that every client on its machine can use."""


@dataclass(frozen=True)
class Addresses:
    """The listeners as they are: real ports, absolute paths."""

    tcp: tuple[tuple[str, int], ...]
    unix: tuple[str, ...]
    control: str
    tls_tcp: frozenset[tuple[str, int]] = frozenset()
    """Those of `tcp` that take no client without TLS."""
    tls_unix: bool = False
    """The same of all of `unix`."""
    tls_dir: str | None = None

    def listeners(self) -> list[str]:
        """As "tcp:HOST:PORT" and "unix:PATH"."""
        return [f"tcp:{_host(host)}:{port}" for host, port in self.tcp] + [f"unix:{path}" for path in self.unix]

    def uris(self, export: str) -> list[str]:
        """NBD URIs of an export, those over Unix sockets first."""
        by_path = [NbdUri(export=export, socket=path, tls=self.tls_unix) for path in self.unix]
        by_host = [
            NbdUri(export=export, host=_ANY.get(host, host), port=port, tls=(host, port) in self.tls_tcp)
            for host, port in self.tcp
        ]
        return [str(uri) for uri in by_path + by_host]


def _host(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def paste_lines(disks: Sequence[str], addresses: Addresses, program: str) -> Iterator[str]:
    """What an operator does next, one shell command or argument a line."""
    for number, disk in enumerate(disks):
        snapshot = ["snapshot", "create", disk, "--control", addresses.control]
        yield f"Disk {disk}:"
        yield f"  QEMU       {shlex.join(_qemu(disk, addresses))}"
        for client in _nbd_clients(disk, addresses, f"/dev/nbd{number}"):
            yield f"  kernel     {shlex.join(client)}"
        yield f"  snapshot   {program} {shlex.join(snapshot)}"


def _qemu(disk: str, addresses: Addresses) -> list[str]:
    """QEMU's arguments. With TLS its URIs do not do: they have no scheme for it."""
    uri = NbdUri.parse(addresses.uris(disk)[0])
    credentials: list[str] = []
    if uri.tls:
        credentials = ["-object", f"tls-creds-x509,id=tls,endpoint=client,dir={_value(addresses.tls_dir or '')}"]
        place = (
            [f"file.server.type=inet,file.server.host={uri.host}", f"file.server.port={uri.port}"]
            if uri.socket is None
            else [f"file.server.type=unix,file.server.path={_value(uri.socket)}"]
        )
        file = ["file.driver=nbd", *place, f"file.export={disk}", "file.tls-creds=tls"]
    else:
        file = [f"file={_value(str(uri))}"]
    # reconnect-delay: a server that is restarted within that many seconds costs the guest no error.
    return [*credentials, "-drive", ",".join([*file, "file.reconnect-delay=30,format=raw,if=virtio,discard=unmap"])]


def _value(text: str) -> str:
    """QEMU: "," ends an option, ",," is a comma in its value."""
    return text.replace(",", ",,")


def _nbd_clients(disk: str, addresses: Addresses, device: str) -> Iterator[list[str]]:
    """The kernel's client, by the first Unix socket and by the first port."""
    authority = ["-cacertfile", f"{addresses.tls_dir}/ca-cert.pem"]
    for path in addresses.unix[:1]:
        yield ["nbd-client", "-unix", path, device, "-name", disk, *(authority if addresses.tls_unix else [])]
    for host, port in addresses.tcp[:1]:
        tls = authority if (host, port) in addresses.tls_tcp else []
        yield ["nbd-client", _ANY.get(host, host), str(port), device, "-name", disk, *tls]
