"""From what an operator names as the target to an open one, new or resumed, with the journal that goes with it.

disk.img         being made: disk.img.part, disk.img.journal; renamed when it is whole
/dev/sdx         a device, or with `existing` a file: written over in place; a journal only where one is named
nbd://...        another export, in the same way
-                standard output, in order; nothing can be resumed
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from enum import Enum

from fleecing.block.qcow2.layout import SECTOR
from fleecing.errors import ImageError
from fleecing.nbd.uri import NbdUri
from fleecing.pull.journal import Journal
from fleecing.pull.nbd_target import NbdTarget
from fleecing.pull.qcow2_codec import Compression
from fleecing.pull.qcow2_reader import Qcow2File
from fleecing.pull.qcow2_target import Qcow2Options, Qcow2Target
from fleecing.pull.stream_target import StreamTarget
from fleecing.pull.target import PART, RawTarget, Target, remove_part
from fleecing.units import align_up

JOURNAL = ".journal"
"""Behind the name of a target that is being made."""


class Format(Enum):
    """What kind of file is made."""

    RAW = "raw"
    QCOW2 = "qcow2"


@dataclass
class Destination:
    """A target that is not open yet. `name` is a path, an NBD URI or "-"."""

    name: str
    format: Format = Format.RAW
    compression: Compression = Compression.NONE
    backing: str = ""
    resume: bool = False
    existing: bool = False
    journal_path: str | None = None
    waits: bool = True
    """See Target."""

    def __post_init__(self) -> None:
        self.is_stream = self.name == "-"
        self.uri = NbdUri.parse(self.name) if "://" in self.name else None
        self.is_new_file = not (self.is_stream or self.uri or self.existing or _is_device(self.name))
        if self.is_new_file and self.journal_path is None:
            self.journal_path = self.name + JOURNAL
        self.resuming = False
        self._target: Target | None = None
        self._is_making = False

    def prepare(self) -> Journal | None:
        """The journal of this run. Raises ImageError where something stands in the way; nothing is changed then."""
        journal = self._journal()
        if journal is not None:
            journal.target = self.header()
        return journal

    def _journal(self) -> Journal | None:
        if self.is_new_file:
            self._check_names()
        if self.journal_path is None or self.is_stream:
            return None
        if os.path.lexists(self.journal_path):
            if not self.resume:
                raise ImageError(
                    self.journal_path,
                    -1,
                    "is left of a pull that was cut off: go on with --resume, or remove it, with what that pull made",
                )
            if self._is_there() and os.path.getsize(self.journal_path):
                self.resuming = True
                return Journal.resume(self.journal_path)
            Journal.discard(self.journal_path)  # nothing had been kept
            if self.is_new_file and os.path.lexists(self.name + PART):
                os.unlink(self.name + PART)
        return Journal(self.journal_path)

    def _is_there(self) -> bool:
        return not self.is_new_file or os.path.lexists(self.name + PART)

    def _check_names(self) -> None:
        part = self.name + PART
        has_journal = self.journal_path is not None and os.path.lexists(self.journal_path)
        if os.path.lexists(self.name):
            raise ImageError(self.name, -1, "is there already: remove it, or take another name")
        if os.path.lexists(part) and not has_journal:
            raise ImageError(part, -1, "is in the way, and no journal says what it holds: remove it")

    def finished(self, source: NbdUri) -> Journal | None:
        """The journal of an earlier run that made the target and was killed before it could remove it; None: not so.

        Raises ImageError where the journal is another pull's, or the target is not what it tells of.
        """
        if not (self.resume and self.is_new_file and self.journal_path is not None):
            return None
        has_target = os.path.lexists(self.name) and not os.path.lexists(self.name + PART)
        if not (has_target and os.path.lexists(self.journal_path)):
            return None
        journal = Journal.resume(self.journal_path)
        try:
            journal.check({**self.header(), "export": source.export})
            self._check_size(journal.size)
        except BaseException:
            journal.close()
            raise
        return journal

    def _check_size(self, size: int) -> None:
        """That the file is of a disk of so many bytes. Raises OSError and ImageError."""
        if self.format is Format.RAW:
            found = os.path.getsize(self.name)
        else:
            file = Qcow2File.open(self.name)
            file.close()
            found, size = file.header.size, align_up(size, SECTOR)
        if found != size:
            raise ImageError(self.name, -1, f"is a disk of {found} bytes, its journal is of one of {size}: remove both")

    def open(self, size: int) -> Target:
        """The target for a disk of `size` bytes, as `prepare` has found it. Raises OSError and ImageError."""
        self._is_making = self.is_new_file and not self.resuming and not os.path.lexists(self.name + PART)
        try:
            target = self._target = self._open(size)
        except FileExistsError:
            self._is_making = False  # somebody else's
            raise
        target.waits = self.waits
        return target

    def give_up(self) -> str | None:
        """The work has failed, and no other run goes on with it; what is to be told of a target that was there before.

        No file of this run is left: its target removes it, unless Ctrl-C came between its making and that call's end.
        """
        if self._is_making:
            remove_part(self.name)
        if self._target is not None and self._target.is_half_written:
            return f"{self.name} is half-written: it has neither what it had before nor the whole disk"
        return None

    def _open(self, size: int) -> Target:
        if self.is_stream:
            return StreamTarget(1, size)
        if self.uri is not None:
            return NbdTarget(self.uri, size)
        if not self.is_new_file:
            return RawTarget.overwrite(self.name, size)
        if self.format is Format.QCOW2:
            options = Qcow2Options(self.compression, self.backing)
            make = Qcow2Target.resume if self.resuming else Qcow2Target.create
            return make(self.name, size, options)
        return RawTarget.resume(self.name, size) if self.resuming else RawTarget.create(self.name, size)

    def header(self) -> dict[str, str]:
        """What a run that resumes must have in common with the one before, for the journal."""
        return {"format": self.format.value, "compression": self.compression.name.lower(), "backing": self.backing}


def _is_device(path: str) -> bool:
    try:
        return stat.S_ISBLK(os.stat(path).st_mode)
    except OSError:
        return False
