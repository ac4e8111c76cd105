"""The real programs that the tests run: found or failed, started, waited for, and always reaped.

A test never skips because a program is missing: `require` fails it with the name of the package.

    image = tmp_path / "disk.raw"
    listener = listen_tcp()                                     # or listen_unix(tmp_path / "s")
    with Child(["nbdkit", "-f", "file", str(image)], tmp_path, activate=listener):
        run("nbdinfo", "--size", f"nbd://127.0.0.1:{port_of(listener)}")

A server that can be given its listening socket is ready before it starts: who connects early waits in the socket's
queue. nbdkit and qemu-nbd find it by themselves (systemd's socket activation); qemu-storage-daemon takes
`--nbd-server addr.type=fd,addr.str=3`. For the others `Child.wait_for_line` waits for what they say.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Self

import pytest

from tests.forking import ForkedProgram

# Seconds. No test asserts a time: whoever waits this long hangs.
DEADLINE = 60.0

PACKAGES = {
    "blockdev": "util-linux",
    "borg": "borgbackup",
    "busybox": "busybox-static",
    "cpio": "cpio",
    "curl": "curl",
    "debugfs": "e2fsprogs",
    "dumpe2fs": "e2fsprogs",
    "dpkg-deb": "dpkg",
    "e2fsck": "e2fsprogs",
    "fio": "fio",
    "fsfreeze": "util-linux",
    "fusermount3": "fuse3",
    "journalctl": "systemd",
    "ldd": "libc-bin",
    "losetup": "mount",
    "mke2fs": "e2fsprogs",
    "mount": "mount",
    "nbd-client": "nbd-client",
    "nbd-server": "nbd-server",
    "nbdcopy": "libnbd-bin",
    "nbddump": "libnbd-bin",
    "nbdfuse": "libnbd-bin",
    "nbdinfo": "libnbd-bin",
    "nbdkit": "nbdkit",
    "nsenter": "util-linux",
    "prlimit": "util-linux",
    "prometheus": "prometheus",
    "promtool": "prometheus",
    "qemu-ga": "qemu-guest-agent",
    "qemu-img": "qemu-utils",
    "qemu-io": "qemu-utils",
    "qemu-nbd": "qemu-utils",
    "qemu-storage-daemon": "qemu-system-common",
    "qemu-system-x86_64": "qemu-system-x86",
    "setpriv": "util-linux",
    "systemctl": "systemd",
    "systemd-analyze": "systemd",
    "systemd-socket-activate": "systemd",
    "systemd-sysusers": "systemd",
    "systemd-tmpfiles": "systemd",
    "umount": "mount",
    "unshare": "util-linux",
    "virt-qemu-run": "libvirt-daemon-driver-qemu",
}

# The PATH of a plain user lacks these, and several peers live there.
_SEARCH = os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/local/sbin", "/usr/sbin", "/sbin"))

_DIST_PACKAGES = Path("/usr/lib/python3/dist-packages")


def require(program: str) -> str:
    """The absolute path of a peer. Where there is none, the test fails with the name of its package."""
    found = shutil.which(program, path=_SEARCH)
    if found is None:
        package = PACKAGES.get(program, program)
        pytest.fail(f"{program} is missing: install the package {package}, as ./scripts/test does", pytrace=False)
    return found


def run(program: str, *arguments: str, expect: int | None = 0, deadline: float = DEADLINE) -> str:
    """Run a peer to its end; its standard output. The test fails where its exit code is not `expect` (None = any)."""
    result = run_any(program, *arguments, deadline=deadline)
    if expect is not None and result.returncode != expect:
        pytest.fail(f"{describe(result)}: expected exit code {expect}")
    return result.stdout


def run_any(program: str, *arguments: str, deadline: float = DEADLINE) -> subprocess.CompletedProcess[str]:
    """Run a peer to its end, however it ends."""
    return subprocess.run(
        [require(program), *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=deadline,
        check=False,
    )


def describe(result: subprocess.CompletedProcess[str]) -> str:
    """The command, how it ended, and what it said."""
    return f"{' '.join(result.args)} exited with {result.returncode}\n{result.stdout}{result.stderr}"


def load_libnbd() -> ModuleType:
    """libnbd's Python module `nbd`, out of Debian's package and into this interpreter.

    The folder stays off sys.path: it holds other versions of what the virtual environment holds.
    """
    if (loaded := sys.modules.get("nbd")) is not None:
        return loaded
    package = "install the package python3-libnbd, as ./scripts/test does"
    binary = _DIST_PACKAGES / f"libnbdmod{importlib.machinery.EXTENSION_SUFFIXES[0]}"
    if not binary.exists():
        pytest.fail(f"{binary} is missing: {package}; it is made for Debian's own Python", pytrace=False)
    _load("libnbdmod", binary)
    return _load("nbd", _DIST_PACKAGES / "nbd.py")


def _load(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def free_port() -> int:
    """A TCP port of the loopback that was free just now. Nobody can take that of `listen_tcp`: prefer it."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return port_of(probe)


def listen_tcp() -> socket.socket:
    """A socket that listens on a free port of the loopback."""
    return socket.create_server(("127.0.0.1", 0))


