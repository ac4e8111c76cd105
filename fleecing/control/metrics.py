"""Figures for Prometheus, taken at the moment of the scrape."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Metric, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from fleecing.control.models import SnapshotState
from fleecing.control.report import Reporter

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class _Figures(Collector):
    def __init__(self, reporter: Reporter) -> None:
        self._reporter = reporter

    def describe(self) -> Iterable[Metric]:
        """None: registration must not collect."""
        return []

    def collect(self) -> Iterable[Metric]:
        """One Metric a name, with a sample for each disk or snapshot."""
        yield from self._disk_figures()
        yield from self._snapshot_figures()

    def _disk_figures(self) -> Iterable[Metric]:
        clients = GaugeMetricFamily("fleecing_clients", "NBD connections by export", labels=["export"])
        size = GaugeMetricFamily("fleecing_disk_size_bytes", "Size of the active image", labels=["disk"])
        free = GaugeMetricFamily("fleecing_temp_free_bytes", "Free space for temp files", labels=["disk"])
        for disk in self._reporter.disks():
            clients.add_metric([disk.name], disk.clients)
            size.add_metric([disk.name], disk.size)
            free.add_metric([disk.name], disk.temp_free)
        for snapshot in self._reporter.snapshots():
            clients.add_metric([snapshot.export], snapshot.clients)
        return clients, size, free

    def _snapshot_figures(self) -> Iterable[Metric]:
        labels = ["disk", "snapshot"]
        clusters = GaugeMetricFamily("fleecing_snapshot_clusters", "Clusters by state", labels=[*labels, "state"])
        copied = CounterMetricFamily("fleecing_snapshot_copied_clusters", "Clusters ever copied", labels=labels)
        used = GaugeMetricFamily("fleecing_snapshot_temp_used_bytes", "Temp space now", labels=labels)
        peak = GaugeMetricFamily("fleecing_snapshot_temp_peak_bytes", "Most temp space so far", labels=labels)
        limit = GaugeMetricFamily("fleecing_snapshot_temp_limit_bytes", "Quota of temp space, if any", labels=labels)
        broken = GaugeMetricFamily("fleecing_snapshot_broken", "1 = can never be read again", labels=labels)
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
        return clusters, copied, used, peak, limit, broken


class Metrics:
    """The text of /metrics."""

    def __init__(self, reporter: Reporter) -> None:
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(_Figures(reporter))

    def text(self) -> bytes:
        """May count all clusters of all snapshots: for a worker thread."""
        return generate_latest(self._registry)
