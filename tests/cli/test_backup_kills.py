"""kill -9 of the client or of the server at random moments of `fleecing backup`: the next run needs no help."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path

import pytest

from fleecing.cli.control_client import ControlClient
from fleecing.client.dial import connect
from fleecing.nbd.uri import NbdUri
from tests.crash.forked import ForkedCommand, ForkedServer
from tests.images import MIB, make_image
from tests.peers import run

SIZE = 2 * MIB + 333
KILLS = 6
DISKS = ("vda", "vdb")


class Story:
    """Two disks, their server, and a folder of backups."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.images = {disk: folder / f"{disk}.img" for disk in DISKS}
        for image in self.images.values():
            make_image(image, SIZE)
        self.backups = folder / "backups"
        self._state = folder
        self.server = ForkedServer(folder, self.images)
        self.server.wait_ready()
        self.chance = random.Random(seed)

    def change(self) -> None:
        """Some writes of the guest."""
        for disk in DISKS:
            with connect(NbdUri(export=disk, socket=str(self.server.unix))) as guest:
                for _ in range(2):
                    guest.write(self.chance.randrange(SIZE - 70_000), self.chance.randbytes(70_000))

    def backup(self, *more: str) -> ForkedCommand:
        return ForkedCommand("backup", *DISKS, self.backups, "--control", self.server.control, *more)

    def must(self, *words: object) -> None:
        command = ForkedCommand(*words)
        assert command.wait() == 0, command.said

    def assert_in_order(self) -> None:
        """The next backup is an increment; nothing dangles; the chains verify and have what the disks have."""
        self.must("verify", self.backups)
        self.change()
        command = self.backup()
        assert command.wait() == 0, command.said
        control = ControlClient(str(self.server.control))
        assert control.request("GET", "/v1/snapshots")["snapshots"] == []
        found = control.request("GET", "/v1/checkpoints")["checkpoints"]
        assert not list(self._state.rglob("temp.qcow2")) + list(self._state.rglob(".creation-*"))
        assert not (self.backups / ".backup.json").exists()
        for disk in DISKS:
            folder = self.backups / disk
            points = json.loads((folder / "manifest.json").read_text())["points"]
            assert points[-1]["backing"] is not None
            assert [each["name"] for each in found if each["disk"] == disk] == [points[-1]["name"]]
            needed = {name for point in points for name in (point["file"], point["chunks"])}
            assert {path.name for path in folder.iterdir()} == needed | {"manifest.json", ".lock"}
            last = str(folder / points[-1]["file"])
            run("qemu-img", "compare", "-f", "raw", "-F", "qcow2", str(self.images[disk]), last)
        self.must("verify", self.backups)


@pytest.mark.parametrize("victim", ["client", "server"])
def test_a_backup_killed_at_a_random_moment_is_mended_by_the_next(tmp_path: Path, victim: str) -> None:
    story = Story(tmp_path, seed=len(victim))
    story.must("backup", *DISKS, story.backups, "--control", story.server.control)
    began = time.monotonic()
    story.must("backup", *DISKS, story.backups, "--control", story.server.control, "--full")
    typical = time.monotonic() - began
    for _ in range(KILLS):
        story.change()
        command = story.backup(*story.chance.choice(([], ["--full"], ["--keep", "2"])))
        time.sleep(story.chance.random() * typical)
        if victim == "client":
            command.kill()
        else:
            story.server.kill()
            story.server = ForkedServer(tmp_path, story.images)
            story.server.wait_ready()
            command.wait()  # it went on, or it failed
        story.assert_in_order()
    story.server.stop()
