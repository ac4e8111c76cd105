"""TLS with real clients (GnuTLS in libnbd and QEMU, OpenSSL by hand), and all that must be refused."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import trustme

from fleecing.nbd.handshake import TlsMode
from fleecing.server.export import active_export, snapshot_export
from fleecing.server.limits import Limits
from fleecing.server.tls import server_context
from fleecing.units import KiB, MiB
from tests.block.rig import SECONDS, Rig, pattern
from tests.peers import run, run_any
from tests.server.listening import Exports, Listening

CONTENTS = pattern(4 * MiB)


class Pki:
    """A CA, the server's certificate, and a folder for a client as QEMU and libnbd want it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ca = trustme.CA()
        self.server = self.issue("server", "localhost", "127.0.0.1")
        self.client = self.issue("client", "backup@example.org")
        self.ca.cert_pem.write_to_path(str(folder / "ca-cert.pem"))

    def issue(self, role: str, *names: str, ca: trustme.CA | None = None) -> trustme.LeafCert:
        leaf = (ca or self.ca).issue_cert(*names)
        leaf.private_key_pem.write_to_path(str(self.folder / f"{role}-key.pem"))
        (self.folder / f"{role}-cert.pem").write_bytes(b"".join(blob.bytes() for blob in leaf.cert_chain_pems))
        return leaf

    def context(self, *, verify_client: bool = False) -> ssl.SSLContext:
        path = self.folder
        ca = str(path / "ca-cert.pem") if verify_client else None
        return server_context(str(path / "server-cert.pem"), str(path / "server-key.pem"), client_ca=ca)


@pytest.fixture
def pki(tmp_path: Path) -> Pki:
    folder = tmp_path / "pki"
    folder.mkdir()
    return Pki(folder)


Serve = Callable[..., Listening]


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    servers: list[Listening] = []
    rigs: list[Rig] = []

    def start(context: ssl.SSLContext, mode: TlsMode = TlsMode.REQUIRE, limits: Limits | None = None) -> Listening:
        folder = tmp_path / f"disk{len(rigs)}"
        folder.mkdir()
        rig = Rig(folder, CONTENTS)
        rigs.append(rig)
        snapshot, _ = rig.snapshot()
        exports = Exports(
            active_export("vda", "", rig.disk, cluster_size=64 * KiB), snapshot_export("vda@s", "", snapshot)
        )
        servers.append(Listening(folder, exports, tls_mode=mode, tls_context=context, limits=limits))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()
    for rig in rigs:
        rig.close()


def uri(server: Listening, pki: Pki, export: str = "vda") -> str:
    return f"nbds://localhost:{server.address[1]}/{export}?tls-certificates={pki.folder}"


@pytest.mark.parametrize("mode", [TlsMode.ALLOW, TlsMode.REQUIRE])
def test_nbdinfo_and_nbdcopy_over_tls(serve: Serve, pki: Pki, tmp_path: Path, mode: TlsMode) -> None:
    server = serve(pki.context(), mode)
    assert "newstyle-fixed with TLS" in run("nbdinfo", uri(server, pki))
    assert 'export="vda@s"' in run("nbdinfo", "--list", uri(server, pki))
    for number, connections in enumerate(("1", "4")):
        copy = tmp_path / f"copy{number}.raw"
        run("nbdcopy", "--connections", connections, uri(server, pki, "vda@s"), str(copy))
        assert copy.read_bytes() == CONTENTS


def test_qemu_with_its_own_credentials_object_reads_and_writes(serve: Serve, pki: Pki) -> None:
    server = serve(pki.context(verify_client=True))
    options = f"driver=nbd,host=localhost,port={server.address[1]},export=vda,tls-creds=tls0"
    creds = f"tls-creds-x509,id=tls0,endpoint=client,dir={pki.folder}"
    commands = ["-c", "write -P 7 65000 200000", "-c", "read -P 7 65000 200000", "-c", "discard 1M 1M", "-c", "flush"]
    out = run("qemu-io", "--object", creds, *commands, "--image-opts", options)
    assert "Pattern verification failed" not in out
    assert "wrote 200000/200000" in out


def test_a_client_without_certificate_is_refused_where_one_is_asked_for(serve: Serve, pki: Pki) -> None:
    server = serve(pki.context(verify_client=True))
    assert "with TLS" in run("nbdinfo", uri(server, pki))
    (pki.folder / "client-key.pem").unlink()
    (pki.folder / "client-cert.pem").unlink()
    assert run_any("nbdinfo", uri(server, pki)).returncode != 0


