"""A real guest agent in a real machine, with QEMU's arguments as the README has them."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from tests.console import read_blocks
from tests.guest.busy import BusyGuest, make_files
from tests.guest.guest import Guest, drive
from tests.images import MIB
from tests.peers import run
from tests.serving import ROOT, Serve

MAKE_FILE_SYSTEM = "mkfs.ext4 -q /dev/vda && mount /dev/vda /mnt"

START_AGENT = """
port=$(grep -l org.qemu.guest_agent.0 /sys/class/virtio-ports/*/name) && port=${port%/name}
qemu-ga -m virtio-serial -p /dev/${port##*/} -t /tmp -f /tmp/agent.pid -l /tmp/agent.log -d
"""


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.raw"
    path.write_bytes(bytes(64 * MIB))
    return path


def agent_arguments(socket: Path) -> list[str]:
    """The words of the README's lines."""
    section = "Consistent file systems and programs"
    (block,) = (
        block
        for block in read_blocks((ROOT / "README.md").read_text())
        if (block.section, block.info) == (section, "sh")
    )
    return [word for line in block.lines for word in shlex.split(line.replace("/run/vm/web-agent.sock", str(socket)))]


def needs_recovery(uri: str, path: Path) -> bool:
    """Whether the file system in a snapshot has a journal to replay; if it has none, all of it must be right."""
    run("nbdcopy", uri, str(path))
    recovery = "needs_recovery" in run("dumpe2fs", "-h", str(path))
    if not recovery:
        run("e2fsck", "-f", "-n", str(path))
    return recovery


def test_a_quiesced_snapshot_has_no_journal_to_replay_and_the_guest_writes_on(
    serve: Serve, image: Path, tmp_path: Path
) -> None:
    agent = tmp_path / "agent.sock"
    server = serve(image, "--guest-agent", str(agent))
    with Guest(tmp_path, [*drive(server.uri()), *agent_arguments(agent)]) as guest:
        guest.check(MAKE_FILE_SYSTEM)
        guest.check(START_AGENT)
        work = BusyGuest(guest)
        make_files(guest)
        work.wait_for(2)
        for turn in range(2):
            assert needs_recovery(server.snapshot(name=f"plain{turn}"), tmp_path / "plain")
            assert not needs_recovery(server.snapshot(name=f"quiet{turn}", quiesce=True), tmp_path / "quiet")
            work.wait_for(2)
        work.stop()
        guest.check("umount /mnt")
        assert guest.console == ""
    server.child.wait_for_line("guest vda is frozen, 1 file systems, ")
    server.child.wait_for_line("guest vda is thawed, it was frozen for ")
