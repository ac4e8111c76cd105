"""Rows of `fleecing pull` against the clients that people use."""

from __future__ import annotations

from collections.abc import Iterator

from scripts.benchmark.contenders.table import OURS
from scripts.benchmark.copies import CONVERT, NBDCOPY, copies
from scripts.benchmark.house import SCATTERED_DATA, House
from scripts.benchmark.load import disk, snapshot
from scripts.benchmark.model import Against, Goal, Image, Row, Snapshot, Stage
from scripts.benchmark.rows_disk import at_least

SHOWN = ("mb", "client_gib", "cpu_gib")


def copy_rows(house: House) -> Iterator[Row]:
    """All of them."""
    for state, stage, source in (
        ("", Stage(tools=True), disk),
        ("snap50-", Stage(tools=True, snapshot=Snapshot.LASTING, copied=50), snapshot),
    ):
        of = "the disk" if not state else "a snapshot, 50 % copied"
        for form in ("raw", "qcow2"):
            yield Row(
                f"{state}copy-{form}-unix",
                f"copy of {of} to a new {form} file, no checks, no flush",
                stage,
                (OURS, NBDCOPY, CONVERT) if form == "raw" else (OURS, CONVERT),
                copies(house, form, source),
                shown=SHOWN,
                goals=at_least(1.0, "mb"),
                quick=bool(state) and form == "raw",
            )
        if not state:
            yield Row(
                "copy-raw-durable-unix",
                "copy of the disk to a new raw file that is on its disk at the end",
                stage,
                (OURS, NBDCOPY, CONVERT),
                copies(house, "raw", source, durable=True),
                shown=SHOWN,
                goals=at_least(1.0, "mb"),
            )
    yield from _sparse(house)


def _sparse(house: House) -> Iterator[Row]:
    """Time by the data, not by the size."""
    stage = Stage(image=Image.SCATTERED, snapshot=Snapshot.LASTING, tools=True)
    goals = (Goal("seconds", 10.0, Against.NOTHING, at_most=True), Goal("seconds", 1.0, at_most=True))
    for form, contenders, seconds in (("raw", (OURS, NBDCOPY, CONVERT), 3.0), ("qcow2", (OURS, CONVERT), 5.0)):
        yield Row(
            f"pull-sparse-1t-{form}",
            f"copy of a snapshot of 1 TiB with 1 GiB of data all over it to a new {form} file, no checks, no flush",
            stage,
            contenders,
            copies(house, form, snapshot, data=SCATTERED_DATA),
            shown=("seconds", "client_gib", "cpu_gib"),
            goals=goals,
            seconds=seconds,
        )
