"""A guest that writes while a snapshot is pulled, with TRIM behind the read head or none, or read once."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from fleecing.units import KiB, MiB
from scripts.benchmark.contenders.ours import COMMAND, TREE, Ours
from scripts.benchmark.house import House
from scripts.benchmark.load import MB, Fio
from scripts.benchmark.model import Figures, Measure, Offer
from scripts.benchmark.process import BenchError, Process, run

_PULL = Path(__file__).with_name("trim_pull.py")
_PYTHON = "/usr/bin/python3"  # python3-libnbd is made for it

GUEST_RATE = 4000
"""Writes/s of the guest in the rows of temp space."""

PULL_SECONDS = 3.0
"""How long a pull of those rows takes: its rate is limited, or it would be over before there is anything to see."""

_LOOK_INTERVAL = 0.01


class Writer:
    """A fio that writes 4 KiB at random over the whole disk until it is told to stop; each request is logged."""

    def __init__(self, house: House, uri: str, *, depth: int, rate: int) -> None:
        self._logs = house.path("guest")
        go = house.path("go")
        os.mkfifo(go)
        options = [f"--write_lat_log={self._logs}", "--log_unix_epoch=1", f"--exec_prerun=echo > {go}"]
        if rate:
            options.append(f"--rate_iops={rate}")
        # What the prerun says goes to a file in fio's working folder.
        job = Fio("randwrite", 4 * KiB, depth, house.settings.size, seconds=300.0, options=tuple(options))
        self._fio = Process(job.command(uri, house.path("fio.json")), house.log, folder=house.folder)
        go.read_text()  # returns when it is about to write

    def stop(self) -> list[tuple[float, int]]:
        """End it; (milliseconds since the epoch, latency in ns) of each request."""
        self._fio.signal(signal.SIGINT)
        self._fio.wait()
        self._fio.stop()
        lines = Path(f"{self._logs}_clat.1.log").read_text().splitlines()
        if not lines:
            raise BenchError("the guest made no request")
        fields = [line.split(",", 2) for line in lines]
        return [(float(at), int(latency)) for at, latency, _ in fields]


def during_pull(house: House, *, depth: int, rate: int = 0, by_ours: bool = False) -> Measure:
    """A measure: the guest's rate and latencies while the snapshot is pulled at full speed, and the pull's speed.

    `by_ours`: by `fleecing pull`, which takes more CPU than the small client that pulls elsewhere.
    """

    def measure(offer: Offer) -> Figures:
        cpu = offer.server.child.cpu()
        writer = Writer(house, offer.disk, depth=depth, rate=rate)
        try:
            if by_ours:
                impartial = isinstance(offer.server, Ours) and offer.server.impartial
                report = pull_to_nowhere(house, offer.snapshot, nicely=not impartial)
            else:
                report = _pull(house, offer.snapshot, trim=True)
        finally:
            samples = writer.stop()
        began, ended = report["began"], report["ended"]
        latencies = sorted(ns for at, ns in samples if began * 1000 <= at <= ended * 1000)
        if not latencies:
            raise BenchError("the guest made no request during the pull")
        return {
            "rate": len(latencies) / (ended - began),
            "p50": latencies[len(latencies) // 2] / 1000,
            "p99": latencies[len(latencies) * 99 // 100] / 1000,
            "pull_mb": report["bytes"] / MB / (ended - began),
            "cpu_gib": (offer.server.child.cpu() - cpu) / report["bytes"] * (1 << 30),
        }

    return measure


def temp_peak(house: House) -> Measure:
    """A measure: the most temp space of a pull with TRIM, against the same pull without, while the guest writes."""

    def measure(offer: Offer) -> Figures:
        rate = house.settings.size / MB / PULL_SECONDS
        with_trim = _peak(house, offer, lambda: _pull(house, offer.snapshot, trim=True, rate=rate))
        with offer.server.snapshot() as another:
            without = _peak(house, another, lambda: _pull(house, another.snapshot, trim=False, rate=rate))
        return {"peak": with_trim / MiB, "peak_share": with_trim / without}

    return measure


def read_once_peak(house: House, command: Callable[[str], list[str]]) -> Measure:
    """A measure: the same of a client that sends no TRIM, of a read-once snapshot and of a plain one.

    The client goes as fast as it can. `command` gives what to run for a URI.
    """

    def measure(offer: Offer) -> Figures:
        server = offer.server
        assert isinstance(server, Ours)
        peaks = []
        for read_once in (True, False):
            with server.snapshot(read_once=read_once) as made:
                peaks.append(_peak(house, made, partial(run, command(made.snapshot), house.log)))
        return {"peak": peaks[0] / MiB, "peak_share": peaks[0] / peaks[1]}

    return measure


def _peak(house: House, offer: Offer, pull: Callable[[], object]) -> int:
    """Bytes of disk space that temp had at most during a pull."""
    writer = Writer(house, offer.disk, depth=16, rate=GUEST_RATE)
    over = threading.Event()
    peak = 0

    def look() -> None:
        nonlocal peak
        while not over.wait(_LOOK_INTERVAL):
            peak = max(peak, os.stat(offer.temp_path).st_blocks * 512)

    looker = threading.Thread(target=look)
    looker.start()
    try:
        pull()
    finally:
        over.set()
        looker.join()
        writer.stop()
    return peak


def _pull(house: House, uri: str, *, trim: bool, rate: float = 0.0) -> dict[str, float]:
    mode = "--trim" if trim else "--no-trim"
    report: dict[str, float] = json.loads(run([_PYTHON, _PULL, uri, mode, f"{rate:.0f}"], house.log))
    return report


def pull_to_nowhere(house: House, uri: str, *, nicely: bool = True) -> dict[str, float]:
    """The report of a `fleecing pull` with TRIM, as fast as it goes; it began when it was connected.

    `nicely`: as nice as it is by itself; else with a niceness that somebody has chosen, the least there is.
    """
    pull = [*([] if nicely else ["nice", "-n", "1"]), *COMMAND, "pull", uri, "-", "--json"]
    with Process(["bash", "-c", 'exec "$@" > /dev/null', "bash", *pull], house.log, env=TREE) as client:
        said = json.loads(client.wait_line('"event": "(done|failed)"'))
        ended = time.time()
        client.wait()
    if "error" in said:
        raise BenchError(f"fleecing pull: {said['error']}")
    return {"began": ended - said["seconds"], "ended": ended, "bytes": said["data"], "trimmed": said["trimmed"]}
