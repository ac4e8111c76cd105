"""What is measured: metrics, goals, rows, and what is served to a load."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

Figures = dict[str, float]
"""What one sample found, by the name of the metric (see METRICS)."""


@dataclass(frozen=True)
class Metric:
    """A kind of figure. `more_is_better` decides which peer is the best one."""

    unit: str
    more_is_better: bool = False


METRICS: Mapping[str, Metric] = {
    "rate": Metric("requests/s", more_is_better=True),
    "mb": Metric("MB/s", more_is_better=True),
    "p50": Metric("us, median"),
    "p99": Metric("us, p99"),
    "cpu": Metric("us of server CPU/request"),
    "cpu_gib": Metric("s of server CPU/GiB"),
    "client_gib": Metric("s of client CPU/GiB"),
    "seconds": Metric("s"),
    "cpu_s": Metric("s of server CPU"),
    "rss": Metric("MiB resident"),
    "growth": Metric("x bitmaps' bytes"),
    "pull_mb": Metric("MB/s of the pull", more_is_better=True),
    "other_mb": Metric("MB/s of the other client", more_is_better=True),
    "peak": Metric("MiB of temp at most"),
    "kept": Metric("of it without tracking", more_is_better=True),
    "peak_share": Metric("of the peak without that"),
}


class Against(StrEnum):
    """What a goal compares ours with, in the same run."""

    BEST = "best peer"
    QSD = "best qsd"
    NOTHING = "absolute"


@dataclass(frozen=True)
class Goal:
    """Ours, divided by the peer's figure where there is one, is to be at least (or at most) `bound`."""

    metric: str
    bound: float
    against: Against = Against.BEST
    at_most: bool = False

    def met(self, value: float) -> bool:
        """Whether this ratio, or absolute figure, is good enough."""
        return value <= self.bound if self.at_most else value >= self.bound

    def __str__(self) -> str:
        return f"{'<=' if self.at_most else '>='} {self.bound:g}"


class Transport(StrEnum):
    """How clients reach a server."""

    UNIX = "unix"
    TCP = "tcp"
    TLS = "tls"


class Child(Protocol):
    """A running server."""

    @property
    def pid(self) -> int:
        """Its number."""

    def cpu(self) -> float:
        """Seconds of CPU that it took so far."""

    def memory(self) -> int:
        """Bytes resident."""


class Server(Protocol):
    """A contender that serves one image over one transport."""

    @property
    def child(self) -> Child:
        """Its process."""

    @property
    def uri(self) -> str:
        """Where clients reach the disk."""

    def snapshot(self) -> AbstractContextManager[Offer]:
        """A snapshot of the disk, which is gone with the context."""


@dataclass
class Offer:
    """What a sample can use: the URI of a disk and, on some stages, of a snapshot of it; `tool`: who is measured."""

    server: Server
    disk: str
    snapshot: str = ""
    temp_path: str = ""
    create_seconds: float = 0.0
    tool: str = ""


class Image(StrEnum):
    """What is served."""

    DISK = "disk in memory"
    COLD = "disk not in memory"
    EXTENTS = "disk of 1 TiB with a million extents"
    SPARSE = "empty disk"
    SCATTERED = "disk of 1 TiB with 1 GiB of data all over it"


class Snapshot(StrEnum):
    """Whether a snapshot of it exists: none, one for the whole stage, or a fresh one for each sample."""

    NONE = "none"
    LASTING = "lasting"
    FRESH = "fresh"


@dataclass(frozen=True)
class Stage:
    """What has to be there for a row. `copied`: percent of a lasting snapshot; `tib`: size of a sparse image.

    `tools`: the contenders are clients, all of one server. `alone`: each sample has a server just started, and there is
    no other meanwhile.
    """

    transport: Transport = Transport.UNIX
    image: Image = Image.DISK
    snapshot: Snapshot = Snapshot.NONE
    copied: int = 0
    tib: int = 0
    tools: bool = False
    alone: bool = False


Measure = Callable[[Offer], Figures]


@dataclass(frozen=True)
class Row:
    """One line of the comparison.

    `shown` are the metrics of the table; the first is in the chart, too. `awake`: low-priority spinners keep the CPUs
    from sleeping meanwhile. `dirties`: the sample changes the disk, whose pages are made dirty beforehand. `seconds`:
    how long a sample takes, about, where that is more than the settings say.
    """

    name: str
    title: str
    stage: Stage
    contenders: tuple[str, ...]
    measure: Measure
    shown: tuple[str, ...] = ("rate",)
    goals: tuple[Goal, ...] = ()
    quick: bool = False
    awake: bool = False
    dirties: bool = False
    seconds: float = 0.0
