"""A command of the operator's, run by the shell with a limit of time.

What it leaves in the background when it ends well goes on: a database may hold its locks only as long as a client does.
"""

from __future__ import annotations

import os
import selectors
import signal
import subprocess
import time
from collections.abc import Mapping

from fleecing.control.guest_agent import HookError

TAIL = 1000
"""Bytes of what it wrote that are told where it fails."""

KILL_SECONDS = 10.0
"""How long a killed one may take to end: it cannot while the kernel has it wait for a disk, maybe for ours."""


class HookCommand:
    """One run of it, in a session of its own: a Ctrl-C for the server is none for it. `abort` is for any thread."""

    def __init__(self, command: str, environ: Mapping[str, str], seconds: float) -> None:
        """Start it. Raises HookError."""
        self._command = command
        self._seconds = seconds
        try:
            self._process = subprocess.Popen(
                ["/bin/sh", "-c", command],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env={**os.environ, **environ},
                start_new_session=True,
            )
        except OSError as e:
            raise HookError(f"the command '{command}' cannot be run: {e.strerror}") from None

    def wait(self) -> None:
        """Returns when it has ended well. Raises HookError where it failed, or took too long and was killed."""
        process = self._process
        assert process.stdout is not None
        tail = b""
        end = time.monotonic() + self._seconds
        ended = os.pidfd_open(process.pid)
        try:
            with process.stdout as output, selectors.DefaultSelector() as selector:
                os.set_blocking(output.fileno(), False)
                selector.register(ended, selectors.EVENT_READ)
                selector.register(output, selectors.EVENT_READ)
                while not any(key.fd == ended for key, _ in selector.select(max(0.0, end - time.monotonic()))):
                    if time.monotonic() >= end:
                        raise HookError(f"the command '{self._command}' took more than {self._seconds:g} s: killed")
                    data = output.read(65536)
                    if data == b"":
                        selector.unregister(output)  # it closed its output, and may go on
                    tail = (tail + (data or b""))[-TAIL:]
                tail = (tail + (output.read(65536) or b""))[-TAIL:]
        except BaseException:
            self.abort()
            raise
        finally:
            os.close(ended)
            code = self._end()
        if code:
            said = " ".join(tail.decode("utf-8", "replace").split())
            ending = f"was ended by signal {-code}" if code < 0 else f"failed with exit code {code}"
            raise HookError(f"the command '{self._command}' {ending}{': ' if said else ''}{said}")

    def _end(self) -> int:
        try:
            return self._process.wait(KILL_SECONDS)
        except subprocess.TimeoutExpired:
            said = f"the command '{self._command}', process {self._process.pid}, was killed and does not end"
            raise HookError(said) from None

    def abort(self) -> None:
        """Kill it, with all that it started. It is no harm where it has ended."""
        if self._process.returncode is not None:
            return
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            pass
