"""`fleecing backup` of odd disks, under odd names, at odd moments."""

from __future__ import annotations

import fcntl
import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from fleecing.cli.control_client import ControlClient
from fleecing.client.dial import connect
from fleecing.nbd.uri import NbdUri
from tests.crash.forked import ForkedCommand, ForkedServer
from tests.images import IS_ROOT, KIB, MIB, loop_device, make_image, padded, tmpfs
from tests.peers import run


@contextmanager
def serving(folder: Path, images: Path | Mapping[str, Path], *options: str) -> Iterator[ForkedServer]:
    server = ForkedServer(folder, images, *options)
    server.wait_ready()
    try:
        yield server
    finally:
        server.stop()


def backup(server: ForkedServer, *words: object, expect: int = 0) -> list[dict[str, Any]]:
    command = ForkedCommand("backup", *words, "--json", "--control", server.control)
    assert command.wait() == expect, command.said
    _, bracket, answer = command.said.partition("[\n")
    found: list[dict[str, Any]] = json.loads(bracket + answer) if bracket else []
    return found


def assert_restores(chain: Path, scratch: Path, expected: bytes) -> None:
    """The last point, by our restore and by qemu-img alone."""
    ours = scratch / "ours"
    command = ForkedCommand("restore", chain, ours)
    assert command.wait() == 0, command.said
    assert ours.read_bytes() == expected
    ours.unlink()
    last = json.loads((chain / "manifest.json").read_text())["points"][-1]["file"]
    run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", str(chain / last), str(scratch / "theirs"))
    assert (scratch / "theirs").read_bytes() == padded(expected)


@pytest.mark.parametrize("size, cluster", [(1, "64K"), (2 * MIB + 1, "4K"), (5 * MIB + 999, "2M")])
def test_disks_of_any_size_and_cluster_in_increments(tmp_path: Path, size: int, cluster: str) -> None:
    """Clusters smaller than those of a qcow2 file among them: what changed is told in whole clusters of that."""
    image, backups = tmp_path / "vda.img", tmp_path / "backups"
    make_image(image, size)
    chance = random.Random(size)
    with (
        serving(tmp_path, image, "--cluster-size", cluster) as server,
        connect(NbdUri(export="vda", socket=str(server.unix))) as guest,
    ):
        for turn in range(3):
            (result,) = backup(server, "vda", backups)
            assert (result["since"] is None) == (turn == 0)
            assert_restores(backups / "vda", tmp_path, image.read_bytes())
            for _ in range(4):
                length = min(size, chance.choice((1, 4 * KIB, 70_000)))
                offset = chance.randrange(size - length + 1)
                if chance.random() < 0.3:
                    guest.write_zeroes(offset, length)
                else:
                    guest.write(offset, chance.randbytes(length))
    assert ForkedCommand("verify", backups).wait() == 0


def test_a_disk_that_has_grown_is_backed_up_in_full_and_says_why(tmp_path: Path) -> None:
    image, backups = tmp_path / "vda.img", tmp_path / "backups"
    make_image(image, MIB)
    with serving(tmp_path, image) as server:
        (first,) = backup(server, "vda", backups)
    with image.open("ab") as file:
        file.write(b"more" * 50_000)
    with serving(tmp_path, image) as server:
        (second,) = backup(server, "vda", backups, expect=3)
        assert second["since"] is None and "inconsistent" in second["reason"]
        assert_restores(backups / "vda", tmp_path, image.read_bytes())
        (third,) = backup(server, "vda", backups, "--keep", 2)
        assert third["since"] == second["point"]
        assert [point["name"] for point in checkpoints(server)] == [third["point"]]
    assert ForkedCommand("verify", backups).wait() == 0
    assert not (backups / "vda" / f"{first['point']}.qcow2").exists()


def change(server: ForkedServer, disk: str, offset: int) -> None:
    with connect(NbdUri(export=disk, socket=str(server.unix))) as guest:
        guest.write(offset, random.Random(offset).randbytes(70_000))


