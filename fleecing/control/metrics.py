"""Figures for Prometheus, taken at the moment of the scrape.

Nothing here counts: whoever does something counts it in plain numbers, and this reads them. So a figure costs when it
is asked for. Counters go over all that there was since the start of the server; series of a snapshot end with it.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Sequence

from prometheus_client import CollectorRegistry, Metric, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector

import fleecing
from fleecing.block.latency import BOUNDS, Latency
from fleecing.control.jobs import Jobs
from fleecing.control.lag import LoopLag
from fleecing.control.models import JobState, SnapshotState
from fleecing.control.report import Reporter
from fleecing.server.meter import KINDS, WITH_BYTES

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_EXPORTED = [i for i, bound in enumerate(BOUNDS) if f"{bound:e}"[:4] in ("1.00", "2.50", "5.00") and bound >= 5e-6]
"""The buckets that are told: 5 us, 10 us, 25 us ... 50 s."""

_CHECKPOINT_STATES = ("active", "pending", "deleting", "inconsistent")

Labels = Sequence[str]


class _Figures(Collector):
    def __init__(self, reporter: Reporter, jobs: Jobs, lag: LoopLag) -> None:
        self._reporter = reporter
        self._manager = reporter.manager
        self._server = reporter.server
        self._jobs = jobs
        self._lag = lag

    def describe(self) -> Iterable[Metric]:
        """None: registration must not collect."""
        return []

    def collect(self) -> Iterable[Metric]:
        """One Metric a name, with a sample for each disk, snapshot, kind."""
        yield from self._disks()
        yield from self._requests()
        yield from self._copies()
        yield from self._snapshots()
        yield from self._checkpoints()
        yield from self._whole_server()

    def _disks(self) -> Iterable[Metric]:
        clients = GaugeMetricFamily("fleecing_clients", "NBD connections by export.", labels=["export"])
        size = GaugeMetricFamily("fleecing_disk_size_bytes", "Size of the active image.", labels=["disk"])
        problem = GaugeMetricFamily(
            "fleecing_disk_problem", "1 = the image is not what it was at the start.", labels=["disk"]
        )
        free = GaugeMetricFamily(
            "fleecing_temp_free_bytes", "Free space of the file system that takes the next temp file.", labels=["disk"]
        )
        whole = GaugeMetricFamily("fleecing_temp_size_bytes", "Size of that file system.", labels=["disk"])
        for disk in self._reporter.disks():
            clients.add_metric([disk.name], disk.clients)
            size.add_metric([disk.name], disk.size)
            problem.add_metric([disk.name], int(disk.problem is not None))
            free.add_metric([disk.name], disk.temp_free)
            whole.add_metric([disk.name], disk.temp_size)
        for export, count in self._reporter.snapshot_clients():
            clients.add_metric([export], count)
        return clients, size, problem, free, whole

    def _requests(self) -> Iterable[Metric]:
        labels = ["disk", "role", "kind"]
        requests = CounterMetricFamily("fleecing_requests", "Answered NBD requests.", labels=labels)
        errors = CounterMetricFamily("fleecing_request_errors", "Those answered with an error.", labels=labels)
        moved = CounterMetricFamily("fleecing_request_bytes", "Read, written, zeroed or trimmed.", labels=labels)
        seconds = HistogramMetricFamily(
            "fleecing_request_seconds", "From the receive of requests to the send of their replies.", labels=labels
        )
        opened = CounterMetricFamily(
            "fleecing_connections", "NBD connections that chose an export.", labels=["disk", "role"]
        )
        for disk in list(self._manager.disks.values()):
            for role, traffic in (("active", disk.export.traffic), ("snapshot", disk.backups)):
                tally = traffic.total()
                opened.add_metric([disk.name, role], traffic.opened)
                for kind, name in KINDS.items():
                    which = [disk.name, role, name]
                    requests.add_metric(which, tally.requests[kind])
                    errors.add_metric(which, tally.errors[kind])
                    if kind in WITH_BYTES:
                        moved.add_metric(which, tally.bytes[kind])
                    if (latency := tally.latencies[kind]) is not None:
                        _add(seconds, which, latency)
        return requests, errors, moved, seconds, opened

    def _copies(self) -> Iterable[Metric]:
        labels = ["disk"]
        seconds = HistogramMetricFamily(
            "fleecing_copy_seconds", "Copies before guest writes, of one or several clusters.", labels=labels
        )
        errors = CounterMetricFamily("fleecing_copy_errors", "Copies that failed.", labels=labels)
        clusters = CounterMetricFamily("fleecing_copied_clusters", "Clusters copied, zeroes too.", labels=labels)
        copied = CounterMetricFamily(
            "fleecing_copied_bytes", "Bytes copied; those of zeroes were not written.", labels=["disk", "contents"]
        )
        waits = CounterMetricFamily(
            "fleecing_copy_waits", "Copies that waited for the lock of a snapshot or for another's copy.",
            labels=["disk", "what"],
        )  # fmt: skip
        waited = CounterMetricFamily("fleecing_copy_wait_seconds", "How long, in all.", labels=["disk", "what"])
        rereads = CounterMetricFamily(
            "fleecing_repeated_reads",
            "Reads of snapshots that the guest overtook, read again from temp.",
            labels=labels,
        )
        broken = CounterMetricFamily(
            "fleecing_snapshots_broken", "Snapshots that broke, or could not be gone on with.",
            labels=["disk", "reason"],
        )  # fmt: skip
        for disk in list(self._manager.disks.values()):
            which, figures = [disk.name], disk.node.copies.total()
            _add(seconds, which, figures.latency)
            errors.add_metric(which, figures.failures)
            clusters.add_metric(which, figures.clusters)
            copied.add_metric([*which, "data"], figures.bytes_data)
            copied.add_metric([*which, "zeroes"], figures.bytes_zeroes)
            waits.add_metric([*which, "lock"], figures.lock_waits)
            waits.add_metric([*which, "copy"], figures.task_waits)
            waited.add_metric([*which, "lock"], figures.lock_wait_seconds)
            waited.add_metric([*which, "copy"], figures.task_wait_seconds)
            rereads.add_metric(which, figures.rereads)
            for kind, count in disk.node.breakages.counts().items():
                broken.add_metric([*which, kind], count)
        return seconds, errors, clusters, copied, waits, waited, rereads, broken

    def _snapshots(self) -> Iterable[Metric]:
        labels = ["disk", "snapshot"]
        clusters = GaugeMetricFamily("fleecing_snapshot_clusters", "Clusters by state.", labels=[*labels, "state"])
        copied = CounterMetricFamily("fleecing_snapshot_copied_clusters", "Clusters ever copied.", labels=labels)
        used = GaugeMetricFamily("fleecing_snapshot_temp_used_bytes", "Temp space now.", labels=labels)
        peak = GaugeMetricFamily("fleecing_snapshot_temp_peak_bytes", "Most temp space so far.", labels=labels)
        limit = GaugeMetricFamily("fleecing_snapshot_temp_limit_bytes", "Limit of temp space, if any.", labels=labels)
        broken = GaugeMetricFamily("fleecing_snapshot_broken", "1 = can never be read again.", labels=labels)
        created = GaugeMetricFamily(
            "fleecing_snapshot_created_timestamp_seconds", "When it was made, since 1970.", labels=labels
        )
        for s in self._reporter.snapshots():
            which = [s.disk, s.name]
            for state, count in s.clusters.model_dump().items():
                clusters.add_metric([*which, state], count)
            copied.add_metric(which, s.copied_total)
            used.add_metric(which, s.temp.used)
            peak.add_metric(which, s.temp.peak)
            if s.temp.limit is not None:
                limit.add_metric(which, s.temp.limit)
            broken.add_metric(which, int(s.state is SnapshotState.BROKEN))
            created.add_metric(which, s.created.timestamp())
        return clusters, copied, used, peak, limit, broken, created

    def _checkpoints(self) -> Iterable[Metric]:
        count = GaugeMetricFamily("fleecing_checkpoints", "Checkpoints by state.", labels=["disk", "state"])
        for disk in list(self._manager.disks.values()):
            states = disk.chain.states()
            for state in _CHECKPOINT_STATES:
                count.add_metric([disk.name, state], states.count(state))
        return (count,)

    def _whole_server(self) -> Iterable[Metric]:
        running = GaugeMetricFamily("fleecing_jobs_running", "Pushes at work.", value=self._jobs.running)
        ended = CounterMetricFamily("fleecing_jobs", "Pushes that ended, by outcome.", labels=["state"])
        for state in JobState:
            if state is not JobState.RUNNING:
                ended.add_metric([state], self._jobs.ended(state))
        lag = HistogramMetricFamily(
            "fleecing_event_loop_lag_seconds",
            "How late the event loop came to what was due, twice a second.",
            labels=[],
        )
        _add(lag, [], self._lag.latency)
        used, total = self._server.read_memory
        requests, payload = self._server.in_flight
        build = GaugeMetricFamily("fleecing_build_info", "The version, as a label.", labels=["version"])
        build.add_metric([fleecing.__version__], 1)
        return (
            running,
            ended,
            lag,
            build,
            GaugeMetricFamily("fleecing_threads", "Threads of the server.", value=threading.active_count()),
            GaugeMetricFamily("fleecing_read_memory_used_bytes", "Memory in use for long READs.", value=used),
            GaugeMetricFamily("fleecing_read_memory_limit_bytes", "Most of it (read-memory).", value=total),
            GaugeMetricFamily("fleecing_requests_in_flight", "Requests under way in other threads.", value=requests),
            GaugeMetricFamily("fleecing_requests_in_flight_bytes", "Of their payload.", value=payload),
            CounterMetricFamily(
                "fleecing_clients_turned_away", "Clients that were one too many.", value=self._server.turned_away
            ),
        )


def _add(family: HistogramMetricFamily, labels: Labels, latency: Latency) -> None:
    """A histogram with the buckets that are told; its count is theirs, whatever is recorded meanwhile."""
    buckets = latency.buckets.copy()
    told = [(repr(BOUNDS[i]), float(sum(buckets[: i + 1]))) for i in _EXPORTED]
    family.add_metric(labels, [*told, ("+Inf", float(sum(buckets)))], latency.seconds)


class Metrics:
    """The text of /metrics."""

    def __init__(self, reporter: Reporter, jobs: Jobs, lag: LoopLag) -> None:
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(_Figures(reporter, jobs, lag))
        ProcessCollector(pid=os.getpid, registry=self._registry)

    def text(self) -> bytes:
        """May count all clusters of all snapshots: for a worker thread."""
        return generate_latest(self._registry)
