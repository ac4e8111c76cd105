"""Targets that are devices, that cannot be written, and that vanish: all of it, or one sentence and exit code 1."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from fleecing.block import hostfile
from fleecing.cli.control_client import ControlClient
from fleecing.cli.main import main
from fleecing.nbd.uri import NbdUri
from fleecing.pull import target as target_module
from tests.client.servers import cutting, nbdkit
from tests.crash.forked import ForkedCommand, ForkedServer
from tests.images import FULL, IS_ROOT, MIB, little_space, loop_device, make_image, tmpfs
from tests.peers import run, run_any
from tests.serving import ROOT

SIZE = 6 * MIB + 512
ENV = {**os.environ, "PYTHONPATH": str(ROOT)}


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "vda.img"
    make_image(path, SIZE)
    return path


@pytest.fixture
def server(tmp_path: Path, image: Path) -> Iterator[ForkedServer]:
    server = ForkedServer(tmp_path, image)
    server.wait_ready()
    yield server
    server.stop()


def snapshot(server: ForkedServer) -> None:
    ControlClient(str(server.control)).request("POST", "/v1/snapshots", {"disks": ["vda"], "name": "s"})


def trimmed(server: ForkedServer) -> int:
    found: int = ControlClient(str(server.control)).request("GET", "/v1/snapshots/vda@s")["clusters"]["trimmed"]
    return found


def fleecing(*words: object, expect: int = 0) -> Result:
    result = CliRunner().invoke(main, [str(word) for word in words])
    assert result.exit_code == expect, result.output
    if expect:
        assert result.stderr.splitlines()[-1].startswith("Error: "), result.stderr
    return result


@pytest.fixture(params=["folder without permission", *(["file system", "device"] if IS_ROOT else [])])
def read_only(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A target that cannot be written. Root may write to a folder whatever its mode says: there it is a /proc."""
    if request.param == "file system":
        with tmpfs(tmp_path / "mount", MIB) as folder:
            run("mount", "-o", "remount,ro", str(folder))
            yield folder / "copy"
    elif request.param == "device":
        backing = tmp_path / "device.img"
        make_image(backing, SIZE)
        with loop_device(backing) as device:
            run("blockdev", "--setro", str(device))
            yield device
            run("blockdev", "--setrw", str(device))  # whoever gets the same device next does not find it so
    elif IS_ROOT:
        yield Path("/proc/copy")
    else:
        (tmp_path / "locked").mkdir(mode=0o500)
        yield tmp_path / "locked" / "copy"


def test_a_read_only_target_is_told_and_the_snapshot_is_untouched(server: ForkedServer, read_only: Path) -> None:
    snapshot(server)
    result = fleecing("pull", "vda@s", read_only, "--control", server.control, expect=1)
    assert str(read_only) in result.stderr and len(result.stderr.splitlines()) == 1
    assert trimmed(server) == 0


def test_a_backup_into_a_folder_that_cannot_be_written_leaves_nothing(server: ForkedServer, tmp_path: Path) -> None:
    folder = tmp_path / "locked"
    folder.mkdir()
    (folder / "vda").write_text("no folder")
    fleecing("backup", "vda", folder, "--control", server.control, expect=1)
    fleecing("backup", "vda", "/proc/backups", "--control", server.control, expect=1)
    control = ControlClient(str(server.control))
    assert control.request("GET", "/v1/snapshots")["snapshots"] == []
    assert control.request("GET", "/v1/checkpoints")["checkpoints"] == []


@pytest.mark.parametrize("command", ["pull", "backup"])
def test_a_target_folder_that_vanishes_is_told(server: ForkedServer, tmp_path: Path, command: str) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    snapshot(server)
    words = ("pull", "vda@s", folder / "copy") if command == "pull" else ("backup", "vda", folder)
    process = ForkedCommand(*words, "--control", server.control, "--bandwidth", "4M")
    while process.process.is_alive() and not list(folder.rglob("*.part")):
        pass
    while folder.exists():
        shutil.rmtree(folder, ignore_errors=True)
    assert process.wait() == 1
    last = process.said.splitlines()[-1]
    assert last.startswith("Error: ") and str(folder) in last, process.said
    assert not folder.exists() or not any(path.is_file() for path in folder.rglob("*.qcow2"))
    if command == "backup":
        backups = tmp_path / "other"
        fleecing("backup", "vda", backups, "--control", server.control)
        fleecing("verify", backups)


# Restoring, and pruning, into too little space; what is there stays as it is


@pytest.fixture
def backups(server: ForkedServer, image: Path, tmp_path: Path) -> Path:
    """Two points of the disk."""
    for number in range(2):
        fleecing("backup", "vda", tmp_path / "backups", "--compress", "none", "--control", server.control)
        run("qemu-io", "-f", "raw", "-c", "write -P 7 1M 100k", f"nbd+unix:///vda?socket={server.unix}")
        assert len(list((tmp_path / "backups" / "vda").glob("*.qcow2"))) == number + 1
    return tmp_path / "backups" / "vda"


