"""What a pull has done, in a file beside its target, so that the next run goes on where this one was killed.

    header     one line of JSON: what is pulled, into what
    records    60 bytes each: KEPT   the target has [offset, offset + length), with the checksum of its bytes
                              TRIMMED  the server need not keep it any more
                              DURABLE  every record before this one's `offset` (in the file) survives a power cut
                              FORGOTTEN  what was kept at `offset` turned out to be something else
                              BOOT   a run on another boot of this machine begins here
                              LOST   the target's disk did not take all that it was given

The order is: target, KEPT, TRIM to the server, TRIMMED. A killed process loses nothing that it has written to a file,
so at any moment the journal claims no more than the target has. A power cut may lose what was written lately: records
behind the last DURABLE are not believed after another boot, nor before a LOST. A record that was half written fails
its own checksum and ends the journal.
"""

from __future__ import annotations

import errno
import json
import os
import struct
import zlib
from contextlib import suppress
from pathlib import Path
from threading import Lock
from typing import Any, Final, NamedTuple

from fleecing.block.hostfile import HostFile
from fleecing.errors import ImageError
from fleecing.pull.plan import Piece
from fleecing.pull.target import sync_folder

FORMAT: Final = 1
CHECK_BYTES: Final = 32
NO_CHECK: Final = bytes(CHECK_BYTES)

_KEPT, _ZERO, _TRIMMED, _DURABLE, _BOOT, _FORGOTTEN, _LOST = range(1, 8)
_BODY: Final = struct.Struct("<IQQ32s")
"""Kind, offset, length, checksum."""
_SUM: Final = struct.Struct("<I")
_RECORD: Final = _BODY.size + _SUM.size
_MAX_HEADER: Final = 1 << 16


class Kept(NamedTuple):
    """A piece that the target has, and the checksum of its bytes (`NO_CHECK` for none and for zeroes)."""

    piece: Piece
    check: bytes


