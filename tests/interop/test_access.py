"""Access rules met by real clients: users of this machine, certificates, addresses."""

from __future__ import annotations

import re
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import trustme

from tests.images import MIB, make_image
from tests.peers import run, run_any
from tests.serving import ROOT, Serve, Server
from tests.users import STRANGER, as_user, open_folder

SIZE = 2 * MIB

USERS = f"""
[[access]]
export = "*"
allow = "all"
user = "root"

[[access]]
export = "vda@*"
allow = ["read", "trim"]
user = {STRANGER}

[[access]]
export = ["vdb", "vdb@*"]
allow = "read"
group = [{STRANGER + 1}]
"""

CERTIFICATES = """
tls-verify-client = true

[[access]]
export = "vda"
allow = "all"
dn = "CN=guest,OU=hosts,O=Example"

[[access]]
export = "vda@*"
allow = ["read", "trim"]
san = "email:backup@example.org"

[[access]]
export = "vdb"
allow = "read"
address = ["::1", "127.0.0.0/8"]
"""


@pytest.fixture
def images(tmp_path: Path) -> dict[str, Path]:
    paths = {name: tmp_path / f"{name}.img" for name in ("vda", "vdb")}
    for path in paths.values():
        make_image(path, SIZE)
    return paths


@pytest.fixture
def folder() -> Iterator[Path]:
    with open_folder() as path:
        yield path


def listed(uri: str, *front: str) -> dict[str, str]:
    """Export and description of all that nbdinfo lists, as the user that `front` makes."""
    text = run(*front, "nbdinfo", "--list", uri)
    return dict(re.findall(r'^export="(.*)":\n(?:\t.*\n)*?\tdescription: (.*)$', text, re.MULTILINE))


def local(server: Server, folder: Path, name: str = "") -> str:
    return f"nbd+unix:///{name}?socket={folder}/n.sock"


def serve_users(serve: Serve, images: dict[str, Path], folder: Path) -> Server:
    """The rules for users, on a socket that all can open."""
    server = serve(images, "--unix", str(folder / "n.sock"), "--unix-mode", "0666", config=USERS)
    server.freeze("vda", "vdb", name="s")
    return server


def test_each_user_sees_what_the_rules_let_it_see(serve: Serve, images: dict[str, Path], folder: Path) -> None:
    server = serve_users(serve, images, folder)
    uri = local(server, folder)
    assert list(listed(uri)) == ["vda", "vda@s", "vdb", "vdb@s"]
    assert list(listed(uri, *as_user(STRANGER))) == ["vda@s"]
    assert listed(uri, *as_user(STRANGER + 5, 5, STRANGER + 1)).keys() == {"vdb", "vdb@s"}
    assert listed(uri, *as_user(STRANGER + 5)) == {}
    # A snapshot that is made later is covered, too.
    server.freeze("vda", name="t")
    assert list(listed(uri, *as_user(STRANGER))) == ["vda@s", "vda@t"]


def test_what_is_hidden_is_for_clients_what_is_not_there(serve: Serve, images: dict[str, Path], folder: Path) -> None:
    server = serve_users(serve, images, folder)
    stranger = as_user(STRANGER)
    for program in (("nbdinfo",), ("qemu-img", "info", "-f", "raw"), ("nbdinfo", "--map")):
        said = []
        for name in ("vdb", "vdx", "vdb@s", "vdb@x"):
            result = run_any(*stranger, *program, local(server, folder, name))
            assert result.returncode == 1
            said.append(re.sub(r"vd[bx](@[sx])?", "NAME", result.stderr))
        assert len(set(said)) == 1, said
    assert f"user {STRANGER}" in server.child.wait_for_line("may not see 'vdb'").string


def test_a_backup_user_copies_and_trims_snapshots_and_cannot_touch_the_disk(
    serve: Serve, images: dict[str, Path], folder: Path
) -> None:
    server = serve_users(serve, images, folder)
    stranger = as_user(STRANGER)
    folder.chmod(0o777)
    run(*stranger, "nbdcopy", local(server, folder, "vda@s"), str(folder / "copy"))
    assert (folder / "copy").read_bytes() == images["vda"].read_bytes()
    server.child.wait_for_line(rf"client unix \(user {STRANGER}\) may do with vda@s: see, read, trim")
    run(*stranger, "qemu-io", "-f", "raw", "-c", "discard 0 1M", local(server, folder, "vda@s"))
    assert server.map("vda@s") == [(0, MIB, "trimmed"), (MIB, MIB, "untouched")]
    assert run_any(*stranger, "qemu-io", "-f", "raw", "-c", "write 0 4k", local(server, folder, "vda")).returncode == 1
    run("qemu-io", "-f", "raw", "-c", "write -P 9 0 4k", local(server, folder, "vda"))  # root may


def test_who_may_only_read_is_told_so_and_stopped(
    serve: Serve, images: dict[str, Path], folder: Path, libnbd: ModuleType
) -> None:
    """nbdinfo sees the flags; libnbd is made to send what it should not."""
    config = '[[access]]\nexport = "*"\nallow = "read"\nuser = "root"\n'
    server = serve(images, config=config)
    server.freeze("vda", name="s")
    for name in ("vda", "vda@s"):
        told = run("nbdinfo", server.uri(name))
        assert "is_read_only: true" in told
        assert "can_trim: false" in told
        assert "fleecing:read-once" not in told
        client = libnbd.NBD()
        client.set_strict_mode(0)
        client.connect_uri(server.uri(name))
        assert client.pread(4096, 0) == images["vda"].read_bytes()[:4096]
        for change in ("client.pwrite(bytes(4096), 0)", "client.zero(4096, 0)", "client.trim(4096, 0)"):
            with pytest.raises(libnbd.Error, match="Operation not permitted"):
                eval(change)
        client.flush()
        client.shutdown()
    refused = run_any("qemu-io", "-f", "raw", "-c", "write 0 4k", server.uri("vda"))
    assert refused.returncode == 1
    assert server.map("vda@s") == [(0, SIZE, "untouched")]


