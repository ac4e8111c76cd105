"""TLS as an operator has it: `fleecing serve --tls`, real clients, and SIGHUP."""

from __future__ import annotations

import signal
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import trustme

from fleecing.control.certificates import Certificates
from fleecing.errors import ConfigError
from fleecing.units import MiB
from tests.peers import run, run_any
from tests.serving import Serve, Server

LONG_AGO = datetime.now(UTC) - timedelta(days=2)


def issue(folder: Path, ca: trustme.CA, role: str, *names: str, until: datetime | None = None) -> None:
    """ROLE-cert.pem and ROLE-key.pem of this authority."""
    leaf = ca.issue_cert(*names, not_before=LONG_AGO - timedelta(days=1), not_after=until)
    leaf.private_key_pem.write_to_path(str(folder / f"{role}-key.pem"))
    (folder / f"{role}-cert.pem").write_bytes(b"".join(blob.bytes() for blob in leaf.cert_chain_pems))


@pytest.fixture
def ca() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def folder(tmp_path: Path, ca: trustme.CA) -> Path:
    """For the server and for a client, as QEMU and libnbd have it."""
    path = tmp_path / "tls"
    path.mkdir()
    ca.cert_pem.write_to_path(str(path / "ca-cert.pem"))
    issue(path, ca, "server", "127.0.0.1", "localhost")
    issue(path, ca, "client", "backup@example.org")
    return path


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "vda.img"
    path.write_bytes(b"\1" * MiB)
    return path


def secure(server: Server, folder: Path, export: str = "vda") -> str:
    return f"{server.uri(export, tcp=True).replace('nbd:', 'nbds:')}?tls-certificates={folder}"


def is_served(server: Server, folder: Path) -> bool:
    return run_any("nbdinfo", "--size", secure(server, folder)).returncode == 0


def test_tls_on_tcp_and_none_on_the_unix_socket(serve: Serve, image: Path, folder: Path, tmp_path: Path) -> None:
    server = serve(image, "--tls", "require", "--tls-dir", str(folder))
    made = server.freeze("vda", name="s")[0]
    assert made["uris"] == [server.uri("vda@s"), f"nbds://127.0.0.1:{server.port}/vda@s"]
    run("nbdcopy", secure(server, folder, "vda@s"), str(tmp_path / "copy"))
    assert (tmp_path / "copy").read_bytes() == image.read_bytes()
    assert run("nbdinfo", "--size", server.uri()) == f"{MiB}\n"
    assert run_any("nbdinfo", server.uri(tcp=True)).returncode != 0
    credentials = f"tls-creds-x509,id=tls,endpoint=client,dir={folder}"
    options = f"driver=nbd,host=127.0.0.1,port={server.port},export=vda,tls-creds=tls"
    assert "1 MiB" in run("qemu-img", "info", "--object", credentials, "--image-opts", options)


def test_clients_are_verified(serve: Serve, image: Path, folder: Path, ca: trustme.CA) -> None:
    server = serve(image, "--tls", "require", "--tls-dir", str(folder), "--tls-verify-client")
    assert is_served(server, folder)
    issue(folder, ca, "client", "backup@example.org", until=LONG_AGO)
    assert not is_served(server, folder)
    issue(folder, trustme.CA(), "client", "backup@example.org")
    assert not is_served(server, folder)
    (folder / "client-cert.pem").unlink()
    (folder / "client-key.pem").unlink()
    assert not is_served(server, folder)
    issue(folder, ca, "client", "backup@example.org")
    assert is_served(server, folder)


def test_tls_on_the_unix_socket_alone(serve: Serve, image: Path, folder: Path) -> None:
    server = serve(image, "--tls-unix", "require", "--tls-dir", str(folder))
    assert run_any("nbdinfo", server.uri()).returncode != 0
    uri = f"nbds+unix://localhost/vda?socket={server.unix}&tls-certificates={folder}"
    assert run("nbdinfo", "--size", uri) == f"{MiB}\n"
    assert run("nbdinfo", "--size", server.uri(tcp=True)) == f"{MiB}\n"


def test_sighup_takes_new_certificates_and_drops_nobody(
    serve: Serve, image: Path, folder: Path, ca: trustme.CA, libnbd: Any
) -> None:
    server = serve(image, "--tls", "require", "--tls-dir", str(folder))
    client = libnbd.NBD()
    client.set_uri_allow_local_file(True)
    client.connect_uri(secure(server, folder))

    (folder / "server-key.pem").write_text("no key")
    server.child.signal(signal.SIGHUP)
    server.child.wait_for_line("ERROR the certificates stay as they were: the TLS files in .* cannot be used")
    issue(folder, ca, "server", "127.0.0.1", until=LONG_AGO)
    server.child.signal(signal.SIGHUP)
    server.child.wait_for_line("ERROR the certificates stay as they were: .*certificate has expired")
    assert is_served(server, folder)

    other = trustme.CA()
    issue(folder, other, "server", "127.0.0.1")
    server.child.signal(signal.SIGHUP)
    server.child.wait_for_line("INFO certificates read again")
    assert not is_served(server, folder)
    other.cert_pem.write_to_path(str(folder / "ca-cert.pem"))
    assert is_served(server, folder)
    assert client.pread(4096, 0) == b"\1" * 4096
    client.shutdown()


def test_sighup_without_tls_ends_nothing(serve: Serve, image: Path) -> None:
    server = serve(image)
    server.child.signal(signal.SIGHUP)
    server.child.wait_for_line("there are no certificates to read again")
    assert run("nbdinfo", "--size", server.uri()) == f"{MiB}\n"


def test_a_certificate_that_has_expired_is_told_at_the_start_and_does_not_take_the_disk_away(
    serve: Serve, image: Path, folder: Path, ca: trustme.CA
) -> None:
    issue(folder, ca, "server", "127.0.0.1", until=LONG_AGO)
    server = serve(image, "--tls", "require", "--tls-dir", str(folder))
    server.child.wait_for_line("ERROR clients will refuse .*server-cert.pem: certificate has expired")
    assert run("nbdinfo", "--size", server.uri()) == f"{MiB}\n"
    assert not is_served(server, folder)


@pytest.mark.parametrize(
    "spoil, sentence",
    [
        (lambda folder: (folder / "ca-cert.pem").unlink(), "TLS needs .*ca-cert.pem, which cannot be read: No such"),
        (lambda folder: (folder / "server-cert.pem").write_text("x"), "cannot be used: .+"),
        (lambda folder: issue(folder / "..", trustme.CA(), "other", "a"), None),
        (lambda folder: (folder / "server-key.pem").write_bytes((folder / "client-key.pem").read_bytes()), "MISMATCH"),
    ],
)
def test_files_that_do_not_do_are_named(folder: Path, spoil: Callable[[Path], object], sentence: str | None) -> None:
    spoil(folder)
    certificates = Certificates(str(folder), verify_client=True)
    if sentence is None:
        assert certificates.flaw(certificates.load()) is None
    else:
        with pytest.raises(ConfigError, match=sentence):
            certificates.load()
