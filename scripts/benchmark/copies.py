"""Full copies of an export into a file, by our client and by others: one server for all, the same checks off."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

from fleecing.units import GiB
from scripts.benchmark.contenders.ours import COMMAND, TREE
from scripts.benchmark.contenders.table import OURS, SERVE, TOOLS
from scripts.benchmark.house import House, touch_memory
from scripts.benchmark.load import MB, Target, disk
from scripts.benchmark.model import Figures, Measure, Offer, Stage
from scripts.benchmark.process import run
from scripts.benchmark.stages import Opener, image_of, lasting

NBDCOPY, CONVERT = TOOLS


@contextmanager
def open_tools(house: House, stage: Stage) -> Iterator[Opener]:
    """Every contender is a client of the same server of ours."""
    image = image_of(house, stage)
    with SERVE[OURS](house, image, stage.transport) as server, lasting(house, stage, server) as offer:

        def give(name: str) -> AbstractContextManager[Offer]:
            return nullcontext(replace(offer, tool=name))

        yield give


def copies(
    house: House, form: str, source: Target = disk, *, durable: bool = False, data: int | None = None
) -> Measure:
    """A measure: the whole process that makes a raw or qcow2 file of the export, its start included.

    `data`: bytes of the export that are data, where not all of it is.

    None trims, and none keeps checksums (ours would). Nor do they wait for the disk, unless `durable`: nbdcopy flushes
    when it is told to, qemu-img only in cache modes other than its default for targets, ours unless it is told not to.
    """

    def measure(offer: Offer) -> Figures:
        target = house.path(f"copy.{form}")
        command = _commands(source(offer), target, form, durable=durable)[offer.tool]
        size = data or house.settings.size
        touch_memory(size)  # the pages of the new file: asked of the host by one contender, others would have them free
        server, client, start = offer.server.child.cpu(), _children(), time.monotonic()
        try:
            run(command, house.log, env=TREE if offer.tool == OURS else None)
            seconds = time.monotonic() - start
        finally:
            target.unlink(missing_ok=True)
        return {
            "seconds": seconds,
            "mb": size / MB / seconds,
            "client_gib": (_children() - client) / size * GiB,
            "cpu_gib": (offer.server.child.cpu() - server) / size * GiB,
        }

    return measure


def _commands(uri: str, target: Path, form: str, *, durable: bool) -> dict[str, list[str | Path]]:
    ours: list[str | Path] = [*COMMAND, "pull", uri, target, "--format", form, "--no-trim", "--no-check"]
    cache = "writeback" if durable else "unsafe"
    return {
        OURS: ours if durable else [*ours, "--no-sync"],
        NBDCOPY: ["nbdcopy", *(["--flush"] if durable else []), uri, target],
        CONVERT: ["qemu-img", "convert", "-f", "raw", "-O", form, "-t", cache, uri, target],
    }


def _children() -> float:
    """Seconds of CPU of all children that have ended."""
    return sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])
