"""All rows, and the order in which they run."""

from __future__ import annotations

from scripts.benchmark.house import House
from scripts.benchmark.model import Row
from scripts.benchmark.rows_copy import copy_rows
from scripts.benchmark.rows_disk import disk_rows
from scripts.benchmark.rows_snapshot import snapshot_rows


def all_rows(house: House) -> list[Row]:
    """Every row there is. Those of one stage come together, so that its servers start once."""
    rows = [*disk_rows(house), *snapshot_rows(house), *copy_rows(house)]
    order = {stage: i for i, stage in enumerate(dict.fromkeys(row.stage for row in rows))}
    return sorted(rows, key=lambda row: order[row.stage])
