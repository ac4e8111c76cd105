"""Rows with a snapshot: against the one peer that has them, qemu-storage-daemon."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from fleecing.units import KiB, TiB
from scripts.benchmark.contenders.plain import NBDKIT
from scripts.benchmark.contenders.table import IMPARTIAL, OURS, QSDS
from scripts.benchmark.guest import during_pull, read_once_peak, temp_peak
from scripts.benchmark.house import House
from scripts.benchmark.load import (
    Fio,
    block_status,
    convert,
    convert_to_nowhere,
    fio,
    nbdcopy,
    nbdcopy_to_nowhere,
    snapshot,
)
from scripts.benchmark.model import Against, Goal, Image, Row, Snapshot, Stage, Transport
from scripts.benchmark.rows_disk import PULL, at_least
from scripts.benchmark.sparse import creation
from scripts.benchmark.tracking import checkpoints, tracked_writes

FLEECING = (OURS, *QSDS)

_HALF = (Goal("peak_share", 0.5, Against.NOTHING, at_most=True),)


def snapshot_rows(house: House) -> Iterator[Row]:
    """All of them."""
    for share in (0, 50, 100):
        for transport in (Transport.UNIX, Transport.TCP):
            yield from _reads(house, share, transport)
    yield from _guest(house)
    yield from _during_pull(house)
    yield from _guest_first(house)
    yield from _read_once(house)
    yield from _extents(house)
    yield from _sparse()
    yield from _tracking(house)


def _reads(house: House, share: int, t: Transport) -> Iterator[Row]:
    stage = Stage(t, snapshot=Snapshot.LASTING, copied=share)
    state = f"of a snapshot, {share} % copied"
    size, seconds = house.settings.size, house.settings.seconds

    def read(depth: int, block: int = 4 * KiB, pattern: str = "randread") -> Fio:
        return Fio(pattern, block, depth, size, seconds)

    yield Row(
        f"snap{share}-rr-4k-d16-{t}",
        f"random read 4 KiB {state}, depth 16",
        stage,
        FLEECING,
        fio(house, read(16), snapshot),
        shown=("rate", "cpu"),
        goals=at_least(4.0, against=Against.QSD),
        quick=share == 0 and t is Transport.UNIX,
    )
    yield Row(
        f"snap{share}-nbdcopy-4-{t}",
        f"full pull {state}, nbdcopy, 4 connections",
        stage,
        FLEECING,
        nbdcopy(house, 4, snapshot),
        shown=PULL,
        goals=at_least(1.7, "mb", Against.QSD),
        quick=share == 0 and t is Transport.UNIX,
    )
    yield Row(
        f"snap{share}-sr-256k-d16-{t}",
        f"sequential read 256 KiB {state}, depth 16",
        stage,
        FLEECING,
        fio(house, read(16, 256 * KiB, "read"), snapshot),
        shown=("mb",),
        goals=at_least(1.8, "mb", Against.QSD),
    )
    if t is Transport.TCP:
        return
    for depth in (1, 64):
        yield Row(
            f"snap{share}-rr-4k-d{depth}-{t}",
            f"random read 4 KiB {state}, depth {depth}",
            stage,
            FLEECING,
            fio(house, read(depth), snapshot),
            awake=depth == 1,
        )
    yield Row(
        f"snap{share}-nbdcopy-1-{t}",
        f"full pull {state}, nbdcopy, 1 connection",
        stage,
        FLEECING,
        nbdcopy(house, 1, snapshot),
        shown=PULL,
    )
    yield Row(
        f"snap{share}-convert-{t}",
        f"full pull {state}, qemu-img convert",
        stage,
        FLEECING,
        convert(house, snapshot),
        shown=PULL,
    )


def _guest(house: House) -> Iterator[Row]:
    """A guest writes, over the whole disk, right after a snapshot was made: most writes have a cluster to save."""
    stage = Stage(snapshot=Snapshot.FRESH)
    goals = (Goal("rate", 1.5, Against.QSD), Goal("p99", 1.0, Against.QSD, at_most=True))
    for block in (4, 64):
        for depth in (1, 16):
            writes = house.settings.writes // (3 if depth == 1 else 1)
            job = Fio("randwrite", block * KiB, depth, house.settings.size, requests=writes)
            yield Row(
                f"guest-{block}k-d{depth}-unix",
                f"random write {block} KiB, depth {depth}, fresh snapshot",
                stage,
                FLEECING,
                fio(house, job),
                shown=("rate", "p50", "p99", "cpu"),
                goals=goals,
                awake=depth == 1,
                quick=block == 4 and depth == 16,
            )


def _during_pull(house: House) -> Iterator[Row]:
    stage = Stage(snapshot=Snapshot.FRESH)
    goals = (Goal("p99", 0.5, Against.QSD, at_most=True), Goal("pull_mb", 1.0, Against.QSD))
    shown = ("rate", "p50", "p99", "pull_mb")
    yield Row(
        "pull-guest-1000-unix",
        "1000 writes/s of 4 KiB while a full pull with TRIM runs",
        stage,
        FLEECING,
        during_pull(house, depth=16, rate=1000),
        shown=shown,
        goals=goals,
        quick=True,
    )
    yield Row(
        "pull-guest-4k-d16-unix",
        "random write 4 KiB, depth 16, while a full pull with TRIM runs",
        stage,
        FLEECING,
        during_pull(house, depth=16),
        shown=shown,
        goals=goals,
    )
    yield Row(
        "temp-peak-unix",
        "temp space of a pull with TRIM, random writes meanwhile",
        stage,
        FLEECING,
        temp_peak(house),
        shown=("peak", "peak_share"),
        goals=_HALF,
    )


def _guest_first(house: House) -> Iterator[Row]:
    """What it is worth that the guest goes first: ours beside ours without that, as p99 is to be no worse for it."""
    for name, title, rate in (("1000", "1000 writes/s of 4 KiB", 1000), ("4k-d16", "random write 4 KiB, depth 16,", 0)):
        yield Row(
            f"guest-first-{name}-unix",
            f"{title} while `fleecing pull` runs, against where the guest does not go first",
            Stage(snapshot=Snapshot.FRESH, alone=True),
            (OURS, IMPARTIAL),
            during_pull(house, depth=16, rate=rate, by_ours=True),
            shown=("p99", "p50", "rate", "pull_mb"),
            goals=(Goal("p99", 1.0, at_most=True),),
            seconds=4.0,
        )


def _read_once(house: House) -> Iterator[Row]:
    """Peers have nothing of the kind."""
    commands: list[tuple[str, str, Callable[[str], list[str]]]] = [
        ("nbdcopy-4", "nbdcopy, 4 connections", lambda uri: nbdcopy_to_nowhere(uri, 4)),
        ("convert", "qemu-img convert", lambda uri: convert_to_nowhere(uri, house.settings.size)),
    ]
    for name, program, command in commands:
        yield Row(
            f"read-once-{name}-unix",
            f"temp space of a pull with --read-once, random writes meanwhile, {program}",
            Stage(),
            (OURS,),
            read_once_peak(house, command),
            shown=("peak", "peak_share"),
            goals=_HALF,
            dirties=True,
        )


def _extents(house: House) -> Iterator[Row]:
    goals = (Goal("seconds", 1.0, Against.NOTHING, at_most=True),)
    yield Row(
        "status-1m-unix",
        "block status of 1 TiB with a million extents, nbdinfo --map",
        Stage(image=Image.EXTENTS),
        (*FLEECING, NBDKIT),
        block_status(house),
        shown=("seconds", "cpu_s"),
        goals=goals,
    )
    yield Row(
        "snap0-status-1m-unix",
        "the same of a snapshot",
        Stage(image=Image.EXTENTS, snapshot=Snapshot.LASTING),
        FLEECING,
        block_status(house, snapshot),
        shown=("seconds", "cpu_s"),
        goals=goals,
    )


def _sparse() -> Iterator[Row]:
    small = (Goal("seconds", 0.2, Against.NOTHING, at_most=True), Goal("rss", 100, Against.NOTHING, at_most=True))
    large = (Goal("seconds", 0.5, Against.NOTHING, at_most=True), Goal("growth", 1.2, Against.NOTHING, at_most=True))
    for tib in (1, 16, 64):
        yield Row(
            f"create-{tib}t",
            f"two snapshots of an empty disk of {tib} TiB",
            Stage(image=Image.SPARSE, tib=tib, alone=True),
            FLEECING,
            creation(tib * TiB),
            shown=("seconds", "rss", "growth"),
            goals={1: small, 64: large}.get(tib, ()),
            quick=tib == 1,
        )


def _tracking(house: House) -> Iterator[Row]:
    """Peers track raw disks not at all, so ours is measured alone."""
    yield Row(
        "track-4k-d16-unix",
        "random write 4 KiB, depth 16, with a checkpoint, against without",
        Stage(),
        (OURS,),
        tracked_writes(house),
        shown=("kept", "rate", "cpu"),
        goals=(Goal("kept", 0.98, Against.NOTHING),),
        dirties=True,
    )
    yield Row(
        "checkpoints-64t",
        "ten checkpoints of an empty disk of 64 TiB, an increment since the first",
        Stage(image=Image.SPARSE, tib=64, alone=True),
        (OURS,),
        checkpoints(10),
        shown=("seconds", "rss"),
    )
