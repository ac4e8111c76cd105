"""Where the log's lines go, in which form, and which of them: chosen at the start, changed while the server runs.

    text       one line for people, on stderr
    json       one JSON object a line, on stderr: time, level, message, and of an event its name and fields
    journald   the journal's own protocol: MESSAGE, PRIORITY, and EVENT, DISK, SNAPSHOT, CLIENT, ... as fields
    auto       journald where stderr is the journal's (systemd.exec(5), $JOURNAL_STREAM), else text

The level bounds what is written, not what the stream of events tells: that has every event at all levels.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
from collections.abc import Iterable
from datetime import UTC, datetime
from enum import StrEnum
from typing import TextIO

from fleecing.control.journal import JournalHandler
from fleecing.events import Event, Value, event_of, fields_of, tell
from fleecing.server import messages

log = logging.getLogger(__name__)

TEXT = "%(asctime)s %(levelname)s %(message)s"


class LogFormat(StrEnum):
    """See above."""

    AUTO = "auto"
    TEXT = "text"
    JSON = "json"
    JOURNALD = "journald"


class LogLevel(StrEnum):
    """Lines below it are not written. DEBUG has every protocol message."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"

    @property
    def number(self) -> int:
        """Python's."""
        return logging.getLevelNamesMapping()[self.name]


class Logs:
    """The log of this process. `change` may be called from any thread."""

    def __init__(
        self,
        wanted: LogFormat = LogFormat.AUTO,
        level: LogLevel = LogLevel.INFO,
        debug_exports: Iterable[str] = (),
        *,
        stream: TextIO | None = None,
    ) -> None:
        """Takes the place of whatever handled the root logger's lines."""
        stream = stream or sys.stderr
        self.format = wanted
        if wanted is LogFormat.AUTO:
            self.format = LogFormat.JOURNALD if is_journal(stream) else LogFormat.TEXT
        self._handler: logging.Handler
        if self.format is LogFormat.JOURNALD:
            self._handler = JournalHandler(stream)
        else:
            self._handler = logging.StreamHandler(stream)
        self._handler.setFormatter(JsonLines() if self.format is LogFormat.JSON else logging.Formatter(TEXT))
        self._handler.addFilter(self._is_written)
        self._changing = threading.Lock()
        self.level = level
        root = logging.getLogger()
        for handler in list(root.handlers):
            root.removeHandler(handler)
        root.addHandler(self._handler)
        self.change(level, debug_exports)

    @property
    def debug_exports(self) -> list[str]:
        """Exports whose requests are logged at any level, in order."""
        return sorted(messages.chosen())

    def change(self, level: LogLevel | None = None, debug_exports: Iterable[str] | None = None) -> None:
        """From now on; None = as it is."""
        with self._changing:
            if level is not None:
                self.level = level
                # Events are told to others, too, so what is below the level is held back only at the end.
                logging.getLogger().setLevel(min(level.number, logging.INFO))
            if debug_exports is not None:
                messages.choose(debug_exports)

    def tell(self) -> None:
        """That it was changed."""
        exports = ", ".join(self.debug_exports) or "none"
        text = "log level %s, requests logged of exports: %s"
        tell(
            log, logging.INFO, Event.LOG_CHANGED, text, self.level, exports, log_level=str(self.level), exports=exports
        )

    def _is_written(self, record: logging.LogRecord) -> bool:
        return record.levelno >= self.level.number or record.name == messages.log.name


def is_journal(stream: TextIO) -> bool:
    """Whether it is the one that systemd means by $JOURNAL_STREAM: its device and inode number."""
    try:
        state = os.fstat(stream.fileno())
    except (OSError, ValueError):
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{state.st_dev}:{state.st_ino}"


def values_of(record: logging.LogRecord) -> dict[str, Value]:
    """A line for programs: what stands in it, by name."""
    values: dict[str, Value] = {
        "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="microseconds"),
        "level": record.levelname.lower(),
        "message": record.getMessage(),
    }
    event = event_of(record)
    if event is not None:
        values |= {"event": str(event), **fields_of(record)}
    return values


class JsonLines(logging.Formatter):
    """One object a line. The text of an exception is one of its values."""

    def format(self, record: logging.LogRecord) -> str:
        values = values_of(record)
        if record.exc_info:
            values["exception"] = self.formatException(record.exc_info)
        return json.dumps(values)
