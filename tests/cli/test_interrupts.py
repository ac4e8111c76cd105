"""Ctrl-C at any moment of a pull and of what works on backups: nothing looks whole that is not, and the next run goes.

`fleecing backup` is interrupted in test_backup_odd.py.
"""

from __future__ import annotations

import shutil
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from click.testing import CliRunner

from fleecing.block.hostfile import HostFile
from fleecing.cli.control_client import ControlClient
from fleecing.cli.main import main
from fleecing.client.dial import connect
from fleecing.nbd.handshake import Agreement
from fleecing.nbd.uri import NbdUri
from tests.client.servers import nbdkit, scripted, take
from tests.crash.forked import ForkedCommand, ForkedServer
from tests.images import MIB, make_image, random_bytes
from tests.peers import run

SIZE = 3 * MIB + 4321
MOMENTS = 10
"""How many a command is interrupted at, spread evenly over the lines that it runs."""


def fleecing(*words: object) -> str:
    result = CliRunner().invoke(main, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    return result.output


def interrupted(command: ForkedCommand) -> list[str]:
    """What it said before the word that ends it."""
    assert command.wait() == 1, command.said
    said = [line for line in command.said.splitlines() if line and not line.startswith("Lines: ")]
    assert said.pop() == "Aborted!"
    return said


def contents(file: Path) -> bytes:
    """Of the disk in a raw or qcow2 file, by qemu-img."""
    raw = file.with_name("raw")
    run("qemu-img", "convert", "-O", "raw", str(file), str(raw))
    data = raw.read_bytes()[:SIZE]
    raw.unlink()
    return data


def moments(*words: object) -> list[int]:
    """Runs the command once; where it is to be interrupted from then on."""
    command = ForkedCommand(*words, interrupt_at=0)
    assert command.wait() == 0, command.said
    lines = int(command.said.rpartition("Lines: ")[2])
    return [lines * number // MOMENTS for number in range(1, MOMENTS + 1)]


@dataclass
class World:
    """A server, and backups of its disk, whose contents are `last`."""

    server: ForkedServer
    chain: Path
    last: bytes

    def snapshot(self) -> tuple[object, ...]:
        """A new one; the words that pull it."""
        control = ControlClient(str(self.server.control))
        control.request("DELETE", "/v1/snapshots/vda@s")
        control.request("POST", "/v1/snapshots", {"disks": ["vda"], "name": "s"})
        return ("pull", "vda@s", "--control", self.server.control)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("w")
    image = folder / "vda.img"
    make_image(image, SIZE)
    server = ForkedServer(folder, image)
    server.wait_ready()
    for number in range(3):
        with connect(NbdUri(export="vda", socket=str(server.unix))) as guest:
            guest.write(number * 300_000, random_bytes(70_000, number))
            guest.write_zeroes(number * 500_000, 131_072)
        fleecing("backup", "vda", folder / "b", "--control", server.control)
    yield World(server, folder / "b" / "vda", image.read_bytes())
    server.stop()


@pytest.fixture
def chain(world: World, tmp_path: Path) -> Path:
    """A copy, to be spoilt."""
    return Path(shutil.copytree(world.chain, tmp_path / "chain"))


@pytest.mark.parametrize("name", ["out.img", "out.qcow2"])
def test_a_restore_that_is_interrupted_leaves_nothing(world: World, tmp_path: Path, name: str) -> None:
    out = tmp_path / name
    words = ("restore", world.chain, out, "--compress", "zstd" if name.endswith("qcow2") else "none")
    wholes = 0
    for line in moments(*words):
        out.unlink()
        interrupted(ForkedCommand(*words, interrupt_at=line))
        wholes += out.exists()  # after the last byte
        assert {path.name for path in tmp_path.iterdir()} <= {name}
        if not out.exists():
            fleecing(*words)
        assert contents(out) == world.last
    assert wholes <= 1


@pytest.mark.parametrize("keep", [1, 2])
def test_backups_whose_pruning_is_interrupted_are_whole(world: World, chain: Path, tmp_path: Path, keep: int) -> None:
    out = tmp_path / "out"
    for line in moments("prune", chain, "--keep", keep):
        shutil.rmtree(chain)
        shutil.copytree(world.chain, chain)
        interrupted(ForkedCommand("prune", chain, "--keep", keep, interrupt_at=line))
        assert fleecing("verify", chain).count(": ok\n") in (keep, 3)
        fleecing("prune", chain, "--keep", keep)
        assert fleecing("verify", chain).count(": ok\n") == keep
        assert len(list(chain.iterdir())) == 2 * keep + 2
        fleecing("restore", chain, out)
        assert out.read_bytes() == world.last
        out.unlink()


def test_a_verify_that_is_interrupted_calls_nothing_right(world: World) -> None:
    before = {path: path.stat().st_mtime_ns for path in world.chain.iterdir()}
    for line in moments("verify", world.chain)[:-1]:
        assert interrupted(ForkedCommand("verify", world.chain, interrupt_at=line)) == []
    assert fleecing("verify", world.chain).count(": ok\n") == 3
    assert {path: path.stat().st_mtime_ns for path in world.chain.iterdir()} == before


@pytest.mark.parametrize("name", ["out.img", "out.qcow2", "folder"])
def test_a_pull_that_is_interrupted_is_kept_to_be_resumed(world: World, tmp_path: Path, name: str) -> None:
    """It is trimmed behind the read head, so nothing could be read twice."""
    out = tmp_path / name
    file = out / "s.qcow2" if name == "folder" else out
    pull, source, *control = world.snapshot()
    words = (pull, source, out, *control, *(["--chain"] if name == "folder" else []))
    command = ForkedCommand(*words, "--bandwidth", "1M")
    journal = Path(f"{file}.journal")
    while command.process.is_alive() and not (journal.exists() and journal.stat().st_size > 400 + 60 * 2):
        pass
    command.interrupt()
    what = "s" if name == "folder" else out
    assert interrupted(command) == [f"What there is of {what} is kept; --resume goes on from there."]
    assert not file.exists()
    refused = ForkedCommand(*words)
    assert refused.wait() == 1 and "is left of a pull that was cut off: go on with --resume" in refused.said
    fleecing(*words, "--resume")
    assert contents(file) == world.last
    assert not list(file.parent.glob("*.part")) + list(file.parent.glob("*.journal"))


@pytest.mark.parametrize("name", ["out.img", "out.qcow2"])
def test_a_pull_that_is_interrupted_before_it_has_anything_leaves_nothing(
    world: World, tmp_path: Path, name: str
) -> None:
    (tmp_path / "out").mkdir()
    out = tmp_path / "out" / name
    with nbdkit(tmp_path, "-r", "--filter=delay", "pattern", "1M", "rdelay=3600") as never:
        command = ForkedCommand("pull", never, out)
        while command.process.is_alive() and not Path(f"{out}.part").exists():
            pass
        command.interrupt()
        assert interrupted(command) == []
    assert list(out.parent.iterdir()) == []
    pull, source, *control = world.snapshot()
    fleecing(pull, source, out, *control)
    assert contents(out) == world.last


@pytest.mark.parametrize("name", ["out.img", "out.qcow2"])
@pytest.mark.parametrize("command", ["restore", "pull"])
def test_ctrl_c_between_the_making_of_a_file_and_the_knowledge_of_it_leaves_nothing(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, name: str
) -> None:
    out = tmp_path / name
    words = ("restore", world.chain, out) if command == "restore" else (*world.snapshot(), out)
    real = HostFile.__init__

    def interrupt(self: HostFile, path: str, fd: int) -> None:
        real(self, path, fd)
        if path.endswith(".part"):
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(HostFile, "__init__", interrupt)
        result = CliRunner().invoke(main, [*map(str, words)])
    assert (result.exit_code, result.stderr.strip()) == (1, "Aborted!")
    assert list(tmp_path.iterdir()) == []
    fleecing(*words)


# What is written over


@contextmanager
def silent_target(folder: Path) -> Iterator[tuple[NbdUri, threading.Event]]:
    """An export that never answers; the event is set as soon as it is asked for something."""
    asked = threading.Event()

    def script(sock: socket.socket, _: Agreement) -> None:
        take(sock, 1)
        asked.set()
        while sock.recv(65536):
            pass

    with scripted(folder, script, contexts=()) as uri:
        yield uri, asked


@pytest.mark.parametrize(
    "command, number",
    [
        ("restore", signal.SIGINT),
        ("restore", signal.SIGTERM),
        ("restore", signal.SIGHUP),
        ("pull", signal.SIGINT),
    ],
)
def test_an_export_that_is_half_written_when_ctrl_c_comes_is_told(
    world: World, tmp_path: Path, command: str, number: int
) -> None:
    with silent_target(tmp_path) as (uri, asked):
        words = ("restore", world.chain, uri) if command == "restore" else (*world.snapshot(), uri)
        process = ForkedCommand(*words)
        assert asked.wait(60), process.said
        process.interrupt(number)
        said = interrupted(process)
    assert said == [f"{uri} is half-written: it has neither what it had before nor the whole disk"]


def test_a_file_that_is_half_written_when_ctrl_c_comes_is_told(world: World, tmp_path: Path) -> None:
    out = tmp_path / "out"
    make_image(out, SIZE, seed=1)
    words = ("restore", world.chain, out, "--existing")
    found = moments(*words)
    assert interrupted(ForkedCommand(*words, interrupt_at=1)) == []
    for line in found[MOMENTS // 2 : MOMENTS - 2]:
        said = interrupted(ForkedCommand(*words, interrupt_at=line))
        assert said == [f"{out} is half-written: it has neither what it had before nor the whole disk"]
    fleecing(*words)
    assert out.read_bytes() == world.last
