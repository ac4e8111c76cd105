"""The power of the machine that keeps the backups goes at any moment: every point that is listed restores exactly.

FLEECING_CRASHES sets at how many moments it goes; the default is what CI has time for.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from random import Random

import pytest
from click.testing import CliRunner

from fleecing.cli.main import main
from fleecing.pull import journal
from fleecing.pull.chain import open_chain
from fleecing.pull.manifest import Manifest
from tests.crash.disk_log import DiskLog, after_crash, recorded_folder
from tests.faulty import CAN_FAIL
from tests.images import KIB, MIB, make_sparse, random_bytes
from tests.peers import run
from tests.serving import ROOT, Serve, Server

CRASHES = int(os.environ.get("FLEECING_CRASHES", "25"))
SIZE = 3 * MIB + 777
KEEP = 2


@dataclass
class Step:
    """A command, and between which entries of the disk's log it ran."""

    words: list[str]
    begin: int
    end: int


class Story:
    """Points p0, p1 and p2, then `prune`, then p3, on a disk that remembers."""

    def __init__(self, server: Server, image: Path, folder: Path, disk: DiskLog) -> None:
        self.server = server
        self.folder = folder
        self.disk = disk
        self.expected: dict[str, bytes] = {}
        self.steps: list[Step] = []
        chance = random.Random(8)
        for n in range(4):
            since = {"since": f"p{n - 1}"} if n else {}
            server.freeze("vda", name=f"s{n}", checkpoint=f"p{n}", **since)
            self.expected[f"p{n}"] = image.read_bytes()
            writes = [f"write -P {chance.randrange(1, 255)} {chance.randrange(0, SIZE - 99999)} 90k" for _ in range(3)]
            run("qemu-io", "-f", "raw", *(word for each in writes for word in ("-c", each)), server.uri())
        for n in range(3):
            self.tell(*self.pull(n))
        self.tell("prune", "BACKUPS", "--keep", str(KEEP))
        self.tell(*self.pull(3))

    def pull(self, n: int) -> list[str]:
        compress = ("none", "zstd")[n % 2]
        words = ["pull", f"vda@s{n}", "BACKUPS", "--chain", "--resume", "--no-trim", "--compress", compress]
        return [*words, "--control", str(self.server.control_path)]

    def tell(self, *words: str) -> None:
        begin = len(self.disk.log)
        command = [sys.executable, "-m", "fleecing", *at(self.folder, words)]
        subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True, capture_output=True)
        self.steps.append(Step(list(words), begin, len(self.disk.log)))

    def may_have(self, moment: int) -> list[list[str]]:
        """The points that the folder may list after a crash."""
        points: list[str] = []
        choices = [points]
        for step in self.steps:
            if step.begin > moment:
                break
            after = points[-KEEP:] if step.words[0] == "prune" else [*points, step.words[1].replace("vda@s", "p")]
            choices = [after] if step.end <= moment else [points, after]
            points = after
        return choices


def at(folder: Path, words: tuple[str, ...] | list[str]) -> list[str]:
    return [str(folder) if word == "BACKUPS" else word for word in words]


def fleecing(folder: Path, *words: str) -> None:
    """In this process; none of its disks is served here."""
    result = CliRunner().invoke(main, at(folder, words))
    assert result.exit_code == 0, (words, result.output)


def listed(folder: Path) -> list[str]:
    """As a reader has it, who finds a merge done or not done."""
    if not folder.exists() or Manifest.load(folder) is None:
        return []
    with open_chain(str(folder)) as chain:
        return [point.name for point in chain.points]


def look(story: Story, folder: Path, scratch: Path) -> list[str]:
    """All that is listed is what it was; its names."""
    points = listed(folder)
    if points:
        fleecing(folder, "verify", "BACKUPS")
    for point in points:
        fleecing(folder, "restore", "BACKUPS", "--at", point, str(scratch / "restored"))
        assert (scratch / "restored").read_bytes() == story.expected[point], point
        (scratch / "restored").unlink()
    return points


@pytest.mark.skipif(not CAN_FAIL, reason="takes root")
def test_backups_are_exact_and_go_on_wherever_the_power_went(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = tmp_path / "vda.img"
    make_sparse(image, SIZE, {0: random_bytes(MIB), 2 * MIB: random_bytes(700 * KIB)})
    with recorded_folder(tmp_path / "recorded") as (mounted, disk):
        story = Story(serve(image), image, mounted / "backups", disk)
    monkeypatch.setattr(journal, "_boot_id", lambda: b"another boot".ljust(journal.CHECK_BYTES))
    chance = Random(9)
    last = story.steps[-1].end
    for number in range(CRASHES):
        moment = last * (number + 1) // CRASHES if number % 2 else chance.randint(0, last)
        with after_crash(tmp_path / f"crash{number}", disk.crashed(moment, chance)) as found:
            folder = found / "backups"
            points = look(story, folder, tmp_path)
            assert points in story.may_have(moment), (number, moment)
            following = int(points[-1][1:]) + 1 if points else 0
            if following < 4:
                fleecing(folder, *story.pull(following))
                assert look(story, folder, tmp_path) == [*points, f"p{following}"]
            fleecing(folder, "prune", "BACKUPS", "--keep", "1")
            assert look(story, folder, tmp_path) == [f"p{min(following, 3)}"]
            assert not [path.name for path in folder.iterdir() if path.name.endswith((".part", ".journal"))]
