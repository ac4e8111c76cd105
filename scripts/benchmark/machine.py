"""The machine: what it is, how quiet it was during a sample, and spinners that keep its CPUs awake."""

from __future__ import annotations

import os
import platform
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts.benchmark.house import House
from scripts.benchmark.process import Daemon, Process

_TICKS = os.sysconf("SC_CLK_TCK")
_CPUS = os.cpu_count() or 1
_KERNEL_THREAD = 0x00200000  # PF_KTHREAD, of the flags in /proc/PID/stat

STEAL_LIMIT = 0.03
OTHERS_LIMIT = 0.10
"""Shares of the machine's CPU time above which a sample is not to be trusted: taken by the host, by other programs."""


@dataclass(frozen=True)
class Quiet:
    """Shares of the CPU time, 0 to 1, that the host and other programs took during a sample."""

    steal: float
    others: float


@dataclass(frozen=True)
class _Clock:
    at: float
    busy: float
    steal: float
    kernel: float
    ours: float


def watch() -> _Clock:
    """Look at the clocks; the same again at the end gives what lies between to `quiet_since`."""
    fields = [int(word) / _TICKS for word in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]]
    own = sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    children = sum(child.cpu() for child in Process.running) + sum(child.cpu() for child in Daemon.running)
    return _Clock(time.monotonic(), sum(fields[:3]), fields[7], _kernel_threads(), own + children)


def quiet_since(start: _Clock) -> Quiet:
    """How quiet it was since `start`. User and system time that is neither ours nor the kernel's own is others'."""
    end = watch()
    total = max(1e-9, (end.at - start.at) * _CPUS)
    others = (end.busy - start.busy) - (end.kernel - start.kernel) - (end.ours - start.ours)
    return Quiet(steal=(end.steal - start.steal) / total, others=max(0.0, others / total))


def _kernel_threads() -> float:
    ticks = 0
    for entry in os.scandir("/proc"):
        if entry.name.isdecimal():
            try:
                fields = Path(entry.path, "stat").read_text().rpartition(")")[2].split()
            except (FileNotFoundError, ProcessLookupError):
                continue
            if int(fields[6]) & _KERNEL_THREAD:
                ticks += int(fields[11]) + int(fields[12])
    return ticks / _TICKS


class Spinners:
    """One busy loop a CPU at the lowest priority, stopped but for `awake`."""

    def __init__(self, house: House) -> None:
        # Absolute, where `nice` would only add to a priority that the benchmark was started with.
        spin = "import os\nos.setpriority(os.PRIO_PROCESS, 0, 19)\nwhile True: pass"
        self._children = [Process([sys.executable, "-S", "-c", spin], house.log) for _ in range(_CPUS)]
        self._signal(signal.SIGSTOP)

    def _signal(self, number: signal.Signals) -> None:
        for child in self._children:
            child.signal(number)

    @contextmanager
    def awake(self) -> Iterator[None]:
        """The CPUs do not sleep meanwhile."""
        self._signal(signal.SIGCONT)
        try:
            yield
        finally:
            self._signal(signal.SIGSTOP)

    def close(self) -> None:
        """End them."""
        self._signal(signal.SIGCONT)
        for child in self._children:
            child.stop()


def describe(programs: Sequence[Sequence[str]]) -> dict[str, Any]:
    """The machine and the versions, for the report. `programs`: commands that print their version."""
    cpuinfo = Path("/proc/cpuinfo").read_text()
    model = re.search(r"^model name\s*:\s*(.*)", cpuinfo, re.MULTILINE)
    memory = re.search(r"^MemTotal:\s+(\d+)", Path("/proc/meminfo").read_text(), re.MULTILINE)
    return {
        "cpu": model[1] if model else platform.machine(),
        "cpus": _CPUS,
        "memory_mib": int(memory[1]) // 1024 if memory else 0,
        "kernel": platform.release(),
        "python": f"{platform.python_version()} ({platform.python_compiler()})",
        "load_average": os.getloadavg()[0],
        "versions": {command[0]: _version(command) for command in programs},
    }


def _version(command: Sequence[str]) -> str:
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return "not installed"
    found = re.search(r"\d+\.\d+(\.\d+)?", done.stdout + done.stderr)
    return found[0] if found else "?"
