"""The kinds of reasons for which snapshots break: few, for those who count them.

What is kept of a broken snapshot, over a restart too, is a sentence. So the kind is told from the sentence, here, for
all of them; the tests break snapshots in each of these ways.
"""

from __future__ import annotations

import errno
import os
import re
import threading
from collections import Counter
from enum import StrEnum

COPY_FAILED = "copy before a guest write failed: "
OVERDUE = "temp did not take a copy within cbw-timeout"
SOURCE_FAILED = "the image cannot be read: "
NOT_SYNCED = "the snapshot's files could not be made durable: "
FILES_NOT_SYNCED = "its files could not be made durable: "
TEMP_LOST = "the disk of temp did not take what was written to it: "
SOURCE_NOT_SYNCED = "the image could not be made durable: "


class Breakage(StrEnum):
    """Why a snapshot is broken."""

    TEMP_LIMIT = "temp-limit"
    TEMP_FULL = "temp-full"
    """The file system of temp, its quota, or the largest size of a file."""
    TEMP_ERROR = "temp-error"
    TIMEOUT = "timeout"
    REVIVAL = "revival"
    """It could not be gone on with after a restart."""
    IMAGE_CHANGED = "image-changed"
    """Somebody else wrote, replaced or resized the image."""
    OTHER = "other"


_OF_TEMP = f"{COPY_FAILED}|{NOT_SYNCED}|{FILES_NOT_SYNCED}|{TEMP_LOST}"
_NO_SPACE = "|".join(re.escape(os.strerror(number)) for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG))

# The first that matches the beginning counts.
_KINDS = [
    (re.compile(pattern), kind)
    for pattern, kind in (
        (re.escape(OVERDUE), Breakage.TIMEOUT),
        (rf"{COPY_FAILED}temp limit of \d+ bytes reached", Breakage.TEMP_LIMIT),
        (rf"({_OF_TEMP})({_NO_SPACE})", Breakage.TEMP_FULL),
        (rf"{COPY_FAILED}{SOURCE_FAILED}.* has (grown|shrunk) from \d+ to \d+ bytes", Breakage.IMAGE_CHANGED),
        (rf"{COPY_FAILED}{SOURCE_FAILED}|{SOURCE_NOT_SYNCED}", Breakage.OTHER),
        (_OF_TEMP, Breakage.TEMP_ERROR),
        (r"the size of the image changed|the image was written by something else", Breakage.IMAGE_CHANGED),
        (r"another (file|device) was put in the place of the image|a file was replaced by", Breakage.IMAGE_CHANGED),
    )
]


def kind_of(cause: str, otherwise: Breakage = Breakage.OTHER) -> Breakage:
    """The kind of this sentence; `otherwise` where it is none of those that are known."""
    return next((kind for pattern, kind in _KINDS if pattern.match(cause)), otherwise)


class Breakages:
    """How many snapshots broke, by kind. For any thread."""

    def __init__(self) -> None:
        self._counts: Counter[Breakage] = Counter()
        self._lock = threading.Lock()

    def add(self, kind: Breakage) -> None:
        """One more."""
        with self._lock:
            self._counts[kind] += 1

    def counts(self) -> dict[Breakage, int]:
        """All kinds, those that never happened, too."""
        with self._lock:
            return {kind: self._counts[kind] for kind in Breakage}
