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

    def listeners(self) -> list[str]:
        """As "tcp:HOST:PORT" and "unix:PATH"."""
        return [f"tcp:{_host(host)}:{port}" for host, port in self.tcp] + [f"unix:{path}" for path in self.unix]

    def uris(self, export: str) -> list[str]:
        """NBD URIs of an export, those over Unix sockets first."""
        by_path = [NbdUri(export=export, socket=path) for path in self.unix]
        by_host = [NbdUri(export=export, host=_ANY.get(host, host), port=port) for host, port in self.tcp]
        return [str(uri) for uri in by_path + by_host]


def _host(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def paste_lines(disks: Sequence[str], addresses: Addresses, program: str) -> Iterator[str]:
    """What an operator does next, one shell command or argument a line."""
    for number, disk in enumerate(disks):
        uri = addresses.uris(disk)[0]
        # QEMU: "," ends an option, ",," is a comma in its value
        # reconnect-delay: a server that is restarted within that many seconds costs the guest no error.
        drive = f"file={uri.replace(',', ',,')},file.reconnect-delay=30,format=raw,if=virtio,discard=unmap"
        device = f"/dev/nbd{number}"
        clients = [["nbd-client", "-unix", path, device, "-name", disk] for path in addresses.unix[:1]]
        for host, port in addresses.tcp[:1]:
            clients.append(["nbd-client", _ANY.get(host, host), str(port), device, "-name", disk])
        snapshot = ["snapshot", "create", disk, "--control", addresses.control]
        yield f"Disk {disk}:"
        yield f"  QEMU       -drive {shlex.quote(drive)}"
        for client in clients:
            yield f"  kernel     {shlex.join(client)}"
        yield f"  snapshot   {program} {shlex.join(snapshot)}"
