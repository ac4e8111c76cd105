"""The control API of a running server, asked by curl as anybody would."""

from __future__ import annotations

import json
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fleecing.units import MiB
from tests.peers import run
from tests.serving import Server


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Disks vda and vdb."""
    folder = tmp_path_factory.mktemp("api")
    images = {name: folder / f"{name}.img" for name in ("vda", "vdb")}
    for image in images.values():
        image.write_bytes(b"\1" * MiB)
    server = Server(folder, images)
    yield server
    server.stop()


@pytest.fixture
def server(running: Server) -> Iterator[Server]:
    """The same for all tests, each time without snapshots."""
    yield running
    for snapshot in running.status()["snapshots"]:
        running.delete(snapshot["export"])


def curl(server: Server, path: str, *options: str) -> tuple[int, Any]:
    """(status, JSON) of a call."""
    form = ["--silent", "--unix-socket", str(server.control_path), "--write-out", "\n%{http_code}"]
    body, _, status = run("curl", *form, *options, f"http://localhost{path}").rpartition("\n")
    return int(status), json.loads(body)


def post(server: Server, body: str) -> tuple[int, Any]:
    return curl(server, "/v1/snapshots", "--data", body)


def test_the_control_socket_is_its_owners_alone(server: Server) -> None:
    assert stat.S_IMODE(server.control_path.stat().st_mode) == 0o600


def test_a_snapshot_is_made_shown_mapped_and_deleted(server: Server) -> None:
    status, made = post(server, '{"disks": ["vda", "vdb"], "name": "s"}')
    assert status == 201
    assert [s["export"] for s in made["snapshots"]] == ["vda@s", "vdb@s"]
    assert curl(server, "/v1/snapshots") == (200, made)
    assert curl(server, "/v1/snapshots/vdb@s") == (200, made["snapshots"][1])
    status, page = curl(server, "/v1/snapshots/vda@s/map?offset=65536&limit=5")
    assert (status, page["next"]) == (200, None)
    assert page["runs"] == [{"offset": 65536, "length": MiB - 65536, "state": "untouched"}]
    for deleted in (True, False):
        assert curl(server, "/v1/snapshots/vda@s", "-X", "DELETE") == (
            200,
            {"disk": "vda", "name": "s", "deleted": deleted},
        )


def test_a_snapshot_that_is_made_can_be_read_at_its_uris(server: Server) -> None:
    _, made = post(server, '{"disks": ["vda"]}')
    (info,) = made["snapshots"]
    assert [uri.partition(":")[0] for uri in info["uris"]] == ["nbd+unix", "nbd"]
    for uri in info["uris"]:
        assert run("nbdinfo", "--size", uri) == f"{MiB}\n"


def test_the_temp_file_is_a_qcow2_image_over_the_active_one(server: Server) -> None:
    _, made = post(server, '{"disks": ["vda"]}')
    info = json.loads(run("qemu-img", "info", "-U", "--output=json", made["snapshots"][0]["temp"]["path"]))
    assert (info["format"], info["virtual-size"]) == ("qcow2", MiB)
    assert info["backing-filename"] == server.status()["disks"][0]["path"]


def test_status_names_disks_snapshots_and_listeners(server: Server) -> None:
    server.snapshot(name="s")
    status, now = curl(server, "/v1/status")
    assert status == 200
    assert [disk["name"] for disk in now["disks"]] == ["vda", "vdb"]
    assert now["disks"][0]["path"].endswith("/vda.img")
    assert now["disks"][0]["snapshots"] == ["s"]
    assert [s["export"] for s in now["snapshots"]] == ["vda@s"]
    assert now["listeners"] == [f"tcp:127.0.0.1:{server.port}", f"unix:{server.unix}"]
    assert now["pid"] == server.child.pid
    assert [disk["uris"] for disk in curl(server, "/v1/disks")[1]["disks"]] == [disk["uris"] for disk in now["disks"]]


def test_clients_are_counted_at_their_export(server: Server, libnbd: Any) -> None:
    client = libnbd.NBD()
    client.connect_uri(server.snapshot(name="s"))
    client.pread(4096, 0)
    (told,) = server.status()["clients"]
    assert (told["export"], told["requests"], told["bytes_read"]) == ("vda@s", 1, 4096)
    assert server.show("vda@s")["clients"] == 1
    assert [disk["clients"] for disk in server.status()["disks"]] == [0, 0]
    client.shutdown()


def test_metrics_are_text_for_prometheus(server: Server) -> None:
    server.snapshot(name="s")
    text = run("curl", "--silent", "--include", "--unix-socket", str(server.control_path), "http://localhost/metrics")
    assert re.search(r"(?i)^content-type: text/plain; version=0\.0\.4", text, re.MULTILINE)
    assert 'fleecing_snapshot_clusters{disk="vda",snapshot="s",state="untouched"} 16.0' in text


@pytest.mark.parametrize(
    "body, status, sentence",
    [
        ("", 400, "Invalid JSON"),
        ("[]", 400, "object"),
        ("{}", 400, "disks: is missing"),
        ('{"disks": []}', 400, "disks: there must be at least one"),
        ('{"disks": "vda"}', 400, "disks: "),
        ('{"disks": ["vda", "vda"]}', 400, "disk 'vda' is named twice"),
        ('{"disks": ["../vda"]}', 400, "'../vda' is no name"),
        ('{"disks": ["vdc"]}', 404, "there is no disk 'vdc': this server has vda, vdb"),
        ('{"disks": ["vda"], "name": "a/b"}', 400, "name: 'a/b' is no name"),
        ('{"disks": ["vda"], "name": "taken"}', 409, "disk 'vda' has a snapshot 'taken' already"),
        ('{"disks": ["vda"], "temp_limit": "10X"}', 400, "'10X' is no size"),
        ('{"disks": ["vda"], "temp_limit": 0}', 400, "temp limit 0"),
        ('{"disks": ["vda"], "temp_limit": 1.5}', 400, "temp_limit: "),
        ('{"disks": ["vda"], "temp_limit": "64K"}', 409, "too small"),
        ('{"disks": ["vda"], "cbw_timeout": -1}', 400, "cbw_timeout: "),
        ('{"disks": ["vda"], "cbw_timeout": "NaN"}', 400, "cbw_timeout: "),
        ('{"disks": ["vda"], "on_cbw_error": "panic"}', 400, "on_cbw_error: "),
        ('{"disks": ["vda"], "sicne": "x"}', 400, "sicne: is no known setting"),
        ('{"disks": ["vda"], "since": "x"}', 409, "disk 'vda' has no checkpoint 'x'; take a full one, or allow"),
        ('{"disks": ["vda"], "bitmap": "x"}', 409, "disk 'vda' has no checkpoint 'x'; leave the bitmap out"),
        ('{"disks": ["vda"], "since": "x", "bitmap": "x"}', 400, "since and bitmap do not go together"),
        ('{"disks": ["vda"], "or_full": true}', 400, "or_full goes with since only"),
        ('{"disks": ["vda"], "bitmap_name": "x"}', 400, "bitmap_name goes with since or bitmap only"),
        ('{"disks": ["vda"], "checkpoint": "../x"}', 400, "checkpoint: '../x' is no name"),
        ('{"disks": ["vda"], "read_once_grace": "1M"}', 400, "read_once_grace goes with read_once only"),
        ('{"disks": ["vda"], "read_once": true, "read_once_grace": -1}', 400, "read_once_grace: "),
        ('{"disks": ["vda"], "read_once": true, "read_once_grace": "5G"}', 400, "give 4 GiB at most"),
    ],
)
def test_a_request_that_cannot_be_met_is_answered_with_a_sentence(
    server: Server, body: str, status: int, sentence: str
) -> None:
    server.snapshot(name="taken")
    answered, problem = post(server, body)
    assert (answered, list(problem)) == (status, ["error"])
    assert sentence in problem["error"]
    assert len(server.status()["snapshots"]) == 1


@pytest.mark.parametrize(
    "method, path, status",
    [
        ("GET", "/", 404),
        ("GET", "/v1/snapshots/vda@s", 404),
        ("GET", "/v1/snapshots/vda@s/map", 404),
        ("GET", "/v1/snapshots/vdc@s", 404),
        ("DELETE", "/v1/snapshots/vdc@s", 404),
        ("GET", "/v1/checkpoints?disk=vdc", 404),
        ("DELETE", "/v1/checkpoints/vdc@c", 404),
        ("GET", "/v1/checkpoints/vda@c/extents", 404),
        ("GET", "/v1/checkpoints/vda@c/bitmap", 404),
        ("GET", "/v1/snapshots/..@..", 404),
        ("GET", "/v1/jobs/1", 404),
        ("GET", "/v1/jobs/" + "9" * 5000, 404),
        ("PUT", "/v1/status", 405),
        ("DELETE", "/v1/snapshots", 405),
    ],
)
def test_what_is_not_there_is_answered_with_a_sentence(server: Server, method: str, path: str, status: int) -> None:
    answered, problem = curl(server, path, "-X", method)
    assert (answered, list(problem)) == (status, ["error"])


@pytest.mark.parametrize("query", ["offset=-1", "offset=x", "limit=1.0", "offset=1048576", "offset=" + "9" * 30])
def test_a_map_query_that_means_nothing_is_refused(server: Server, query: str) -> None:
    server.snapshot(name="s")
    status, problem = curl(server, f"/v1/snapshots/vda@s/map?{query}")
    assert (status, list(problem)) == (400, ["error"])


def test_a_body_that_is_too_long_is_refused(server: Server, tmp_path: Path) -> None:
    body = tmp_path / "body"
    body.write_bytes(b" " * (2 * MiB))
    status, problem = curl(server, "/v1/snapshots", "--data-binary", f"@{body}")
    assert (status, list(problem)) == (413, ["error"])


def test_the_document_describes_every_call_and_resolves(server: Server) -> None:
    status, document = curl(server, "/openapi.json")
    assert (status, document["openapi"]) == (200, "3.1.0")
    calls = {(method, path) for path, methods in document["paths"].items() for method in methods}
    one = "/v1/snapshots/{disk}@{name}"
    assert calls == {
        ("get", "/v1/status"),
        ("get", "/v1/disks"),
        ("get", "/v1/snapshots"),
        ("post", "/v1/snapshots"),
        ("get", one),
        ("patch", one),
        ("delete", one),
        ("get", f"{one}/map"),
        ("get", "/v1/checkpoints"),
        ("delete", "/v1/checkpoints/{disk}@{name}"),
        ("get", "/v1/checkpoints/{disk}@{name}/extents"),
        ("get", "/v1/checkpoints/{disk}@{name}/bitmap"),
        ("get", "/v1/events"),
        ("get", "/v1/log"),
        ("patch", "/v1/log"),
        ("get", "/metrics"),
        ("get", "/v1/jobs"),
        ("post", "/v1/jobs"),
        ("get", "/v1/jobs/{id}"),
        ("patch", "/v1/jobs/{id}"),
        ("delete", "/v1/jobs/{id}"),
        ("get", "/openapi.json"),
    }
    for reference in re.findall(r'"\$ref": "([^"]*)"', json.dumps(document)):
        node = document
        for part in reference.removeprefix("#/").split("/"):
            node = node[part]


def test_what_the_document_requires_of_a_snapshot_is_answered(server: Server) -> None:
    _, document = curl(server, "/openapi.json")
    server.snapshot(name="s")
    schema = document["components"]["schemas"]["SnapshotInfo"]
    assert set(schema["required"]) <= set(schema["properties"]) == set(server.show("vda@s"))
