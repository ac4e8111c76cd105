"""Processes of the program that start in milliseconds: forked from one that has everything imported.

A server that is started by the interpreter spends a third of a second with its imports. That is as it is for operators,
and for most tests; where a test, or its file, starts dozens of servers one after another, it is most of the time.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from threading import Lock
from typing import IO

import click

from fleecing.cli.main import main

for _word in main.list_commands(click.Context(main)):  # each is imported when it is named
    main.get_command(click.Context(main), _word)

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["tests.forking"])


def _run(arguments: list[str], out: Connection, err: Connection, folder: str, environ: dict[str, str]) -> None:
    """In the new process."""
    null = os.open(os.devnull, os.O_RDONLY)
    for fd, own in enumerate([null, out.fileno(), err.fileno()]):
        os.dup2(own, fd)
    os.close(null)
    out.close()
    err.close()
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environ)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    main(arguments, prog_name="fleecing")


class ForkedProgram:
    """`fleecing ARGUMENTS`, as far as `subprocess.Popen` is the same; its standard error can be read."""

    def __init__(self, arguments: Sequence[str], out: IO[bytes], env: Mapping[str, str]) -> None:
        reading, writing = os.pipe()
        self.stderr: IO[bytes] = os.fdopen(reading, "rb")
        with Connection(os.dup(out.fileno())) as out_end, Connection(writing, readable=False) as err_end:
            words = [*arguments], out_end, err_end, os.getcwd(), dict(env)
            self._process = context.Process(target=_run, args=words)
            self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid
        self._lock = Lock()  # two who ask at once how it ended would each read a part of the answer
        self._code: int | None = None

    def poll(self) -> int | None:
        return self._ended(0)

    def wait(self, timeout: float) -> int:
        code = self._ended(timeout)
        if code is None:
            raise subprocess.TimeoutExpired("fleecing", timeout)
        return code

    def _ended(self, timeout: float) -> int | None:
        if self._code is None:
            with suppress(ValueError):  # the other one has closed it
                wait([self._process.sentinel], timeout)
        with self._lock:
            if self._code is None and self._process.exitcode is not None:
                self._code = self._process.exitcode
                self._process.close()
            return self._code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            try:
                os.kill(self.pid, number)
            except ProcessLookupError:
                pass

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)
