"""READ_ONCE from libnbd, which has to be told not to mind the flag, and from the bundled client."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest

from fleecing.client.dial import connect
from fleecing.errors import RequestError
from fleecing.nbd.constants import READ_ONCE, CmdFlag
from fleecing.nbd.uri import NbdUri
from tests.console import read_blocks
from tests.images import KIB, MIB, make_image
from tests.peers import run
from tests.serving import ROOT, Serve

SIZE = 8 * MIB + 777
STEP = 4 * MIB


def test_libnbd_reads_once(libnbd: ModuleType, serve: Serve, tmp_path: Path) -> None:
    make_image(tmp_path / "disk.img", SIZE)
    contents = (tmp_path / "disk.img").read_bytes()
    server = serve(tmp_path / "disk.img")
    uri = server.snapshot(name="s")
    handle = libnbd.NBD()
    handle.set_strict_mode(handle.get_strict_mode() & ~libnbd.STRICT_FLAGS)
    handle.add_meta_context(READ_ONCE)
    handle.connect_uri(uri)
    copy = b""
    for offset in range(0, SIZE, STEP):
        copy += handle.pread(min(STEP, SIZE - offset), offset, flags=1 << 15)
    assert copy == contents
    with pytest.raises(libnbd.Error, match="Invalid argument"):
        handle.pread(1, 0)
    handle.shutdown()
    assert server.map("vda@s") == [(0, SIZE, "trimmed")]


def test_the_example_of_the_document_runs(serve: Serve, tmp_path: Path) -> None:
    """As it stands there, where libnbd is installed as Debian has it."""
    (example,) = (block for block in read_blocks((ROOT / "docs/read-once.md").read_text()) if block.info == "python")
    assert "import nbd" in example.lines
    before, behind = "import sys; uri = sys.argv[1]", "open(sys.argv[2], 'wb').write(data)"
    make_image(tmp_path / "disk.img", SIZE)
    server = serve(tmp_path / "disk.img")
    program = "\n".join((before, *example.lines, behind))
    run("/usr/bin/python3", "-c", program, server.snapshot(name="s"), str(tmp_path / "read"))
    assert (tmp_path / "read").read_bytes() == (tmp_path / "disk.img").read_bytes()[: 4 * MIB]
    assert server.map("vda@s") == [(0, 4 * MIB, "trimmed"), (4 * MIB, SIZE - 4 * MIB, "untouched")]


def test_libnbd_without_the_context(libnbd: ModuleType, serve: Serve, tmp_path: Path) -> None:
    make_image(tmp_path / "disk.img", SIZE)
    server = serve(tmp_path / "disk.img")
    handle = libnbd.NBD()
    handle.set_strict_mode(0)
    handle.connect_uri(server.snapshot(name="s"))
    with pytest.raises(libnbd.Error, match="Invalid argument"):
        handle.pread(64 * KIB, 0, flags=1 << 15)
    assert handle.pread(64 * KIB, 0) == (tmp_path / "disk.img").read_bytes()[: 64 * KIB]
    handle.shutdown()
    assert server.map("vda@s") == [(0, SIZE, "untouched")]


@pytest.mark.parametrize("durable", [False, True], ids=["", "durable"])
@pytest.mark.parametrize("extended", [False, True], ids=["structured", "extended"])
def test_the_bundled_client(serve: Serve, tmp_path: Path, extended: bool, durable: bool) -> None:
    make_image(tmp_path / "disk.img", SIZE)
    contents = (tmp_path / "disk.img").read_bytes()
    server = serve(tmp_path / "disk.img")
    uri = NbdUri.parse(server.snapshot(name="s", durable=durable))
    with connect(uri, contexts=[READ_ONCE], extended=extended) as client:
        buffers = [bytearray(MIB) for _ in range(8)]
        requests = [client.submit_read(n * MIB, buffer, once=True) for n, buffer in enumerate(buffers)]
        for request in requests:
            client.wait(request)
        assert b"".join(buffers) == contents[: 8 * MIB]
        assert client.read(8 * MIB, 777, once=True) == contents[8 * MIB :]
        with pytest.raises(RequestError, match="trimmed"):
            client.read(0, 1)
        assert client.block_status(0, SIZE) == {READ_ONCE: [(SIZE, 1)]}
    assert server.map("vda@s") == [(0, SIZE, "trimmed")]


def test_the_bundled_client_does_not_send_what_was_not_agreed(serve: Serve, tmp_path: Path) -> None:
    make_image(tmp_path / "disk.img", MIB)
    server = serve(tmp_path / "disk.img")
    for uri in (server.uri(), server.snapshot(name="s")):
        with connect(NbdUri.parse(uri)) as client, pytest.raises(RequestError, match="offers no READ_ONCE"):
            client.read(0, 1, once=True)
    assert CmdFlag.READ_ONCE == 1 << 15
