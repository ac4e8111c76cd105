"""Listening sockets that systemd made and keeps (sd_listen_fds(3)): clients wait in them while the server restarts.

LISTEN_FDS descriptors begin at 3; LISTEN_FDNAMES has their names. "control" is the control socket, every other one is
for NBD clients.
"""

from __future__ import annotations

import os
import socket
from collections.abc import MutableMapping
from contextlib import ExitStack
from dataclasses import dataclass

from fleecing.errors import ConfigError

CONTROL_NAME = "control"

_FIRST = 3  # SD_LISTEN_FDS_START
_FAMILIES = (socket.AF_INET, socket.AF_INET6, socket.AF_UNIX)


@dataclass(frozen=True)
class Inherited:
    """The sockets that were there before the server."""

    nbd: tuple[socket.socket, ...] = ()
    control: socket.socket | None = None

    def takes(self, path: str) -> bool:
        """Whether one of the NBD sockets is bound to `path`."""
        return any(s.family == socket.AF_UNIX and os.path.abspath(s.getsockname()) == path for s in self.nbd)


def take_sockets(environ: MutableMapping[str, str] = os.environ, *, first: int = _FIRST) -> Inherited:
    """The sockets that are meant for this process, once; its children do not get them. Raises ConfigError."""
    pid, count = environ.pop("LISTEN_PID", ""), environ.pop("LISTEN_FDS", "")
    names = environ.pop("LISTEN_FDNAMES", "").split(":")
    if pid != str(os.getpid()) or not (count.isascii() and count.isdecimal()):
        return Inherited()
    nbd: list[socket.socket] = []
    control: list[socket.socket] = []
    with ExitStack() as failed:
        for index in range(int(count)):
            name = names[index] if index < len(names) else ""
            taken = failed.enter_context(_take(first + index, name or "unnamed"))
            (control if name == CONTROL_NAME else nbd).append(taken)
        if len(control) > 1:
            raise ConfigError("systemd passes two sockets of the name 'control': a server has one control socket")
        if control and control[0].family != socket.AF_UNIX:
            raise ConfigError("systemd passes a control socket that is no Unix socket: the API is for this machine")
        failed.pop_all()
    return Inherited(tuple(nbd), control[0] if control else None)


def _take(fd: int, name: str) -> socket.socket:
    wrong = f"systemd passes '{name}' (descriptor {fd}), which is no listening stream socket: use ListenStream="
    try:
        os.set_inheritable(fd, False)
        taken = socket.socket(fileno=fd)
        kind = taken.getsockopt(socket.SOL_SOCKET, socket.SO_TYPE)
        listens = taken.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        bound = taken.family != socket.AF_UNIX or isinstance(taken.getsockname(), str)
    except OSError:
        raise ConfigError(wrong) from None
    if kind != socket.SOCK_STREAM or not listens or taken.family not in _FAMILIES or not bound:
        taken.close()
        raise ConfigError(wrong)
    return taken