def test_a_restore_to_a_target_that_cannot_be_written_is_told(backups: Path, read_only: Path) -> None:
    result = fleecing("restore", backups, read_only, expect=1)
    assert str(read_only) in result.stderr and len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize("how", FULL)
@pytest.mark.parametrize("name", ["out.img", "out.qcow2"])
def test_a_restore_into_too_little_space_leaves_nothing(backups: Path, tmp_path: Path, how: str, name: str) -> None:
    with little_space(how, tmp_path / "small", 2 * MIB) as (folder, wrapper):
        words = [*wrapper, sys.executable, "-m", "fleecing", "restore", str(backups), str(folder / name)]
        result = run_any(words[0], *words[1:])
        assert result.returncode == 1
        assert result.stderr.startswith(f"Error: {folder / name}.part: ") and len(result.stderr.splitlines()) == 1
        assert list(folder.iterdir()) == []


@pytest.mark.parametrize("how", FULL)
def test_pruning_without_space_for_the_merged_file_keeps_every_point(backups: Path, tmp_path: Path, how: str) -> None:
    with little_space(how, tmp_path / "small", 7 * MIB) as (folder, wrapper):
        if not wrapper:
            shutil.copytree(backups, folder, dirs_exist_ok=True)
        else:
            wrapper, folder = ["prlimit", f"--fsize={2 * MIB}"], backups
        before = sorted(path.name for path in folder.iterdir())
        words = [*wrapper, sys.executable, "-m", "fleecing", "prune", str(folder), "--keep", "1"]
        result = run_any(words[0], *words[1:])
        assert result.returncode == 1 and len(result.stderr.splitlines()) == 1
        fleecing("verify", folder)
        assert sorted(path.name for path in folder.iterdir()) == before


@pytest.mark.parametrize("budget, is_begun", [(10, False), (500, True), (700, True)])
def test_an_export_that_vanishes_during_a_restore_is_told(
    backups: Path, tmp_path: Path, budget: int, *, is_begun: bool
) -> None:
    """After so many bytes of its answers: in the handshake, or among the writes."""
    (tmp_path / "relay").mkdir()
    with (
        nbdkit(tmp_path, "memory", str(SIZE)) as there,
        cutting(tmp_path / "relay", there, [budget] + [0] * 99) as uri,
    ):
        result = fleecing("restore", backups, uri, expect=1)
    half_written = f"{uri} is half-written: it has neither what it had before nor the whole disk"
    assert result.stderr.splitlines()[:-1] == ([half_written] if is_begun else [])


@pytest.mark.parametrize("end", [ForkedServer.kill, ForkedServer.stop])
def test_an_export_that_vanishes_during_a_pull_is_named(
    server: ForkedServer, tmp_path: Path, end: Callable[[ForkedServer], None]
) -> None:
    """And not the source, which is called the same there."""
    folder = tmp_path / "there"
    folder.mkdir()
    make_image(folder / "vda.img", SIZE)
    there = ForkedServer(folder, folder / "vda.img")
    there.wait_ready()
    uri = NbdUri(export="vda", socket=str(there.unix))
    snapshot(server)
    process = ForkedCommand("pull", "vda@s", uri, "--bandwidth", "2M", "--control", server.control)
    while process.process.is_alive() and not trimmed(server):
        pass
    end(there)
    assert process.wait() == 1
    half_written, error = process.said.splitlines()
    assert half_written == f"{uri} is half-written: it has neither what it had before nor the whole disk"
    assert error.startswith(f"Error: {uri}") and str(server.unix) not in error


@pytest.fixture(params=["ours", "nbdkit"])
def too_small(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[NbdUri, Path]]:
    """An export that has a byte too few, and its image."""
    folder = tmp_path / "there"
    folder.mkdir()
    image = folder / "vda.img"
    make_image(image, SIZE - 1, seed=1)
    if request.param == "nbdkit":
        with nbdkit(folder, "file", str(image)) as uri:
            yield uri, image
    else:
        there = ForkedServer(folder, image)
        there.wait_ready()
        yield NbdUri(export="vda", socket=str(there.unix)), image
        there.stop()


def test_an_export_that_is_too_small_is_told_and_not_written_to(
    server: ForkedServer, backups: Path, too_small: tuple[NbdUri, Path]
) -> None:
    uri, image = too_small
    before = image.read_bytes()
    snapshot(server)
    for words in (("restore", backups, uri), ("pull", "vda@s", uri, "--control", server.control)):
        result = fleecing(*words, expect=1)
        assert result.stderr == f"Error: {uri}: has {SIZE - 1} bytes, {SIZE} are needed\n"
    assert image.read_bytes() == before
    assert trimmed(server) == 0


