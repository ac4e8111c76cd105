"""Two clients of one server: how one that asks for little fares beside one that takes all it can get."""

from __future__ import annotations

import os
import signal

from scripts.benchmark.house import House
from scripts.benchmark.load import Fio, fio_figures
from scripts.benchmark.model import Figures, Measure, Offer
from scripts.benchmark.process import Process


def beside(house: House, small: Fio, large: Fio) -> Measure:
    """A measure: the figures of `small` while `large` runs, and what that one gets."""

    def measure(offer: Offer) -> Figures:
        output, go = house.path("neighbour.json"), house.path("go")
        os.mkfifo(go)
        command = [*large.command(offer.disk, output), f"--exec_prerun=echo > {go}"]
        # What the prerun says goes to a file in fio's working folder.
        with Process(command, house.log, folder=house.folder) as neighbour:
            go.read_text()  # returns when it is about to begin
            figures = small.run(house, offer.disk)
            neighbour.signal(signal.SIGINT)
            neighbour.wait()
        return figures | {"other_mb": fio_figures(output)["mb"]}

    return measure
