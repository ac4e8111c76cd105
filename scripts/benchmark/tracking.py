"""What changed-block tracking costs: the guest's writes, and time and memory on a large disk."""

from __future__ import annotations

from fleecing.units import KiB, MiB
from scripts.benchmark.contenders.ours import Ours
from scripts.benchmark.house import House
from scripts.benchmark.load import Fio, fio
from scripts.benchmark.model import Figures, Measure, Offer

_REGION = 256 * MiB
"""What the guest works on: few enough clusters that all are marked after the first run."""

_ROUNDS = 3


def tracked_writes(house: House) -> Measure:
    """A measure: random writes with a checkpoint, at steady state, and their rate and CPU beside those without one.

    Runs with and without take turns, so that a machine whose speed drifts does not decide.
    """
    job = Fio("randwrite", 4 * KiB, 16, _REGION, max(house.settings.seconds, 0.5))

    def measure(offer: Offer) -> Figures:
        server, run = offer.server, fio(house, job)
        assert isinstance(server, Ours)
        plain: list[Figures] = []
        tracked: list[Figures] = []
        for number in range(_ROUNDS):
            plain.append(run(offer))
            server.add_checkpoint(f"c{number}")
            run(offer)  # marks the clusters
            tracked.append(run(offer))
            server.drop_checkpoint(f"c{number}")
        rates = sorted(t["rate"] / p["rate"] for t, p in zip(tracked, plain, strict=True))
        cpu = sorted(figures["cpu"] for figures in tracked)
        return {"kept": rates[_ROUNDS // 2], "cpu": cpu[_ROUNDS // 2], "rate": tracked[-1]["rate"]}

    return measure


def checkpoints(count: int) -> Measure:
    """A measure: so many checkpoints, one after the other, the last with an increment since the first."""

    def measure(offer: Offer) -> Figures:
        server = offer.server
        assert isinstance(server, Ours)
        names = [f"c{number}" for number in range(count)]
        try:
            seconds = [
                server.add_checkpoint(name, names[0] if number == count - 1 else None)
                for number, name in enumerate(names)
            ]
            return {"seconds": max(seconds), "rss": server.child.memory() / MiB}
        finally:
            for name in names:
                server.drop_checkpoint(name)

    return measure
