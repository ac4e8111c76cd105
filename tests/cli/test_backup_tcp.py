"""`fleecing backup` and `fleecing pull` of a server that is reached over IPv6 or through TLS, and says so itself."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trustme
from click.testing import CliRunner, Result

from fleecing.cli.control_client import ControlClient
from fleecing.cli.main import main
from fleecing.client.dial import connect
from fleecing.nbd.uri import NbdUri
from tests.crash.forked import ForkedServer
from tests.images import MIB, make_image

SIZE = 2 * MIB + 333


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Certificates of a server called `localhost`, and of a client."""
    folder = tmp_path_factory.mktemp("tls")
    ca = trustme.CA()
    ca.cert_pem.write_to_path(str(folder / "ca-cert.pem"))
    for role, name in (("server", "localhost"), ("client", "backup@example.org")):
        leaf = ca.issue_cert(name)
        leaf.private_key_pem.write_to_path(str(folder / f"{role}-key.pem"))
        leaf.cert_chain_pems[0].write_to_path(str(folder / f"{role}-cert.pem"))
    return folder


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "vda.img"
    make_image(path, SIZE)
    return path


PLACES = {
    "IPv4": ("127.0.0.1:0", "nbd://127.0.0.1:", []),
    "IPv6": ("[::1]:0", "nbd://[::1]:", []),
    "TLS over IPv6": ("[::1]:0", "nbds://[::1]:", ["--tls-certificates", "DIR", "--tls-hostname", "localhost"]),
    "TLS over IPv4": ("127.0.0.1:0", "nbds://127.0.0.1:", ["--tls-certificates", "DIR", "--tls-hostname", "localhost"]),
    "TLS on the Unix socket": (None, "nbds+unix:///vda?socket=", ["--tls-certificates", "DIR"]),
}
"""Where a server listens, how the URIs begin that it tells, and what it takes of options to get in there."""


class Place:
    """A server that listens there, and the commands of its clients."""

    def __init__(self, server: ForkedServer, options: list[str]) -> None:
        self.server = server
        self.options = options
        self.uri: str = self.request("GET", "/v1/disks")["disks"][0]["uris"][0]

    def request(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        answer: dict[str, Any] = ControlClient(str(self.server.control)).request(method, path, body)
        return answer

    def fleecing(self, *words: object, expect: int = 0) -> Result:
        control = ["--control", str(self.server.control)]
        result = CliRunner().invoke(main, [*map(str, words), *self.options, *control])
        assert result.exit_code == expect, result.output
        return result


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest, tmp_path: Path, image: Path, tls: Path) -> Iterator[Place]:
    listen, begins, options = PLACES[request.param]
    required = ["--tls", "require", "--tls-unix", "require", "--tls-dir", str(tls), "--tls-verify-client"]
    server = ForkedServer(tmp_path, image, *(required if options else []), listen=listen)
    server.wait_ready()
    found = Place(server, [word.replace("DIR", str(tls)) for word in options])
    assert found.uri.startswith(begins)
    yield found
    server.stop()


def test_a_backup_and_the_next_one_restore_exactly(place: Place, image: Path, tmp_path: Path, tls: Path) -> None:
    backups, out = tmp_path / "backups", tmp_path / "out"
    for turn in range(2):
        result = place.fleecing("backup", "vda", backups, "--json")
        (told,) = json.loads(result.stdout)
        assert (told["since"] is None) == (turn == 0)
        restored = CliRunner().invoke(main, ["restore", str(backups / "vda"), str(out)])
        assert restored.exit_code == 0, restored.output
        assert out.read_bytes() == image.read_bytes()
        out.unlink()
        with connect(NbdUri.parse(place.uri).with_tls(str(tls), "localhost")) as guest:
            guest.write(70_000, b"x" * 70_000)


def test_a_snapshot_is_pulled_by_its_name_and_by_its_uri(place: Place, image: Path, tmp_path: Path) -> None:
    uri = place.request("POST", "/v1/snapshots", {"disks": ["vda"], "name": "s"})["snapshots"][0]["uris"][0]
    for source in ("vda@s", uri):
        place.fleecing("pull", source, tmp_path / "out", "--no-trim")
        assert (tmp_path / "out").read_bytes() == image.read_bytes()
        (tmp_path / "out").unlink()
    place.fleecing("pull", "vda@s", tmp_path / "chain", "--chain")
    result = CliRunner().invoke(main, ["verify", str(tmp_path / "chain")])
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("place", ["TLS over IPv4", "TLS on the Unix socket"], indirect=True)
def test_a_backup_without_the_servers_authority_is_refused_and_leaves_nothing(place: Place, tmp_path: Path) -> None:
    place.options = []
    result = place.fleecing("backup", "vda", tmp_path / "backups", expect=1)
    assert "the server's certificate is not accepted" in result.stderr and len(result.stderr.splitlines()) == 1
    assert place.request("GET", "/v1/snapshots")["snapshots"] == []
    assert place.request("GET", "/v1/checkpoints")["checkpoints"] == []


def test_options_of_tls_do_not_go_with_a_uri_without_tls(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["pull", "nbd://localhost/x", str(tmp_path / "o"), "--tls-certificates", "tls"])
    assert result.exit_code == 2 and "go with a URI of nbds" in result.stderr


@pytest.mark.parametrize("place", ["IPv4"], indirect=True)
def test_options_of_tls_are_not_passed_over_where_the_server_has_none(place: Place, tmp_path: Path, tls: Path) -> None:
    place.request("POST", "/v1/snapshots", {"disks": ["vda"], "name": "s"})
    place.options = ["--tls-certificates", str(tls)]
    for words in (("pull", "vda@s", tmp_path / "out"), ("backup", "vda", tmp_path / "backups")):
        assert "are for TLS, which the server does not offer" in place.fleecing(*words, expect=1).stderr
    assert not (tmp_path / "out").exists()
    assert [s["name"] for s in place.request("GET", "/v1/snapshots")["snapshots"]] == ["s"]
