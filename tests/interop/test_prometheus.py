"""Prometheus against the server: what it makes of /metrics, of the alerts and of the dashboard in docs/prometheus."""

from __future__ import annotations

import json
import re
import time
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.images import MIB, make_image
from tests.peers import DEADLINE, Children, run
from tests.scrape import Figures, when_all_left
from tests.serving import ROOT, Serve, Server

DOCS = ROOT / "docs" / "prometheus"
ALERTS = DOCS / "alerts.yml"
DASHBOARD = json.loads((DOCS / "dashboard.json").read_text())
SIZE = 4 * MIB


@pytest.fixture
def server(serve: Serve, tmp_path: Path) -> Server:
    """One that has figures of every kind."""
    make_image(tmp_path / "vda.img", SIZE)
    server = serve(tmp_path / "vda.img", "--metrics", "127.0.0.1:0")
    uri = server.snapshot(name="s", temp_limit="2M", checkpoint="c")
    run("qemu-io", "-f", "raw", "-c", "write 0 1M", "-c", "discard 1M 64k", "-c", "read 0 64k", server.uri())
    run("qemu-io", "-f", "raw", "-c", "read 0 64k", "-c", "discard 0 64k", uri)
    return server


def expressions() -> Iterator[tuple[str, str]]:
    """(where it stands, PromQL) of all alerts and panels, with values in the place of Grafana's variables."""
    for name, expression in re.findall(
        r"- alert: (\w+)\n +expr: (?:>-\n)?(.*?)\n +(?:for|labels):", ALERTS.read_text(), re.DOTALL
    ):
        yield name, " ".join(expression.split())
    for panel in DASHBOARD["panels"]:
        for target in panel["targets"]:
            text = target["expr"].replace("$__rate_interval", "1m").replace("$instance", ".*").replace("$disk", ".*")
            yield panel["title"], text


def names(expression: str) -> set[str]:
    """Names of our figures and of the process's."""
    return set(re.findall(r"\b(?:fleecing|process)_\w+", expression))


def test_the_alerts_are_there_when_they_should_be_and_not_before() -> None:
    assert f"SUCCESS: {ALERTS.read_text().count('- alert:')} rules found" in run(
        "promtool", "check", "rules", str(ALERTS)
    )
    assert "SUCCESS" in run("promtool", "test", "rules", str(DOCS / "alerts_test.yml"))
    tested = set(re.findall(r"alertname: (\w+)", (DOCS / "alerts_test.yml").read_text()))
    assert tested == set(re.findall(r"- alert: (\w+)", ALERTS.read_text()))


def test_every_figure_of_alerts_and_dashboard_is_one_of_a_server_at_work(server: Server) -> None:
    found = when_all_left(server).names()
    wanted = list(expressions())
    assert len(wanted) > 40
    for where, expression in wanted:
        assert names(expression) <= found, where
    for variable in DASHBOARD["templating"]["list"]:
        assert names(json.dumps(variable)) <= found


def test_every_name_in_the_tests_of_the_alerts_is_one_of_a_server_at_work(server: Server) -> None:
    series = re.findall(r"series: '(\w+)\{", (DOCS / "alerts_test.yml").read_text())
    assert set(series) - {"up"} <= when_all_left(server).names()


def test_the_text_is_what_prometheus_asks_for(server: Server, tmp_path: Path) -> None:
    text = when_all_left(server).text
    (tmp_path / "metrics").write_text(text)
    said = run("bash", "-c", f"promtool check metrics <'{tmp_path}/metrics' 2>&1", expect=None)
    assert said == ""
    assert Figures(text).types["fleecing_request_seconds"] == "histogram"


class Prometheus:
    """A real one, which scrapes this server twice a second and looks at the alerts as often."""

    def __init__(self, children: Children, folder: Path, target: str) -> None:
        config = {
            "global": {"scrape_interval": "500ms", "scrape_timeout": "500ms", "evaluation_interval": "500ms"},
            "rule_files": [str(ALERTS)],
            "scrape_configs": [{"job_name": "fleecing", "static_configs": [{"targets": [target]}]}],
        }
        (folder / "prometheus.yml").write_text(json.dumps(config))
        child = children.start(
            *("prometheus", f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/tsdb"),
            "--web.listen-address=127.0.0.1:0",
        )
        listening = child.wait_for_line(r'"Listening on" address=(127\.0\.0\.1:\d+)')
        self._base = f"http://{listening.group(1)}/api/v1/"
        child.wait_for_line("Server is ready")

    def ask(self, path: str, **query: str) -> Any:
        """The data of an answer of its API; the test fails where that is an error."""
        answer = json.loads(run("curl", "--silent", f"{self._base}{path}?{urllib.parse.urlencode(query)}"))
        assert answer["status"] == "success", (query, answer)
        return answer["data"]

    def query(self, expression: str) -> list[dict[str, Any]]:
        """What an expression comes to now."""
        found: list[dict[str, Any]] = self.ask("query", query=expression)["result"]
        return found

    def alerts(self) -> dict[str, str]:
        """Those that there are, with their state: pending or firing."""
        return {alert["labels"]["alertname"]: alert["state"] for alert in self.ask("alerts")["alerts"]}

    def until(self, expression: str) -> list[dict[str, Any]]:
        """What it comes to, as soon as that is anything."""
        end = time.monotonic() + DEADLINE
        while not (found := self.query(expression)):
            assert time.monotonic() < end, expression
        return found


def test_a_real_prometheus_scrapes_it_and_sees_what_is_wrong(
    server: Server, tmp_path: Path, children: Children
) -> None:
    place = server.child.wait_for_line(r"metrics on http://(127\.0\.0\.1:\d+)/metrics").group(1)
    prometheus = Prometheus(children, tmp_path, place)
    prometheus.until('up{job="fleecing"} == 1')
    (written,) = prometheus.until('fleecing_request_bytes_total{role="active", kind="write"}')
    assert written["value"][1] == str(MIB)
    for where, expression in expressions():
        assert isinstance(prometheus.query(expression), list), where
    assert not {"FleecingSnapshotBroken", "FleecingDown", "FleecingGuestErrors"} & set(prometheus.alerts())
    run("qemu-io", "-f", "raw", "-c", "write 0 4M", server.uri())
    prometheus.until('ALERTS{alertname="FleecingSnapshotBroken", snapshot="s", alertstate="firing"}')
    prometheus.until('ALERTS{alertname="FleecingSnapshotBroke", reason="temp-limit", alertstate="firing"}')
    server.stop()
    prometheus.until('ALERTS{alertname="FleecingDown", alertstate="pending"}')


def test_the_dashboard_has_what_grafana_needs() -> None:
    """Panels that lie beside each other, each with its own number, and a data source that can be chosen."""
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels) > 20
    places: set[tuple[int, int]] = set()
    for panel in panels:
        grid = panel["gridPos"]
        own = {(grid["x"] + x, grid["y"] + y) for x in range(grid["w"]) for y in range(grid["h"])}
        assert max(x for x, _ in own) < 24
        assert not own & places, panel["title"]
        places |= own
        assert panel["datasource"]["uid"] == "${datasource}"
        assert panel["type"] in ("timeseries", "stat")
        assert panel["fieldConfig"]["defaults"]["unit"]
    variables = {variable["name"]: variable for variable in DASHBOARD["templating"]["list"]}
    assert list(variables) == ["datasource", "instance", "disk"]
    used = set(re.findall(r"\$\{?(\w+)", json.dumps(panels))) - {"__rate_interval"}
    assert used == set(variables)
