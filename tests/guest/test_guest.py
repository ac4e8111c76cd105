"""The guest itself, on plain servers: what a test of ours finds wrong with a guest is then not the guest."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from tests.guest.guest import HOST, Guest, drive
from tests.peers import Children, listen_tcp, listen_unix, port_of, run

MiB = 1 << 20


@pytest.fixture(scope="module")
def bare_guest(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guest]:
    """A guest without a disk, for tests that change nothing in it."""
    with Guest(tmp_path_factory.mktemp("guest")) as guest:
        yield guest


def test_a_command_answers_with_its_exit_code_and_its_output(bare_guest: Guest) -> None:
    assert bare_guest.run("echo out; echo err >&2; exit 3") == (3, "out\nerr\n")


def test_a_command_may_hold_anything(bare_guest: Guest) -> None:
    assert bare_guest.check("""printf '%s\n' "a 'b'" '$c'\nprintf '\\0é'""") == "a 'b'\n$c\n\0é"


def test_an_answer_may_be_longer_than_any_buffer(bare_guest: Guest) -> None:
    assert bare_guest.check("head -c 300000 /dev/zero | tr '\\0' x") == "x" * 300000


def test_a_command_that_fails_fails_the_test_with_its_output(bare_guest: Guest) -> None:
    with pytest.raises(pytest.fail.Exception, match="with exit code 1: cat /nowhere\ncat: can't open '/nowhere'"):
        bare_guest.check("cat /nowhere")


def test_a_command_that_hangs_fails_the_test(tmp_path: Path) -> None:
    with Guest(tmp_path) as guest, pytest.raises(pytest.fail.Exception, match="the guest does not answer"):
        guest.run("sleep 600", deadline=0.1)
    assert guest.qemu.returncode is not None


def test_a_guest_that_goes_away_fails_the_test(tmp_path: Path) -> None:
    with Guest(tmp_path) as guest:
        with pytest.raises(pytest.fail.Exception, match="the guest is gone"):
            guest.run("poweroff -f")
        with pytest.raises(pytest.fail.Exception, match="the guest is gone"):
            guest.run("true")


def test_a_guest_that_cannot_start_fails_the_test_with_what_qemu_said(tmp_path: Path) -> None:
    with pytest.raises(pytest.fail.Exception, match="Failed to connect"):
        Guest(tmp_path, drive(f"nbd+unix:///?socket={tmp_path}/nobody"))


def test_a_file_system_made_in_the_guest_is_whole_on_the_host(children: Children, tmp_path: Path) -> None:
    image, path = tmp_path / "disk.raw", tmp_path / "s"
    image.touch()
    os.truncate(image, 64 * MiB)
    server = children.start("qemu-nbd", "-t", "-f", "raw", "--discard=unmap", str(image), activate=listen_unix(path))
    with Guest(tmp_path, drive(f"nbd+unix:///?socket={path}")) as guest:
        guest.check("mkfs.ext4 -q /dev/vda && mount /dev/vda /mnt")
        guest.check("for i in 1 2 3 4; do head -c ${i}23457 /dev/urandom >/mnt/file$i; done")
        sums = guest.check("cd /mnt && sha256sum file*")
        guest.check("sync && umount /mnt")
        assert guest.console == ""
    server.stop()

    run("e2fsck", "-fn", str(image))
    lines = sums.splitlines()
    assert len(lines) == 4
    for line in lines:
        want, name = line.split()
        run("debugfs", "-R", f"dump /{name} {tmp_path / name}", str(image))
        assert hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() == want


def test_the_guest_trims_its_disk(children: Children, tmp_path: Path) -> None:
    image, path = tmp_path / "disk.raw", tmp_path / "s"
    image.write_bytes(b"\1" * (16 * MiB))
    server = children.start("qemu-nbd", "-t", "-f", "raw", "--discard=unmap", str(image), activate=listen_unix(path))
    with Guest(tmp_path, drive(f"nbd+unix:///?socket={path}")) as guest:
        guest.check("blkdiscard -o 4M -l 8M /dev/vda")
    server.stop()
    # The file system's own blocks for a file in pieces count, too.
    assert 8 * MiB <= image.stat().st_blocks * 512 <= 8 * MiB + 65536


def test_the_kernel_attaches_an_export_of_the_host(children: Children, libnbd: ModuleType, tmp_path: Path) -> None:
    listener = listen_tcp()
    port = port_of(listener)
    children.start("nbdkit", "-f", "memory", "16M", activate=listener)
    with Guest(tmp_path) as guest:
        guest.check(f"nbd-client -C 2 -b 512 {HOST} {port} /dev/nbd0")
        assert guest.check("blockdev --getsize64 /dev/nbd0") == f"{16 * MiB}\n"
        guest.check("yes fleecing | head -c 3145728 | dd of=/dev/nbd0 bs=512 seek=1 conv=fsync")
        guest.check("blkdiscard -o 1M -l 1M /dev/nbd0")
        sums = guest.check("dd if=/dev/nbd0 bs=512 iflag=direct 2>/dev/null | sha256sum")
        guest.check("nbd-client -d /dev/nbd0")

    want = bytearray(16 * MiB)
    want[512 : 512 + 3 * MiB] = (b"fleecing\n" * MiB)[: 3 * MiB]
    want[MiB : 2 * MiB] = bytes(MiB)
    assert sums.split()[0] == hashlib.sha256(want).hexdigest()
    handle = libnbd.NBD()
    handle.connect_uri(f"nbd://127.0.0.1:{port}")
    assert handle.pread(16 * MiB, 0) == want
    handle.shutdown()
