"""QEMU's guest agent, as far as freezing needs it: JSON lines over the Unix socket of its virtio-serial port.

    > 0xFF {"execute": "guest-sync-delimited", "arguments": {"id": N}}      forget what was sent before
    < ... 0xFF {"return": N}                                                answers to earlier ones, then this one
    > {"execute": "guest-fsfreeze-freeze"}
    < {"return": 2}                                                         file systems

(QEMU Guest Agent Protocol Reference.) The port knows no connections: what an earlier client asked for is answered to
the next one, so each connection begins with that. The agent does one command after the other; who was answered knows
that all before it are done. qemu.qmp's client is not used: it wants a greeting and gives up at the byte 0xFF.
"""

from __future__ import annotations

import json
import secrets
import socket
import time
from typing import Any

from fleecing.errors import FleecingError
from fleecing.units import MiB

MAX_LINE = MiB
"""Bytes of an answer; an agent that sends more is none."""


class HookError(FleecingError):
    """A guest, or a command of the operator's, did not do what was asked of it."""


class AgentRefused(HookError):
    """The agent answered with an error: the connection is good."""


class GuestAgent:
    """One connection. Every call raises HookError where there is no answer within `seconds`. Not for several threads,
    but for `abort`."""

    def __init__(self, path: str, seconds: float) -> None:
        self._path = path
        self._seconds = seconds
        self._pending = b""
        self._aborted = False
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)

    def connect(self) -> None:
        """Reach the agent, with nothing left of what anybody asked before."""
        end = time.monotonic() + self._seconds
        number = secrets.randbits(48)
        try:
            self._socket.settimeout(self._seconds)
            self._socket.connect(self._path)
            question = {"execute": "guest-sync-delimited", "arguments": {"id": number}}
            self._socket.sendall(b"\xff" + json.dumps(question).encode() + b"\n")
            while True:
                self._skip(b"\xff", end)
                try:
                    answer = json.loads(self._line(end))
                except ValueError:
                    continue
                if answer == {"return": number}:
                    return
        except TimeoutError:
            raise HookError(f"its agent does not answer on {self._path} within {self._seconds:g} s") from None
        except OSError as e:
            raise HookError(f"its agent cannot be reached on {self._path}: {e.strerror or e}") from None

    def freeze(self) -> int:
        """Flush and freeze all file systems; how many."""
        return self._count("guest-fsfreeze-freeze")

    def thaw(self) -> int:
        """Let them go on; how many were frozen."""
        return self._count("guest-fsfreeze-thaw")

    def is_frozen(self) -> bool:
        """Whether they are frozen by anybody."""
        return bool(self._ask("guest-fsfreeze-status") == "frozen")

    def _count(self, command: str) -> int:
        count = self._ask(command)
        if not isinstance(count, int):
            raise HookError(f"its agent answered {command} with {str(count)[:100]!r}, which is no number")
        return count

    def abort(self) -> None:
        """Have the call that is under way, and all later ones, fail now. From any thread."""
        self._aborted = True
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # not connected, or closed

    def close(self) -> None:
        """Leave the port to others; twice does no harm."""
        self._socket.close()

    def _ask(self, command: str) -> Any:
        end = time.monotonic() + self._seconds
        try:
            self._socket.settimeout(self._seconds)
            self._socket.sendall(json.dumps({"execute": command}).encode() + b"\n")
            line = self._line(end)
        except TimeoutError:
            raise HookError(f"its agent gave no answer to {command} within {self._seconds:g} s") from None
        except OSError as e:
            raise HookError(f"its agent went away during {command}: {e.strerror or e}") from None
        try:
            answer = json.loads(line)
            if "error" in answer:
                raise AgentRefused(f"its agent refused {command}: {answer['error']['desc']}")
            return answer["return"]
        except (ValueError, KeyError, TypeError):
            raise HookError(f"its agent answered {command} with what is no answer: {line[:100]!r}") from None

    def _skip(self, mark: bytes, end: float) -> None:
        while mark not in self._pending:
            self._pending = b""
            self._receive(end)
        self._pending = self._pending.partition(mark)[2]

    def _line(self, end: float) -> bytes:
        while b"\n" not in self._pending:
            if len(self._pending) > MAX_LINE:
                raise OSError("it sends more than an answer can have")
            self._receive(end)
        line, _, self._pending = self._pending.partition(b"\n")
        return line

    def _receive(self, end: float) -> None:
        left = end - time.monotonic()
        if self._aborted:
            raise ConnectionError("given up")
        if left <= 0:
            raise TimeoutError
        self._socket.settimeout(left)
        data = self._socket.recv(65536)
        if not data:
            raise ConnectionError("it hung up")
        self._pending += data