def test_a_disk_that_was_renamed_is_backed_up_in_full(tmp_path: Path) -> None:
    """As another one; the old name's backups stay. Back under the old name, what it missed is no increment."""
    images = {"vda": tmp_path / "vda.img", "vdb": tmp_path / "vdb.img"}
    for image in images.values():
        make_image(image, MIB)
    backups = tmp_path / "backups"
    with serving(tmp_path, images) as server:
        backup(server, "vda", backups)
        backup(server, "vda", backups)
    before = images["vda"].read_bytes()
    with serving(tmp_path, {"web": images["vda"], "vdb": images["vdb"]}) as server:
        change(server, "web", 0)
        (first,) = backup(server, "web", backups)
        assert (first["since"], first["reason"]) == (None, None)
        assert_restores(backups / "web", tmp_path, images["vda"].read_bytes())
        assert_restores(backups / "vda", tmp_path, before)
        change(server, "web", 500_000)
        (second,) = backup(server, "web", backups)
        assert second["since"] == first["point"]
        for result in backup(server, "web", "vdb", backups, expect=3):
            assert result["reason"] == "the disks' last backups are not of one instant"
    with serving(tmp_path, images) as server:
        (back,) = backup(server, "vda", backups, expect=3)
        assert back["since"] is None and "the image was written by something else" in back["reason"]
        assert_restores(backups / "vda", tmp_path, images["vda"].read_bytes())
    assert ForkedCommand("verify", backups).wait() == 0


def test_a_disk_that_was_renamed_with_its_folder_is_backed_up_in_full_and_says_why(tmp_path: Path) -> None:
    image, backups = tmp_path / "vda.img", tmp_path / "backups"
    make_image(image, MIB)
    with serving(tmp_path, image) as server:
        (first,) = backup(server, "vda", backups)
    (backups / "vda").rename(backups / "web")
    with serving(tmp_path, {"web": image}) as server:
        change(server, "web", 0)
        (second,) = backup(server, "web", backups, expect=3)
        assert second["reason"] == f"disk 'web' has no checkpoint '{first['point']}'"
        assert_restores(backups / "web", tmp_path, image.read_bytes())
        assert [(each["disk"], each["name"]) for each in checkpoints(server)] == [("web", second["point"])]


@pytest.mark.parametrize("end", [ForkedServer.stop, ForkedServer.kill])
@pytest.mark.parametrize("kind", ["files", "files of one moment", *(["devices"] if IS_ROOT else [])])
def test_disks_that_have_swapped_names_are_backed_up_in_full_and_say_why(
    tmp_path: Path, kind: str, end: Callable[[ForkedServer], None]
) -> None:
    """Both have a checkpoint of the other's last backup, which is called the same."""
    backups = tmp_path / "backups"
    files = [tmp_path / "a.img", tmp_path / "b.img"]
    for number, file in enumerate(files):
        make_image(file, MIB, seed=number)
    results: list[dict[str, Any]] = []
    with ExitStack() as stack:
        one, other = (stack.enter_context(loop_device(file)) for file in files) if kind == "devices" else files
        for names in ({"vda": one, "vdb": other}, {"vda": other, "vdb": one}):
            server = ForkedServer(tmp_path, names)
            server.wait_ready()
            try:
                for disk in names:
                    change(server, disk, 300_000)
                results = backup(server, "vda", "vdb", backups, expect=0 if names["vda"] == one else 3)
            finally:
                if kind == "files of one moment":
                    moment = files[0].stat().st_mtime_ns
                    for file in files:
                        os.utime(file, ns=(moment, moment))
                end(server)
        for result in results:
            assert result["since"] is None
            assert "is inconsistent: " in result["reason"] and "while it was not served" in result["reason"]
        for disk, image in names.items():
            assert_restores(backups / disk, tmp_path, image.read_bytes())


if IS_ROOT:

    @pytest.mark.parametrize("boot, expect", [("this", 0), ("another", 3)])
    def test_a_device_under_another_path_is_the_same_until_the_next_boot(
        tmp_path: Path, boot: str, expect: int
    ) -> None:
        """Later its number may be that of another one."""
        image, link, backups = tmp_path / "a.img", tmp_path / "link", tmp_path / "backups"
        make_image(image, MIB)
        with loop_device(image) as device:
            link.symlink_to(device)
            with serving(tmp_path, {"vda": device}) as server:
                (first,) = backup(server, "vda", backups)
            record = tmp_path / "state" / "vda" / "disk.json"
            if boot == "another":
                record.write_text(json.dumps(json.loads(record.read_text()) | {"boot_id": boot}))
            with serving(tmp_path, {"vda": link}) as server:
                change(server, "vda", 0)
                (second,) = backup(server, "vda", backups, expect=expect)
            assert second["since"] == (None if expect else first["point"])
            assert_restores(backups / "vda", tmp_path, device.read_bytes())


