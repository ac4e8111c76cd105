"""nbds:// against nbdkit, qemu-nbd (both GnuTLS) and our own server: pulled byte-exact, or refused with a sentence."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
import trustme

from fleecing.client.dial import connect, list_exports
from fleecing.errors import FleecingError
from fleecing.nbd.client_handshake import ExportRefused
from fleecing.nbd.handshake import TlsMode
from fleecing.nbd.uri import NbdUri
from fleecing.pull.engine import pull
from fleecing.pull.nbd_target import NbdTarget
from fleecing.pull.options import PullOptions
from fleecing.pull.target import RawTarget
from fleecing.server.export import active_export, snapshot_export
from fleecing.server.tls import server_context
from fleecing.units import KiB, MiB
from tests.block.rig import Rig
from tests.client.servers import TIMEOUT, activated
from tests.images import make_image
from tests.server.listening import Exports, Listening

SIZE = 6 * MiB


class Pki:
    """Folders of certificates: `server`, `client`, and `stranger`, a client that another CA knows."""

    def __init__(self, folder: Path) -> None:
        ca, other = trustme.CA(), trustme.CA()
        self.server = self._folder(folder / "server", ca, "server", ca.issue_cert("localhost"))
        self.client = self._folder(folder / "client", ca, "client", ca.issue_cert("backup@example.org"))
        self.stranger = self._folder(folder / "stranger", ca, "client", other.issue_cert("backup@example.org"))
        self.misled = self._folder(folder / "misled", other, "client", ca.issue_cert("backup@example.org"))

    @staticmethod
    def _folder(folder: Path, ca: trustme.CA, role: str, leaf: trustme.LeafCert) -> Path:
        folder.mkdir(parents=True)
        ca.cert_pem.write_to_path(str(folder / "ca-cert.pem"))
        leaf.private_key_pem.write_to_path(str(folder / f"{role}-key.pem"))
        (folder / f"{role}-cert.pem").write_bytes(b"".join(blob.bytes() for blob in leaf.cert_chain_pems))
        return folder


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    return Pki(tmp_path_factory.mktemp("pki"))


def nbdkit(folder: Path, pki: Pki, image: Path) -> AbstractContextManager[NbdUri]:
    options = ["--tls=require", f"--tls-certificates={pki.server}", "--tls-verify-peer"]
    return activated(folder, "nbdkit", "-f", *options, "file", str(image))


def qemu_nbd(folder: Path, pki: Pki, image: Path) -> AbstractContextManager[NbdUri]:
    creds = f"tls-creds-x509,id=tls0,endpoint=server,dir={pki.server},verify-peer=yes"
    words = ["--object", creds, "--tls-creds", "tls0", "-t", "-e", "9", "-f", "raw", "-x", "", str(image)]
    return activated(folder, "qemu-nbd", *words)


@contextmanager
def ours(folder: Path, pki: Pki, image: Path) -> Iterator[NbdUri]:
    rig = Rig(folder / "rig", image.read_bytes())
    snapshot, _ = rig.snapshot()
    exports = Exports(active_export("vda", "", rig.disk, cluster_size=64 * KiB), snapshot_export("vda@s", "", snapshot))
    path = pki.server
    context = server_context(
        str(path / "server-cert.pem"), str(path / "server-key.pem"), client_ca=str(path / "ca-cert.pem")
    )
    server = Listening(folder / "rig", exports, tls_mode=TlsMode.REQUIRE, tls_context=context)
    try:
        yield NbdUri(export="vda@s", port=server.address[1])
    finally:
        server.stop()
        rig.close()


PEERS: list[Callable[[Path, Pki, Path], AbstractContextManager[NbdUri]]] = [nbdkit, qemu_nbd, ours]


@pytest.fixture(params=PEERS, ids=lambda peer: peer.__name__)
def peer(request: pytest.FixtureRequest, tmp_path: Path, pki: Pki) -> Iterator[NbdUri]:
    (tmp_path / "rig").mkdir()
    image = tmp_path / "disk.raw"
    make_image(image, SIZE)
    with request.param(tmp_path, pki, image) as uri:
        yield dataclasses.replace(uri, tls=True)


def with_(uri: NbdUri, folder: Path | None, **more: object) -> NbdUri:
    found = dataclasses.replace(uri, tls_certificates=None if folder is None else str(folder), **more)  # type: ignore[arg-type]
    assert NbdUri.parse(str(found)) == found
    return found


def test_a_pull_through_tls_is_byte_exact(peer: NbdUri, pki: Pki, tmp_path: Path) -> None:
    uri = with_(peer, pki.client)
    options = PullOptions(connections=3, depth=4, piece=256 * KiB, timeout=TIMEOUT)
    pull(uri, lambda size: RawTarget.create(str(tmp_path / "copy"), size), options)
    assert (tmp_path / "copy").read_bytes() == (tmp_path / "disk.raw").read_bytes()
    assert list_exports(uri, timeout=TIMEOUT)


@pytest.mark.parametrize(
    "folder, more, problem",
    [
        ("misled", {}, "certificate is not accepted: .*"),
        ("client", {"tls_hostname": "elsewhere.example"}, "not valid for 'elsewhere.example'"),
        ("stranger", {}, "TLS|closed the connection|reset"),
        (None, {}, "certificate is not accepted"),
        ("client", {"tls_type": "psk"}, "certificates only"),
        ("nowhere", {}, "ca-cert.pem"),
    ],
)
def test_what_does_not_fit_is_refused(
    peer: NbdUri, pki: Pki, folder: str | None, more: dict[str, object], problem: str
) -> None:
    """The CA, the name, a client that the server does not know; no CA but the system's."""
    path = None if folder is None else getattr(pki, folder, Path("/nowhere"))
    with pytest.raises((OSError, FleecingError), match=problem), connect(with_(peer, path, **more), timeout=TIMEOUT):
        pytest.fail("it was served")


def test_a_server_is_not_verified_only_when_told_so(peer: NbdUri, pki: Pki) -> None:
    with connect(with_(peer, pki.misled, tls_verify_peer=False), timeout=TIMEOUT) as connection:
        assert connection.size == SIZE


def test_a_server_without_tls_is_refused_where_tls_is_asked_for(pki: Pki, tmp_path: Path) -> None:
    """Otherwise somebody between the two could take TLS away."""
    with activated(tmp_path, "nbdkit", "-f", "memory", "1M") as uri, pytest.raises(ExportRefused, match="start TLS"):
        connect(with_(dataclasses.replace(uri, tls=True), pki.client), timeout=TIMEOUT)


def test_large_writes_go_through_tls_into_another_export(pki: Pki, tmp_path: Path) -> None:
    """More than the socket takes at once: what was begun of a record is sent on, whatever is received meanwhile."""
    image, there = tmp_path / "disk.raw", tmp_path / "there.raw"
    make_image(image, SIZE)
    make_image(there, SIZE, seed=1)
    (tmp_path / "to").mkdir()
    shutil.copytree(pki.client, tmp_path / "pki")
    with activated(tmp_path, "nbdkit", "-f", "file", str(image)) as uri, nbdkit(tmp_path / "to", pki, there) as to:
        target = with_(dataclasses.replace(to, tls=True), tmp_path / "pki")
        pull(uri, lambda size: NbdTarget(target, size), PullOptions(piece=2 * MiB))
    assert there.read_bytes() == image.read_bytes()
