"""A disk that remembers what came to it and when: what it may have when the power goes at any moment.

    file system (ext4), loop device, a file (FUSE, nbdfuse)     the kernel's own, with its own order of writes
    a server in this process                                    notes each write and each flush

What was written before a flush is there after a crash. Each sector written since is there or not, whatever the others
are. Programs that use the folder are processes of their own: a thread of this one may hold the interpreter while it
waits for the disk, which is this process, too.
"""

from __future__ import annotations

import os
import select
import socket
import struct
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from random import Random
from typing import Final

from fleecing.nbd.constants import Cmd, TransmissionFlag
from tests.client.servers import MIB, served, shake_hands, take
from tests.images import loop_device
from tests.peers import DEADLINE, Child, run

SECTOR: Final = 512
SIZE: Final = 64 * MIB
FLUSH: Final = (-1, b"")

_REQUEST: Final = struct.Struct(">IHHQQI")
_CHUNK: Final = struct.Struct(">IHHQI")
_CHUNK_MAGIC: Final = 0x668E33EF
_DONE: Final = 1
_NONE, _OFFSET_DATA = 0, 1
_FLAGS: Final = TransmissionFlag.HAS_FLAGS | TransmissionFlag.SEND_FLUSH | TransmissionFlag.SEND_WRITE_ZEROES


class DiskLog:
    """The disk. `log`: (offset, data) of each write since `begin`, and FLUSH."""

    def __init__(self) -> None:
        self.content = bytearray(SIZE)
        self.log: list[tuple[int, bytes]] = []
        self._before = b""

    def begin(self) -> None:
        """What is there now is there after every crash."""
        self.log.clear()
        self._before = bytes(self.content)

    def crashed(self, moment: int, chance: Random) -> bytearray:
        """What the disk may have when so many entries of the log have come to it."""
        durable = max((n for n in range(moment) if self.log[n] == FLUSH), default=0)
        content = bytearray(self._before)
        for offset, data in self.log[:durable]:
            if data:
                content[offset : offset + len(data)] = data
        share = chance.choice([0.0, 0.5, 0.9, 1.0])
        for offset, data in self.log[durable:moment]:
            for at in range(0, len(data), SECTOR):
                if chance.random() < share:
                    content[offset + at : offset + at + SECTOR] = data[at : at + SECTOR]
        return content

    def serve(self, sock: socket.socket) -> None:
        """One client, as long as it stays; with structured replies."""
        shake_hands(sock, _FLAGS, ())
        while True:
            _, _, command, cookie, offset, length = _REQUEST.unpack(take(sock, _REQUEST.size))
            if command == Cmd.READ:
                head = _CHUNK.pack(_CHUNK_MAGIC, _DONE, _OFFSET_DATA, cookie, 8 + length)
                sock.sendall(head + offset.to_bytes(8, "big") + self.content[offset : offset + length])
                continue
            if command in (Cmd.WRITE, Cmd.WRITE_ZEROES):
                data = take(sock, length) if command == Cmd.WRITE else bytes(length)
                self.content[offset : offset + length] = data
                self.log.append((offset, data))
            elif command == Cmd.FLUSH:
                self.log.append(FLUSH)
            else:
                return
            sock.sendall(_CHUNK.pack(_CHUNK_MAGIC, _DONE, _NONE, cookie, 0))


@contextmanager
def recorded_folder(folder: Path) -> Iterator[tuple[Path, DiskLog]]:
    """An empty folder on such a disk, and the disk. `folder` is made. Takes root and /dev/fuse."""
    folder.mkdir()
    disk, file, mounted, ready = DiskLog(), folder / "disk", folder / "mounted", folder / "ready"
    file.touch()
    mounted.mkdir()
    os.mkfifo(ready)
    with ExitStack() as stack:
        uri = stack.enter_context(served(folder, disk.serve))
        pipe = os.open(ready, os.O_RDWR)
        stack.callback(os.close, pipe)
        fuse = ["nbdfuse", "--pidfile", str(ready), str(file), f"nbd+unix:///?socket={uri.socket}"]
        stack.enter_context(Child(fuse, folder))
        assert select.select([pipe], [], [], DEADLINE)[0], "nbdfuse does not mount"
        run("mke2fs", "-q", "-t", "ext4", "-E", "lazy_itable_init=0,lazy_journal_init=0,nodiscard", str(file))
        device = stack.enter_context(loop_device(file))
        run("mount", "-t", "ext4", str(device), str(mounted))
        stack.callback(run, "umount", str(mounted))
        run("sync", "--file-system", str(mounted))
        disk.begin()
        yield mounted, disk


@contextmanager
def after_crash(folder: Path, content: bytearray) -> Iterator[Path]:
    """What the file system makes of such a disk. `folder` is made."""
    folder.mkdir()
    image, mounted = folder / "image", folder / "mounted"
    image.write_bytes(content)
    mounted.mkdir()
    with loop_device(image) as device:
        run("mount", "-t", "ext4", str(device), str(mounted))
        try:
            yield mounted
        finally:
            run("umount", str(mounted))
    image.unlink()
