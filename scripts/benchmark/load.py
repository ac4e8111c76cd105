"""The loads: fio with its NBD engine, nbdcopy, qemu-img. Each returns what it measured as Figures."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fleecing.units import GiB
from scripts.benchmark.house import EXTENTS, House
from scripts.benchmark.model import Figures, Measure, Offer
from scripts.benchmark.process import BenchError, run

MB = 1_000_000

Target = Callable[[Offer], str]
"""Which of the URIs on offer a load works on."""


def disk(offer: Offer) -> str:
    """The active export: what the guest has."""
    return offer.disk


def snapshot(offer: Offer) -> str:
    """The frozen view: what a backup tool has."""
    return offer.snapshot


@dataclass(frozen=True)
class Fio:
    """A fio job. `seconds` or `requests` ends it; `region` are the bytes it works on, from the start of the disk."""

    pattern: str
    block: int
    depth: int
    region: int
    seconds: float = 0.0
    requests: int = 0
    connections: int = 1
    options: tuple[str, ...] = ()

    def command(self, uri: str, output: Path) -> list[str]:
        """What to run; its JSON goes to `output`."""
        until = [f"--number_ios={self.requests}"] if self.requests else ["--time_based"]
        if self.seconds:
            until.append(f"--runtime={round(self.seconds * 1000)}ms")
        return [
            "fio",
            "--name=load",
            "--ioengine=nbd",
            f"--uri={uri}",
            f"--rw={self.pattern}",
            f"--bs={self.block}",
            f"--iodepth={self.depth}",
            f"--size={self.region}",
            f"--numjobs={self.connections}",
            "--thread",
            "--group_reporting",
            "--norandommap",
            "--randrepeat=1",
            "--output-format=json",
            f"--output={output}",
            *until,
            *self.options,
        ]

    def run(self, house: House, uri: str) -> Figures:
        """Requests/s, MB/s, latencies in microseconds, and "requests", how many there were."""
        output = house.path("fio.json")
        run(self.command(uri, output), house.log)
        return fio_figures(output)


def fio_figures(output: Path) -> Figures:
    """What fio's JSON says of its one job, reads and writes together."""
    text = output.read_text()
    job: dict[str, Any] = json.loads(text[text.index("{") :])["jobs"][0]  # warnings may stand before it
    if job["error"]:
        raise BenchError(f"fio had error {job['error']}")
    sides = [side for side in (job["read"], job["write"]) if side["total_ios"]]
    if not sides:
        raise BenchError("fio made no request at all")
    worst = max(sides, key=lambda side: side["clat_ns"]["percentile"]["99.000000"])
    percentiles = worst["clat_ns"]["percentile"]
    return {
        "rate": sum(side["iops"] for side in sides),
        "mb": sum(side["bw_bytes"] for side in sides) / MB,
        "p50": percentiles["50.000000"] / 1000,
        "p99": percentiles["99.000000"] / 1000,
        "requests": sum(side["total_ios"] for side in sides),
    }


def fio(house: House, job: Fio, target: Target = disk) -> Measure:
    """A measure: this job, with the server's CPU time a request."""

    def measure(offer: Offer) -> Figures:
        before = offer.server.child.cpu()
        figures = job.run(house, target(offer))
        figures["cpu"] = (offer.server.child.cpu() - before) / figures.pop("requests") * 1e6
        return figures

    return measure


def nbdcopy(house: House, connections: int, target: Target = disk) -> Measure:
    """A measure: a full pull to nowhere."""

    return lambda offer: _pull(house, offer, nbdcopy_to_nowhere(target(offer), connections))


def convert(house: House, target: Target = disk) -> Measure:
    """A measure: `qemu-img convert` to nowhere."""

    return lambda offer: _pull(house, offer, convert_to_nowhere(target(offer), house.settings.size))


def nbdcopy_to_nowhere(uri: str, connections: int) -> list[str]:
    """What to run."""
    return ["nbdcopy", f"--connections={connections}", uri, "null:"]


def convert_to_nowhere(uri: str, size: int) -> list[str]:
    """What to run; `size` in bytes."""
    sink = f"driver=null-co,size={size}"
    return ["qemu-img", "convert", "-n", "-f", "raw", "--target-image-opts", uri, sink]


def _pull(house: House, offer: Offer, command: list[str]) -> Figures:
    size = house.settings.size
    cpu, start = offer.server.child.cpu(), time.monotonic()
    run(command, house.log)
    seconds = time.monotonic() - start
    return {"mb": size / MB / seconds, "cpu_gib": (offer.server.child.cpu() - cpu) / size * GiB}


def block_status(house: House, target: Target = disk) -> Measure:
    """A measure: the map of the whole disk, by nbdinfo."""

    def measure(offer: Offer) -> Figures:
        cpu, start = offer.server.child.cpu(), time.monotonic()
        lines = run(["nbdinfo", "--map", target(offer)], house.log).count("\n")
        seconds = time.monotonic() - start
        if abs(lines - EXTENTS) > 2:  # how the last hole is counted
            raise BenchError(f"{lines} extents instead of {EXTENTS}")
        return {"seconds": seconds, "cpu_s": offer.server.child.cpu() - cpu}

    return measure
