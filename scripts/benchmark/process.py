"""Programs that the benchmark starts: known by number, ended with the benchmark, their CPU time counted.

`setpriv --pdeathsig` ends them even where the benchmark is killed. A program that makes itself a daemon becomes our
child again, because this process adopts orphans, and is ended by its number like the others.
"""

from __future__ import annotations

import ctypes
import os
import queue
import re
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, ClassVar, Self

PATIENCE = 60.0
"""Seconds after which a program that says nothing is taken to hang."""

_PR_SET_CHILD_SUBREAPER = 36
_TICKS = os.sysconf("SC_CLK_TCK")
_END_WITH_US = ("setpriv", "--pdeathsig", "KILL", "--")


class BenchError(Exception):
    """A sample, a server or the machine is not as it must be; the text says what and where."""


def adopt_orphans() -> None:
    """Descendants whose parent ends become children of this process."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """What children get: ours without PYTHONPATH, and `extra`."""
    return {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | dict(extra or {})


class Process:
    """A program that runs beside the benchmark. Used as a context, it is ended and reaped at its end.

    What it says goes to `log`; the lines of standard output (`listen="stdout"`) or of standard error are handed out by
    `wait_line`. `fds` are passed on as descriptors 3 and up, with LISTEN_FDS, as systemd's socket activation does.
    `folder` is where it works.
    """

    running: ClassVar[set[Process]] = set()

    def __init__(
        self,
        command: Sequence[str | Path],
        log: Path,
        *,
        listen: str = "stderr",
        fds: Sequence[socket.socket] = (),
        env: Mapping[str, str] | None = None,
        folder: Path | None = None,
    ) -> None:
        argv = [str(word) for word in command]
        self.name = Path(argv[0]).name
        self.log = log
        if fds:
            moves = " ".join(f"{3 + i}<&{fd.fileno()}" for i, fd in enumerate(fds))
            argv = ["bash", "-c", f'export LISTEN_FDS={len(fds)} LISTEN_PID=$$; exec "$@" {moves}', "bash", *argv]
        with log.open("ab") as out:
            self._popen = subprocess.Popen(
                [*_END_WITH_US, *argv],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE if listen == "stdout" else out,
                stderr=subprocess.PIPE if listen == "stderr" else out,
                env=environment(env),
                cwd=folder,
                pass_fds=[fd.fileno() for fd in fds],
            )
        for fd in fds:
            fd.close()
        self.pid = self._popen.pid
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        stream = self._popen.stdout if listen == "stdout" else self._popen.stderr
        assert stream is not None
        self._pump = threading.Thread(target=self._read, args=(stream,), daemon=True)
        self._pump.start()
        Process.running.add(self)

    def _read(self, stream: IO[bytes]) -> None:
        with self.log.open("ab") as log, stream:
            for line in stream:
                log.write(line)
                self._lines.put(line.decode(errors="replace").rstrip("\n"))
        self._lines.put(None)

    def wait_line(self, pattern: str) -> str:
        """The next line that matches. Raises BenchError where the program ends or hangs before it says one."""
        for line in self._said():
            if re.search(pattern, line):
                return line
        raise BenchError(f"{self.name} did not say '{pattern}': {tail(self.log)}")

    def _said(self) -> Iterator[str]:
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                line = self._lines.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                return
            if line is None:
                return
            yield line

    def tell(self, line: str) -> None:
        """Write a line to its standard input."""
        assert self._popen.stdin is not None
        self._popen.stdin.write(line.encode() + b"\n")
        self._popen.stdin.flush()

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to it, if it still runs."""
        self._popen.send_signal(number)

    def wait(self) -> int:
        """How it ended by itself."""
        try:
            return self._popen.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            raise BenchError(f"{self.name} does not end: {tail(self.log)}") from None

    def stop(self) -> None:
        """End it; twice does no harm."""
        if self not in Process.running:
            return
        self._popen.terminate()
        try:
            self._popen.wait(10)
        except subprocess.TimeoutExpired:
            self._popen.kill()
            self._popen.wait()
        self._pump.join(5)
        assert self._popen.stdin is not None
        self._popen.stdin.close()
        Process.running.discard(self)

    def cpu(self) -> float:
        """Seconds of CPU that it, its threads, and its children that have ended took so far."""
        return cpu_seconds(self.pid)

    def memory(self) -> int:
        """Bytes of memory that it holds now (VmRSS)."""
        return memory_of(self.pid)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


class Daemon:
    """A program that detached itself; `pid_file` tells its number. Ended like a `Process`."""

    running: ClassVar[set[Daemon]] = set()

    def __init__(self, command: Sequence[str | Path], log: Path, pid_file: Path) -> None:
        run(command, log)
        deadline = time.monotonic() + PATIENCE
        while not (pid_file.exists() and pid_file.read_text().strip()):
            if time.monotonic() > deadline:
                raise BenchError(f"{command[0]} wrote no {pid_file}: {tail(log)}")
            time.sleep(0.01)  # it says nothing else when it is there
        self.pid = int(pid_file.read_text())
        Daemon.running.add(self)

    def cpu(self) -> float:
        return cpu_seconds(self.pid)

    def memory(self) -> int:
        return memory_of(self.pid)

    def stop(self) -> None:
        if self not in Daemon.running:
            return
        Daemon.running.discard(self)
        os.kill(self.pid, signal.SIGTERM)
        os.waitpid(self.pid, 0)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def run(command: Sequence[str | Path], log: Path, *, env: Mapping[str, str] | None = None) -> str:
    """Run a program to its end; what it wrote to standard output. Raises BenchError where it fails or hangs."""
    argv = [str(word) for word in command]
    with log.open("ab") as err:
        try:
            done = subprocess.run(
                [*_END_WITH_US, *argv],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=err,
                env=environment(env),
                timeout=5 * PATIENCE,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise BenchError(f"{argv[0]} does not end: {tail(log)}") from None
    text = done.stdout.decode(errors="replace")
    if done.returncode:
        raise BenchError(f"{argv[0]} ended with {done.returncode}: {tail(log)}{text[-300:]}")
    return text


def cpu_seconds(pid: int) -> float:
    """Seconds of CPU of a process and of its children that have ended; 0 where it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    return sum(map(int, fields[11:15])) / _TICKS


def memory_of(pid: int) -> int:
    """VmRSS in bytes."""
    status = Path(f"/proc/{pid}/status").read_text()
    found = re.search(r"^VmRSS:\s+(\d+) kB", status, re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


def tail(log: Path, length: int = 300) -> str:
    """The last words of a log."""
    return log.read_text(errors="replace")[-length:].strip() if log.exists() else ""