def checkpoints(server: ForkedServer) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = ControlClient(str(server.control)).request("GET", "/v1/checkpoints")["checkpoints"]
    return found


def test_disks_are_called_what_they_like(tmp_path: Path) -> None:
    """Also as our own files were called; and so is the folder."""
    image, backups = tmp_path / "vda.img", tmp_path / "json:{ b a,ck?ups#%é }"
    make_image(image, 70_000)
    for name in ("lock", "manifest.json", "backup.json", "x" * 128):
        with serving(tmp_path, image, "--name", name) as server:
            for _ in range(2):
                backup(server, name, backups)
            assert_restores(backups / name, tmp_path, image.read_bytes())
    verify = ForkedCommand("verify", backups)
    assert verify.wait() == 0 and verify.said.count(": ok\n") == 8


def test_points_are_called_what_they_like(tmp_path: Path) -> None:
    """Names that begin or end as those of other files do; the merge of one makes no other's."""
    image, folder = tmp_path / "vda.img", tmp_path / "chain"
    make_image(image, 70_000)
    names = ("a", "a-full", "a.qcow2", "a.chunks", "a.qcow2.part")
    with serving(tmp_path, image) as server:
        control = ControlClient(str(server.control))
        for number, name in enumerate(names):
            since = {"since": names[number - 1]} if number else {}
            control.request("POST", "/v1/snapshots", {"disks": ["vda"], "name": "s", "checkpoint": name, **since})
            command = ForkedCommand("pull", "vda@s", folder, "--chain", "--control", server.control)
            assert command.wait() == 0, command.said
            control.request("DELETE", "/v1/snapshots/vda@s")
    for keep in (4, 2, 1):
        assert ForkedCommand("prune", folder, "--keep", keep).wait() == 0
        verify = ForkedCommand("verify", folder)
        assert verify.wait() == 0 and verify.said.count(": ok\n") == keep, verify.said
        assert_restores(folder, tmp_path, image.read_bytes())


def test_a_clock_that_was_set_back_changes_no_order(tmp_path: Path) -> None:
    """As if the last point had been made tomorrow."""
    image, backups = tmp_path / "vda.img", tmp_path / "backups"
    make_image(image, 70_000)
    with serving(tmp_path, image) as server:
        backup(server, "vda", backups)
        manifest = backups / "vda" / "manifest.json"
        content = json.loads(manifest.read_text())
        content["points"][0]["created"] = "2999-01-01T00:00:00+00:00"
        manifest.write_text(json.dumps(content))
        (second,) = backup(server, "vda", backups, "--keep", 1)
        assert second["since"] is not None
    assert [point["name"] for point in json.loads(manifest.read_text())["points"]] == [second["point"]]
    assert_restores(backups / "vda", tmp_path, image.read_bytes())


@pytest.mark.parametrize("what", [".", "vda"])
def test_a_backup_waits_for_another_command_in_its_folder(tmp_path: Path, what: str) -> None:
    """Timers of several disks fire at the same time, and somebody may be reading with `verify`."""
    image, backups = tmp_path / "vda.img", tmp_path / "backups"
    make_image(image, 70_000)
    with serving(tmp_path, image) as server:
        backup(server, "vda", backups)
        lock = os.open(backups / what / ".lock", os.O_RDWR)
        fcntl.flock(lock, fcntl.LOCK_SH)
        command = ForkedCommand("backup", "vda", backups, "--control", server.control)
        command.wait_for("is being worked on by another command: waiting for its end\n")
        assert len(checkpoints(server)) == 1
        os.close(lock)
        assert command.wait() == 0, command.said
    assert len(json.loads((backups / "vda" / "manifest.json").read_text())["points"]) == 2


