"""The errors of Fleecing, and who must do what about each.

    FleecingError
     +-- ProtocolError        the peer broke a MUST of the NBD protocol: drop the connection
     +-- RequestError         one request cannot be done: answer its NBD error and text, go on
     +-- BlockError           something below the protocol failed
     |    +-- ImageError         an image file is not what it should be
     |    +-- SnapshotBroken     the whole snapshot is dead for good; every read reports why
     |    +-- ClusterUnreadable  this cluster may not be read (trimmed, or not in the bitmap)
     |    +-- TempLimitReached   the snapshot's quota of temp space is used up
     +-- ControlError         an operator's call is refused; carries an HTTP status
     +-- ConfigError          the configuration cannot be used

A plain OSError passes through every layer: the border that answers the peer maps its errno.
Every text is one sentence that names the thing, the value and, where there is one, the way out.
"""

from __future__ import annotations


class FleecingError(Exception):
    """The root of the errors that this project raises on purpose."""


class ProtocolError(FleecingError):
    """The peer broke a MUST of the protocol; the stream cannot be trusted: drop the connection."""


class RequestError(FleecingError):
    """One request is refused; `error` is an NBD error value (NBD document, "Error values")."""

    def __init__(self, error: int, text: str) -> None:
        super().__init__(text)
        self.error = error
        self.text = text


class BlockError(FleecingError):
    """Something in the block layer failed in a way that errno has no word for."""


class ImageError(BlockError):
    """The file at `path` is not the image that it should be; `offset` in bytes, -1 = the file as a whole."""

    def __init__(self, path: str, offset: int, text: str) -> None:
        where = f" at offset {offset}" if offset >= 0 else ""
        super().__init__(f"{path}{where}: {text}")
        self.path = path
        self.offset = offset
        self.text = text


class SnapshotBroken(BlockError):
    """The snapshot can never be read again; `cause` is the first thing that went wrong."""

    def __init__(self, cause: str) -> None:
        super().__init__(f"snapshot broken: {cause}")
        self.cause = cause


class ClusterUnreadable(BlockError):
    """A cluster of a snapshot may not be read; `reason` is "trimmed" or "not in bitmap"."""

    def __init__(self, offset: int, reason: str) -> None:
        super().__init__(f"cluster at offset {offset}: {reason}")
        self.offset = offset
        self.reason = reason


class TempLimitReached(BlockError):
    """A copy would take the temp file beyond its limit (bytes)."""

    def __init__(self, limit: int) -> None:
        super().__init__(f"temp limit of {limit} bytes reached")
        self.limit = limit


class ControlError(FleecingError):
    """An operator's call is refused with this sentence; `status` is the HTTP status that goes with it."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status
        self.text = text


class ConfigError(FleecingError):
    """The configuration (file or command line) cannot be used as it is."""


def sentence(error: Exception) -> str:
    """What failed, for people: with the file that the system's error is about, and without its number."""
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}"
    return str(error)
