"""Who a client is: what the system tells of its socket, and what TLS tells of its certificate."""

from __future__ import annotations

import socket
import ssl
import struct
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Final, cast

_CREDENTIALS: Final = struct.Struct("iII")
"""struct ucred, unix(7): pid, uid, gid."""

_SO_PEERGROUPS: Final = 59
"""Linux 4.13 and later, <asm-generic/socket.h>; Python does not name it."""

_MOST_GROUPS: Final = 256
"""As many as getsockopt takes from Python."""

Attribute = tuple[str, str]
"""(type, value) of a part of a name, the type as OpenSSL's long name: ("commonName", "backup")."""

DistinguishedName = tuple[frozenset[Attribute], ...]
"""From the root on, as certificates have it: the last part is nearest to the one that is named."""


@dataclass(frozen=True)
class Certificate:
    """What the authority says of a client."""

    subject: DistinguishedName = ()
    names: frozenset[Attribute] = frozenset()
    """Subject alternative names: (type as `ssl` names it, value), for instance ("DNS", "backup.example")."""

    @classmethod
    def of(cls, described: ssl._PeerCertRetDictType) -> Certificate:
        """From what `ssl` makes of a certificate that it has verified."""
        subject = cast(tuple[tuple[Attribute, ...], ...], described.get("subject", ()))
        names = cast(tuple[tuple[str, object], ...], described.get("subjectAltName", ()))
        texts = frozenset((kind, value) for kind, value in names if isinstance(value, str))
        return cls(tuple(frozenset(part) for part in subject), texts)


@dataclass(frozen=True)
class Peer:
    """A client. What is None is not known of it: a TCP client has no user, one of a Unix socket no address."""

    address: IPv4Address | IPv6Address | None = None
    uid: int | None = None
    """The effective user of the process that connected, at that moment. 65534 for one of another user namespace."""
    groups: frozenset[int] = frozenset()
    """The effective group and the supplementary ones of that process."""
    certificate: Certificate | None = None
    """Verified; None where the client has none, or was not asked for one."""

    def __str__(self) -> str:
        """For the log."""
        known = [] if self.address is None else [str(self.address)]
        if self.uid is not None:
            known.append(f"user {self.uid}")
        if self.certificate is not None:
            names = (value for part in self.certificate.subject for kind, value in part if kind == "commonName")
            known.append(f"certificate {next(names, 'without a common name')!r}")
        return ", ".join(known) or "unknown"


def peer_of(sock: socket.socket) -> Peer:
    """Who is at the other end of a connected socket. A client that is gone already is nobody in particular."""
    try:
        if sock.family == socket.AF_UNIX:
            return _local_peer(sock)
        return Peer(address=plain_address(sock.getpeername()[0]))
    except (OSError, ValueError):
        return Peer()


def plain_address(text: str) -> IPv4Address | IPv6Address:
    """The address without its zone; an IPv4 one that came through an IPv6 socket is the IPv4 one. Raises ValueError."""
    address = ip_address(text.partition("%")[0])
    return (address.ipv4_mapped or address) if isinstance(address, IPv6Address) else address


def _local_peer(sock: socket.socket) -> Peer:
    _, uid, gid = _CREDENTIALS.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
    return Peer(uid=uid, groups=frozenset((gid, *_supplementary_groups(sock))))


def _supplementary_groups(sock: socket.socket) -> tuple[int, ...]:
    """None where the system does not tell them (an older kernel, or too many): who has fewer may do less."""
    try:
        raw = sock.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, 4 * _MOST_GROUPS)
    except OSError:
        return ()
    return struct.unpack(f"{len(raw) // 4}I", raw)
