"""The demo's server: `fleecing serve` as a child process, ended and reaped whatever happens."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from collections import deque
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import fleecing
from fleecing.control.daemon import READY
from fleecing.errors import ConfigError

DISK: Final = "demo"

_START_SECONDS: Final = 60.0
_STOP_SECONDS: Final = 30.0
_KEPT_LINES: Final = 5


class DemoServer:
    """Serves `image` as the disk DISK on two sockets in `folder`, with its state there; what it says goes to a log."""

    def __init__(self, image: Path, folder: Path, *, cluster_size: int) -> None:
        self.socket = folder / "nbd.sock"
        self.control = folder / "control.sock"
        self.log = folder / "server.log"
        arguments = {
            "--name": DISK,
            "--unix": self.socket,
            "--control": self.control,
            "--state-dir": folder / "state",
            "--cluster-size": cluster_size,
        }
        options = [str(word) for pair in arguments.items() for word in pair]
        self.command = [*_with_parent(), sys.executable, "-P", "-m", "fleecing", "serve", str(image), *options]
        self._process: subprocess.Popen[str] | None = None
        self._said = threading.Event()
        self._is_ready = False
        self._last_lines: deque[str] = deque(maxlen=_KEPT_LINES)
        self._listener = threading.Thread(target=self._listen, name="server's stderr", daemon=True)

    def __enter__(self) -> Self:
        """Returns when the server answers. Raises ConfigError with what it said where it does not come up."""
        # The package may be a folder that is not installed: the child imports it from where this process did.
        package = str(Path(fleecing.__file__).parent.parent)
        path = os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))
        self._process = subprocess.Popen(
            self.command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            env={**os.environ, "PYTHONPATH": path},
            start_new_session=True,  # Ctrl-C on the terminal is for the demo, which then ends the server in order
        )
        self._listener.start()
        try:
            if not self._said.wait(_START_SECONDS) or not self._is_ready:
                self.stop()
                raise ConfigError("the server did not start: " + (" / ".join(self._last_lines) or "it said nothing"))
        except KeyboardInterrupt:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def stop(self) -> int:
        """SIGTERM, and SIGKILL where that does not end it in time; the exit code, minus the signal that ended it."""
        assert self._process is not None
        self._process.terminate()
        try:
            code = self._process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            code = self._process.wait()
        self._listener.join(_STOP_SECONDS)
        return code

    def _listen(self) -> None:
        """In a thread: keep what the server says, and see when it is ready or has ended."""
        assert self._process is not None and self._process.stderr is not None
        with self._process.stderr as lines, self.log.open("w") as log:
            for line in lines:
                log.write(line)
                self._last_lines.append(line.strip())
                if line.strip() == READY:
                    self._is_ready = True
                    self._said.set()
        self._said.set()


def _with_parent() -> list[str]:
    """In front of the command: ends the server by SIGTERM when this process is killed (prctl(2), PR_SET_PDEATHSIG)."""
    setpriv = shutil.which("setpriv")
    return [] if setpriv is None else [setpriv, "--pdeathsig", "TERM"]
