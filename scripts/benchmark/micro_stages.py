"""--micro, the second half: the stages of a request, each by itself, in this process."""

from __future__ import annotations

import os
import time
import timeit
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from itertools import count

from fleecing.block.copy_before_write import CopyBeforeWrite
from fleecing.block.graph import SnapshotSpec, freeze, open_disk
from fleecing.block.snapshot_access import SnapshotAccess
from fleecing.nbd.constants import REQUEST_MAGIC, Cmd, ReplyMode
from fleecing.nbd.transmission import REQUEST, data_header
from fleecing.server.meter import KINDS, Meter, clock
from fleecing.units import KiB
from scripts.benchmark.house import House, make_dirty

_LOOPS = 2000
_ROUNDS = 15
_CLUSTER = 64 * KiB
_PIECE = 4 * KiB
_DRAIN_SECONDS = 10.0

_names = count(1)


def stages(house: House) -> Iterator[tuple[str, float]]:
    """(title, ns of CPU) of each stage."""
    make_dirty(house.image)
    received = bytearray(REQUEST.pack(REQUEST_MAGIC, 0, Cmd.READ, 1, 0, _PIECE))
    view, data = memoryview(bytearray(_PIECE)), os.urandom(_PIECE)
    yield "cut: unpack a request", _smallest(lambda: REQUEST.unpack_from(received, 0))
    yield "answer: pack a simple header", _smallest(lambda: data_header(ReplyMode.SIMPLE, 1, 0, _PIECE))
    yield "answer: pack a structured header", _smallest(lambda: data_header(ReplyMode.STRUCTURED, 1, 0, _PIECE))
    yield "count: a batch of one READ, with its latency", _smallest(_counting(Meter()))
    yield "count: what a scrape takes of a client", _smallest(_used_meter().figures, 20)
    with closing(open_disk(str(house.image))) as disk:
        yield "serve: read 4 KiB of the image", _smallest(lambda: disk.read_cached(0, view))
        yield "serve: write 4 KiB, no snapshot", _smallest(lambda: disk.write_now(0, data))
        with _snapshot(house, disk) as frozen:
            yield "serve: read 4 KiB of a snapshot, untouched", _smallest(lambda: frozen.read_cached(0, view))
            frozen.copier.save(0, 1)
            yield "serve: read 4 KiB of a snapshot, copied", _smallest(lambda: frozen.read_cached(0, view))
            yield "serve: write 4 KiB, its cluster saved already", _smallest(lambda: disk.write_now(0, data))
        yield "save one cluster of 64 KiB", min(_saving(house, disk, 1) for _ in range(3))
        yield "save 16 clusters of 64 KiB in one go, each", min(_saving(house, disk, 16) for _ in range(3))


def _smallest(call: Callable[[], object], loops: int = _LOOPS) -> float:
    seconds = timeit.repeat(call, number=loops, repeat=_ROUNDS, timer=time.thread_time)
    return min(seconds) / loops * 1e9


def _counting(meter: Meter) -> Callable[[], None]:
    """All that a connection does for the metrics between two receives."""

    def count() -> None:
        meter.received = clock()
        meter.reads += 1
        meter.bytes_read += _PIECE
        meter.sent()

    return count


def _used_meter() -> Meter:
    meter = Meter()
    for kind in KINDS:
        meter.answered(kind, _PIECE)
    meter.sent()
    return meter


def _saving(house: House, disk: CopyBeforeWrite, together: int) -> float:
    with _snapshot(house, disk) as frozen:
        clusters = disk.size // _CLUSTER
        start = time.thread_time_ns()
        for first in range(0, clusters, together):
            frozen.copier.save(first, min(clusters, first + together))
        return (time.thread_time_ns() - start) / clusters


@contextmanager
def _snapshot(house: House, disk: CopyBeforeWrite) -> Iterator[SnapshotAccess]:
    name = f"micro{next(_names)}"
    spec = SnapshotSpec(name, str(house.path(f"{name}.qcow2")), _CLUSTER)
    [frozen] = freeze([(disk, spec)], drain_timeout=_DRAIN_SECONDS, on_broken=lambda snapshot, cause: None)
    try:
        yield frozen
    finally:
        frozen.remove(_DRAIN_SECONDS)
