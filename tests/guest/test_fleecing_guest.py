"""Our server under a real machine: a guest that works on its file system while the host freezes and pulls its disk."""

from __future__ import annotations

import filecmp
import json
import os
import re
import shlex
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from fleecing.client.dial import connect
from fleecing.errors import RequestError
from fleecing.nbd.uri import NbdUri
from fleecing.pull.engine import pull
from fleecing.pull.target import RawTarget
from tests.guest.busy import BusyGuest, assert_files, change_files, make_files, replay_journal
from tests.guest.guest import Guest, drive
from tests.images import MIB, allocated, random_bytes, tmpfs
from tests.peers import run
from tests.serving import Serve, Server

DISK_SIZE = 64 * MIB

MAKE_FILE_SYSTEM = "mkfs.ext4 -q -E nodiscard /dev/vda && mount /dev/vda /mnt"
"""What was on the disk before stays where the file system is free, so that a trim of it has contents to save."""


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A disk that is full of data."""
    path = tmp_path / "disk.raw"
    path.write_bytes(random_bytes(DISK_SIZE))
    return path


def printed_drive(server: Server) -> list[str]:
    """The words of the line that the server prints to be pasted into QEMU's command line."""
    return shlex.split(server.child.wait_for_line("^  QEMU +(.*)").group(1))


def pull_with_each_client(uri: str, folder: Path) -> Path:
    """Pull with each client there is, ours last, with TRIM behind its read head; all get the same bytes."""
    folder.mkdir()
    run("nbdcopy", uri, str(folder / "nbdcopy"))
    run("qemu-img", "convert", "-f", "raw", "-O", "raw", uri, str(folder / "qemu-img"))
    ours = folder / "ours"
    report = pull(NbdUri.parse(uri), lambda size: RawTarget.create(str(ours), size))
    assert report.trimmed == DISK_SIZE
    assert filecmp.cmp(folder / "nbdcopy", ours, shallow=False)
    assert filecmp.cmp(folder / "qemu-img", ours, shallow=False)
    return ours


def assert_temp_is_empty(server: Server, export: str) -> None:
    """Nothing but its tables is left, and nothing is copied any more."""
    snapshot = server.show(export)
    assert snapshot["state"] == "ready"
    assert snapshot["clusters"]["trimmed"] * snapshot["cluster_size"] == DISK_SIZE
    temp = snapshot["temp"]
    check = json.loads(run("qemu-img", "check", "-U", "--output=json", temp["path"]))
    assert check.get("allocated-clusters", 0) == 0
    assert allocated(Path(temp["path"])) <= temp["used"] <= 8 * snapshot["cluster_size"] < temp["peak"]


def first_number(uri: str) -> int:
    """The number at the start of an export."""
    with connect(NbdUri.parse(uri)) as connection:
        return int(connection.read(0, 512).strip(b"\0 ") or b"0")


def freeze_a_busy_disk(guest: Guest, server: Server, *, cbw_timeout: float) -> tuple[BusyGuest, str]:
    """A guest at work on files, and a snapshot of its disk: the work, and the snapshot's URI."""
    guest.check(MAKE_FILE_SYSTEM)
    work = BusyGuest(guest)
    make_files(guest)
    work.wait_for(2)
    return work, server.snapshot(name="s", cbw_timeout=cbw_timeout)


def assert_broken(server: Server, uri: str, reason: str) -> None:
    """Everyone who asks for the snapshot learns the reason, a pattern."""
    snapshot = server.show("vda@s")
    assert snapshot["state"] == "broken"
    assert re.fullmatch(reason, snapshot["broken"])
    server.child.wait_for_line(f"snapshot vda@s is broken: {reason}$")
    nowhere = server.state_dir / "pulled"
    with pytest.raises(RequestError, match=f"snapshot broken: {reason}"):
        pull(NbdUri.parse(uri), lambda size: RawTarget.create(str(nowhere), size))


@contextmanager
def freezable(folder: Path) -> Iterator[Path]:
    """A file system of its own, which `fsfreeze` can freeze without the host noticing."""
    device = folder.with_suffix(".ext4")
    device.touch()
    os.truncate(device, 64 * MIB)
    run("mke2fs", "-q", "-t", "ext4", str(device))
    folder.mkdir()
    run("mount", "-o", "loop", str(device), str(folder))
    try:
        yield folder
    finally:
        run("umount", "--lazy", str(folder))  # where the test failed, its server still has files open there


def test_snapshots_of_a_busy_guest_have_the_files_of_their_instants(serve: Serve, image: Path, tmp_path: Path) -> None:
    server = serve(image)
    truth = tmp_path / "truth"
    with Guest(tmp_path, printed_drive(server)) as guest:
        guest.check(MAKE_FILE_SYSTEM)
        work = BusyGuest(guest)
        early = make_files(guest), work.wait_for(5)
        guest.check("fsfreeze --freeze /mnt")
        quiet = server.snapshot(name="quiet")
        run("cp", str(image), str(truth))
        guest.check("fsfreeze --unfreeze /mnt")
        late = change_files(guest), work.wait_for(5)
        in_use = server.snapshot(name="in-use")
        work.trim_too()
        last = make_files(guest)
        with ThreadPoolExecutor() as pool:
            pulling_quiet = pool.submit(pull_with_each_client, quiet, tmp_path / "quiet")
            pulling_in_use = pool.submit(pull_with_each_client, in_use, tmp_path / "in-use")
            work.wait_for(10)
            pulled_quiet, pulled_in_use = pulling_quiet.result(), pulling_in_use.result()
        work.wait_for(5)
        assert_temp_is_empty(server, "vda@quiet")
        assert_temp_is_empty(server, "vda@in-use")
        rounds = work.stop()
        guest.check("umount /mnt")
        assert guest.console == ""
    server.stop()
    assert filecmp.cmp(truth, pulled_quiet, shallow=False)
    assert_files(pulled_quiet, tmp_path / "quiet-files", *early)
    replay_journal(pulled_in_use)
    assert_files(pulled_in_use, tmp_path / "in-use-files", *late)
    assert_files(image, tmp_path / "files", {**late[0], **last}, rounds)


