"""The README is true: its commands are run for real. (Its tables: test_readme_tables.py.)

Every console block runs in a scratch folder (tests/console.py), the recipes against the server of the tour. What needs
a machine (QEMU's arguments, nbd-client) runs with the guest of tests/guest. `./scripts/test` is what runs this.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from fleecing.errors import ControlError
from tests.console import Block, Session, read_blocks
from tests.guest.guest import HOST, Guest
from tests.guest.libvirt import LibvirtGuest
from tests.images import MIB, make_image
from tests.peers import run
from tests.serving import ROOT, Serve, Server

README = ROOT / "README.md"
BLOCKS = read_blocks(README.read_text())

QUICK_START = "Quick start"
TOUR = ["Serve a disk", "Write to it", "Freeze it", "Read it", "Trim it", "Delete it"]
BEFORE_RECIPES = TOUR[:2]
"""What the recipes go on from."""

_RUN = [block.section for block in BLOCKS if block.info == "console"]
RECIPES = [section for section in dict.fromkeys(_RUN) if section not in (QUICK_START, *TOUR)]


def blocks_of(*sections: str) -> list[Block]:
    return [block for block in BLOCKS if block.section in sections]


@pytest.fixture
def session(tmp_path: Path) -> Iterator[Session]:
    """A shell in the checkout. The page's folder of the tour is the test's."""
    home = tmp_path / "home"
    home.mkdir()
    places = {"/tmp/tour": tmp_path / "tour", "/home/ann/fleecing": ROOT}
    try:
        with Session(README, ROOT, home, places) as session:
            yield session
    finally:
        for line in Path("/proc/self/mounts").read_text().splitlines():
            if (mounted := line.split()[1]).startswith(f"{tmp_path}/"):  # where the test failed
                run("umount", "--lazy", mounted)


@pytest.fixture
def installed(session: Session, tmp_path: Path) -> Session:
    """With the command `fleecing`."""
    command = tmp_path / "home/.local/bin/fleecing"
    command.parent.mkdir(parents=True)
    command.symlink_to(ROOT / "scripts/fleecing")
    return session


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "vda.img"
    make_image(path, 16 * MIB)
    return path


def test_the_quick_start(session: Session) -> None:
    run(str(ROOT / "scripts/fleecing"), "--version")  # .venv is there from now on, if it was not
    for block in blocks_of(QUICK_START):
        session.run_block(block)


def test_the_tour(installed: Session) -> None:
    for block in blocks_of(*TOUR):
        installed.run_block(block)


@pytest.mark.parametrize("section", RECIPES)
def test_a_recipe(installed: Session, section: str) -> None:
    for block in blocks_of(*BEFORE_RECIPES, section):
        installed.run_block(block)


def test_pip_install_gives_the_command(tmp_path: Path) -> None:
    """Without a network: what the package needs is in this environment already."""
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check"]
    run(sys.executable, "-m", "pip", "install", *options, "--target", str(tmp_path), str(ROOT))
    code = "import sys; sys.path.insert(0, sys.argv[1]); import fleecing; print(fleecing.__file__)"
    assert run(sys.executable, "-P", "-c", code, str(tmp_path)) == f"{tmp_path}/fleecing/__init__.py\n"
    assert (tmp_path / "bin/fleecing").read_text().count("from fleecing.cli.main import main") == 1
    (metadata,) = tmp_path.glob("fleecing-*.dist-info/METADATA")
    assert "# Fleecing\n" in metadata.read_text()


# What needs a machine.


def qemu_arguments(server: Server) -> list[str]:
    """The words of the QEMU recipe's lines."""
    lines = [line for block in blocks_of("QEMU") for line in block.lines]
    return [word for line in lines for word in shlex.split(line.replace("/tmp/tour/nbd.sock", str(server.unix)))]


def test_the_drive_of_the_recipe_is_what_the_server_prints(serve: Serve, image: Path) -> None:
    """That QEMU takes it, and a machine works with it, is tests/guest/test_fleecing_guest.py."""
    server = serve(image)
    printed = server.child.wait_for_line("^  QEMU +(.*)")[1]
    assert qemu_arguments(server)[:2] == shlex.split(printed)