def test_a_client_of_another_ca_is_refused(serve: Serve, pki: Pki) -> None:
    server = serve(pki.context(verify_client=True))
    pki.issue("client", "backup@example.org", ca=trustme.CA())
    assert run_any("nbdinfo", uri(server, pki)).returncode != 0


def test_a_plain_client_is_refused_where_tls_is_required_and_served_where_it_is_allowed(serve: Serve, pki: Pki) -> None:
    for mode, code in ((TlsMode.REQUIRE, 1), (TlsMode.ALLOW, 0)):
        server = serve(pki.context(), mode)
        got = run_any("nbdinfo", f"nbd://localhost:{server.address[1]}/vda")
        assert (got.returncode != 0) == bool(code)
        server.close_server()


def starttls(server: Listening) -> socket.socket:
    sock = server.connect(tcp=True)
    assert len(sock.recv(18)) == 18
    sock.sendall((3).to_bytes(4, "big") + b"IHAVEOPT" + (5).to_bytes(4, "big") + bytes(4))
    return sock


def test_plaintext_that_an_attacker_puts_behind_starttls_is_never_taken(serve: Serve, pki: Pki) -> None:
    server = serve(pki.context())
    sock = server.connect(tcp=True)
    assert len(sock.recv(18)) == 18
    injected = b"IHAVEOPT" + (3).to_bytes(4, "big") + bytes(4)  # LIST
    sock.sendall((3).to_bytes(4, "big") + b"IHAVEOPT" + (5).to_bytes(4, "big") + bytes(4) + injected)
    while sock.recv(4096):
        pass  # an ACK at most, then the end
    assert run_any("nbdinfo", uri(server, pki)).returncode == 0


def test_garbage_in_the_place_of_a_tls_handshake_drops_that_client_only(serve: Serve, pki: Pki) -> None:
    server = serve(pki.context())
    sock = starttls(server)
    assert len(sock.recv(20)) == 20
    sock.sendall(b"\x16\x03\x01" + bytes(range(200)))
    while sock.recv(4096):
        pass
    assert run_any("nbdinfo", uri(server, pki)).returncode == 0


def test_the_stream_ends_with_close_notify(serve: Serve, pki: Pki) -> None:
    server = serve(pki.context())
    sock = starttls(server)
    assert len(sock.recv(20)) == 20
    client = ssl.create_default_context(cafile=str(pki.folder / "ca-cert.pem"))
    with client.wrap_socket(sock, server_hostname="localhost", suppress_ragged_eofs=False) as tls:
        tls.settimeout(SECONDS)
        tls.sendall(b"IHAVEOPT" + (1).to_bytes(4, "big") + (3).to_bytes(4, "big") + b"vda")  # EXPORT_NAME
        assert len(tls.recv(4096)) == 10
        tls.sendall((0x25609513).to_bytes(4, "big") + (2).to_bytes(4, "big") + bytes(20))  # DISC
        assert tls.recv(100) == b""


def test_a_client_that_does_not_read_is_dropped(serve: Serve, pki: Pki) -> None:
    server = serve(pki.context(), limits=Limits(send_seconds=0.2))
    sock = starttls(server)
    assert len(sock.recv(20)) == 20
    client = ssl.create_default_context(cafile=str(pki.folder / "ca-cert.pem"))
    with client.wrap_socket(sock, server_hostname="localhost") as tls:
        tls.settimeout(SECONDS)
        tls.sendall(b"IHAVEOPT" + (1).to_bytes(4, "big") + (3).to_bytes(4, "big") + b"vda")  # EXPORT_NAME
        assert len(tls.recv(4096)) == 10
        read = (0x25609513).to_bytes(4, "big") + bytes(20) + (4 * MiB).to_bytes(4, "big")
        tls.sendall(10 * read)
        assert len(tls.recv(1)) == 1
        server.call(server.server._idle.wait())
    assert run_any("nbdinfo", uri(server, pki)).returncode == 0


def test_a_replaced_context_serves_later_clients_and_leaves_the_others_alone(serve: Serve, pki: Pki) -> None:
    server = serve(pki.context())
    sock = starttls(server)
    assert len(sock.recv(20)) == 20
    old = ssl.create_default_context(cafile=str(pki.folder / "ca-cert.pem"))
    with old.wrap_socket(sock, server_hostname="localhost") as tls:
        fresh = Pki(pki.folder)
        server.server.tls_context = fresh.context()
        assert "with TLS" in run("nbdinfo", uri(server, fresh))
        tls.sendall(b"IHAVEOPT" + (1).to_bytes(4, "big") + (3).to_bytes(4, "big") + b"vda")
        assert len(tls.recv(4096)) == 10