def test_two_backups_at_once_are_one_after_the_other(tmp_path: Path) -> None:
    image, backups = tmp_path / "vda.img", tmp_path / "backups"
    make_image(image, MIB)
    with serving(tmp_path, image) as server:
        commands = [ForkedCommand("backup", "vda", backups, "--control", server.control) for _ in range(3)]
        for command in commands:
            assert command.wait() == 0, command.said
        assert len(checkpoints(server)) == 1
    points = json.loads((backups / "vda" / "manifest.json").read_text())["points"]
    assert [point["backing"] for point in points] == [None, points[0]["file"], points[1]["file"]]
    assert ForkedCommand("verify", backups).wait() == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_backup_that_is_stopped_undoes_itself(tmp_path: Path, number: signal.Signals) -> None:
    image, backups = tmp_path / "vda.img", tmp_path / "backups"
    make_image(image, 8 * MIB)
    with serving(tmp_path, image) as server:
        command = ForkedCommand("backup", "vda", backups, "--bandwidth", "100K", "--control", server.control)
        while not list(backups.rglob("*.qcow2.part")):
            assert command.process.is_alive(), command.said
        assert command.process.pid is not None
        os.kill(command.process.pid, number)
        code = command.wait()
        assert code == 1, (code, command.said)
        assert ControlClient(str(server.control)).request("GET", "/v1/snapshots")["snapshots"] == []
        assert checkpoints(server) == []
        assert {path.name for path in backups.rglob("*") if path.is_file()} == {".lock", "manifest.json"}


def unmade(folder: Path) -> None:
    """The folder and all that is in it, while somebody writes there."""
    while folder.exists():
        shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.parametrize("vanish", [unmade, lambda folder: folder.rename(folder.with_name("elsewhere"))])
def test_a_folder_that_vanishes_leaves_nothing_on_the_server(tmp_path: Path, vanish: Callable[[Path], object]) -> None:
    """With the folder its record of what is to be undone is gone."""
    image, backups = tmp_path / "vda.img", tmp_path / "backups"
    make_image(image, 4 * MIB)
    with serving(tmp_path, image) as server:
        backup(server, "vda", backups)
        before = checkpoints(server)
        command = ForkedCommand("backup", "vda", backups, "--bandwidth", "1M", "--full", "--control", server.control)
        while not list(backups.glob("vda/*.journal")):
            time.sleep(0.01)
        vanish(backups)
        assert command.wait() == 1
        assert "the next backup will do that" not in command.said
        control = ControlClient(str(server.control))
        assert control.request("GET", "/v1/snapshots")["snapshots"] == []
        assert checkpoints(server) == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_backup_that_is_told_to_end_leaves_nothing(tmp_path: Path, number: int) -> None:
    image, backups = tmp_path / "vda.img", tmp_path / "backups"
    make_image(image, 4 * MIB)
    with serving(tmp_path, image) as server:
        command = ForkedCommand("backup", "vda", backups, "--bandwidth", "1M", "--control", server.control)
        while not list(backups.glob("vda/*.journal")):
            time.sleep(0.01)
        command.interrupt(number)
        assert command.wait() == 1
        assert ControlClient(str(server.control)).request("GET", "/v1/snapshots")["snapshots"] == []
        assert checkpoints(server) == []
    assert not list(backups.glob("*.json")) + list(backups.glob("vda/*.qcow2*"))


def test_backups_are_not_hidden_behind_those_of_one_disk(tmp_path: Path) -> None:
    image, folder = tmp_path / "vda.img", tmp_path / "chain"
    make_image(image, 70_000)
    with serving(tmp_path, image) as server:
        control = ControlClient(str(server.control))
        control.request("POST", "/v1/snapshots", {"disks": ["vda"], "name": "s"})
        assert ForkedCommand("pull", "vda@s", folder, "--chain", "--control", server.control).wait() == 0
        names = sorted(folder.iterdir())
        command = ForkedCommand("backup", "vda", folder, "--control", server.control)
        assert command.wait() == 1 and "has the backups of one disk itself" in command.said
        assert sorted(folder.iterdir()) == names
        assert len(control.request("GET", "/v1/snapshots")["snapshots"]) == 1


def test_a_folder_without_any_space_is_named(tmp_path: Path) -> None:
    image, folder = tmp_path / "vda.img", tmp_path / "small"
    make_image(image, 70_000)
    with serving(tmp_path, image) as server, tmpfs(folder, 64 * KIB):
        with suppress(OSError):
            (folder / "filler").write_bytes(bytes(MIB))
        command = ForkedCommand("backup", "vda", folder, "--control", server.control)
        assert command.wait() == 1
        assert f"No space left on device: '{folder}/" in command.said or f"{folder}/" in command.said.splitlines()[-1]
        assert not [path for path in folder.rglob("*") if path.suffix == ".part"]
