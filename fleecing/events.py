"""What happens in a server's life: each time one line in the log, with the event's name and fields for programs.

The line is for people, the fields are what `--log-format json`, the journal and the stream of events show besides. So
all of them tell the same, and there is one call for it: `tell`. Nothing here is for what happens once a request.
"""

from __future__ import annotations

import logging
from enum import StrEnum
from typing import Final

Value = str | int | float | bool | None


class Event(StrEnum):
    """Names of events. Their fields: `disk`, `snapshot`, `export`, `client`, `checkpoint`, `reason` and the like."""

    SERVER_READY = "server-ready"
    SERVER_STOPPING = "server-stopping"
    DISK_OPENED = "disk-opened"
    IMAGE_PROBLEM = "image-problem"
    IMAGE_OK = "image-ok"
    SNAPSHOT_CREATED = "snapshot-created"
    SNAPSHOT_RESUMED = "snapshot-resumed"
    SNAPSHOT_BROKEN = "snapshot-broken"
    SNAPSHOT_DELETED = "snapshot-deleted"
    TEMP_PRESSURE = "temp-pressure"
    TEMP_LIMIT_CHANGED = "temp-limit-changed"
    CLIENT_CAME = "client-came"
    CLIENT_LEFT = "client-left"
    CLIENT_DROPPED = "client-dropped"
    CLIENT_TURNED_AWAY = "client-turned-away"
    CHECKPOINT_CREATED = "checkpoint-created"
    CHECKPOINT_INCONSISTENT = "checkpoint-inconsistent"
    CHECKPOINT_DELETED = "checkpoint-deleted"
    JOB_STARTED = "job-started"
    JOB_ENDED = "job-ended"
    GUEST_FROZEN = "guest-frozen"
    GUEST_THAWED = "guest-thawed"
    GUEST_STUCK = "guest-stuck"
    LOG_CHANGED = "log-changed"


_EVENT: Final = "fleecing_event"
_FIELDS: Final = "fleecing_fields"


def tell(log: logging.Logger, level: int, event: Event, text: str, *args: object, **fields: Value) -> None:
    """One line in the log, as `log.log(level, text, *args)`, and an event with these fields. From any thread."""
    log.log(level, text, *args, extra={_EVENT: event, _FIELDS: fields}, stacklevel=2)


def event_of(record: logging.LogRecord) -> Event | None:
    """The event that a line of the log tells; None = it is only a line."""
    return getattr(record, _EVENT, None)


def fields_of(record: logging.LogRecord) -> dict[str, Value]:
    """The fields of its event, those without a value left out."""
    fields: dict[str, Value] = getattr(record, _FIELDS, {})
    return {name: value for name, value in fields.items() if value is not None}


def of_export(name: str) -> dict[str, Value]:
    """The fields for an export's name, DISK or DISK@SNAPSHOT."""
    disk, _, snapshot = name.partition("@")
    return {"export": name, "disk": disk, "snapshot": snapshot or None}
