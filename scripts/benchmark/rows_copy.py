"""Rows of `fleecing pull` against the clients that people use."""

from __future__ import annotations

from collections.abc import Iterator

from scripts.benchmark.contenders.table import OURS
from scripts.benchmark.copies import CONVERT, NBDCOPY, copies
from scripts.benchmark.house import House
from scripts.benchmark.load import disk, snapshot
from scripts.benchmark.model import Row, Snapshot, Stage
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
