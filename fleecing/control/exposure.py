"""What a configuration leaves open: a sentence for each thing that others can reach, read or change.

Nothing is opened and nothing changed; files and folders that are not there yet are no concern (the server makes its own
for its user alone).
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from ipaddress import ip_address

from fleecing.control.access import AccessRule, make_policy
from fleecing.control.accounts import group_id
from fleecing.control.certificates import AUTHORITIES, CERTIFICATE, KEY
from fleecing.control.config import ServerSettings, TcpAddress
from fleecing.nbd.conversation import TlsMode
from fleecing.server.access import Access
from fleecing.server.peer import Peer

_LOCAL, _LOCAL_6 = ip_address("127.0.0.1"), ip_address("::1")
_ANYBODY, _ANYBODY_6 = ip_address("192.0.2.1"), ip_address("2001:db8::1")  # RFC 5737, RFC 3849: nobody's
_SOME_SNAPSHOT = "@some-snapshot"
_FOREIGN_KEY = "ca-key.pem"


def open_ends(settings: ServerSettings, path: str) -> list[str]:
    """All that is open with these settings, which the file at `path` has."""
    return [
        *_tcp(settings),
        *_unix(settings),
        *_metrics(settings),
        *_rules(settings.access or (), list(settings.disk)),
        *_tls_files(settings),
        *_folders(settings),
        *_images(settings),
        *_file(path, "configuration", 0o022, "change who may do what"),
    ]


# Listeners.


def _tcp(settings: ServerSettings) -> Iterator[str]:
    for address in settings.listen:
        mode = settings.tls_of(address)
        who = "every user of this machine" if address.is_loopback else "whoever reaches it"
        can = _can(settings, _stranger(address))
        if mode is TlsMode.OFF and not address.is_loopback:
            yield f"{address} has no TLS: whoever can listen to the network reads all that is sent; require TLS there"
        if mode is TlsMode.ALLOW:
            yield f"{address} takes clients without TLS, too: require it"
        if can and mode is TlsMode.OFF:
            yield f"{address} does not ask who a client is: {who} {can}"
        elif can and not settings.tls_verify_client:
            yield f"{address} asks clients for no certificate: {who} {can}; give tls-verify-client"


def _stranger(address: TcpAddress) -> Peer:
    """A client of this listener of whom no more is known."""
    choice = (_LOCAL, _LOCAL_6) if address.is_loopback else (_ANYBODY, _ANYBODY_6)
    return Peer(address=choice[":" in address.host])


def _unix(settings: ServerSettings) -> Iterator[str]:
    mode = int(settings.unix_mode, 8)
    if settings.unix and settings.tls_unix is TlsMode.ALLOW:
        yield 'the Unix sockets take clients without TLS, too (tls-unix = "allow"): require it'
    for path in settings.unix:
        if mode & 0o002 and (can := _can(settings, Peer())):
            yield f"every user of this machine may connect to {path} (unix-mode {settings.unix_mode}) and {can}"
        elif mode & 0o020 and (can := _can(settings, _member(settings))):
            group = "the server's group" if settings.unix_group is None else f"group {settings.unix_group}"
            yield f"every member of {group} may connect to {path} (unix-mode {settings.unix_mode}) and {can}"
    for path in (*settings.unix, settings.control):
        yield from _folder(os.path.dirname(path), f"the folder of socket {path}", 0o022, may_be_sticky=True)
    if settings.control_group is not None:
        yield f"every member of group {settings.control_group} may do everything over the control socket, rules or not"


def _metrics(settings: ServerSettings) -> Iterator[str]:
    for address in settings.metrics:
        if not address.is_loopback:
            yield f"metrics on {address}: whoever reaches it learns the names of disks and snapshots, and what they do"


def _member(settings: ServerSettings) -> Peer:
    group = os.getegid() if settings.unix_group is None else group_id(settings.unix_group)
    return Peer(groups=frozenset({group}))


def _can(settings: ServerSettings, peer: Peer) -> str:
    """What a client of whom no more is known may do, or "" where that is nothing."""
    if settings.access is None:
        return "may read and write all disks: there are no access rules"
    policy = make_policy(settings.access)
    for access, words in ((Access.WRITE, "may write"), (Access.TRIM, "may trim"), (Access.READ, "may read")):
        names = [
            name for disk in settings.disk for name in (disk, disk + _SOME_SNAPSHOT) if access in policy(peer, name)
        ]
        if names:
            return f"{words} {_exports(names)}"
    return ""


def _exports(names: Sequence[str]) -> str:
    return ", ".join(name.replace(_SOME_SNAPSHOT, "@SNAPSHOT") for name in names)


# Rules.


def _rules(rules: Sequence[AccessRule], disks: Sequence[str]) -> Iterator[str]:
    for number, rule in enumerate(rules, 1):
        if Access.WRITE in rule.access and rule.is_for_everybody():
            yield f"access rule {number} lets everybody who gets in write {', '.join(rule.export)}: say whom it is for"
        for pattern in rule.export:
            if not any(_may_fit(pattern, disk) for disk in disks):
                yield f"access rule {number}: '{pattern}' fits no disk: there are {', '.join(disks)}"


def _may_fit(pattern: str, disk: str) -> bool:
    """Whether the pattern fits the disk, or can fit a snapshot of it."""
    if _rests(pattern, disk) & {"", "*"}:
        return True
    return any(rest and "@" not in rest for rest in _rests(pattern, f"{disk}@"))


def _rests(pattern: str, text: str) -> set[str]:
    """What may be left of the pattern when it has taken all of the text."""
    rests = {pattern}
    for character in text:
        rests = {rest for before in rests for rest in _step(before, character)}
    return rests | {rest.lstrip("*") for rest in rests}


def _step(pattern: str, character: str) -> set[str]:
    after = pattern.lstrip("*")
    taken = {after[1:]} if after and after[0] in ("?", character) else set()
    return taken | {pattern} if after != pattern else taken


# Files.


def _tls_files(settings: ServerSettings) -> Iterator[str]:
    if settings.tls_dir is None:
        return
    yield from _folder(settings.tls_dir, "tls-dir", 0o022)
    yield from _file(os.path.join(settings.tls_dir, KEY), "the private key", 0o066, "be this server for its clients")
    for name in (CERTIFICATE, AUTHORITIES):
        yield from _file(os.path.join(settings.tls_dir, name), "the certificate", 0o022, "say whom to trust")
    if os.path.exists(authority := os.path.join(settings.tls_dir, _FOREIGN_KEY)):
        yield f"{authority} can make certificates for everybody: keep it on another machine"


def _folders(settings: ServerSettings) -> Iterator[str]:
    yield from _folder(settings.state_dir, "state-dir", 0o066)
    for path in settings.temp_dir:
        yield from _folder(path, "temp-dir", 0o066)


def _images(settings: ServerSettings) -> Iterator[str]:
    """Of a group's access nothing is said: block devices belong to one."""
    for name, disk in settings.disk.items():
        if found := _granted(disk.path, 0o006):
            yield f"disk {name}: every user of this machine can {found} {disk.path}, whatever is allowed here; chmod it"


