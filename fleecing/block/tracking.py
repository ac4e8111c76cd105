"""Which clusters the guest changed since a checkpoint: set before the change is made, safe from kill -9 and power loss.

Two files for each checkpoint. In the bit file every changed cluster has its bit, set in mapped memory, so that kill -9
loses none. The loss of power may lose what was not synced, and a sync for each bit would cost a guest write some
milliseconds. So there is a write-intent log beside it, as md's write-intent bitmap and DRBD's activity log have one: a
bit for each of at most REGIONS regions of the disk, made durable before the first change in the region. After a power
loss every cluster of those regions counts as changed.

    change ---> its bits are set already                          nothing to do
            \\-> its regions are in the log                        set the bits, go on
             \\-> otherwise                                        log the regions, wait for the disk, set the bits

The log would fill up in time. `settle`, called now and then, closes the regions in which no bit was set since the last
time, syncs the bit file, and takes them out of the log. Regions where the guest is at work stay, and cost nothing more.
"""

from __future__ import annotations

import logging
import os
import threading
from typing import Self

from bitarray import bitarray

from fleecing.block.bitfile import BitFile
from fleecing.block.bitmap import zeroes
from fleecing.events import Event, tell
from fleecing.units import MiB, align_up

log = logging.getLogger(__name__)

REGIONS = 4096
"""Regions of the log at most; one sector of 512 bytes, which a disk writes whole or not at all."""

SMALLEST_REGION = 64 * MiB
"""Bytes. Smaller ones would cost more syncs and gain little."""


class IntentLog:
    """The write-intent log of one bit file: one sector on disk, rewritten in place and synced."""

    def __init__(self, path: str, fd: int, region: int) -> None:
        self.path = path
        self.region = region  # bytes
        self._fd = fd

    @classmethod
    def create(cls, path: str, region: int) -> Self:
        """A new, empty log, durable when this returns."""
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        made = cls(path, fd, region)
        try:
            made.write(zeroes(REGIONS))
        except BaseException:
            made.remove()
            raise
        return made

    @classmethod
    def open(cls, path: str, region: int) -> Self:
        """The log that an earlier process left. Raises OSError."""
        return cls(path, os.open(path, os.O_RDWR | os.O_CLOEXEC), region)

    def read(self) -> bitarray:
        """The regions in the log; what is missing of the file counts as set."""
        raw = os.pread(self._fd, REGIONS // 8, 0)
        regions = bitarray(endian="little")
        regions.frombytes(raw.ljust(REGIONS // 8, b"\xff"))
        return regions

    def write(self, regions: bitarray) -> None:
        """Replace the log; durable when this returns."""
        os.pwrite(self._fd, regions.tobytes(), 0)
        os.fdatasync(self._fd)

    def close(self) -> None:
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


def region_size(size: int, granularity: int) -> int:
    """Bytes of a region of the log for a disk of `size` bytes: a power of two, so that REGIONS cover the disk."""
    region = max(SMALLEST_REGION, granularity)
    while region * REGIONS < size:
        region *= 2
    return region


class Tracker:
    """Records changes in one checkpoint's bit file. Any thread may call; a change that records is inside the gate."""

    def __init__(self, bits: BitFile, intents: IntentLog, *, disk: str = "", checkpoint: str = "") -> None:
        """The names are for what is told of it."""
        self._names = {"disk": disk, "checkpoint": checkpoint}
        self.file = bits
        self.log = intents
        self.bits = bits.bits  # a bit for each `1 << shift` bytes; set for good
        self.shift = bits.granularity.bit_length() - 1
        self._region_shift = intents.region.bit_length() - 1
        # The first change of a cluster sets its bit under this lock, and only where `_open` has its region; so when
        # `settle` has closed a region, every bit that was promised there is set.
        self._lock = threading.Lock()
        self._open = intents.read()  # regions that are in the log; under _lock, as is the next
        self._used = zeroes(REGIONS)  # regions where a bit was set since the last `settle`
        self.failed = bits.note or None  # why nothing is recorded any more; set once
        self._log_lock = threading.Lock()  # orders writes of the log; taken before _lock

    def record_now(self, offset: int, length: int) -> bool:
        """Record a change that is about to be made, if that takes no waiting; else record nothing, return False."""
        bits, first, end = self.bits, offset >> self.shift, (offset + length - 1 >> self.shift) + 1
        if bits.find(0, first, end) < 0 or self.failed is not None:
            return True
        shift = self._region_shift
        region, region_end = offset >> shift, (offset + length - 1 >> shift) + 1
        with self._lock:
            if self._open.find(0, region, region_end) >= 0:
                return False
            self._used[region:region_end] = 1
            bits[first:end] = 1
        return True

    def record(self, offset: int, length: int) -> None:
        """Record a change that is about to be made; may wait for the disk.

        The guest comes first: where the log cannot be written, the record is given up for good and says so.
        """
        while not self.record_now(offset, length):
            try:
                self._log_regions(offset, length)
            except OSError as e:
                self.give_up(f"the write-intent log {self.log.path} could not be written: {e.strerror}")

    def _log_regions(self, offset: int, length: int) -> None:
        shift = self._region_shift
        with self._log_lock:
            regions = self._open.copy()
            regions[offset >> shift : (offset + length - 1 >> shift) + 1] = 1
            self.log.write(regions)
            with self._lock:
                self._open = regions

    def give_up(self, reason: str) -> None:
        """Changes are not recorded any more: from this checkpoint on nobody knows what changed. The first reason stays.

        Kept with the bits, before the change goes on: the next process knows, too.
        """
        with self._lock:
            if self.failed is not None:
                return
            self.file.note = reason
            self.failed = reason
        tell(
            log,
            logging.ERROR,
            Event.CHECKPOINT_INCONSISTENT,
            "checkpoint %s of disk %s, and those before it, are inconsistent: %s",
            self._names["checkpoint"],
            self._names["disk"],
            reason,
            **self._names,
            reason=reason,
        )

    def settle(self) -> None:
        """Make the recorded bits durable and take the idle regions out of the log.

        Raises OSError; then the idle regions are still in the log on disk, and nothing is lost.
        """
        with self._log_lock:
            with self._lock:
                self._open &= self._used
                self._used = zeroes(REGIONS)
            self.file.sync()
            self.log.write(self._open)

    def sync(self) -> None:
        """Make every recorded bit durable and the log empty. Only while nothing records, as after a last change."""
        with self._log_lock:
            self.file.sync()
            self.log.write(zeroes(REGIONS))
            with self._lock:
                self._open = zeroes(REGIONS)

    def close(self) -> None:
        """Give the files back. Nothing may record any more."""
        self.file.close()
        self.log.close()


def recover(bits: BitFile, intents: IntentLog) -> int:
    """After a power loss: mark every cluster of the regions in the log; returns how many became marked by that."""
    before = bits.bits.count()
    regions = intents.read()
    for number in regions.search(1):
        first = number * intents.region // bits.granularity
        end = min(bits.count, align_up((number + 1) * intents.region, bits.granularity) // bits.granularity)
        if first < end:
            bits.bits[first:end] = 1
    return bits.bits.count() - before