def listen_unix(path: Path) -> socket.socket:
    """A socket that listens at `path`."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(path))
    listener.listen(128)
    return listener


def port_of(listener: socket.socket) -> int:
    """The TCP port that a socket is bound to."""
    port: int = listener.getsockname()[1]
    return port


class Child:
    """A program that runs beside the test. Leaving the `with` block ends and reaps it.

    What it writes goes to FOLDER/NAME.out (standard output) and FOLDER/NAME.err (standard error); the lines of the
    latter can be waited for.
    """

    def __init__(
        self,
        command: Sequence[str],
        folder: Path,
        *,
        name: str | None = None,
        env: Mapping[str, str] | None = None,
        activate: socket.socket | None = None,
        pass_fds: Sequence[int] = (),
        forked: bool = False,
    ) -> None:
        """Start `command`. `env` adds to the environment; `activate` is passed on as systemd would, and closed here.

        `forked`: the command is `fleecing ...`, and its process is forked from one that has everything imported.
        """
        program, *arguments = command
        everything = {**os.environ, **(env or {})}
        argv = [program if forked or "/" in program else require(program), *arguments]
        self.name = name or Path(program).name
        self.out_path = folder / f"{self.name}.out"
        self.err_path = folder / f"{self.name}.err"
        fds = list(pass_fds)
        if activate is not None:
            # The socket is descriptor 3 and LISTEN_PID the process's own number: a shell arranges that, then becomes
            # the program (sd_listen_fds(3)).
            fds.append(activate.fileno())
            script = f'export LISTEN_FDS=1 LISTEN_PID=$$; exec "$@" 3<&{activate.fileno()}'
            argv = [require("bash"), "-c", script, "bash", *argv]
        with self.out_path.open("wb") as out:
            self._process: subprocess.Popen[bytes] | ForkedProgram
            if forked:
                self._process = ForkedProgram(arguments, out, everything)
            else:
                self._process = subprocess.Popen(
                    argv,
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=subprocess.PIPE,
                    env=everything,
                    pass_fds=fds,
                )
        if activate is not None:
            activate.close()
        self._lines: list[str] = []
        self._said = threading.Condition()
        self._silent = False
        self._pump = threading.Thread(target=self._read_lines, name=f"stderr of {self.name}", daemon=True)
        self._pump.start()

    def _read_lines(self) -> None:
        """In a thread of its own: take what the child says, so that its pipe never fills, and wake who waits for it."""
        assert self._process.stderr is not None
        with self.err_path.open("wb", buffering=0) as copy, self._process.stderr as stream:
            for line in stream:
                copy.write(line)
                with self._said:
                    self._lines.append(line.decode(errors="replace").rstrip("\n"))
                    self._said.notify_all()
        with self._said:
            self._silent = True
            self._said.notify_all()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """How it ended, or None while it runs; minus the signal's number where one ended it."""
        return self._process.poll()

    @property
    def stdout(self) -> str:
        """What it has written to its standard output until now."""
        return self.out_path.read_text(errors="replace")

    @property
    def stderr(self) -> str:
        """What it has said until now."""
        with self._said:
            return "\n".join(self._lines)

    def wait_for_line(self, pattern: str, deadline: float = DEADLINE) -> re.Match[str]:
        """The first match of `pattern` in a line of its standard error. The test fails where none comes."""
        end = time.monotonic() + deadline
        seen = 0
        with self._said:
            while True:
                for line in self._lines[seen:]:
                    if (match := re.search(pattern, line)) is not None:
                        return match
                seen = len(self._lines)
                if self._silent or not self._said.wait(max(0.0, end - time.monotonic())):
                    break
        said = self.stderr
        ending = f"ended with {self._process.wait(5)}" if self._silent else f"was still running after {deadline:g} s"
        pytest.fail(f"{self.name} {ending} and never said '{pattern}', but:\n{said}")

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to it, if it still runs."""
        self._process.send_signal(number)

    def wait(self, deadline: float = DEADLINE) -> int:
        """How it ended by itself. The test fails where it does not end."""
        try:
            code = self._process.wait(deadline)
        except subprocess.TimeoutExpired:
            pytest.fail(f"{self.name} still runs after {deadline:g} s; it said:\n{self.stderr}")
        self._pump.join(deadline)
        return code

    def stop(self, deadline: float = 20.0) -> int:
        """End it: SIGTERM, and SIGKILL where that does not help in time. Once is enough, twice does no harm."""
        self._process.terminate()
        try:
            self._process.wait(deadline)
        except subprocess.TimeoutExpired:
            self._process.kill()
        return self.wait()

    def kill(self) -> None:
        """End it as a crash would."""
        self._process.kill()
        self.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        print(f"---- {self.name} (pid {self.pid}) ended with {self.returncode} and said:\n{self.stderr}")


class Children:
    """The programs that a test starts; all are ended and reaped together, the last one first."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self._folder = folder
        self._stack = stack
        self._started = 0

    def start(
        self,
        *command: str,
        name: str | None = None,
        env: Mapping[str, str] | None = None,
        activate: socket.socket | None = None,
    ) -> Child:
        """Start a program as `Child` does; its output goes to tmp_path/NAME-NUMBER.out and .err."""
        self._started += 1
        name = f"{name or Path(command[0]).name}-{self._started}"
        return self._stack.enter_context(Child(command, self._folder, name=name, env=env, activate=activate))
