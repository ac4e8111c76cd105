"""Lines for systemd's journal in its native protocol: fields by name, a datagram a line.

https://systemd.io/JOURNAL_NATIVE_PROTOCOL/: a field is "NAME=value\\n", or where the value has a newline "NAME\\n", its
length in 64 bits, little-endian, the value, "\\n". A message that is too long for a datagram goes in a sealed memory
file whose descriptor is passed.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import socket
import struct
from typing import TextIO

from fleecing.events import event_of, fields_of

SOCKET = "/run/systemd/journal/socket"

SECONDS = 1.0
"""How long a line may wait for a journal that takes nothing; then it goes to stderr."""

# syslog(3)
_PRIORITIES = ((logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6), (logging.DEBUG, 7))
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL


class JournalHandler(logging.StreamHandler[TextIO]):
    """Writes to the journal, and what that does not take to `stream`, as text."""

    def __init__(self, stream: TextIO, path: str | None = None) -> None:
        super().__init__(stream)
        self._path = path or SOCKET
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.settimeout(SECONDS)

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._send(_datagram(self._fields(record)))
        except OSError:
            super().emit(record)
        except Exception:
            self.handleError(record)

    def _fields(self, record: logging.LogRecord) -> dict[str, str]:
        message = record.getMessage()
        if record.exc_info:
            message = f"{message}\n{logging.Formatter().formatException(record.exc_info)}"
        fields = {
            "MESSAGE": message,
            "PRIORITY": str(next((p for level, p in _PRIORITIES if record.levelno >= level), 7)),
            "SYSLOG_IDENTIFIER": "fleecing",
            "LOGGER": record.name,
            "CODE_FILE": record.pathname,
            "CODE_LINE": str(record.lineno),
            "CODE_FUNC": record.funcName or "",
        }
        event = event_of(record)
        if event is not None:
            fields |= {"EVENT": str(event), **{name.upper(): str(value) for name, value in fields_of(record).items()}}
        return fields

    def _send(self, datagram: bytes) -> None:
        try:
            self._socket.sendto(datagram, self._path)
        except OSError as e:
            if e.errno not in (errno.EMSGSIZE, errno.ENOBUFS):
                raise
            self._send_file(datagram)

    def _send_file(self, datagram: bytes) -> None:
        fd = os.memfd_create("fleecing-journal", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            with os.fdopen(os.dup(fd), "wb") as file:
                file.write(datagram)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
            passed = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("i", fd))]
            self._socket.sendmsg([], passed, 0, self._path)
        finally:
            os.close(fd)

    def close(self) -> None:
        self._socket.close()
        super().close()


def _datagram(fields: dict[str, str]) -> bytes:
    parts = []
    for name, text in fields.items():
        value = text.encode("utf-8", "backslashreplace")
        if b"\n" in value:
            parts.append(name.encode() + b"\n" + struct.pack("<Q", len(value)) + value + b"\n")
        else:
            parts.append(name.encode() + b"=" + value + b"\n")
    return b"".join(parts)
