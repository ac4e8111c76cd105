"""What a running server tells Prometheus, as numbers."""

from __future__ import annotations

import time
from collections.abc import Iterator

from prometheus_client.parser import text_string_to_metric_families

from tests.peers import DEADLINE, run
from tests.serving import Server


class Figures:
    """One scrape."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.types = {family.name: family.type for family in text_string_to_metric_families(text)}
        self._samples = {
            (sample.name, frozenset(sample.labels.items())): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }

    def get(self, name: str, **labels: str) -> float | None:
        """The sample with exactly these labels; None = there is none."""
        return self._samples.get((name, frozenset(labels.items())))

    def all(self, name: str, **labels: str) -> dict[tuple[str, ...], float]:
        """Samples with these labels among others, by the values of the others in the order of their names."""
        return {
            tuple(value for key, value in sorted(found) if key not in labels): number
            for (sample, found), number in self._samples.items()
            if sample == name and labels.items() <= dict(found).items()
        }

    def names(self) -> set[str]:
        """Of all samples."""
        return {name for name, _ in self._samples}

    def counters(self) -> Iterator[tuple[tuple[str, frozenset[tuple[str, str]]], float]]:
        """All samples that may only grow."""
        for (name, labels), value in self._samples.items():
            if name.endswith(("_total", "_bucket", "_count", "_sum")):
                yield (name, labels), value

    def kinds(self, role: str, disk: str = "vda") -> dict[str, tuple[int, int, int]]:
        """(requests, errors, bytes) of each kind of requests that there was."""
        which = {"disk": disk, "role": role}
        return {
            kind: (
                int(requests),
                int(self.get("fleecing_request_errors_total", kind=kind, **which) or 0),
                int(self.get("fleecing_request_bytes_total", kind=kind, **which) or 0),
            )
            for (kind,), requests in self.all("fleecing_requests_total", **which).items()
            if requests
        }

    def timed(self, role: str, disk: str = "vda") -> dict[str, int]:
        """How many requests of each kind the histograms have."""
        found = self.all("fleecing_request_seconds_count", disk=disk, role=role)
        return {kind: int(count) for (kind,), count in found.items()}


def scrape(server: Server) -> Figures:
    """As an operator may have it, over the control socket."""
    where = ("--unix-socket", str(server.control_path), "http://localhost/metrics")
    return Figures(run("curl", "--silent", "--fail", "--max-time", str(DEADLINE), *where))


def when_all_left(server: Server) -> Figures:
    """When no client is connected any more: then all that they did is in all figures."""
    end = time.monotonic() + DEADLINE
    while server.status()["clients"]:
        assert time.monotonic() < end
    return scrape(server)
