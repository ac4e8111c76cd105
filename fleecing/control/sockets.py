"""Listening sockets: TCP addresses, and Unix sockets as files that a dead server may have left behind."""

from __future__ import annotations

import os
import socket
import stat

from fleecing.errors import ConfigError

# unix(7): sun_path has 108 bytes, the last one is the terminating zero
MAX_PATH = 107

BACKLOG = 128
"""Clients that may wait to be accepted."""

_PROBE_SECONDS = 5.0


def check_socket_path(path: str) -> str:
    """The same path if the system can bind it. Raises ValueError where it is too long."""
    length = len(os.fsencode(path))
    if length > MAX_PATH:
        raise ValueError(f"socket path {path} has {length} bytes and the system allows {MAX_PATH}: give a shorter one")
    return path


def bind_tcp(host: str, port: int) -> list[socket.socket]:
    """Listening sockets on every address of `host`; port 0 takes a free one, the same on all of them.

    0.0.0.0 is every IPv4 address, :: every IPv6 one. Raises ConfigError.
    """
    where = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    listeners: list[socket.socket] = []
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, address in dict.fromkeys((family, address[0]) for family, _, _, _, address in found):
            listeners.append(socket.create_server((str(address), port), family=family, backlog=BACKLOG))
            port = listeners[0].getsockname()[1]
    except OSError as e:
        for listener in listeners:
            listener.close()
        # socket.create_server puts the address into its text
        reason = os.strerror(e.errno) if e.errno and e.errno > 0 else e.strerror
        raise ConfigError(
            f"cannot listen on {where}: {reason}; give another address, port 0 takes any free port"
        ) from None
    return listeners


def bind_unix(path: str, mode: int = 0o600, group: int | None = None) -> socket.socket:
    """A listening Unix socket with these permissions, and of this group instead of the process's own.

    It is bound for this user alone (mode 0600 from the first moment on), and nobody can connect before all is set: it
    listens last. Raises ConfigError.
    """
    clear_socket_path(path, mode)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    before = os.umask(0o177)
    try:
        listener.bind(path)
    except OSError as e:
        listener.close()
        raise ConfigError(f"cannot listen on socket {path}: {e.strerror}") from None
    finally:
        os.umask(before)
    try:
        if group is not None:
            os.chown(path, -1, group, follow_symlinks=False)
        os.chmod(path, mode)
        listener.listen(BACKLOG)
    except OSError as e:
        listener.close()
        remove_socket(path)
        what = f"mode {mode:04o}" + ("" if group is None else f" and group {group}")
        raise ConfigError(
            f"socket {path} cannot be given {what}: {e.strerror}; the server's user must be root or of that group"
        ) from None
    return listener


def clear_socket_path(path: str, mode: int = 0o600) -> None:
    """Make `path` free to bind: its folder is there, and a socket that a dead server left behind is gone.

    A folder that has to be made can be passed by whom a socket of that `mode` is for. Raises ConfigError where a server
    answers on it, where it is no socket, and where the folder cannot be made.
    """
    _make_parent(path, 0o700 if mode & 0o077 == 0 else 0o711)
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise ConfigError(f"{path} is there and is no socket: remove it or give another path")
    if _answers(path):
        raise ConfigError(f"socket {path} is in use by a running server: stop that one or give another path")
    os.unlink(path)


def remove_socket(path: str) -> None:
    """Take the socket's file away; no harm where it is gone."""
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass


def _make_parent(path: str, mode: int) -> None:
    parent = os.path.dirname(os.path.abspath(path))
    try:
        os.makedirs(parent, mode=mode, exist_ok=True)
    except OSError as e:
        raise ConfigError(f"folder {parent} of socket {path} cannot be made: {e.strerror}") from None
    if not os.access(parent, os.W_OK | os.X_OK):
        raise ConfigError(f"folder {parent} of socket {path} is not writable")


def _answers(path: str) -> bool:
    """Whether a process listens there. A busy one whose backlog is full listens, too."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(_PROBE_SECONDS)
        try:
            probe.connect(path)
        except (ConnectionRefusedError, FileNotFoundError):
            return False
        except OSError:
            return True
    return True
