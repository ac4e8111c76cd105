"""Clients of a server that is killed and started again: QEMU's goes on by itself, nbdcopy when it is started again."""

from __future__ import annotations

from pathlib import Path

from tests.images import KIB, MIB, make_image
from tests.peers import Children, run
from tests.serving import Serve, Server

SIZE = 32 * MIB


def copied(server: Server, export: str, more_than: int) -> int:
    """Wait until more clusters than this are copied; how many are."""
    while (count := server.show(export)["copied_total"]) <= more_than:
        pass
    return int(count)


def test_guest_with_reconnect_delay_goes_on_over_kills(serve: Serve, tmp_path: Path, children: Children) -> None:
    old = make_image(tmp_path / "disk.raw", SIZE)
    server = serve(tmp_path / "disk.raw")
    uri = server.snapshot(name="s")
    place = f"driver=raw,file.driver=nbd,file.server.type=unix,file.server.path={server.unix},file.export=vda"
    requests = SIZE // (64 * KIB)
    guest = children.start(
        *("qemu-img", "bench", "--image-opts", "-w", "--pattern=85", "-c", str(requests), "-d", "4"),
        *("-s", "4096", "-S", "65536", f"{place},file.reconnect-delay=60"),
    )
    total = 0
    for _ in range(3):
        total = copied(server, "vda@s", 0)
        server.kill()
        server.start()
        if guest.returncode is not None:
            break
    assert total
    assert guest.wait() == 0, guest.stderr
    run("nbdcopy", uri, str(tmp_path / "pulled.raw"))
    assert (tmp_path / "pulled.raw").read_bytes() == old
    server.stop()
    new = (tmp_path / "disk.raw").read_bytes()
    for offset in range(0, SIZE, 64 * KIB):
        assert new[offset : offset + 4096] == b"\x55" * 4096
        assert new[offset + 4096 : offset + 64 * KIB] == old[offset + 4096 : offset + 64 * KIB]


def test_qemu_io_that_sleeps_over_a_kill_reads_on(serve: Serve, tmp_path: Path, children: Children) -> None:
    make_image(tmp_path / "disk.raw", MIB)
    server = serve(tmp_path / "disk.raw")
    place = f"driver=raw,file.driver=nbd,file.server.type=unix,file.server.path={server.unix},file.export=vda"
    client = children.start(
        *("qemu-io", "--image-opts", "-c", "write -P 7 0 64k", "-c", "sleep 1000", "-c", "read -P 7 0 64k"),
        *("-c", "write -P 8 64k 64k", "-c", "flush", f"{place},file.reconnect-delay=60"),
    )
    while (tmp_path / "disk.raw").read_bytes()[: 64 * KIB] != b"\7" * 64 * KIB:
        assert client.returncode is None, client.stderr
    server.kill()
    server.start()
    assert client.wait() == 0, client.stderr
    assert "failed" not in client.stdout + client.stderr
    assert (tmp_path / "disk.raw").read_bytes()[: 128 * KIB] == b"\7" * 64 * KIB + b"\10" * 64 * KIB


def test_nbdcopy_of_a_snapshot_works_when_it_is_started_again(serve: Serve, tmp_path: Path, children: Children) -> None:
    old = make_image(tmp_path / "disk.raw", SIZE)
    server = serve(tmp_path / "disk.raw")
    uri = server.snapshot(name="s")
    run("qemu-io", "-f", "raw", "-c", "write -P 1 0 16M", server.uri())
    # Slowed down, so that the kill comes in the middle of it.
    target = tmp_path / "pulled.raw"
    first = children.start("qemu-img", "convert", "-r", "4M", "-f", "raw", "-O", "raw", uri, str(target))
    while not server.show("vda@s")["clients"]:
        assert first.returncode is None
    server.kill()
    assert first.wait() != 0
    server.start()
    run("nbdcopy", uri, str(target))
    assert target.read_bytes() == old