def test_a_machine_goes_on_when_its_server_is_killed_and_started_again(
    serve: Serve, image: Path, tmp_path: Path
) -> None:
    """With the -blockdev of the recipe; the kernel's client attaches the same export meanwhile."""
    server = serve(image)
    arguments = qemu_arguments(server)[2:]
    assert arguments[::2] == ["-blockdev", "-device"]
    with Guest(tmp_path, arguments) as guest, ThreadPoolExecutor() as pool:
        attach_with_the_kernel(guest, server)
        server.kill()
        write = "yes again | head -c 1048576 | dd of=/dev/vda bs=1M seek=2 conv=fsync iflag=fullblock"
        writing = pool.submit(guest.check, write)
        server = serve_again(server, image)
        writing.result()
    server.stop()
    with image.open("rb") as disk:
        disk.seek(2 * MIB)
        assert disk.readline() == b"again\n"


def test_a_machine_of_libvirt_works_on_the_disk_of_the_recipe(serve: Serve, image: Path, tmp_path: Path) -> None:
    """Both ways at once, on two disks; the second one waits for a server that is killed and started again."""
    other = tmp_path / "vdb.img"
    make_image(other, 4 * MIB)
    server = serve({"vda": image, "vdb": other})
    devices, commandline = (
        "\n".join(block.lines).replace("/tmp/tour/nbd.sock", str(server.unix)) for block in blocks_of("libvirt")
    )
    old = image.read_bytes()
    write = "yes again | head -c 1048576 | dd of=/dev/{} bs=1M seek=2 conv=fsync iflag=fullblock"
    with (
        LibvirtGuest(tmp_path, devices, commandline.replace("export=vda", "export=vdb")) as guest,
        ThreadPoolExecutor() as pool,
    ):
        uri = server.snapshot("vda", name="s")
        guest.check(write.format("vda"))
        run("nbdcopy", uri, str(tmp_path / "pulled"))
        server.kill()
        writing = pool.submit(guest.check, write.format("vdb"))
        server.start()
        writing.result()
    server.stop()
    assert (tmp_path / "pulled").read_bytes() == old
    for path in (image, other):
        assert path.read_bytes()[2 * MIB :].startswith(b"again\n" * 1000)


def attach_with_the_kernel(guest: Guest, server: Server) -> None:
    (block,) = (block for block in BLOCKS if block.info == "console guest")
    for step in block.steps():
        code, output = guest.run(step.command.replace("server.example 10809", f"{HOST} {server.port}"))
        assert (code, bool(output)) == (0, bool(step.output)), f"README.md:{step.line}: {output}"


def serve_again(server: Server, image: Path) -> Server:
    """The next server, with the same image, sockets and state."""
    return Server(server.unix.parent, image)


# Safety.


def test_what_was_acknowledged_survives_a_kill_and_snapshots_go_on(serve: Serve, image: Path) -> None:
    server = serve(image)
    old = image.read_bytes()
    uri = server.snapshot(name="monday")
    run("qemu-io", "-f", "raw", "-c", "write -P 7 0 1M", server.uri())
    for end in (server.kill, server.stop):
        end()
        server.start()
        run("qemu-io", "-f", "raw", "-c", "read -P 7 0 1M", server.uri())
        run("nbdcopy", uri, str(image.with_name("pulled.img")))
        assert image.with_name("pulled.img").read_bytes() == old


def test_an_image_that_was_resized_gets_no_snapshot(serve: Serve, image: Path) -> None:
    server = serve(image)
    os.truncate(image, 17 * MIB)
    with pytest.raises(ControlError, match=r"has grown .* restart the server"):
        server.snapshot()
    (disk,) = server.status()["disks"]
    assert "has grown" in disk["problem"] and disk["temp_free"] > 0


def test_sockets_are_for_their_owner_alone(serve: Serve, image: Path) -> None:
    server = serve(image)
    assert [path.stat().st_mode & 0o777 for path in (server.unix, server.control_path)] == [0o600, 0o600]
