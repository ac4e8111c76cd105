"""A small Linux machine of our own, whose disks are NBD exports.

    with Guest(tmp_path, [*drive(f"nbd+unix:///vda?socket={path}")]) as guest:      # /dev/vda
        guest.check("mkfs.ext4 -q /dev/vda && mount /dev/vda /mnt")
        code, output = guest.run("dd if=/dev/zero of=/mnt/file bs=1M count=999")

QEMU without KVM boots it in about 3 s. In it are busybox, mkfs.ext4, fsck.ext4, nbd-client and QEMU's guest agent
(image.py), and a network on which the host's loopback is 10.0.2.2.
"""

from __future__ import annotations

import base64
import socket
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, NoReturn, Self

import pytest

from tests.guest.image import guest_image
from tests.peers import DEADLINE, Child

CPU = "qemu64,+rdrand"
"""With a random number instruction: without one, mkfs and nbd-client wait seconds for the kernel to collect entropy."""

KERNEL_OPTIONS = "console=ttyS0 quiet panic=-1 noapic"
"""`noapic`: where the host is busy, the kernel misses the few ticks that it tests the IO-APIC with, and panics."""

HOST = "10.0.2.2"
"""The host's 127.0.0.1, seen from the guest."""


def drive(uri: str, *, cache: str = "none") -> list[str]:
    """QEMU's arguments for a virtio disk that is an NBD export; the first one is /dev/vda, the next /dev/vdb."""
    file = uri.replace(",", ",,")
    return ["-drive", f"file={file},if=virtio,format=raw,discard=unmap,cache={cache}"]


class Answer(NamedTuple):
    """How a command in the guest ended, and what it wrote to standard output and standard error."""

    code: int
    output: str


class Guest:
    """A running guest. Leaving the `with` block ends it at once, as a power cut would: sync first what must last."""

    def __init__(
        self,
        folder: Path,
        arguments: Sequence[str] = (),
        *,
        cpus: int = 1,
        memory: int = 256,
        options: str = "",
        deadline: float = DEADLINE,
    ) -> None:
        """Boot it; `arguments` go to QEMU, `options` to the kernel, `memory` is in MiB. FOLDER gets the console log."""
        image = guest_image()
        self.console_path = folder / "console.log"
        self.console_path.touch()
        self._commands, inner = socket.socketpair()
        self._pending = b""
        command = [
            *("qemu-system-x86_64", "-M", "pc", "-accel", "tcg", "-cpu", CPU, "-smp", str(cpus), "-m", str(memory)),
            *("-nodefaults", "-no-user-config", "-no-reboot", "-display", "none"),
            *("-kernel", str(image.kernel), "-initrd", str(image.initramfs)),
            *("-append", f"{KERNEL_OPTIONS} {options}"),
            *("-serial", f"file:{self.console_path}"),
            *("-chardev", f"socket,id=commands,fd={inner.fileno()}", "-serial", "chardev:commands"),
            *("-netdev", "user,id=net", "-device", "virtio-net-pci,netdev=net,romfile="),
            *arguments,
        ]
        with ExitStack() as on_failure:
            on_failure.callback(self._commands.close)
            with inner:
                self.qemu = Child(command, folder, pass_fds=[inner.fileno()])
            on_failure.callback(self.close)
            self._read_until(b"guest ready\n", time.monotonic() + deadline)
            on_failure.pop_all()

    @property
    def console(self) -> str:
        """What the guest's kernel has said until now: errors only."""
        return self.console_path.read_text(errors="replace")

    def run(self, command: str, *, deadline: float = DEADLINE) -> Answer:
        """Run a shell command in the guest. The test fails where no answer comes within `deadline` seconds.

        A command that goes on in the background needs its output redirected. The line carries about 400 KiB/s.
        """
        end = time.monotonic() + deadline
        try:
            self._commands.sendall(base64.b64encode(command.encode()) + b"\n")
        except OSError:
            self._fail("is gone")
        _, code, length = self._read_until(b"\n", end).split()
        return Answer(int(code), self._read(int(length), end).decode(errors="replace"))

    def check(self, command: str, *, deadline: float = DEADLINE) -> str:
        """What a shell command in the guest wrote. The test fails where the command does."""
        code, output = self.run(command, deadline=deadline)
        if code:
            pytest.fail(f"in the guest, with exit code {code}: {command}\n{output}\nconsole:\n{self.console}")
        return output

    def close(self) -> None:
        """Cut the power. Once is enough, twice does no harm."""
        self._commands.close()
        self.qemu.kill()

    def _read_until(self, mark: bytes, end: float) -> bytes:
        """The bytes before `mark`, which is consumed too."""
        while mark not in self._pending:
            self._receive(end)
        before, _, self._pending = self._pending.partition(mark)
        return before

    def _read(self, length: int, end: float) -> bytes:
        while len(self._pending) < length:
            self._receive(end)
        data, self._pending = self._pending[:length], self._pending[length:]
        return data

    def _receive(self, end: float) -> None:
        self._commands.settimeout(max(0.001, end - time.monotonic()))
        try:
            data = self._commands.recv(65536)
        except TimeoutError:
            self._fail("does not answer")
        except ConnectionError:
            data = b""
        if not data:
            self._fail("is gone")
        self._pending += data

    def _fail(self, state: str) -> NoReturn:
        """The test fails. The guest is ended: what it would answer from now on fits no question."""
        self.close()
        pytest.fail(f"the guest {state}; QEMU said:\n{self.qemu.stderr}\nconsole:\n{self.console}")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
