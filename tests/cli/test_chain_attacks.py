"""Folders of backups that lie, are damaged, or hold a stranger's files: told, and nothing is lost or made up."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from hypothesis import given, settings
from hypothesis import strategies as st

from fleecing.cli.control_client import ControlClient
from fleecing.cli.main import main
from fleecing.client.dial import connect
from fleecing.nbd.uri import NbdUri
from tests.crash.forked import ForkedCommand, ForkedServer
from tests.images import MIB, make_image, random_bytes
from tests.peers import run

SIZE = 2 * MIB + 4321
POINTS = ("p0", "p1", "p2")


def fleecing(*words: object, expect: int = 0) -> Result:
    """A command; where it fails it says why in one sentence."""
    result = CliRunner().invoke(main, [str(word) for word in words])
    assert result.exit_code == expect, (result.output, result.exc_info)
    if expect:
        assert result.stderr.splitlines()[-1].startswith("Error: "), result.stderr
    return result


@dataclass
class World:
    """A server, three points of its disk in `chain`, and what each of them is."""

    server: ForkedServer
    chain: Path
    expected: dict[str, bytes]

    def pull(self, export: str, folder: Path, expect: int = 0) -> Result:
        return fleecing("pull", export, folder, "--chain", "--control", self.server.control, expect=expect)

    def request(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        answer: dict[str, Any] = ControlClient(str(self.server.control)).request(method, path, body)
        return answer

    def snapshot(self, name: str, **more: object) -> None:
        self.request("POST", "/v1/snapshots", {"disks": ["vda"], "name": name, **more})


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("w")
    image = folder / "vda.img"
    make_image(image, SIZE)
    server = ForkedServer(folder, image)
    server.wait_ready()
    made = World(server, folder / "chain", {})
    for number, name in enumerate(POINTS):
        if number:
            with connect(NbdUri(export="vda", socket=str(server.unix))) as guest:
                guest.write(number * 300_000, random_bytes(70_000, number))
                guest.write_zeroes(number * 500_000, 131_072)
        made.snapshot(f"s{number}", checkpoint=name, **({"since": POINTS[number - 1]} if number else {}))
        made.pull(f"vda@s{number}", made.chain)
        made.expected[name] = image.read_bytes()
    yield made
    server.stop()


@pytest.fixture
def chain(world: World, tmp_path: Path) -> Path:
    """A copy, to be spoilt."""
    return Path(shutil.copytree(world.chain, tmp_path / "chain"))


def change(chain: Path, what: Callable[[dict[str, Any]], object]) -> None:
    manifest = json.loads((chain / "manifest.json").read_text())
    what(manifest)
    (chain / "manifest.json").write_text(json.dumps(manifest))


def set_chunks(chain: Path, name: str, text: bytes) -> None:
    """Another list of chunks, which the manifest vouches for."""
    (chain / f"{name}.chunks").write_bytes(text)
    digest = hashlib.sha256(text).hexdigest()
    change(chain, lambda m: m["points"][POINTS.index(name)].update(chunks_sha256=digest))


def assert_nothing_is_made_up(world: World, chain: Path, out: Path) -> None:
    """Whatever restores is right; all else is told."""
    for name in POINTS:
        result = CliRunner().invoke(main, ["restore", str(chain), str(out), "--at", name])
        if result.exit_code == 0:
            assert out.read_bytes() == world.expected[name], name
            out.unlink()
        else:
            assert result.exit_code == 1 and result.stderr.splitlines()[-1].startswith("Error: "), result.exc_info
            assert not out.exists() and not out.with_name(out.name + ".part").exists()


# Strangers' files


def test_no_file_of_a_stranger_is_ever_removed(world: World, tmp_path: Path) -> None:
    """Neither images in a folder that was named by mistake, nor what somebody keeps among the backups."""
    images = tmp_path / "images"
    images.mkdir()
    for name in ("web.qcow2", "db.qcow2.part", "x.chunks"):
        (images / name).write_text(name)
    world.snapshot("t", checkpoint="t")
    assert "is not empty and holds no backups" in world.pull("vda@t", images, expect=1).stderr
    assert sorted(path.name for path in images.iterdir()) == [".lock", "db.qcow2.part", "web.qcow2", "x.chunks"]
    folder = Path(shutil.copytree(world.chain, tmp_path / "chain"))
    kept = [folder / name for name in ("restored.qcow2", "p1.qcow2.part", "other.chunks", "q.qcow2.journal")]
    for path in kept:
        path.write_text("precious")
    (folder / "t.qcow2").write_text("precious")
    assert "t.qcow2: is in the way" in world.pull("vda@t", folder, expect=1).stderr
    assert (folder / "t.qcow2").read_text() == "precious"
    (folder / "t.qcow2").unlink()
    world.pull("vda@t", folder)
    fleecing("prune", folder, "--keep", 2)
    fleecing("prune", folder, "--keep", 1)
    fleecing("verify", folder)
    assert all(path.read_text() == "precious" for path in kept)
    assert {path.name for path in folder.glob("*.qcow2")} == {"restored.qcow2", "t.qcow2"}
    world.request("DELETE", "/v1/snapshots/vda@t")
    world.request("DELETE", "/v1/checkpoints/vda@t")


def test_backups_whose_manifest_is_lost_are_left_alone_and_told(world: World, tmp_path: Path) -> None:
    backups = tmp_path / "backups"
    fleecing("backup", "vda", backups, "--control", world.server.control)
    (backups / "vda" / "manifest.json").unlink()
    before = sorted((backups / "vda").iterdir())
    assert "there is no manifest.json" in fleecing("verify", backups, expect=1).stderr
    result = fleecing("backup", "vda", backups, "--control", world.server.control, expect=1)
    assert "is not empty and holds no backups: there is no manifest.json in it" in result.stderr
    assert sorted((backups / "vda").iterdir()) == before
    shutil.copytree(world.chain, backups / "vdb")
    result = fleecing("verify", backups, expect=1)
    assert "vda: has backups, but no manifest.json" in result.stdout and result.stdout.count(": ok\n") == 3
    for checkpoint in world.request("GET", "/v1/checkpoints")["checkpoints"]:
        if checkpoint["name"] not in POINTS:
            world.request("DELETE", f"/v1/checkpoints/vda@{checkpoint['name']}")


def test_the_folder_of_several_disks_is_told_from_that_of_one(chain: Path, tmp_path: Path) -> None:
    result = fleecing("restore", tmp_path, tmp_path / "out", expect=1)
    assert f"holds no backups: there is no manifest.json in it; name one of {chain}" in result.stderr
    assert CliRunner().invoke(main, ["restore", str(chain), str(tmp_path / "out"), "--compress", "zstd"]).exit_code == 2


def test_an_empty_folder_does_not_verify(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text('{"fleecing-backups": 1, "points": []}')
    assert "holds no backup yet" in fleecing("verify", tmp_path, expect=1).stderr


# Damage


def test_files_that_are_swapped_cut_or_gone_are_found(world: World, chain: Path, tmp_path: Path) -> None:
    """Only the points that stand on them are lost."""

    def ruined(at: str, *names: str) -> None:
        result = fleecing("verify", chain, expect=1)
        assert at in result.output
        assert result.stdout.count(": ok\n") == len(POINTS) - len(names)
        assert_nothing_is_made_up(world, chain, tmp_path / "out")
        shutil.rmtree(chain)
        shutil.copytree(world.chain, chain)

    (chain / "p1.qcow2").rename(chain / "x")
    (chain / "p2.qcow2").rename(chain / "p1.qcow2")
    (chain / "x").rename(chain / "p2.qcow2")
    ruined("has the backing file", "p1", "p2")
    (chain / "p1.qcow2").unlink()
    assert "missing" in fleecing("points", chain).stdout
    ruined("p1.qcow2: No such file", "p1")
    (chain / "p1.chunks").write_bytes((chain / "p2.chunks").read_bytes())
    ruined("p1.chunks: is not what the manifest says", "p1")
    run("qemu-img", "resize", "-q", "-f", "qcow2", str(chain / "p2.qcow2"), "8M")
    ruined("the manifest says", "p2")
    run("qemu-img", "rebase", "-u", "-F", "qcow2", "-b", "p0.qcow2", str(chain / "p2.qcow2"))
    ruined("has the backing file 'p0.qcow2'", "p2")
    for cut in (0, 50, 65536, 200_000):
        (chain / "p0.qcow2").write_bytes((chain / "p0.qcow2").read_bytes()[:cut])
        ruined("p0.qcow2", "p0")


def test_a_prune_that_is_killed_at_a_random_moment_loses_nothing(world: World, chain: Path, tmp_path: Path) -> None:
    """All that is listed is right, and the next one needs no help."""
    chance = random.Random(9)
    began = time.monotonic()
    assert ForkedCommand("prune", chain, "--keep", 1).wait() == 0
    typical = time.monotonic() - began
    for turn in range(8):
        shutil.rmtree(chain)
        shutil.copytree(world.chain, chain)
        keep = turn % 2 + 1
        command = ForkedCommand("prune", chain, "--keep", keep)
        time.sleep(chance.random() * typical)
        command.kill()
        fleecing("verify", chain)
        names = [point["name"] for point in json.loads(fleecing("points", chain, "--json").stdout)]
        assert names in (list(POINTS), list(POINTS[-keep:]))
        for name in names:
            fleecing("restore", chain, tmp_path / name, "--at", name)
            assert (tmp_path / name).read_bytes() == world.expected[name]
            (tmp_path / name).unlink()
        fleecing("prune", chain, "--keep", keep)
        fleecing("verify", chain)
        assert len(list(chain.iterdir())) == 2 * keep + 2


CHUNKS = {
    "no line": b"hello\n",
    "no numbers": b"a b zero\n",
    "not ended": b"0 65536 zero",
    "not whole clusters": b"512 65536 zero\n",
    "out of order": b"65536 65536 zero\n0 65536 zero\n",
    "on top of each other": b"0 131072 zero\n65536 65536 zero\n",
    "behind the end": b"0 4194304 zero\n",
    "empty": b"0 0 zero\n",
    "much too large": b"0 99999999999999999999 zero\n",
    "not ASCII": "0 65536 zéro\n".encode(),
}


@pytest.mark.parametrize("what", CHUNKS)
def test_a_list_of_chunks_that_makes_no_sense_is_told(world: World, chain: Path, tmp_path: Path, what: str) -> None:
    set_chunks(chain, "p1", CHUNKS[what])
    assert fleecing("verify", chain, expect=1).stdout.count(": ok\n") == 2
    result = fleecing("restore", chain, tmp_path / "out", "--at", "p1", expect=1)
    assert "p1.chunks: makes no sense" in result.stderr
    fleecing("restore", chain, tmp_path / "p0", "--at", "p0")
    assert not (tmp_path / "out").exists()


LIES: dict[str, Callable[[dict[str, Any]], object]] = {
    "a file elsewhere": lambda m: m["points"][1].update(file="../vda.img"),
    "an absolute file": lambda m: m["points"][1].update(chunks="/etc/passwd"),
    "a name with a zero": lambda m: m["points"][1].update(file="a\0b"),
    "a name that no file can have": lambda m: m["points"][1].update(file="\ud800"),
    "no name": lambda m: m["points"][1].update(file=""),
    "a size that is none": lambda m: m["points"][1].update(size="2M"),
    "no size": lambda m: m["points"][1].update(size=0),
    "a time that is none": lambda m: m["points"][1].update(created="yesterday"),
    "a field too much": lambda m: m["points"][1].update(more=1),
    "a field too few": lambda m: m["points"][1].pop("data"),
    "points that are none": lambda m: m.update(points=[1]),
    "a list": lambda m: m.update(points={"a": 1}),
    "a point twice": lambda m: m["points"].append(m["points"][1]),
    "litter elsewhere": lambda m: m.update(litter=["../vda.img"]),
    "something made elsewhere": lambda m: m.update(making="/x"),
    "another release": lambda m: m.update({"fleecing-backups": 2}),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_manifest_that_makes_no_sense_is_told_by_every_command(chain: Path, tmp_path: Path, lie: str) -> None:
    change(chain, LIES[lie])
    before = sorted(chain.iterdir())
    for words in (("points", chain), ("verify", chain), ("prune", chain, "--keep", 1), ("restore", chain, chain / "o")):
        assert "manifest.json" in fleecing(*words, expect=1).output
    assert sorted(chain.iterdir()) == before


@pytest.mark.parametrize(
    "lie",
    [
        lambda m: m["points"].pop(0),
        lambda m: m["points"].reverse(),
        lambda m: m["points"][2].update(backing=None),
        lambda m: m["points"][1].update(backing="p2.qcow2"),
        lambda m: m["points"][1].update(size=SIZE - 65536),
        lambda m: m["points"][0].update(file="p1.qcow2") or m["points"][1].update(file="p0.qcow2"),
        lambda m: m.update(merging={**m["points"][1], "chunks": "p0.chunks"}),
    ],
)
def test_a_manifest_that_lies_never_makes_a_wrong_restore(
    world: World, chain: Path, tmp_path: Path, lie: Callable[[dict[str, Any]], object]
) -> None:
    """It may be told by a restore, or by verify, or it changes nothing that a restore goes by."""
    change(chain, lie)
    result = CliRunner().invoke(main, ["verify", str(chain)])
    assert result.exit_code in (0, 1) and isinstance(result.exception, SystemExit | None)
    if result.exit_code:
        assert "Error: " in result.stderr
    else:
        assert_nothing_is_made_up(world, chain, tmp_path / "out")


@settings(max_examples=60)
@given(data=st.data())
def test_bytes_that_flip_are_never_restored(world: World, tmp_path_factory: pytest.TempPathFactory, data: Any) -> None:
    """In any file of the folder: the right bytes, or a sentence."""
    folder = tmp_path_factory.mktemp("f")
    chain = Path(shutil.copytree(world.chain, folder / "chain"))
    path = chain / data.draw(st.sampled_from(["p0.qcow2", "p1.qcow2", "p1.chunks", "manifest.json"]))
    content = bytearray(path.read_bytes())
    # Headers and tables lie at the ends of clusters' beginnings: half of the flips go there
    end = data.draw(st.sampled_from([120, len(content)]))
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, min(end, len(content)) - 1))] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    assert_nothing_is_made_up(world, chain, folder / "out")
    result = CliRunner().invoke(main, ["verify", str(chain)])
    assert result.exit_code in (0, 1) and isinstance(result.exception, SystemExit | None), result.exc_info
    shutil.rmtree(folder)


def test_what_only_other_readers_see_is_found(world: World, chain: Path) -> None:
    """A cluster that the list of chunks does not know hides the backing file; bits of the header turn QEMU away."""
    file = chain / "p1.qcow2"
    good = file.read_bytes()
    (l1,) = struct.unpack_from(">Q", good, 40)
    (l2,) = struct.unpack_from(">Q", good, l1)
    table = l2 & 0x00FF_FFFF_FFFF_FE00
    entries = struct.unpack_from(f">{-(-SIZE // 65536)}Q", good, table)
    places = [table + 8 * index + 7 for index, entry in enumerate(entries) if not entry]
    places += [9, 13, 59, 72, 78, 79, 95, 99, 103, 105, 110]
    assert len(places) > 20
    for place in places:
        bad = bytearray(good)
        bad[place] ^= 1
        file.write_bytes(bad)
        said = CliRunner().invoke(main, ["verify", str(chain)])
        assert said.exit_code == 1 and "p1.qcow2: ok" not in said.output, (place - table, place)
    file.write_bytes(good)
    assert fleecing("verify", chain).output.count(": ok\n") == 3
