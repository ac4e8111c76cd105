"""qemu-io against the server: single requests of every kind, checked by their patterns."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.images import MIB, allocated, make_image
from tests.peers import run, run_any
from tests.serving import Serve, Server

SIZE = 4 * MIB + 700


@pytest.fixture
def server(serve: Serve, tmp_path: Path) -> Server:
    make_image(tmp_path / "disk.raw", SIZE)
    return serve(tmp_path / "disk.raw")


def io(uri: str, *commands: str) -> str:
    """Run commands in one qemu-io; each must succeed, patterns must match."""
    output = run(
        "qemu-io", "-f", "raw", "-d", "unmap", *(word for command in commands for word in ("-c", command)), uri
    )
    assert "Pattern verification failed" not in output
    return output


def refusal(uri: str, *commands: str) -> str:
    """What qemu-io says where the last of the commands fails."""
    result = run_any(
        "qemu-io", "-f", "raw", "-d", "unmap", *(word for command in commands for word in ("-c", command)), uri
    )
    assert result.returncode == 1
    return result.stderr + result.stdout


@pytest.mark.parametrize("tcp", [False, True], ids=["unix", "tcp"])
def test_what_is_written_is_read(server: Server, tcp: bool) -> None:
    io(
        server.uri(tcp=tcp),
        "write -P 0x11 0 64k",
        "write -P 0x22 65535 3",
        "write -f -P 0x33 1M 1",
        "writev -P 0x44 1048577 511 4096 17",
        f"write -P 0x55 {4 * MIB + 699} 1",
        "flush",
        "read -P 0x11 0 65535",
        "read -P 0x22 65535 3",
        "read -P 0x33 1M 1",
        "read -P 0x44 1048577 4624",
        f"read -P 0x55 {4 * MIB + 699} 1",
    )


def test_many_writes_in_flight_are_all_there(server: Server) -> None:
    commands = [f"aio_write -q -P {n + 1} {n * 65531} 65531" for n in range(60)]
    io(server.uri(), *commands, "aio_flush", *(f"read -P {n + 1} {n * 65531} 65531" for n in range(60)))


@pytest.mark.parametrize("flags", ["", "-u", "-u -f", "-n"])
def test_zeroes_are_read_as_zeroes(server: Server, flags: str) -> None:
    before = allocated(Path(server.status()["disks"][0]["path"]))
    # -n asks for FAST_ZERO; the file system of the test can zero fast.
    io(server.uri(), "write -P 9 0 2M", f"write -z {flags} 4097 1M", "read -P 9 0 4097", "read -P 0 4097 1M",
       f"read -P 9 {4097 + MIB} 500k")  # fmt: skip
    now = allocated(Path(server.status()["disks"][0]["path"]))
    assert (now < before) == ("-u" in flags)


def test_a_discard_frees_space_and_reads_as_zeroes(server: Server) -> None:
    image = Path(server.status()["disks"][0]["path"])
    before = allocated(image)
    io(server.uri(), "discard 1M 1M", "discard 3 5", "read -P 0 1M 1M")
    # The file system may spend a block on its own list of extents, which now has a gap.
    assert before - MIB <= allocated(image) <= before - MIB + 64 * 1024


def test_a_snapshot_takes_no_writes(server: Server) -> None:
    uri = server.snapshot(name="s")
    for command in ("write 0 4k", "write -f 1 1", "write 0 3M"):
        assert "Operation not permitted" in refusal(uri, command)
    assert server.show("vda@s")["state"] == "ready"


def test_the_disk_is_written_while_its_snapshot_stays(server: Server) -> None:
    io(server.uri(), "write -P 1 0 4M")
    frozen = server.snapshot()
    io(server.uri(), "write -P 2 1000 100000", "write -z 1M 64k", "discard 2M 1M", "write -P 3 4M 700")
    io(frozen, "read -P 1 0 4M", "read -P 1 999 5", "read -P 1 65530 12", "read -P 1 1M 64k", "read -P 1 2097151 2")
    io(server.uri(), "read -P 2 1000 100000", "read -P 0 1M 64k", "read -P 0 2M 1M")


def test_a_trimmed_cluster_cannot_be_read_and_its_neighbour_can(server: Server) -> None:
    frozen = server.snapshot()
    assert "Invalid argument" in refusal(frozen, "discard 64k 64k", "read 128k 4k", "read 64k 4k")
    assert "Invalid argument" in refusal(frozen, "read 0 64k", "read 65535 2")
    io(frozen, "read 0 64k", "read 128k 1M")


def test_requests_of_32_mib_are_served(serve: Serve, tmp_path: Path) -> None:
    make_image(tmp_path / "disk.raw", 40 * MIB)
    server = serve(tmp_path / "disk.raw")
    frozen = server.snapshot()
    io(server.uri(), "write -P 5 3 33554432", "read -P 5 3 33554432")
    run("qemu-img", "compare", "-f", "raw", "-F", "raw", "-s", frozen, frozen)