def test_the_bundled_client_leaves_a_snapshot_that_it_may_not_trim(
    serve: Serve, images: dict[str, Path], tmp_path: Path
) -> None:
    server = serve(images, config='[[access]]\nexport = "vda@*"\nallow = "read"\nuser = 0\n')
    server.freeze("vda", name="s")
    pull = [sys.executable, "-m", "fleecing", "pull", "vda@s", str(tmp_path / "copy")]
    run("env", f"PYTHONPATH={ROOT}", *pull, "--control", str(server.control_path))
    assert (tmp_path / "copy").read_bytes() == images["vda"].read_bytes()
    assert server.map("vda@s") == [(0, SIZE, "untouched")]


class Pki:
    """An authority, the server's folder, and folders of clients as libnbd and QEMU want them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._ca = trustme.CA()
        self.server = self._issue("server", self._ca.issue_cert("127.0.0.1", "localhost"))

    def client(self, name: str, *names: str, unit: str = "people") -> Path:
        leaf = self._ca.issue_cert(*names, common_name=name, organization_name="Example", organization_unit_name=unit)
        return self._issue("client", leaf, name)

    def _issue(self, role: str, leaf: trustme.LeafCert, name: str = "server") -> Path:
        path = self._folder / name
        path.mkdir()
        self._ca.cert_pem.write_to_path(str(path / "ca-cert.pem"))
        leaf.private_key_pem.write_to_path(str(path / f"{role}-key.pem"))
        (path / f"{role}-cert.pem").write_bytes(b"".join(blob.bytes() for blob in leaf.cert_chain_pems))
        return path


@pytest.fixture
def pki(tmp_path: Path) -> Pki:
    (tmp_path / "pki").mkdir()
    return Pki(tmp_path / "pki")


def secure(server: Server, certificates: Path, name: str = "") -> str:
    return f"nbds://127.0.0.1:{server.port}/{name}?tls-certificates={certificates}"


def test_each_certificate_sees_what_the_rules_let_it_see(
    serve: Serve, images: dict[str, Path], pki: Pki, libnbd: Any
) -> None:
    tls = ["--tls", "allow", "--tls-dir", str(pki.server)]
    server = serve(images, *tls, config=CERTIFICATES)
    server.freeze("vda", name="s")
    guest = pki.client("guest", "guest.example", unit="hosts")
    backup = pki.client("backup", "backup@example.org")
    other = pki.client("guest2", "guest@example.org", unit="hosts")
    plain = f"nbd://127.0.0.1:{server.port}"
    # Before STARTTLS and without it there is only the address.
    assert list(listed(plain)) == ["vdb"]
    assert list(listed(secure(server, other))) == ["vdb"]
    assert list(listed(secure(server, guest))) == ["vda", "vdb"]
    assert list(listed(secure(server, backup))) == ["vda@s", "vdb"]

    client = libnbd.NBD()
    client.set_uri_allow_local_file(True)
    client.set_strict_mode(0)
    client.connect_uri(secure(server, guest, "vda"))
    client.pwrite(b"new" * 1000, 0)
    client.shutdown()
    client = libnbd.NBD()
    client.set_uri_allow_local_file(True)
    client.connect_uri(secure(server, backup, "vda@s"))
    assert client.pread(SIZE, 0)[3000:] == images["vda"].read_bytes()[3000:]
    client.trim(SIZE, 0)
    client.shutdown()
    assert server.map("vda@s") == [(0, SIZE, "trimmed")]
    for certificates in (other, backup):
        client = libnbd.NBD()
        client.set_uri_allow_local_file(True)
        with pytest.raises(libnbd.Error, match="No such file"):
            client.connect_uri(secure(server, certificates, "vda"))
    # The empty name is the only disk that the client sees.
    assert 'export="vdb"' in run("nbdinfo", plain)
    assert run_any("nbdinfo", secure(server, guest)).returncode == 1

    options = f"driver=nbd,host=127.0.0.1,port={server.port},export=vda@s,tls-creds=tls"
    credentials = f"tls-creds-x509,id=tls,endpoint=client,dir={backup}"
    assert "2 MiB" in run("qemu-img", "info", "--object", credentials, "--image-opts", options)
    options = options.replace("vda@s", "vda")
    assert run_any("qemu-img", "info", "--object", credentials, "--image-opts", options).returncode == 1


def test_sighup_has_the_rules_read_again(serve: Serve, images: dict[str, Path], folder: Path) -> None:
    server = serve_users(serve, images, folder)
    uri, stranger = local(server, folder), as_user(STRANGER)
    server.configure(USERS.replace('"vda@*"', '"vd?@*"'))
    server.child.signal(signal.SIGHUP)
    server.child.wait_for_line("access rules read again: 3 of them")
    assert list(listed(uri, *stranger)) == ["vda@s", "vdb@s"]
    server.configure("[[access]]\nexport = 7\n")
    server.child.signal(signal.SIGHUP)
    server.child.wait_for_line(
        r"ERROR the access rules stay as they were: configuration .* access\.0\.allow: is missing"
    )
    assert list(listed(uri, *stranger)) == ["vda@s", "vdb@s"]
    server.configure("drain-seconds = 1")
    server.child.signal(signal.SIGHUP)
    server.child.wait_for_line("access rules read again: none")
    server.child.wait_for_line("WARNING other settings have changed as well: they wait for the next start")
    assert list(listed(uri, *stranger)) == ["vda", "vda@s", "vdb", "vdb@s"]
