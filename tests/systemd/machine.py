"""A machine with systemd as process 1, made of this machine's own files: its root is an ext4 file system.

In it are systemd and its journal, Python with what Fleecing needs, the checkout, busybox, bash and nbdinfo. The host's
systemd is never asked to do anything.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import sys
import sysconfig
import tomllib
from collections.abc import Iterator
from pathlib import Path

from tests.guest.guest import Guest
from tests.guest.image import copy_libraries
from tests.peers import require, run
from tests.serving import ROOT

SYSTEMD = "/lib/systemd/systemd"
PROGRAM = "/opt/fleecing/bin/fleecing"

DEADLINE = 300.0
"""Seconds for one command in there: Python starts slowly without KVM, and a busy host makes it slower."""

SIZE = "nbdinfo --size 'nbd+unix:///vda?socket=/run/fleecing/nbd.sock'"

INSTALL = f"""
set -e
bash /src/systemd/install {PROGRAM}
busybox yes fleecing | busybox head -c 1048576 >/srv/fleecing/vda.img
truncate -s 16M /srv/fleecing/vda.img
truncate -s 8M /srv/fleecing/vdb.img
chown fleecing:fleecing /srv/fleecing/*.img
echo '[disk.vda]
path = "/srv/fleecing/vda.img"' >/etc/fleecing/fleecing.toml
echo '[disk.vdb]
path = "/srv/fleecing/vdb.img"' >/etc/fleecing/vdb.toml
"""

_HELPERS = (SYSTEMD, "/lib/systemd/systemd-journald", "/lib/systemd/systemd-shutdown")
_PROGRAMS = ("bash", "busybox", "install", "journalctl", "nbdinfo", "systemctl", "systemd-sysusers", "systemd-tmpfiles")
_APPLETS = ("cat", "chmod", "chown", "cut", "dirname", "echo", "grep", "id", "kill", "ls", "sed", "sh", "sleep", "stat",
            "stty", "base64", "mkdir", "tail", "truncate", "wc", "test", "touch", "true")  # fmt: skip
_UNITS = (
    "basic.target", "final.target", "local-fs.target", "local-fs-pre.target", "multi-user.target", "network.target",
    "paths.target", "poweroff.target", "shutdown.target", "slices.target", "sockets.target", "swap.target",
    "sysinit.target", "timers.target", "time-set.target", "time-sync.target", "umount.target",
    "systemd-journald.service", "systemd-journald.socket", "systemd-journald-dev-log.socket",
)  # fmt: skip
_AGENT = """\
[Unit]
After=basic.target
[Service]
ExecStart=/agent
StandardError=null
IgnoreSIGPIPE=no
"""


class Machine:
    """The booted machine, with the words of the tests."""

    def __init__(self, guest: Guest) -> None:
        self._guest = guest

    def do(self, command: str) -> str:
        """What a command that must succeed wrote."""
        return self._guest.check(command, deadline=DEADLINE)

    def show(self, name: str, unit: str = "fleecing.service") -> str:
        """A property of a unit."""
        return self.do(f"systemctl show --value -p {name} {unit}").strip()

    def journal(self, unit: str = "fleecing.service") -> str:
        return self.do(f"journalctl --no-pager -u {unit}")

    def wait_for_journal(self, text: str, unit: str = "fleecing.service") -> None:
        """Until a unit's journal has a match of this text, a regular expression."""
        self.do(f"until journalctl --no-pager -u {unit} | grep -q '{text}'; do sleep 1; done")

    def connect_after(self, command: str) -> None:
        """A client that comes when the present server is gone, and the next one not yet there, is served by that."""
        before = self.show("MainPID")
        gone = f"while kill -0 {before} 2>/dev/null; do sleep 0.1; done"
        assert self.do(f"{command.replace('PID', before)}; {gone}; {SIZE}") == "16777216\n"
        assert self.show("MainPID") not in (before, "0")
        self.do("until systemctl is-active --quiet fleecing.service; do sleep 1; done")


def make_root(folder: Path) -> Path:
    """The file system's image, in FOLDER."""
    root = folder / "root"
    for name in ("dev", "etc/systemd/system", "proc", "run", "sys", "tmp", "usr/bin", "usr/lib/systemd/system", "var"):
        (root / name).mkdir(parents=True)
    for name in ("bin", "sbin", "lib", "lib64"):  # as the host has it, where all of these are in /usr
        (root / "usr" / name).mkdir(exist_ok=True)
        (root / name).symlink_to(f"usr/{name}")
    for program in (*_HELPERS, *map(require, _PROGRAMS)):
        _copy(program, root)
    for applet in _APPLETS:
        (root / "usr/bin" / applet).symlink_to("busybox")
    for unit in _UNITS:
        shutil.copy(f"/lib/systemd/system/{unit}", root / "usr/lib/systemd/system")
    _write_settings(root)
    _copy_python(root)
    _copy_checkout(root)
    # Nobody may write there later, and without KVM compiling takes its time.
    run(sys.executable, "-m", "compileall", "-q", str(root / "src"), str(root / "opt"), deadline=DEADLINE)
    image = folder / "root.img"
    run("mke2fs", "-q", "-t", "ext4", "-O", "^has_journal", "-E", "root_owner=0:0", "-d", str(root), str(image), "512M")
    shutil.rmtree(root)
    return image


def _copy(path: str, root: Path) -> None:
    """A program or library and what it is linked with, at the same place."""
    target = root / path[1:]
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, target)
    copy_libraries(path, root)


def _write_settings(root: Path) -> None:
    etc = root / "etc"
    (etc / "passwd").write_text("root:x:0:0:root:/:/bin/sh\n")
    (etc / "group").write_text("root:x:0:\ntty:x:5:\n")
    (etc / "nsswitch.conf").write_text("passwd: files\ngroup: files\nshadow: files\n")
    (etc / "machine-id").write_text("0123456789abcdef0123456789abcdef\n")
    (etc / "fstab").touch()
    (etc / "systemd/system.conf").write_text("[Manager]\nDefaultTimeoutStartSec=600\n")  # of a busy host
    shutil.copy(ROOT / "tests/guest/agent", root / "agent")
    (root / "agent").chmod(0o755)
    units = etc / "systemd/system"
    (root / "usr/lib/systemd/system/agent.service").write_text(_AGENT)
    for target, unit in (("multi-user", "agent.service"), ("sysinit", "systemd-journald.service")):
        (units / f"{target}.target.wants").mkdir()
        (units / f"{target}.target.wants" / unit).symlink_to(f"/usr/lib/systemd/system/{unit}")
    (units / "default.target").symlink_to("/usr/lib/systemd/system/multi-user.target")


def _copy_python(root: Path) -> None:
    """The interpreter and its library, where they are here, and the packages that Fleecing depends on."""
    program = os.path.realpath(sys.executable)
    _copy(program, root)
    library = sysconfig.get_path("stdlib", vars={"installed_base": sys.base_prefix})
    without = shutil.ignore_patterns("test", "tests", "idlelib", "lib2to3", "tkinter", "site-packages", "dist-packages",
                                     "ensurepip", "config-*", "*.opt-?.pyc")  # fmt: skip
    shutil.copytree(library, root / library[1:], ignore=without, symlinks=True, dirs_exist_ok=True)
    packages = root / "opt/fleecing/lib"
    for source, name in _package_files():
        target = packages / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source, target)
    for module in (*root.joinpath(library[1:]).rglob("*.so"), *packages.rglob("*.so")):
        copy_libraries(str(module), root)
    command = root / PROGRAM[1:]
    command.parent.mkdir(parents=True)
    command.write_text(f"#!{program} -P\nimport sys\nsys.path[:0] = ['/opt/fleecing/lib', '/src']\n"
                       "from fleecing.cli.main import main\nmain()\n")  # fmt: skip
    command.chmod(0o755)


def _package_files() -> Iterator[tuple[Path, str]]:
    """(file, its name below site-packages) of what pyproject.toml names, and of what that needs."""
    waiting: list[str] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    seen: set[str] = set()
    while waiting:
        requirement, _, marker = waiting.pop().partition(";")
        name = re.split(r"[^\w.-]", requirement.strip())[0].lower()
        if name in seen or "extra" in marker:
            continue
        seen.add(name)
        try:
            found = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # another Python or system needs it
        waiting += found.requires or []
        for file in found.files or []:
            path = Path(str(file.locate()))
            if ".." not in str(file) and path.exists():
                yield path, str(file)


def _copy_checkout(root: Path) -> None:
    for name in ("fleecing", "systemd"):
        shutil.copytree(ROOT / name, root / "src" / name)
