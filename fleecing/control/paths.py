"""Where things lie when nobody says otherwise (XDG Base Directory Specification; /run and /var/lib for root)."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping

from fleecing.errors import ConfigError


def runtime_dir(environ: Mapping[str, str] = os.environ) -> str:
    """The folder for sockets.

    "If $XDG_RUNTIME_DIR is not set applications should fall back to a replacement directory with similar
    capabilities": one in /tmp that belongs to this user. Raises ConfigError where somebody else owns that one.
    """
    user = os.geteuid()
    if user == 0:
        return "/run/fleecing"
    if base := environ.get("XDG_RUNTIME_DIR"):
        return os.path.join(base, "fleecing")
    path = f"/tmp/fleecing-{user}"
    if os.path.lexists(path) and os.lstat(path).st_uid != user:
        raise ConfigError(f"{path} belongs to somebody else: set XDG_RUNTIME_DIR to a folder of your own")
    return path


def default_control_path(environ: Mapping[str, str] = os.environ) -> str:
    """The control socket: $FLEECING_CONTROL, else control.sock in the runtime folder."""
    return environ.get("FLEECING_CONTROL") or os.path.join(runtime_dir(environ), "control.sock")


def default_unix_path(environ: Mapping[str, str] = os.environ) -> str:
    """The NBD socket of a server that was told of no listener."""
    return os.path.join(runtime_dir(environ), "nbd.sock")


def default_state_dir(environ: Mapping[str, str] = os.environ) -> str:
    """The state folder: /var/lib/fleecing as root, else $XDG_STATE_HOME/fleecing."""
    if os.geteuid() == 0:
        return "/var/lib/fleecing"
    base = environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    return os.path.join(base, "fleecing")


def make_folder(path: str, what: str) -> None:
    """Make the folder, which only its owner may enter (not so its parents); check that files can be made in it.

    `what` names it in the sentence of the ConfigError: "state folder", "temp folder".
    """
    try:
        os.makedirs(path, mode=0o700, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise ConfigError(f"{what} {path} is no folder: a file of that name is in the way") from None
    except OSError as e:
        raise ConfigError(f"{what} {path} cannot be made: {e.strerror}") from None
    try:
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as e:
        raise ConfigError(f"{what} {path} is not writable ({e.strerror}): allow it or name another one") from None
