"""The console blocks of a Markdown page, run for real, their output compared with what the page shows.

    ```console                  $ starts a command; a line that ends in \\ goes on in the next one
    $ echo "two words"          what follows, up to the next $, is its output, stderr included
    two words
    ```

In the output, a line `...` stands for any lines, and `...` inside a line for any text. Times, rates, process numbers
and the like are the same whatever they are (`_VOLATILE`). A command must fail exactly where a line of its output says
so ("Error:", "read failed:", "write failed:", "Failed to get"). `fleecing serve` whose output ends in "Ready." goes on
in the background until the session ends. Any other block whose first line is `# NAME.ENDING` is saved under that name.

The page's folders are replaced by folders of the test: see `Session`.
"""

from __future__ import annotations

import difflib
import os
import re
import select
import shlex
import subprocess
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import pytest

from tests.peers import DEADLINE, Child, require

_HEADING = re.compile(r"#{2,3} (.+)")
_FENCE = re.compile(r"```(.*)")
_FILE = re.compile(r"# ([\w-]+\.\w+)")
_FAILS = re.compile(r"^(Error|read failed|write failed):|: Failed to get ", re.MULTILINE)

_VOLATILE = (
    (re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d([.,]\d+)?"), "TIME"),
    (re.compile(r"process \d+"), "process N"),
    (re.compile(r"\d\d\.\d\d sec \(.* ops/sec\)"), "RATE"),
    (re.compile(r"[\d.]+ [KMG]iB/s\b"), "RATE"),
    (re.compile(r"[\d.]+ [KMGT]iB(?= +nbd\+unix)"), "FREE"),  # of the temp folder, in tables
    (re.compile(r"(?<=RATE, temp )[\d.]+ [KMG]iB"), "TEMP"),  # of a pull that the guest's writes run ahead of
    (re.compile(r"(?<=  )([\d.]+ (us|ms|s)|-)(?=  )"), "LATENCY"),  # in tables
    (re.compile(r"--seed \d+"), "--seed N"),
    (re.compile(r"[^\s=]*/fleecing-demo-\w+"), "/tmp/fleecing-demo"),
    (re.compile(r"(?<=\S)  +"), "  "),  # columns are as wide as their widest cell
)
# What the demo reports differs from run to run; that it adds up is its own test's matter.
_REPORT = re.compile(r"^(snapshot|guest writes|clusters|temp|pull) .*", re.MULTILINE)
_FIGURES = re.compile(r"[\d,.]+( [KMG]iB)?\b|\bm?s\b")


@dataclass(frozen=True)
class Block:
    """A fenced block: where it is, what stands behind the three signs, and its lines."""

    section: str
    info: str
    line: int
    lines: tuple[str, ...]

    def steps(self) -> list[Step]:
        """The commands of a console block."""
        steps: list[Step] = []
        for number, text in enumerate(self.lines, self.line + 1):
            if text.startswith("$ "):
                steps.append(Step(number, text[2:], ()))
            elif steps[-1].command.endswith("\\") and not steps[-1].output:
                steps[-1] = Step(steps[-1].line, f"{steps[-1].command}\n{text}", ())
            else:
                steps[-1] = Step(steps[-1].line, steps[-1].command, (*steps[-1].output, text))
        return steps


@dataclass(frozen=True)
class Step:
    """A command, and the lines that it writes."""

    line: int
    command: str
    output: tuple[str, ...]

    @property
    def is_server(self) -> bool:
        return self.command.startswith("fleecing serve ") and self.output[-1:] == (
            "Ready. Ctrl-C or SIGTERM stops the server.",
        )


def read_blocks(page: str) -> list[Block]:
    """All fenced blocks of a page; `section` is the nearest heading above, of the second or third level."""
    blocks: list[Block] = []
    section, open_at, info = "", 0, ""
    lines = page.splitlines()
    for number, text in enumerate(lines, 1):
        if (fence := _FENCE.fullmatch(text)) is not None:
            if open_at:
                blocks.append(Block(section, info, open_at, tuple(lines[open_at : number - 1])))
            open_at, info = (0, "") if open_at else (number, fence[1])
        elif not open_at and (heading := _HEADING.fullmatch(text)) is not None:
            section = heading[1]
    return blocks


def plain(text: str) -> str:
    """The text without what differs from run to run."""
    for pattern, word in _VOLATILE:
        text = pattern.sub(word, text)
    return _REPORT.sub(lambda line: _FIGURES.sub("N", line[0]), text)


def matches(expected: str, actual: str) -> bool:
    """Whether `actual` is what the page shows, which may hold `...`."""
    pattern = ""
    for line in plain(expected).splitlines():
        if line == "...":
            pattern += r"(?:.*\n)*?"
        else:
            pattern += ".*".join(map(re.escape, line.split("..."))) + r"\n"
    return re.fullmatch(pattern, plain(actual)) is not None


class Session:
    """A bash that runs a page's commands one after the other, and the servers that they start.

    `places` are the page's folders and the test's: commands get the test's, output is compared with the page's.
    """

    def __init__(self, page: Path, cwd: Path, home: Path, places: Mapping[str, Path]) -> None:
        self._page = page
        self._home = home
        self._places = {name: str(path) for name, path in places.items()}
        system = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
        kept = {name: value for name, value in os.environ.items() if name.startswith(("PIP_", "LANG", "LC_", "TMPDIR"))}
        self._env = {**kept, "HOME": str(home), "PATH": f"{home}/.local/bin:{system}", "COLUMNS": "64"}
        self._bash = subprocess.Popen(
            [require("bash"), "--norc"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd=cwd,
            env=self._env,
        )
        self._servers = ExitStack()
        self._pending = b""
        self._started = 0

    def run_block(self, block: Block) -> None:
        """Run a console block, or save one that is a file. The test fails where anything is not as the page says."""
        if block.info == "console":
            for step in block.steps():
                self.run_step(step)
        elif (name := _FILE.match(block.lines[0])) is not None:
            Path(self._cwd(), name[1]).write_text("\n".join((*block.lines, "")))

    def run_step(self, step: Step) -> None:
        """Run one command."""
        command = step.command
        for name, path in self._places.items():
            command = command.replace(name, path)
        expected = "".join(f"{line}\n" for line in step.output)
        code, actual = (0, self._serve(command)) if step.is_server else self._run(command)
        for name, path in self._places.items():
            actual = actual.replace(path, name)
        where = f"{self._page.name}:{step.line}: $ {step.command}"
        if not matches(expected, actual):
            page, ran = plain(expected).splitlines(), plain(actual).splitlines()
            diff = difflib.unified_diff(page, ran, "page", "run", lineterm="")
            pytest.fail("\n".join([where, *diff]), pytrace=False)
        if (code != 0) != (_FAILS.search(expected) is not None):
            pytest.fail(f"{where}\nended with exit code {code} and wrote:\n{actual}", pytrace=False)

    def _cwd(self) -> str:
        return os.readlink(f"/proc/{self._bash.pid}/cwd")

    def _run(self, command: str) -> tuple[int, str]:
        """In the shell that keeps its variables: (exit code, output)."""
        assert self._bash.stdin is not None
        # `(exit CODE)`: what the next command finds in $?
        script = f"eval {shlex.quote(command)} </dev/null\ncode=$?; printf '\\0%s\\0' $code; (exit $code)\n"
        self._bash.stdin.write(script.encode())
        self._bash.stdin.flush()
        end = time.monotonic() + DEADLINE
        while self._pending.count(b"\0") < 2:
            self._receive(command, end)
        output, code, self._pending = self._pending.split(b"\0", 2)
        return int(code), output.decode()

    def _receive(self, command: str, end: float) -> None:
        assert self._bash.stdout is not None
        poll = select.poll()  # select() knows no descriptor above 1023
        poll.register(self._bash.stdout, select.POLLIN)
        ready = poll.poll(max(0.0, end - time.monotonic()) * 1000)
        data = os.read(self._bash.stdout.fileno(), 65536) if ready else b""
        if not data:
            state = "ended the shell" if ready else "does not end"
            pytest.fail(f"{command}\n{state}; it wrote:\n{self._pending.decode(errors='replace')}", pytrace=False)
        self._pending += data

    def _serve(self, command: str) -> str:
        """In the background: what it said until it was ready."""
        self._started += 1
        script = f"cd {shlex.quote(self._cwd())} && exec {command}"
        name = f"server{self._started}"
        server = Child(["bash", "-c", script], self._home, name=name, env=self._env)
        self._servers.callback(self._stop, server)
        server.wait_for_line("^Ready")
        return server.stderr + "\n"

    @staticmethod
    def _stop(server: Child) -> None:
        """As Ctrl-C and SIGTERM do, both of which the page calls a good end."""
        code = server.stop()
        print(f"---- {server.name} ended with {code} and said:\n{server.stderr}")
        if code or "Traceback" in server.stderr:
            pytest.fail(f"the server ended with exit code {code} and said:\n{server.stderr}", pytrace=False)

    def close(self) -> None:
        """End the shell and the servers."""
        assert self._bash.stdin is not None and self._bash.stdout is not None
        self._bash.kill()
        self._bash.wait()
        self._bash.stdin.close()
        self._bash.stdout.close()
        self._servers.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
