"""Bits that outlive the process: a small file, mapped into memory.

    0      magic "FLEEBITS", u32 version, u32 granularity, u64 size of the disk, u64 number of bits (all big-endian)
    512    note: a sentence in UTF-8, ended by a zero byte; empty = none
    2560   seal: SHA-256 of what the last process left, the note and the bits among it; zeroes = it was not ended well
    4096   the bits, least significant first, as qcow2 and QEMU order them; padded with zeroes to a whole page

A bit that is set is in the page cache at once, so it survives kill -9; `sync` makes it survive the loss of power, too.
The file's space is allocated when it is made: storing into a mapping whose space is missing would kill the process with
SIGBUS, and stall the guest.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import struct
from collections.abc import Iterable
from typing import Self

from bitarray import bitarray

from fleecing.errors import ImageError
from fleecing.units import align_up, div_up

MAGIC = b"FLEEBITS"
VERSION = 1
HEAD = 4096
NOTE = 512
NOTE_BYTES = 2048
SEAL = NOTE + NOTE_BYTES
SEAL_BYTES = hashlib.sha256().digest_size

_HEADER = struct.Struct(">8sIIQQ")


class BitFile:
    """One bit for each `granularity` bytes of a disk of `size` bytes.

    `bits` is a whole number of bytes long; what lies behind `count` is always clear. Single operations on `bits` may
    come from any thread; whoever needs two of them to belong together brings a lock.
    """

    def __init__(self, path: str, fd: int) -> None:
        """For `create` and `open`: takes over the descriptor."""
        self.path = path
        self._fd = fd
        self._map = mmap.mmap(fd, 0)
        magic, version, self.granularity, self.size, self.count = _HEADER.unpack_from(self._map)
        self._check(magic, version)
        self.bits = bitarray(buffer=memoryview(self._map)[HEAD : HEAD + div_up(self.count, 8)], endian="little")

    def _check(self, magic: bytes, version: int) -> None:
        if magic != MAGIC:
            raise ImageError(self.path, 0, "is no bit file")
        if version != VERSION:
            raise ImageError(self.path, 8, f"has version {version}, and this release knows {VERSION} only")
        if not self.granularity or self.count != div_up(self.size, self.granularity):
            raise ImageError(self.path, 12, f"{self.count} bits are not one for each {self.granularity} of {self.size}")
        if len(self._map) != _file_size(self.count):
            raise ImageError(self.path, -1, f"has {len(self._map)} bytes, not the {_file_size(self.count)} of its bits")

    @classmethod
    def create(cls, path: str, *, size: int, granularity: int, bits: bitarray | None = None) -> Self:
        """Make a new file with these bits, or all clear; durable when this returns.

        Raises FileExistsError and other OSErrors; then there is no file.
        """
        count = div_up(size, granularity)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            # Space first: as blocks that read as zeroes, which takes no time that grows with the disk.
            os.posix_fallocate(fd, 0, _file_size(count))
            os.pwrite(fd, header(size, granularity), 0)
            if bits is not None:
                view, offset = memoryview(bits.tobytes()), HEAD
                while view:
                    written = os.pwrite(fd, view, offset)
                    view, offset = view[written:], offset + written
            os.fdatasync(fd)
            return cls(path, fd)
        except BaseException:
            os.close(fd)
            os.unlink(path)
            raise

    @classmethod
    def open(cls, path: str) -> Self:
        """Take over an existing file. Raises OSError, and ImageError where it is damaged or of a newer version."""
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            if os.fstat(fd).st_size < HEAD:
                raise ImageError(path, -1, "is too short for a bit file")
            return cls(path, fd)
        except BaseException:
            os.close(fd)
            raise

    @property
    def note(self) -> str:
        """The sentence kept with the bits; "" = none. Written in memory, so it survives the process as the bits do."""
        raw = self._map[NOTE : NOTE + NOTE_BYTES]
        return raw[: raw.index(b"\0")].decode("utf-8", "replace") if b"\0" in raw else ""

    @note.setter
    def note(self, text: str) -> None:
        raw = text.replace("\0", " ").encode("utf-8")[: NOTE_BYTES - 1]
        # The first byte last: until then the note reads as none, not as half a sentence.
        self._map[NOTE + 1 : NOTE + NOTE_BYTES] = raw[1:].ljust(NOTE_BYTES - 1, b"\0")
        self._map[NOTE : NOTE + 1] = raw[:1] or b"\0"

    def seal(self, facts: Iterable[bytes] = ()) -> None:
        """Keep the checksum of the file as it is now, and of `facts`; changes from here on belie it."""
        self._map[SEAL : SEAL + SEAL_BYTES] = self.checksum(facts)

    def take_seal(self) -> bytes | None:
        """The checksum that `seal` kept, which is gone from the file then; None = there is none."""
        found = self._map[SEAL : SEAL + SEAL_BYTES]
        self._map[SEAL : SEAL + SEAL_BYTES] = bytes(SEAL_BYTES)
        return found if any(found) else None

    def checksum(self, facts: Iterable[bytes] = ()) -> bytes:
        """Of the header, the note and the bits, and of `facts`. Some 2 ms for a MiB of bits."""
        digest = hashlib.sha256(self._map[:SEAL])
        digest.update(memoryview(self._map)[HEAD:])
        for fact in facts:
            digest.update(fact)
        return digest.digest()

    def sync(self) -> None:
        """Every bit that was set before this call is durable when it returns."""
        os.fdatasync(self._fd)

    def close(self) -> None:
        """Give the file back; once is enough. `bits` must not be used any more.

        The mapping goes when nobody holds a view of it.
        """
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def remove(self) -> None:
        """Close it and take the file away; missing is no error."""
        self.close()
        try:
            os.unlink(self.path)
        except FileNotFoundError:
            pass


def header(size: int, granularity: int) -> bytes:
    """All that is before the bits; sizes in bytes."""
    return _HEADER.pack(MAGIC, VERSION, granularity, size, div_up(size, granularity)).ljust(HEAD, b"\0")


def _file_size(count: int) -> int:
    return HEAD + align_up(div_up(count, 8), HEAD)
