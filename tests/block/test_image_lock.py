"""Image locks against QEMU's own programs, which must see ours, and whose we must see."""

from __future__ import annotations

import errno
import os
import re
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from fleecing.block.file import FileNode
from fleecing.block.hostfile import HostFile
from fleecing.block.image_lock import lock_image
from fleecing.errors import ImageError
from tests.images import MIB
from tests.peers import DEADLINE, Child, Children, describe, listen_unix, run, run_any

READERS: dict[str, Sequence[str]] = {
    "info": ("qemu-img", "info", "-U", "-f", "raw"),
    "map": ("qemu-img", "map", "-U", "-f", "raw"),
    "qemu-io": ("qemu-io", "-r", "-U", "-f", "raw", "-c", "read -P 9 0 64k"),
}
SERVERS: dict[str, Sequence[str]] = {
    "qemu-nbd": ("qemu-nbd", "-f", "raw", "-t", "-x", "", "IMAGE"),
    "daemon": ("qemu-storage-daemon", "--blockdev", "driver=DRIVER,node-name=a,filename=IMAGE", "--nbd-server",
               "addr.type=fd,addr.str=3", "--export", "nbd,id=a,node-name=a,writable=on"),
    "machine": ("qemu-system-x86_64", "-M", "microvm", "-nodefaults", "-display", "none", "-S",
                "-drive", "file=IMAGE,format=raw,if=none,id=a", "-device", "virtio-blk-device,drive=a",
                "-chardev", "socket,id=q,fd=3,server=on,wait=off", "-mon", "chardev=q,mode=control"),
}  # fmt: skip
"""What has an image open for writing as long as it runs. On the socket that it is given it answers when it has."""

WRITERS: dict[str, Sequence[str]] = {
    "qemu-io": ("qemu-io", "-f", "raw", "-c", "write -P 1 0 64k"),
    "bench": ("qemu-img", "bench", "-f", "raw", "-w", "-c", "1"),
    "qemu-nbd": ("qemu-nbd", "-f", "raw", "-k", "SOCKET"),
    "daemon": ("qemu-storage-daemon", "--blockdev", "driver=DRIVER,node-name=a,filename=IMAGE",
               "--nbd-server", "addr.type=unix,addr.path=SOCKET", "--export", "nbd,id=a,node-name=a,writable=on"),
    "machine": ("qemu-system-x86_64", "-M", "microvm", "-nodefaults", "-display", "none", "-S",
                "-drive", "file=IMAGE,format=raw,if=none,id=a", "-device", "virtio-blk-device,drive=a"),
}  # fmt: skip


def words(command: Sequence[str], image: Path, folder: Path) -> list[str]:
    """The command on this image, which is named at its end where it is not named within."""
    driver = "host_device" if image.is_block_device() else "file"
    places = {"IMAGE": str(image), "SOCKET": str(folder / "s"), "DRIVER": driver}
    filled = [re.sub("|".join(places), lambda name: places[name[0]], word) for word in command]
    return filled if any(str(image) in word for word in filled) else [*filled, str(image)]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(b"\x09" * MIB)
    return path


@pytest.fixture
def loop_device(file: Path) -> Iterator[Path]:
    device = run("losetup", "--find", "--show", str(file)).strip()
    yield Path(device)
    run("losetup", "--detach", device)


@pytest.fixture(params=["file", "block device"])
def image(request: pytest.FixtureRequest) -> Path:
    """A regular file, and a real block device over one."""
    path: Path = request.getfixturevalue("file" if request.param == "file" else "loop_device")
    return path


@pytest.fixture
def node(image: Path) -> Iterator[FileNode]:
    """The image as a server has it."""
    node = FileNode.open(str(image))
    yield node
    node.close()


@pytest.mark.usefixtures("node")
@pytest.mark.parametrize("command", WRITERS.values(), ids=WRITERS)
def test_a_program_that_would_write_is_refused(image: Path, tmp_path: Path, command: Sequence[str]) -> None:
    result = run_any(*words(command, image, tmp_path))
    assert (result.returncode, 'Failed to get "write" lock' in result.stderr) == (1, True), describe(result)
    assert image.read_bytes() == b"\x09" * MIB


@pytest.mark.usefixtures("node")
@pytest.mark.parametrize("command", READERS.values(), ids=READERS)
def test_a_reader_that_shares_is_served(image: Path, tmp_path: Path, command: Sequence[str]) -> None:
    run(*words(command, image, tmp_path))


@pytest.mark.usefixtures("node")
def test_a_reader_that_does_not_share_is_refused(image: Path, tmp_path: Path) -> None:
    copy = ["-f", "raw", "-O", "raw", str(image), str(tmp_path / "copy")]
    result = run_any("qemu-img", "convert", *copy)
    assert 'Failed to get shared "write" lock' in result.stderr, describe(result)
    run("qemu-img", "convert", "-U", *copy)


def start(children: Children, command: Sequence[str], folder: Path) -> Child:
    """A program that has its image open by now."""
    path = folder / "s"
    child = children.start(*command, activate=listen_unix(path))
    with socket.socket(socket.AF_UNIX) as asking:
        asking.settimeout(DEADLINE)
        asking.connect(str(path))
        if command[0].startswith("qemu-system"):  # its monitor greets while the devices are still made
            asking.sendall(b'{"execute": "qmp_capabilities"}')
            assert any(b"return" in line for line in asking.makefile("rb"))
        else:
            assert asking.recv(1)
    path.unlink()
    return child


@pytest.mark.parametrize("command", SERVERS.values(), ids=SERVERS)
def test_an_image_that_is_written_to_is_refused(
    image: Path, tmp_path: Path, children: Children, command: Sequence[str]
) -> None:
    child = start(children, words(command, image, tmp_path), tmp_path)
    with pytest.raises(ImageError, match=r"in use: another program \(QEMU, .*\) has it open for writing"):
        FileNode.open(str(image))
    child.stop()
    FileNode.open(str(image)).close()


def test_an_image_that_must_not_change_is_refused(image: Path, tmp_path: Path, children: Children) -> None:
    """A machine has its disk in a qcow2 file over it, so its contents have to stay."""
    top = tmp_path / "top.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", str(image), "-F", "raw", str(top))
    machine = [word.replace("format=raw", "format=qcow2") for word in words(SERVERS["machine"], top, tmp_path)]
    child = start(children, machine, tmp_path)
    with pytest.raises(ImageError, match="lets nobody else write to it; end it first"):
        FileNode.open(str(image))
    child.stop()
    FileNode.open(str(image)).close()


def test_a_reader_that_shares_does_not_keep_us_away(image: Path, tmp_path: Path, children: Children) -> None:
    start(children, ["qemu-nbd", "-r", "-t", "-f", "raw", "-x", "", str(image)], tmp_path)
    FileNode.open(str(image)).close()


def test_without_the_lock_everybody_is_let_in_but_a_second_server(image: Path, tmp_path: Path) -> None:
    node = FileNode.open(str(image), image_lock=False)
    run(*words(WRITERS["qemu-io"], image, tmp_path))
    with pytest.raises(ImageError, match="another server has this image open"):
        FileNode.open(str(image), image_lock=False)
    node.close()


class WithoutLocks(HostFile):
    """A file where the file system has no locks."""

    def hold_byte(self, offset: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))


def test_where_there_are_no_locks_we_go_on_and_say_so(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    host = WithoutLocks.open(str(file))
    assert not lock_image(host)
    assert f"{file} lies where there are no image locks (No locks available)" in caplog.text
    host.close()
