"""Rows of the active export, with nothing frozen: against every peer."""

from __future__ import annotations

from collections.abc import Iterator

from fleecing.units import KiB, MiB
from scripts.benchmark.contenders.plain import NBD_SERVER, NBDKIT, NBDKIT_COW
from scripts.benchmark.contenders.table import OURS, QSDS
from scripts.benchmark.house import DIRTY_REGION, House
from scripts.benchmark.load import Fio, convert, fio, nbdcopy
from scripts.benchmark.model import Against, Goal, Image, Measure, Row, Stage, Transport
from scripts.benchmark.neighbours import beside

PEERS = (OURS, *QSDS, NBDKIT, NBD_SERVER)
WITH_COW = (*PEERS, NBDKIT_COW)
WITH_TLS = (OURS, *QSDS, NBDKIT)

PULL = ("mb", "cpu_gib")


def disk_rows(house: House) -> Iterator[Row]:
    """All of them."""
    for transport in (Transport.UNIX, Transport.TCP):
        yield from _reads(house, transport)
        yield from _writes(house, transport)
        yield from _pulls(house, transport)
    yield from _others(house)


def at_least(bound: float, metric: str = "rate", against: Against = Against.BEST) -> tuple[Goal, ...]:
    """One goal."""
    return (Goal(metric, bound, against),)


def read(house: House, block: int, depth: int, *, pattern: str = "randread", connections: int = 1) -> Measure:
    """Reads over the whole disk for the time of a sample."""
    size, seconds = house.settings.size, house.settings.seconds
    return fio(house, Fio(pattern, block, depth, size, seconds, connections=connections))


def _write(house: House, block: int, depth: int, pattern: str = "randwrite", *options: str) -> Measure:
    return fio(house, Fio(pattern, block, depth, DIRTY_REGION, house.settings.seconds, options=options))


def _reads(house: House, t: Transport) -> Iterator[Row]:
    stage, is_unix = Stage(t), t is Transport.UNIX
    yield Row(
        f"rr-4k-d1-{t}",
        "random read 4 KiB, depth 1, CPUs awake",
        stage,
        PEERS,
        read(house, 4 * KiB, 1),
        goals=at_least(1.0),
        awake=True,
        quick=is_unix,
    )
    yield Row(f"rr-4k-d1-{t}-idle", "random read 4 KiB, depth 1, CPUs may sleep", stage, PEERS, read(house, 4 * KiB, 1))
    yield Row(
        f"rr-4k-d16-{t}",
        "random read 4 KiB, depth 16",
        stage,
        WITH_COW,
        read(house, 4 * KiB, 16),
        shown=("rate", "cpu"),
        goals=at_least(1.3),
        quick=is_unix,
    )
    yield Row(
        f"rr-4k-d64-{t}",
        "random read 4 KiB, depth 64",
        stage,
        PEERS,
        read(house, 4 * KiB, 64),
        goals=at_least(1.3),
    )
    yield Row(
        f"sr-256k-d16-{t}",
        "sequential read 256 KiB, depth 16",
        stage,
        WITH_COW,
        read(house, 256 * KiB, 16, pattern="read"),
        shown=("mb",),
        goals=at_least(1.0, "mb"),
        quick=is_unix,
    )


def _writes(house: House, t: Transport) -> Iterator[Row]:
    stage, is_unix = Stage(t), t is Transport.UNIX
    yield Row(
        f"rw-4k-d1-{t}",
        "random write 4 KiB, depth 1, CPUs awake",
        stage,
        PEERS,
        _write(house, 4 * KiB, 1),
        goals=at_least(1.0),
        awake=True,
        dirties=True,
    )
    yield Row(
        f"rw-4k-d1-{t}-idle",
        "random write 4 KiB, depth 1, CPUs may sleep",
        stage,
        PEERS,
        _write(house, 4 * KiB, 1),
        dirties=True,
    )
    yield Row(
        f"rw-4k-d16-{t}",
        "random write 4 KiB, depth 16",
        stage,
        PEERS,
        _write(house, 4 * KiB, 16),
        shown=("rate", "cpu"),
        goals=at_least(1.0),
        dirties=True,
        quick=is_unix,
    )
    yield Row(
        f"mix-4k-d16-{t}",
        "random 70 % read, 30 % write, 4 KiB, depth 16",
        stage,
        PEERS,
        _write(house, 4 * KiB, 16, "randrw", "--rwmixread=70"),
        dirties=True,
    )
    yield Row(
        f"sw-256k-d16-{t}",
        "sequential write 256 KiB, depth 16",
        stage,
        PEERS,
        _write(house, 256 * KiB, 16, "write"),
        shown=("mb",),
        goals=at_least(1.0, "mb"),
        dirties=True,
    )
    for depth in (1, 16):
        yield Row(
            f"rw-64k-d{depth}-{t}",
            f"random write 64 KiB, depth {depth}",
            stage,
            PEERS,
            _write(house, 64 * KiB, depth),
            dirties=True,
            awake=depth == 1,
        )


def _pulls(house: House, t: Transport) -> Iterator[Row]:
    stage, is_unix = Stage(t), t is Transport.UNIX
    yield Row(
        f"nbdcopy-1-{t}",
        "full pull, nbdcopy, 1 connection",
        stage,
        PEERS,
        nbdcopy(house, 1),
        shown=PULL,
        goals=at_least(1.0, "mb"),
    )
    yield Row(
        f"nbdcopy-4-{t}",
        "full pull, nbdcopy, 4 connections",
        stage,
        WITH_COW,
        nbdcopy(house, 4),
        shown=PULL,
        goals=at_least(1.2, "mb"),
        quick=is_unix,
    )
    yield Row(f"convert-{t}", "full pull, qemu-img convert", stage, PEERS, convert(house), shown=PULL)


def _others(house: House) -> Iterator[Row]:
    for connections in (8, 64):
        # nbd-server's socket takes 10 clients that wait to be accepted.
        contenders = PEERS if connections == 8 else (OURS, *QSDS, NBDKIT)
        yield Row(
            f"rr-4k-d16-c{connections}-unix",
            f"random read 4 KiB, depth 16, {connections} connections",
            Stage(),
            contenders,
            read(house, 4 * KiB, 16, connections=connections),
            shown=("rate", "p99"),
        )
    for name, block, depth in (("deep", 4 * KiB, 64), ("large", 32 * MiB, 4)):
        size, seconds = house.settings.size, house.settings.seconds
        small = Fio("randread", 4 * KiB, 1, size, seconds)
        other = Fio("randread", block, depth, size, seconds=60.0)  # ended when the small one is through
        yield Row(
            f"beside-{name}-unix",
            f"random read 4 KiB, depth 1, beside a client that reads {block // KiB} KiB at depth {depth}",
            Stage(),
            PEERS,
            beside(house, small, other),
            shown=("rate", "p50", "p99", "other_mb"),
        )
    yield Row(
        "cold-rr-4k-d16-unix",
        "random read 4 KiB, depth 16, page cache cold",
        Stage(image=Image.COLD),
        PEERS,
        read(house, 4 * KiB, 16),
        goals=at_least(1.1),
    )
    yield Row(
        "nbdcopy-4-tls",
        "full pull over TLS, nbdcopy, 4 connections",
        Stage(Transport.TLS),
        WITH_TLS,
        nbdcopy(house, 4),
        shown=PULL,
    )
