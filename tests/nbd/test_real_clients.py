"""Real clients haggle with the server's handshake over a socket, under URIs that were made here."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pytest

from fleecing.nbd.constants import TransmissionFlag
from fleecing.nbd.handshake import ServerHandshake, TlsMode
from fleecing.nbd.uri import NbdUri
from tests.nbd.talk import MONDAY, VDA, Catalog
from tests.peers import describe, listen_unix, run, run_any

AWKWARD = replace(VDA, name="a b?c#d%e&f/ä+=")
CATALOG = Catalog(VDA, MONDAY, AWKWARD)


@contextmanager
def haggling(folder: Path, *, tls: TlsMode = TlsMode.OFF) -> Iterator[str]:
    """The path of a socket where the handshake is served, and in the transmission phase the end of it."""
    path = folder / "a socket&.sock"
    listener = listen_unix(path)

    def serve() -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            # A client may hang up "without waiting for a reply" to ABORT; libnbd does.
            with client, suppress(ConnectionError):
                haggle(client, ServerHandshake(CATALOG, tls=tls))

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield str(path)
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()
        listener.close()


def haggle(client: socket.socket, side: ServerHandshake) -> None:
    client.sendall(side.data_to_send())
    while not side.done and not side.wants_tls:
        data = client.recv(65536)
        if not data:
            return
        side.receive(data)
        client.sendall(side.data_to_send())
    if side.agreement is not None and not side.leftover:
        client.recv(65536)  # DISC, or the end


def test_nbdinfo_lists_all_exports(tmp_path: Path) -> None:
    with haggling(tmp_path) as path:
        told = json.loads(run("nbdinfo", "--list", "--json", "--no-content", str(NbdUri(socket=path))))
    exports = {export["export-name"]: export for export in told["exports"]}
    assert set(exports) == {"vda", "vda@monday", AWKWARD.name}
    monday = exports["vda@monday"]
    assert monday["export-size"] == MONDAY.size
    assert monday["is_read_only"] and monday["can_trim"] and not monday["can_flush"]
    assert monday["contexts"] == list(MONDAY.contexts)
    assert exports["vda"]["description"] == "the active disk"
    assert exports["vda"]["block_size_preferred"] == VDA.preferred_block
    assert exports["vda"]["block_size_maximum"] == VDA.maximum_payload


@pytest.mark.parametrize("name", ["vda", "vda@monday", AWKWARD.name, ""])
def test_nbdinfo_reaches_each_export_by_its_uri(name: str, tmp_path: Path) -> None:
    with haggling(tmp_path) as path:
        told = json.loads(run("nbdinfo", "--json", "--no-content", str(NbdUri(socket=path, export=name))))
    assert told["structured"] and told["protocol"] == "newstyle-fixed"
    (export,) = told["exports"]
    assert export["export-name"] == (name or "vda")
    assert export["export-size"] == VDA.size
    assert export["can_df"]


def test_qemu_nbd_lists_all_exports(tmp_path: Path) -> None:
    with haggling(tmp_path) as path:
        told = run("qemu-nbd", "--list", "--socket", path)
    assert "exports available: 3" in told
    for name in ("vda", "vda@monday", AWKWARD.name):
        assert f"export: '{name}'" in told
    assert "min block: 1" in told and f"opt block: {VDA.preferred_block}" in told
    assert "fleecing:cluster-state" in told


def test_unknown_export_is_told_to_libnbd_in_our_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIBNBD_DEBUG", "1")
    with haggling(tmp_path) as path:
        result = run_any("nbdinfo", str(NbdUri(socket=path, export="nosuch")))
    assert result.returncode != 0
    assert "there is no export 'nosuch'" in result.stderr, describe(result)


def test_client_that_requires_tls_is_told_that_there_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIBNBD_DEBUG", "1")
    with haggling(tmp_path) as path:
        result = run_any("nbdinfo", str(NbdUri(socket=path, export="vda", tls=True)))
    assert result.returncode != 0
    assert "this server does not offer TLS" in result.stderr, describe(result)


def test_client_without_tls_is_told_where_it_is_required(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIBNBD_DEBUG", "1")
    with haggling(tmp_path, tls=TlsMode.REQUIRE) as path:
        result = run_any("nbdinfo", "--size", str(NbdUri(socket=path, export="vda")))
    assert result.returncode != 0
    assert "this server requires TLS" in result.stderr, describe(result)


def test_flags_of_the_catalog_reach_libnbd(tmp_path: Path) -> None:
    assert TransmissionFlag.READ_ONLY in MONDAY.flags
    with haggling(tmp_path) as path:
        uri = str(NbdUri(socket=path, export="vda@monday"))
        run("nbdinfo", "--is", "read-only", uri)
        run("nbdinfo", "--can", "trim", uri)
        run("nbdinfo", "--can", "zero", uri, expect=2)
