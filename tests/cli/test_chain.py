"""Folders of backups: every point restores exactly, by our restore and by qemu-img alone, whatever was killed when."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from fleecing.cli.main import main
from fleecing.errors import ImageError
from fleecing.pull import prune as prune_module
from fleecing.pull.chain import Chain, new_chain, open_chain
from fleecing.pull.destination import JOURNAL
from fleecing.pull.manifest import Manifest
from fleecing.pull.qcow2_codec import Compression
from tests.images import MIB, make_sparse, random_bytes
from tests.peers import run
from tests.serving import ROOT, Serve, Server

SIZE = 12 * MIB + 777


def fleecing(*words: str, expect: int = 0) -> Result:
    """A command that needs no process of its own."""
    result = CliRunner().invoke(main, list(words))
    assert result.exit_code == expect, result.output
    return result


@dataclass
class Backups:
    """A disk that changes, its server, and a folder of backups with what each point must be."""

    server: Server
    folder: Path
    image: Path
    scratch: Path

    def __post_init__(self) -> None:
        self.expected: dict[str, bytes] = {}
        self._chance = random.Random(6)

    def change(self) -> None:
        """Some writes, zeroes and trims, the last cluster among them."""
        commands = []
        for word in ("write -P {}", "write -P {}", "write -z", "discard"):
            offset = self._chance.randrange(0, SIZE - MIB)
            commands += ["-c", f"{word.format(self._chance.randrange(1, 255))} {offset // 512 * 512} 300k"]
        commands += ["-c", f"write -P {self._chance.randrange(1, 255)} {SIZE - 9} 9"]
        run("qemu-io", "-f", "raw", *commands, self.server.uri())

    def point(self, name: str, since: str | None = None, *more: str) -> Result:
        """The next point; the snapshot is gone afterwards."""
        request = {} if since is None else {"since": since}
        self.server.freeze("vda", name=f"s-{name}", checkpoint=name, **request)
        self.expected[name] = self.image.read_bytes()
        result = self.pull(f"vda@s-{name}", *more)
        self.server.delete(f"vda@s-{name}")
        return result

    def pull(self, export: str, *more: str, expect: int = 0) -> Result:
        control = ["--control", str(self.server.control_path)]
        return fleecing("pull", export, str(self.folder), "--chain", *control, *more, expect=expect)

    def make(self, count: int) -> list[str]:
        """A full point and increments, with changes between them."""
        names = [f"p{i}" for i in range(count)]
        for i, name in enumerate(names):
            self.change()
            self.point(name, names[i - 1] if i else None, "--compress", ("none", "deflate", "zstd")[i % 3])
        return names

    def assert_restores(self, *names: str) -> None:
        for name in names:
            raw = self.scratch / f"{name}.raw"
            fleecing("restore", str(self.folder), str(raw), "--at", name)
            assert raw.read_bytes() == self.expected[name], name
            file = self.folder / f"{name}.qcow2"
            run("qemu-img", "check", "-f", "qcow2", str(file))
            run("qemu-img", "compare", "-f", "raw", "-F", "qcow2", str(raw), str(file))
            raw.unlink()


@pytest.fixture
def backups(serve: Serve, tmp_path: Path) -> Backups:
    image = tmp_path / "vda.img"
    make_sparse(image, SIZE, {0: random_bytes(3 * MIB), 8 * MIB: b"text " * 100000})
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    return Backups(serve(image), tmp_path / "backups", image, scratch)


def names_of(folder: Path) -> list[str]:
    return [point["name"] for point in json.loads(fleecing("points", str(folder), "--json").stdout)]


def test_every_point_of_a_chain_restores_exactly(backups: Backups) -> None:
    names = backups.make(6)
    assert names_of(backups.folder) == names
    backups.assert_restores(*names)
    assert fleecing("verify", str(backups.folder)).stdout.count(": ok\n") == 6
    facts = json.loads(fleecing("points", str(backups.folder), "--json").stdout)
    assert [fact["kind"] for fact in facts] == ["full"] + ["incremental"] * 5
    assert all(fact["data"] < 3 * MIB for fact in facts[1:])


def test_a_point_where_nothing_changed_is_a_point(backups: Backups) -> None:
    backups.point("a")
    backups.point("b", "a")
    backups.assert_restores("a", "b")


@pytest.mark.parametrize("keep", [1, 2, 9])
def test_pruning_keeps_the_last_points_exactly(backups: Backups, keep: int) -> None:
    names = backups.make(4)
    fleecing("prune", str(backups.folder), "--keep", str(keep))
    assert names_of(backups.folder) == names[-keep:]
    backups.assert_restores(*names[-keep:])
    fleecing("verify", str(backups.folder))
    assert len(list(backups.folder.glob("*.qcow2"))) == min(keep, 4)
    backups.change()
    backups.point("next", names[-1])
    backups.assert_restores("next", *names[-keep:])


class Crashes(Exception):
    """Stands for kill -9: nothing behind it runs."""


STEPS = ["begin_merge", "write_chunks", "os.replace", "sync_folder", "finish_merge", "sweep"]


@pytest.mark.parametrize("step", STEPS)
def test_pruning_killed_at_any_step_loses_nothing(backups: Backups, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    names = backups.make(3)

    def crash(*_: object, **__: object) -> None:
        raise Crashes

    with monkeypatch.context() as patched, new_chain(str(backups.folder)) as chain:
        if step == "sweep":
            done = []
            real = Chain.sweep

            def later(self: Chain) -> None:
                done.append(step)
                if len(done) > 1:
                    raise Crashes
                real(self)

            patched.setattr(Chain, "sweep", later)
        elif step in ("begin_merge", "finish_merge"):
            patched.setattr(Chain, step, crash)
        elif step == "os.replace":
            patched.setattr("os.replace", crash)
        else:
            patched.setattr(prune_module, step, crash)
        with pytest.raises(Crashes):
            prune_module.prune(chain, 2, lambda count: None, compression=Compression.ZSTD)
    listed = names_of(backups.folder)
    assert listed in (names, names[-2:])
    backups.assert_restores(*listed)
    fleecing("verify", str(backups.folder))
    fleecing("prune", str(backups.folder), "--keep", "2")
    assert names_of(backups.folder) == names[-2:]
    backups.assert_restores(*names[-2:])
    kinds = sorted(path.suffix for path in backups.folder.iterdir())
    assert kinds == ["", ".chunks", ".chunks", ".json", ".qcow2", ".qcow2"]


def test_restore_writes_qcow2_stdout_and_over_an_export(backups: Backups, serve: Serve, tmp_path: Path) -> None:
    backups.make(2)
    last = backups.expected["p1"]
    fleecing("restore", str(backups.folder), str(tmp_path / "out.qcow2"), "--compress", "zstd")
    run("qemu-img", "convert", "-O", "raw", str(tmp_path / "out.qcow2"), str(tmp_path / "out.raw"))
    assert (tmp_path / "out.raw").read_bytes()[:SIZE] == last
    words = [sys.executable, "-m", "fleecing", "restore", str(backups.folder), "-"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    assert subprocess.run(words, env=env, stdout=subprocess.PIPE, timeout=60, check=True).stdout == last
    there = tmp_path / "there.img"
    there.write_bytes(b"\xff" * (SIZE + 5))
    other = serve(there)
    fleecing("restore", str(backups.folder), other.uri())
    other.stop()
    assert there.read_bytes() == last + b"\xff" * 5


# Damage and misuse


def damage(path: Path, needle: bytes) -> None:
    data = bytearray(path.read_bytes())
    data[data.index(needle) + 5] ^= 1
    path.write_bytes(data)


def test_a_flipped_bit_is_found_by_verify_and_by_restore(backups: Backups, tmp_path: Path) -> None:
    backups.make(2)
    damage(backups.folder / "p0.qcow2", backups.expected["p0"][:4096])
    result = fleecing("verify", str(backups.folder), expect=1)
    assert result.stdout.count(": ok\n") == 1
    assert "p0.qcow2" in result.stdout and "differ from their SHA-256" in result.stdout
    assert "1 of 2 points are damaged" in result.stderr
    assert "is damaged" in fleecing("restore", str(backups.folder), str(tmp_path / "out"), expect=1).stderr
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("what", ["p1.chunks", "p1.qcow2"])
def test_a_missing_or_cut_file_is_told(backups: Backups, what: str) -> None:
    backups.make(2)
    path = backups.folder / what
    path.write_bytes(path.read_bytes()[:50])
    result = fleecing("verify", str(backups.folder), expect=1)
    assert what in result.output
    path.unlink()
    assert fleecing("verify", str(backups.folder), expect=1).output


def test_an_increment_that_does_not_fit_is_refused_and_leaves_the_snapshot(backups: Backups) -> None:
    backups.make(2)
    backups.server.freeze("vda", name="wrong", since="p0")
    result = backups.pull("vda@wrong", expect=1)
    assert "ends with checkpoint 'p1', and this increment begins with 'p0'" in result.stderr
    assert backups.server.show("vda@wrong")["clusters"]["trimmed"] == 0
    assert names_of(backups.folder) == ["p0", "p1"]


def test_a_point_is_pulled_once(backups: Backups) -> None:
    backups.make(1)
    backups.server.freeze("vda", name="p0")
    assert "has a point 'p0' already" in backups.pull("vda@p0", expect=1).stderr


def test_folders_that_hold_something_else_are_refused(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("text")
    with pytest.raises(ImageError, match="is not empty and holds no backups"), new_chain(str(tmp_path)):
        pass
    for command in (("verify", "x"), ("restore", "x", "y"), ("prune", "x", "--keep", "1"), ("points", "x")):
        assert "holds no backups" in fleecing(*command, expect=1).stderr


@pytest.mark.parametrize("text", ["", "{}", "[]", "[" * 100_000, '{"fleecing-backups": 1, "points": [{}]}'])
def test_a_manifest_that_makes_no_sense_is_told(tmp_path: Path, text: str) -> None:
    (tmp_path / "manifest.json").write_text(text)
    assert "is no manifest of backups" in fleecing("verify", str(tmp_path), expect=1).stdout


@pytest.mark.parametrize(
    "key, value", [("size", {}), ("size", -1), ("size", 1 << 70), ("data", True), ("file", 7), ("name", None)]
)
def test_a_manifest_whose_values_make_no_sense_is_told(tmp_path: Path, key: str, value: object) -> None:
    point = {"name": "p", "file": "p", "chunks": "p", "chunks_sha256": "", "size": 1, "data": 0, "created": ""}
    (tmp_path / "manifest.json").write_text(json.dumps({"fleecing-backups": 1, "points": [point | {key: value}]}))
    assert "is no manifest of backups" in fleecing("verify", str(tmp_path), expect=1).stdout


def test_one_command_at_a_time_writes(tmp_path: Path) -> None:
    with new_chain(str(tmp_path)) as chain:
        Manifest().save(chain.folder)
        with pytest.raises(ImageError, match="is being worked on"), open_chain(str(tmp_path)):
            pass
    with open_chain(str(tmp_path)), open_chain(str(tmp_path)):
        pass


def test_unknown_points_are_told_with_those_that_there_are(backups: Backups, tmp_path: Path) -> None:
    backups.make(1)
    result = fleecing("restore", str(backups.folder), str(tmp_path / "out"), "--at", "x", expect=1)
    assert "has no point 'x'; the last ones are p0" in result.stderr


@pytest.mark.parametrize("records", [1, 5])
def test_a_pull_into_a_chain_that_was_killed_goes_on(backups: Backups, records: int) -> None:
    backups.make(2)
    backups.change()
    backups.server.freeze("vda", name="s", checkpoint="c")
    backups.expected["c"] = backups.image.read_bytes()
    words = ["pull", "vda@s", str(backups.folder), "--chain", "--control", str(backups.server.control_path)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-m", "fleecing", *words, "--bandwidth", "1M", "--depth", "1"], env=env)
    journal = backups.folder / f"c.qcow2{JOURNAL}"
    while process.poll() is None and not (journal.exists() and journal.stat().st_size > 400 + 60 * records):
        pass
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert names_of(backups.folder) == ["p0", "p1"]
    fleecing("verify", str(backups.folder))
    backups.pull("vda@s", "--resume")
    assert names_of(backups.folder) == ["p0", "p1", "c"]
    backups.assert_restores("p1", "c")
    assert not list(backups.folder.glob("*.part")) + list(backups.folder.glob("*.journal"))


def test_a_kill_before_the_manifest_knows_the_point_is_mended_by_resume(
    backups: Backups, monkeypatch: pytest.MonkeyPatch
) -> None:
    backups.make(1)
    backups.change()
    backups.server.freeze("vda", name="s", checkpoint="c", since="p0")
    backups.expected["c"] = backups.image.read_bytes()
    with monkeypatch.context() as patched:

        def crash(*_: object) -> None:
            raise OSError(5, "the power is gone")

        patched.setattr(Manifest, "save", crash)
        backups.pull("vda@s", expect=1)
    assert names_of(backups.folder) == ["p0"]
    backups.pull("vda@s", "--resume")
    backups.assert_restores("p0", "c")