class Journal:
    """A journal. `kept` and `trimmed` are what earlier runs have done; records of this run only go to the file.

    `is_of_use`: the target has something that a later run need not pull again. `was_lost`: it had. One run at a time
    has it: from `resume` or `begin` on until `close`, the file is locked.
    """

    def __init__(self, path: str) -> None:
        """One that `begin` makes. `target`: what a run that resumes must agree on with the others about the target."""
        self.path = path
        self.target: dict[str, str] = {}
        self.header: dict[str, Any] | None = None
        self.kept: dict[int, Kept] = {}
        self.trimmed: list[tuple[int, int]] = []
        self.is_of_use = False
        self.was_lost = False
        self._has_begun = False
        self._durable = 0
        self._file: HostFile | None = None
        self._lock = Lock()
        self._end = 0

    @classmethod
    def resume(cls, path: str) -> Journal:
        """The one that an earlier run left. Raises OSError, and ImageError for what is no journal, or in use."""
        file = _locked(HostFile.open(path))
        try:
            data = Path(path).read_bytes()
            line, newline, _ = data[:_MAX_HEADER].partition(b"\n")
            try:
                header = json.loads(line) if newline else None
            except (ValueError, RecursionError):
                header = None
            if not isinstance(header, dict) or header.get("fleecing-pull-journal") != FORMAT:
                text = "is no journal of a pull: remove it, with what the pull left, and start again"
                raise ImageError(path, 0, text)
            journal = cls(path)
            journal.header = header
            journal._file = file
            journal._load(data, len(line) + 1)
        except BaseException:
            file.close()
            raise
        return journal

    @staticmethod
    def discard(path: str) -> None:
        """Remove one that is of no use. Raises OSError, and ImageError where it is in use."""
        file = _locked(HostFile.open(path))
        try:
            os.unlink(path)
        finally:
            file.close()

    def begin(self, header: dict[str, Any]) -> None:
        """Say what is pulled. Raises ImageError where an earlier run pulled something else, and FileExistsError."""
        wanted = {"fleecing-pull-journal": FORMAT, **self.target, **header}
        if self.header is None:
            self._file = _locked(HostFile.create(self.path))
            self._append_bytes(json.dumps(wanted).encode() + b"\n")
            self.header = wanted
            self._append(_BOOT, 0, 0, _boot_id())
        else:
            self.check(wanted)
        self._has_begun = True

    def check(self, wanted: dict[str, Any]) -> None:
        """That it is of the pull of which this holds. Raises ImageError."""
        assert self.header is not None
        for key, value in wanted.items():
            if key == "server" and key not in self.header:
                continue  # the releases before this one did not say
            if self.header.get(key) != value:
                raise ImageError(
                    self.path,
                    -1,
                    f"belongs to another pull: its {key} is {self.header.get(key)!r}, not {value!r}; "
                    "remove it, with what that pull left, and start again",
                )

    @property
    def size(self) -> int:
        """Bytes of the disk. Raises ImageError where it does not say."""
        size = None if self.header is None else self.header.get("size")
        if not isinstance(size, int):
            raise ImageError(self.path, 0, "does not say how large the disk is")
        return size

    def keep(self, piece: Piece, check: bytes = NO_CHECK) -> None:
        """The target has it."""
        self.is_of_use = True
        self._append(_ZERO if piece.is_zero else _KEPT, piece.offset, piece.length, check)

    def trim(self, piece: Piece) -> None:
        """The server has answered its TRIM."""
        self._append(_TRIMMED, piece.offset, piece.length)

    @property
    def position(self) -> int:
        """Bytes that it has: for `durable`."""
        return self._end

    def durable(self, position: int) -> None:
        """The target has made durable what it had when the journal had `position` bytes; now the journal is, too."""
        self._append(_DURABLE, position, 0)
        if self._file is not None:
            self._file.sync()
        self._durable = position

    def close(self) -> None:
        """Leave it to a later run, unless this one has begun and there is nothing in it that such a run could use."""
        if self._file is not None:
            if self._has_begun and not self.is_of_use:
                Path(self.path).unlink(missing_ok=True)  # as long as it is locked: the name is not another run's yet
            self._file.close()
            self._file = None

    def remove(self, *, durably: bool = False) -> None:
        """The target is whole: there is nothing to resume. `durably`: it does not come back after a power cut."""
        self.is_of_use = False
        self._has_begun = True
        self.close()
        if durably:
            with suppress(OSError):  # a folder that cannot be read: the copy is whole all the same
                sync_folder(os.path.dirname(self.path) or ".")

    def lose(self) -> None:
        """The target may have lost what it had not made durable. Raises OSError; then it is of no use any more."""
        self.was_lost = True
        self.is_of_use = False
        self._append(_LOST, 0, 0)
        self.is_of_use = self._durable > 0

    def ranges(self) -> list[tuple[int, int]]:
        """The (start, end) of what earlier runs have done, in order, neighbours as one."""
        return _merged((piece.offset, piece.length) for piece, _ in self.kept.values())

    def untrimmed(self) -> list[Piece]:
        """What the target has and the server does not know of."""
        done = set(self.trimmed)
        return [
            piece._replace(is_kept=True) for piece, _ in self.kept.values() if (piece.offset, piece.length) not in done
        ]

    def forget(self, offset: int) -> None:
        """The piece there is not what was kept after all: it has to be pulled again."""
        del self.kept[offset]
        self._append(_FORGOTTEN, offset, 0)

    # The file

    def _append(self, kind: int, offset: int, length: int, check: bytes = NO_CHECK) -> None:
        body = _BODY.pack(kind, offset, length, check)
        self._append_bytes(body + _SUM.pack(zlib.crc32(body)))

    def _append_bytes(self, data: bytes) -> None:
        with self._lock:
            assert self._file is not None, "a journal begins first"
            try:
                self._file.write(self._end, data)
            except OSError as e:
                raise OSError(e.errno, e.strerror, self.path) from e
            self._end += len(data)

    def _load(self, data: bytes, start: int) -> None:
        """Take the records, as far as they are whole; the next ones go behind them."""
        pending: dict[int, Kept] = {}
        trims: list[tuple[int, int]] = []
        order: list[tuple[int, int]] = []  # (end of the record, offset of its piece)
        boot = b""
        durable = 0
        at = start
        while at + _RECORD <= len(data):
            body = data[at : at + _BODY.size]
            if _SUM.unpack_from(data, at + _BODY.size)[0] != zlib.crc32(body):
                break
            at += _RECORD
            kind, offset, length, check = _BODY.unpack(body)
            if kind in (_KEPT, _ZERO):
                pending[offset] = Kept(Piece(offset, length, kind == _ZERO), check)
                order.append((at, offset))
            elif kind == _TRIMMED:
                trims.append((offset, length))
            elif kind == _FORGOTTEN:
                pending.pop(offset, None)
            elif kind == _DURABLE:
                durable = offset
            elif kind == _LOST:
                order = _drop(pending, order, durable)
            elif kind == _BOOT:
                if boot not in (b"", check):
                    order = _drop(pending, order, durable)
                boot = check
        if boot != _boot_id():
            _drop(pending, order, durable)
        self._end = at
        self._durable = durable
        self.kept, self.trimmed = pending, trims
        self.is_of_use = bool(pending)
        assert self._file is not None
        self._file.truncate(at)
        if boot != _boot_id():
            self._append(_BOOT, 0, 0, _boot_id())


def _locked(file: HostFile) -> HostFile:
    """The journal, if nobody else has it. Raises ImageError, and closes the file then."""
    try:
        if file.hold_alone() and os.path.samestat(os.fstat(file.fd), os.stat(file.path)):
            return file
    except FileNotFoundError:  # another run was through with it a moment ago
        pass
    except BaseException:
        file.close()
        raise
    file.close()
    raise ImageError(file.path, -1, "is in use: another pull is at work on this target")


def _drop(pending: dict[int, Kept], order: list[tuple[int, int]], durable: int) -> list[tuple[int, int]]:
    """Forget the pieces whose records lie behind `durable`."""
    for end, offset in order:
        if end > durable:
            pending.pop(offset, None)
    return [entry for entry in order if entry[0] <= durable]


def _merged(pieces: Any) -> list[tuple[int, int]]:
    merged: list[tuple[int, int]] = []
    for offset, length in sorted(pieces):
        if merged and merged[-1][1] >= offset:
            merged[-1] = merged[-1][0], max(merged[-1][1], offset + length)
        else:
            merged.append((offset, offset + length))
    return merged


def _boot_id() -> bytes:
    """32 bytes that change with each boot."""
    try:
        text = Path("/proc/sys/kernel/random/boot_id").read_text()
    except OSError as e:
        if e.errno != errno.ENOENT:
            raise
        text = ""
    return text.strip().replace("-", "").encode()[:CHECK_BYTES].ljust(CHECK_BYTES, b"0")
