"""Starts what the rows of a stage need, and gives each sample what it works on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path

from fleecing.units import GiB, KiB, TiB
from scripts.benchmark.contenders.table import SERVE
from scripts.benchmark.house import House, forget, touch_memory
from scripts.benchmark.load import Fio
from scripts.benchmark.model import Image, Offer, Server, Snapshot, Stage
from scripts.benchmark.process import BenchError

Opener = Callable[[str], AbstractContextManager[Offer]]
"""Gives the named contender's offer for one sample."""

CLUSTER = 64 * KiB


@contextmanager
def open_stage(
    house: House, stage: Stage, contenders: Sequence[str], failed: Callable[[str, str], None]
) -> Iterator[Opener]:
    """Start the servers, and the snapshots that last; end all of it with the context.

    `failed` is told the name of a contender that could not be started, and why; it has no offer then.
    """
    image = image_of(house, stage)
    if stage.alone:
        yield lambda name: _alone(house, stage, image, name)
        return
    with ExitStack() as stack:
        servers: dict[str, Server] = {}
        offers: dict[str, Offer] = {}
        for name in contenders:
            try:
                servers[name] = server = stack.enter_context(SERVE[name](house, image, stage.transport))
                if stage.snapshot is not Snapshot.FRESH:
                    offers[name] = stack.enter_context(lasting(house, stage, server))
            except (BenchError, OSError) as e:  # the others go on without it
                failed(name, str(e))

        def give(name: str) -> AbstractContextManager[Offer]:
            if stage.snapshot is Snapshot.FRESH:
                return servers[name].snapshot()
            if stage.image is Image.COLD:
                forget(image)
            return nullcontext(offers[name])

        yield give


def image_of(house: House, stage: Stage) -> Path:
    """The image that is served; it is made where there is none yet."""
    match stage.image:
        case Image.DISK:
            return house.image
        case Image.COLD:
            return house.cold_image
        case Image.EXTENTS:
            return house.extents_image
        case Image.SPARSE:
            return house.sparse_image(stage.tib * TiB)
        case Image.SCATTERED:
            return house.scattered_image


@contextmanager
def _alone(house: House, stage: Stage, image: Path, name: str) -> Iterator[Offer]:
    if stage.image is Image.SPARSE:
        touch_memory(GiB)  # what the bitmaps of the largest disk take
    with SERVE[name](house, image, stage.transport) as server:
        fresh = stage.snapshot is Snapshot.FRESH
        with server.snapshot() if fresh else lasting(house, stage, server) as offer:
            yield offer


@contextmanager
def lasting(house: House, stage: Stage, server: Server) -> Iterator[Offer]:
    """The plain disk; or a snapshot, `copied` % of whose clusters the guest has overwritten since."""
    if stage.snapshot is Snapshot.NONE:
        yield Offer(server, server.uri)
        return
    with server.snapshot() as offer:
        if stage.copied:
            pattern = "write" if stage.copied == 100 else f"write:{CLUSTER * (100 - stage.copied) // stage.copied}"
            count = house.settings.size // CLUSTER * stage.copied // 100
            Fio(pattern, CLUSTER, 8, house.settings.size, requests=count).run(house, offer.disk)
        yield offer
