"""Servers and commands in forked processes (tests/forking.py) that may be killed at any moment."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from types import FrameType
from typing import Self

import fleecing
from fleecing.cli.main import main
from tests.forking import context
from tests.peers import DEADLINE

_PACKAGE = str(Path(fleecing.__file__).parent)


class _Lines:
    """Counts the lines of the package that this thread runs, as its trace function. SIGINT comes at number `stop`."""

    def __init__(self, stop: int) -> None:
        self.count = 0
        self._stop = stop

    def __call__(self, frame: FrameType, event: str, _: object) -> Self | None:
        if not frame.f_code.co_filename.startswith(_PACKAGE):
            return None
        if event == "line":
            self.count += 1
            if self.count == self._stop:
                signal.raise_signal(signal.SIGINT)
        return self


def _run(arguments: list[str], log: Connection, interrupt_at: int | None) -> None:
    """In the new process: `fleecing ARGUMENTS`, with all that it says in the pipe."""
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    log.close()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's job in the background has it ignored
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # and nohup this
    if interrupt_at is None:
        main(arguments, prog_name="fleecing")
        return
    lines = _Lines(interrupt_at)
    sys.settrace(lines)
    try:
        main(arguments, prog_name="fleecing")
    finally:
        sys.settrace(None)
        print(f"Lines: {lines.count}", file=sys.stderr, flush=True)


class ForkedCommand:
    """`fleecing ARGUMENTS` in a process of its own, which may be killed.

    `interrupt_at`: SIGINT comes when its main thread is at so many lines of the package; 0 counts them only, and the
    last line that it says is then their number ("Lines: 1234").
    """

    def __init__(self, *arguments: object, interrupt_at: int | None = None) -> None:
        reading, writing = os.pipe()
        with Connection(writing, readable=False) as log:
            self.process = context.Process(target=_run, args=([*map(str, arguments)], log, interrupt_at), daemon=True)
            self.process.start()
        self.said = ""
        self._more = threading.Condition()
        self._reader = threading.Thread(target=self._read, args=(reading,), daemon=True)
        self._reader.start()

    def _read(self, reading: int) -> None:
        with os.fdopen(reading, errors="replace") as pipe:
            for line in pipe:
                with self._more:
                    self.said += line
                    self._more.notify_all()

    def wait_for(self, text: str) -> None:
        """Until it has said this."""
        with self._more:
            assert self._more.wait_for(lambda: text in self.said, DEADLINE), self.said

    def interrupt(self, number: int = signal.SIGINT) -> None:
        """As Ctrl-C does, or another signal."""
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def kill(self) -> None:
        """kill -9, and wait until it is gone."""
        self.process.kill()
        self.wait()

    def wait(self) -> int:
        """Its exit code, minus the signal's number where one ended it; `said` is all of it then."""
        self.process.join(DEADLINE)
        code = self.process.exitcode
        assert code is not None, "the command does not end"
        self._reader.join(DEADLINE)
        assert "Traceback" not in self.said, self.said
        return code


def _serve(arguments: list[str], log: Connection) -> None:
    """In the new process: `fleecing serve ARGUMENTS`, with its log in the pipe."""
    os.dup2(log.fileno(), 2)
    log.close()
    main(["serve", *arguments], prog_name="fleecing")


def _config(folder: Path, images: Mapping[str, Path]) -> str:
    path = folder / "fleecing.toml"
    path.write_text("".join(f'[disk.{name}]\npath = "{image}"\n' for name, image in images.items()))
    return str(path)


class ForkedServer:
    """One process that serves an image ("vda"), or several by their names; its sockets and state are in `folder`.

    `listen`: HOST:PORT instead of the Unix socket.
    """

    def __init__(
        self, folder: Path, images: Path | Mapping[str, Path], *options: str, listen: str | None = None
    ) -> None:
        self.unix, self.control = folder / "n", folder / "c"  # socket paths are short
        where = ["--unix", self.unix] if listen is None else ["--listen", listen]
        places = [*where, "--control", self.control, "--state-dir", folder / "state"]
        reading, writing = os.pipe()
        with Connection(writing, readable=False) as log:
            what = [str(images), "--name", "vda"] if isinstance(images, Path) else ["--config", _config(folder, images)]
            arguments = [*what, *map(str, places), *options]
            self.process = context.Process(target=_serve, args=(arguments, log), daemon=True)
            self.process.start()
        self._lines: list[str] = []
        self._ready = threading.Event()
        self._reader = threading.Thread(target=self._read, args=(reading,), daemon=True)
        self._reader.start()

    def _read(self, reading: int) -> None:
        with os.fdopen(reading, errors="replace") as pipe:
            for line in pipe:
                self._lines.append(line)
                if line.startswith("Ready"):
                    self._ready.set()
        self._ready.set()

    def wait_ready(self) -> None:
        assert self._ready.wait(DEADLINE), self.log
        assert any(line.startswith("Ready") for line in self._lines), f"the server did not start:\n{self.log}"

    @property
    def log(self) -> str:
        return "".join(self._lines)

    def kill(self) -> None:
        """kill -9, and wait until it is gone."""
        self.process.kill()
        self._end()

    def stop(self) -> None:
        """SIGTERM; it must end well."""
        self.process.terminate()
        self._end()
        assert self.process.exitcode == 0, self.log

    def _end(self) -> None:
        self.process.join(DEADLINE)
        assert self.process.exitcode is not None, f"the server does not end:\n{self.log}"
        self._reader.join(DEADLINE)
        assert "Traceback" not in self.log, self.log
