"""What the fuzzer shoots at, and what counts as a hit."""

from __future__ import annotations

import json
import logging
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from hypothesis.strategies import SearchStrategy

Case = dict[str, Any]
"""One input: plain values and bytes, as they go to a file and come back."""


class Finding(Exception):
    """The thing under fire did what it must not do."""


class Target(Protocol):
    """One kind of input. `run` raises whatever it does not expect: that is the finding."""

    cases: SearchStrategy[Case]

    def run(self, case: Case) -> None:
        """Shoot once. Returns where all was as it must be."""

    def close(self) -> None:
        """Look a last time, and end what was started."""


Opener = Callable[[Path], Target]
"""Makes a target that works in an empty folder."""


def save(path: Path, name: str, case: Case) -> None:
    """A file that `load` reads."""
    path.write_text(json.dumps({"target": name, "case": _plain(case)}, indent=1) + "\n")


def load(path: Path) -> tuple[str, Case]:
    """(name of the target, case). Raises OSError, and ValueError where it is no such file."""
    content = json.loads(path.read_text())
    if not isinstance(content, dict) or not {"target", "case"} <= set(content):
        raise ValueError(f"{path} is no input that was kept")
    return str(content["target"]), _lively(content["case"])


def _plain(value: Any) -> Any:
    if isinstance(value, bytes | bytearray):
        return {"hex": value.hex()}
    if isinstance(value, dict):
        return {"dict": {key: _plain(item) for key, item in value.items()}}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def _lively(value: Any) -> Any:
    if isinstance(value, list):
        return [_lively(item) for item in value]
    if isinstance(value, dict):
        if "hex" in value:
            return bytes.fromhex(value["hex"])
        return {key: _lively(item) for key, item in value["dict"].items()}
    return value


class Ear(logging.Handler):
    """Hears what nobody expected: tracebacks in the log, and errors of threads that nobody waits for."""

    def __init__(self) -> None:
        super().__init__()
        self._heard: list[str] = []
        self._before = threading.excepthook, sys.unraisablehook
        threading.excepthook = lambda args: self._heard.append(f"in a thread: {args.exc_value!r}")
        sys.unraisablehook = lambda args: self._heard.append(f"unraisable: {args.exc_value!r}")
        logging.getLogger().addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        """A record with a traceback, or one that says so in words."""
        text = record.getMessage()
        if record.exc_info or "nobody expected" in text:
            self._heard.append(f"in the log: {text}: {record.exc_info and record.exc_info[1]!r}")

    def close(self) -> None:
        """Hear nothing any more."""
        logging.getLogger().removeHandler(self)
        threading.excepthook, sys.unraisablehook = self._before
        super().close()

    def check(self) -> None:
        """Raise Finding where there was something since the last look."""
        heard, self._heard = self._heard, []
        if heard:
            raise Finding("; ".join(heard))