def _folder(path: str, what: str, bits: int, *, may_be_sticky: bool = False) -> Iterator[str]:
    """A sticky folder, as /tmp is, lets nobody replace what others have in it."""
    if (found := _granted(path, bits)) and not (may_be_sticky and os.stat(path).st_mode & stat.S_ISVTX):
        yield f"{what}, {path}: others can {found} there; take a folder of its own, with mode 0700"


def _file(path: str, what: str, bits: int, consequence: str) -> Iterator[str]:
    if found := _granted(path, bits):
        yield f"{what} {path}: others can {found} it, and then {consequence}; chmod it"


def _granted(path: str, bits: int) -> str:
    """What of these bits others than the owner have: "read", "write", "read and write", or "".

    Nothing where a folder above keeps them out.
    """
    try:
        mode = os.stat(path).st_mode & bits
        if not mode or not _can_be_reached(path, mode):
            return ""
    except OSError:
        return ""
    words = [word for mask, word in ((0o044, "read"), (0o022, "write")) if mode & mask]
    return " and ".join(words)


def _can_be_reached(path: str, mode: int) -> bool:
    """Whether those who have these bits of the path can pass all folders above it."""
    passing = 0o001 if mode & 0o007 else 0o011
    folder = os.path.dirname(os.path.realpath(path))
    while stat.S_IMODE(os.stat(folder).st_mode) & passing:
        if folder == os.path.dirname(folder):
            return True
        folder = os.path.dirname(folder)
    return False