def test_disks_frozen_together_show_the_same_instant(serve: Serve, tmp_path: Path) -> None:
    """The guest writes a number to the first disk, and when it is there, to the second one."""
    images = {"vda": tmp_path / "a.raw", "vdb": tmp_path / "b.raw"}
    for path in images.values():
        path.write_bytes(bytes(MIB))
    server = serve(images)
    numbers = [(0, 0)]
    with Guest(tmp_path, [*drive(server.uri("vda")), *drive(server.uri("vdb"))]) as guest:
        write = "printf '%-512s' $n | dd of=$disk bs=512 oflag=direct || exit"
        rounds = f"n=0; while n=$((n + 1)); do for disk in /dev/vda /dev/vdb; do {write}; done; done"
        guest.check(f"({rounds}) >/tmp/log 2>&1 &")
        while numbers[-1][1] < 150:
            server.freeze("vda", "vdb", name="s")
            numbers.append((first_number(server.uri("vda@s")), first_number(server.uri("vdb@s"))))
            server.delete("vda@s")
            server.delete("vdb@s")
        assert guest.console == ""
    assert all(first - second in (0, 1) for first, second in numbers), numbers


@pytest.mark.parametrize("end", [Server.kill, Server.stop], ids=["killed", "stopped"])
def test_no_synced_file_is_lost_when_the_server_is_restarted(
    end: Callable[[Server], None], serve: Serve, image: Path, tmp_path: Path
) -> None:
    """QEMU waits for the server to come back; at the end the power of both is cut."""
    socket = tmp_path / "s"
    options = ["--unix", str(socket), "--state-dir", str(tmp_path / "state")]
    server = serve(image, *options)
    disk = {
        "driver": "nbd",
        "node-name": "disk",
        "server": {"type": "unix", "path": str(socket)},
        "export": "vda",
        "reconnect-delay": 30,
        "discard": "unmap",
    }
    with Guest(tmp_path, ["-blockdev", json.dumps(disk), "-device", "virtio-blk-pci,drive=disk"]) as guest:
        guest.check(MAKE_FILE_SYSTEM)
        work = BusyGuest(guest)
        made = make_files(guest)
        for turn in range(1, 3):
            work.wait_for(3)
            server.snapshot(name=f"s{turn}")
            work.wait_for(2)
            end(server)
            server = serve(image, *options)
            states = {snapshot["name"]: snapshot["state"] for snapshot in server.status()["snapshots"]}
            assert states == {f"s{number}": "ready" for number in range(1, turn + 1)}
        synced = work.wait_for(10)
        assert guest.console == ""
        server.kill()
    replay_journal(image)
    assert_files(image, tmp_path / "files", made, synced)


def test_a_full_temp_breaks_the_snapshot_and_no_guest_write(serve: Serve, image: Path, tmp_path: Path) -> None:
    """Needs root, as CI has: the temp lies on a small file system."""
    with tmpfs(tmp_path / "temp", 2 * MIB) as temp:
        server = serve(image, "--temp-dir", str(temp))
        with Guest(tmp_path, printed_drive(server)) as guest:
            work, uri = freeze_a_busy_disk(guest, server, cbw_timeout=20)
            work.trim_too()
            made = change_files(guest)
            work.wait_for(10)
            assert_broken(server, uri, "copy before a guest write failed: No space left on device")
            rounds = work.stop()
            guest.check("umount /mnt")
            assert guest.console == ""
        server.stop()
    assert_files(image, tmp_path / "files", made, rounds)


def test_a_temp_that_hangs_breaks_the_snapshot_and_no_guest_write(serve: Serve, image: Path, tmp_path: Path) -> None:
    """Needs root, as CI has: the temp lies on a file system that is frozen, so that every write to it hangs."""
    with freezable(tmp_path / "temp") as temp:
        server = serve(image, "--temp-dir", str(temp))
        with Guest(tmp_path, printed_drive(server)) as guest:
            work, uri = freeze_a_busy_disk(guest, server, cbw_timeout=1)
            run("fsfreeze", "--freeze", str(temp))
            try:
                made = change_files(guest)
                work.wait_for(10)
                assert_broken(server, uri, r"temp did not take a copy within cbw-timeout \(1 s\)")
            finally:
                run("fsfreeze", "--unfreeze", str(temp))
            rounds = work.stop()
            guest.check("umount /mnt")
            assert guest.console == ""
        server.delete("vda@s")
        server.stop()
        assert list(temp.glob("*.qcow2")) == []
    assert_files(image, tmp_path / "files", made, rounds)
