"""Our server and the kernel's NBD device: nbd-client in a guest, over TCP, by the line that the server prints."""

from __future__ import annotations

import hashlib
import json
import shlex
import sys
from pathlib import Path

from fleecing.nbd.uri import NbdUri
from tests.guest.busy import BusyGuest, assert_files, change_files, make_files
from tests.guest.guest import HOST, Guest
from tests.images import MIB, make_image
from tests.peers import Children, run
from tests.serving import ROOT


class TcpServer:
    """A server without a Unix socket: the line that it prints for the kernel's client is for TCP then."""

    def __init__(self, children: Children, image: Path, folder: Path) -> None:
        self.child = children.start(
            *(sys.executable, "-m", "fleecing", "serve", str(image), "--name", "vda", "--listen", "127.0.0.1:0"),
            *("--control", str(folder / "control.sock"), "--state-dir", str(folder / "state")),
            env={"PYTHONPATH": str(ROOT)},
        )
        self.child.wait_for_line("^Ready")

    def nbd_client(self, export: str, device: str, *options: str) -> str:
        """The command that attaches an export in the guest: the server's own line for its disk, adapted."""
        program, host, port, *rest = self._printed("kernel")
        assert (program, host, rest) == ("nbd-client", "127.0.0.1", ["/dev/nbd0", "-name", "vda"])
        return shlex.join([program, HOST, port, device, "-name", export, *options])

    def snapshot(self, *options: str) -> NbdUri:
        """Take a snapshot by the line that the server printed for that."""
        return NbdUri.parse(run(*self._printed("snapshot"), *options).strip())

    def trimmed(self, export: str) -> int:
        """Bytes of a snapshot that are trimmed."""
        program, _, _, _, *control = self._printed("snapshot")
        shown = json.loads(run(program, "snapshot", "show", export, "--json", *control))
        return int(shown["clusters"]["trimmed"] * shown["cluster_size"])

    def _printed(self, what: str) -> list[str]:
        return shlex.split(self.child.wait_for_line(f"^  {what} +(.*)").group(1))


def test_the_device_writes_flushes_discards_and_reads_back(children: Children, tmp_path: Path) -> None:
    """On a busy machine the guest's network leaves a reply lying now and then, until its kernel asks once more after 30
    seconds. The data are right then, too; a server that lost a reply would not be saved by the second try.
    """
    for last in (False, True):
        folder = tmp_path / f"{last}"
        folder.mkdir()
        console = use_the_device(children, folder)
        if last or "Connection timed out, retrying" not in console:
            assert console == ""
            return


def use_the_device(children: Children, tmp_path: Path) -> str:
    """What the guest's kernel said meanwhile."""
    image = tmp_path / "disk.raw"
    old = make_image(image, 16 * MIB)
    server = TcpServer(children, image, tmp_path)
    with Guest(tmp_path, cpus=2) as guest:
        guest.check(server.nbd_client("vda", "/dev/nbd0", "-C", "2"))
        assert guest.check("blockdev --getsize64 /dev/nbd0; ls /sys/block/nbd0/mq") == f"{len(old)}\n0\n1\n"
        snapshot = server.snapshot()
        guest.check("yes fleecing | head -c 3145728 | dd of=/dev/nbd0 bs=512 seek=1 conv=fsync")
        guest.check("blkdiscard -o 4M -l 8M /dev/nbd0")
        guest.check("yes again | head -c 70000 >/dev/nbd0 && sync")
        sums = guest.check("dd if=/dev/nbd0 bs=1M iflag=direct 2>/dev/null | sha256sum")
        guest.check("nbd-client -d /dev/nbd0")
        console = guest.console
    run("qemu-img", "convert", "-f", "raw", "-O", "raw", str(snapshot), str(tmp_path / "pulled"))
    assert server.child.stop() == 0

    new = bytearray(old)
    new[512 : 512 + 3 * MIB] = (b"fleecing\n" * MIB)[: 3 * MIB]
    new[4 * MIB : 12 * MIB] = bytes(8 * MIB)
    new[:70000] = (b"again\n" * 70000)[:70000]
    assert sums.split()[0] == hashlib.sha256(new).hexdigest()
    assert image.read_bytes() == new
    assert (tmp_path / "pulled").read_bytes() == old
    return console


def test_a_snapshot_is_mounted_beside_the_busy_disk(children: Children, tmp_path: Path) -> None:
    image = tmp_path / "disk.raw"
    make_image(image, 64 * MIB)
    server = TcpServer(children, image, tmp_path)
    with Guest(tmp_path, cpus=2) as guest:
        guest.check(server.nbd_client("vda", "/dev/nbd0", "-C", "2"))
        guest.check("mkfs.ext4 -q -E nodiscard /dev/nbd0 && mount /dev/nbd0 /mnt")
        work = BusyGuest(guest)
        made = make_files(guest)
        guest.check("fsfreeze --freeze /mnt")
        snapshot = server.snapshot()
        guest.check("fsfreeze --unfreeze /mnt")
        changed = change_files(guest)
        work.trim_too()
        work.wait_for(5)
        guest.check(server.nbd_client(snapshot.export, "/dev/nbd1", "-R"))
        guest.check("mkdir /tmp/snapshot && mount -t ext4 -o ro,noload /dev/nbd1 /tmp/snapshot")
        lines = guest.check("cd /tmp/snapshot/made && sha256sum *").splitlines()
        work.wait_for(5)
        guest.check("umount /tmp/snapshot && nbd-client -d /dev/nbd1")
        rounds = work.stop()
        guest.check("umount /mnt && nbd-client -d /dev/nbd0")
        assert guest.console == ""
    assert server.child.stop() == 0
    assert {name: checksum for checksum, name in map(str.split, lines)} == made
    assert_files(image, tmp_path / "files", changed, rounds)


def test_dd_reads_a_read_once_snapshot_of_a_disk_that_changed(children: Children, tmp_path: Path) -> None:
    """Through the page cache, with its read-ahead, over two connections; the kernel looks for partitions first."""
    image = tmp_path / "disk.raw"
    old = make_image(image, 8 * MIB + 512)
    server = TcpServer(children, image, tmp_path)
    snapshot = server.snapshot("--read-once", "--read-once-grace", "2M")
    with Guest(tmp_path, cpus=2) as guest:
        guest.check(server.nbd_client(snapshot.export, "/dev/nbd1", "-C", "2"))
        guest.check("head -c 100000 /dev/nbd1 >/dev/null")
        disk = NbdUri(export="vda", host=snapshot.host, port=snapshot.port)
        run("qemu-io", "-f", "raw", "-c", f"write -P 7 0 {len(old)}", str(disk))
        sums = guest.check("dd if=/dev/nbd1 bs=1M 2>/dev/null | sha256sum")
        guest.check("nbd-client -d /dev/nbd1")
        assert guest.console == ""
    assert sums.split()[0] == hashlib.sha256(old).hexdigest()
    assert server.trimmed(snapshot.export) >= 5 * MIB
    assert server.child.stop() == 0