if IS_ROOT:

    def test_a_block_device_is_pulled_over_and_restored_over(server: ForkedServer, image: Path, tmp_path: Path) -> None:
        """The device is larger, and full of something else."""
        backing = tmp_path / "device.img"
        old = make_image(backing, SIZE + MIB, seed=1)
        snapshot(server)
        fleecing("backup", "vda", tmp_path / "backups", "--control", server.control)
        with loop_device(backing) as device:
            fleecing("pull", "vda@s", device, "--control", server.control)
            run("blockdev", "--flushbufs", str(device))
            assert backing.read_bytes() == image.read_bytes() + old[SIZE:]
            with backing.open("r+b") as file:
                file.write(b"\xff" * SIZE)
                os.fsync(file.fileno())
            fleecing("restore", tmp_path / "backups" / "vda", device)
            run("blockdev", "--flushbufs", str(device))
            assert backing.read_bytes() == image.read_bytes() + old[SIZE:]

    def test_a_device_that_is_too_small_is_told(server: ForkedServer, tmp_path: Path) -> None:
        backing = tmp_path / "device.img"
        make_image(backing, MIB)
        snapshot(server)
        with loop_device(backing) as device:
            result = fleecing("pull", "vda@s", device, "--control", server.control, expect=1)
        assert f"has {MIB} bytes, {SIZE} are needed" in result.stderr
        assert trimmed(server) == 0


if IS_ROOT:  # whoever is not cannot have a loop device

    @pytest.mark.parametrize("partitions", [False, True])
    def test_a_loop_device_of_a_served_image_is_never_the_target(
        server: ForkedServer, image: Path, tmp_path: Path, partitions: bool
    ) -> None:
        """What is written there goes past the server."""
        fleecing("backup", "vda", tmp_path / "b", "--control", server.control)
        before = image.read_bytes()
        with loop_device(image) as device:
            target = device
            if partitions:
                run("addpart", str(device), "1", "0", str(SIZE // 512))
                target = Path(f"{device}p1")
            snapshot(server)
            for words in (("restore", tmp_path / "b" / "vda"), ("pull", "vda@s", "--control", server.control)):
                assert "is in use" in fleecing(*words, target, expect=1).stderr
            if partitions:
                run("delpart", str(device), "1")
        assert image.read_bytes() == before
        assert trimmed(server) == 0


if IS_ROOT:

    def test_a_loop_device_of_a_file_with_any_name_is_a_target(backups: Path, image: Path, tmp_path: Path) -> None:
        file = tmp_path / os.fsdecode(b"im\xe9g")
        file.write_bytes(bytes(SIZE))
        with loop_device(file) as device:
            fleecing("restore", backups, device)
        assert file.read_bytes() == image.read_bytes()


@pytest.mark.parametrize("name", ["copy.img", "copy.qcow2"])
@pytest.mark.parametrize("knows", [True, False])
def test_a_file_that_appears_meanwhile_is_not_replaced(
    server: ForkedServer, tmp_path: Path, name: str, knows: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`knows`: the file system can rename to a name that is free, and to no other."""
    snapshot(server)
    copy = tmp_path / name
    if not knows:
        monkeypatch.setattr(hostfile, "_RENAME_NOREPLACE", 1 << 30)  # EINVAL

    def appear(part: str, new: str) -> None:
        copy.write_text("precious")
        hostfile.rename_new(part, new)

    with monkeypatch.context() as patch:
        patch.setattr(target_module, "rename_new", appear)
        assert "File exists" in fleecing("pull", "vda@s", copy, "--control", server.control, expect=1).stderr
    assert copy.read_text() == "precious"
    copy.unlink()
    fleecing("pull", "vda@s", copy, "--resume", "--control", server.control)
    form = "qcow2" if name.endswith("qcow2") else "raw"
    run("qemu-img", "compare", "-f", "raw", "-F", form, str(tmp_path / "vda.img"), str(copy))


def test_standard_output_that_is_closed_is_no_target(server: ForkedServer) -> None:
    snapshot(server)
    words = f"exec {sys.executable} -m fleecing pull vda@s - --control {server.control} 1>&- 0<&-"
    result = subprocess.run(["sh", "-c", words], env=ENV, stderr=subprocess.PIPE, text=True, timeout=60, check=False)
    assert (result.returncode, result.stderr) == (1, "Error: standard output: Bad file descriptor\n")
    assert trimmed(server) == 0


def test_a_command_without_standard_files_says_nothing_to_its_server(server: ForkedServer, tmp_path: Path) -> None:
    """Its first socket would get the number 1 or 2."""
    snapshot(server)
    copy = tmp_path / "copy"
    words = f"exec {sys.executable} -m fleecing pull vda@s {copy} --json --control {server.control} 0<&- 1>&- 2>&-"
    subprocess.run(["sh", "-c", words], env=ENV, timeout=60, check=True)
    assert copy.read_bytes() == (tmp_path / "vda.img").read_bytes()
