"""A real server under fire: disks to shoot at, and witnesses beside them who must notice nothing."""

from __future__ import annotations

import re
import socket
import threading
from collections.abc import Mapping, Sequence
from itertools import count
from pathlib import Path

from fleecing.client.connection import Connection
from fleecing.client.dial import connect
from fleecing.nbd import options
from fleecing.nbd.constants import BASE_ALLOCATION, ClientFlag, Opt, Rep, ReplyMode
from fleecing.nbd.uri import NbdUri
from fleecing.units import KiB, MiB
from tests.block.rig import SECONDS, in_thread, pattern
from tests.server.wire import Wire
from tests.serving import Server

WITNESS_SIZE = 600 * KiB + 11


_MODE_OPTIONS: Mapping[ReplyMode, Sequence[Opt]] = {
    ReplyMode.SIMPLE: (),
    ReplyMode.STRUCTURED: (Opt.STRUCTURED_REPLY,),
    ReplyMode.EXTENDED: (Opt.EXTENDED_HEADERS,),
}


class Field:
    """`vda` and `vda@s` are shot at, `other` and `other@w` belong to the witness."""

    def __init__(self, folder: Path, size: int, *options: str, wrapper: tuple[str, ...] = ()) -> None:
        """`size` in bytes is that of `vda`, which is a hole; `options` go to the server's command line."""
        images = {"vda": folder / "vda.raw", "other": folder / "other.raw"}
        images["vda"].touch()
        with images["vda"].open("r+b") as image:
            image.truncate(size)
        images["other"].write_bytes(pattern(WITNESS_SIZE))
        self.size = size
        self._looked = 0  # lines of the log
        self.server = Server(folder / "server", images, *options, wrapper=wrapper)
        self.server.freeze("vda", name="s")
        self.server.freeze("other", name="w")

    def dial(self) -> socket.socket:
        """A stranger's socket. Waits where the listener's queue is full."""
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(str(self.server.unix))
        sock.settimeout(SECONDS)
        return sock

    def say(self, stream: bytes) -> bytes:
        """Say it all, hang up on this side, and take what the server answers until it hangs up too."""
        answer = bytearray()
        with self.dial() as sock:
            try:
                sock.sendall(stream)
                sock.shutdown(socket.SHUT_WR)
                while data := sock.recv(1 << 20):
                    answer += data
            except (BrokenPipeError, ConnectionResetError):
                pass  # dropped in the middle: its good right
        return bytes(answer)

    def enter(self, export: str, mode: ReplyMode, contexts: Sequence[str] = ()) -> Wire:
        """A stranger in the transmission phase."""
        sock = self.dial()
        sock.sendall(options.CLIENT_FLAGS.pack(ClientFlag.C_FIXED_NEWSTYLE | ClientFlag.C_NO_ZEROES))
        asked = [options.option(number) for number in _MODE_OPTIONS[mode]]
        if contexts:
            asked.append(options.option(Opt.SET_META_CONTEXT, options.meta_query(export, contexts)))
        asked.append(options.option(Opt.GO, options.info_request(export, ())))
        wire = Wire(sock, mode)
        wire.take(options.GREETING.size)
        for option in asked:
            sock.sendall(option)
            reply = Rep.INFO
            while reply in (Rep.INFO, Rep.META_CONTEXT):
                _, _, reply, length = options.OPTION_REPLY.unpack(wire.take(options.OPTION_REPLY.size))
                wire.take(length)
            assert reply == Rep.ACK
        return wire

    @property
    def peak(self) -> int:
        """The most memory in bytes that the server ever had (resident)."""
        return self._memory("VmHWM")

    def _memory(self, what: str) -> int:
        status = Path(f"/proc/{self.server.child.pid}/status").read_text()
        found = re.search(rf"^{what}:\s+(\d+) kB$", status, re.MULTILINE)
        assert found is not None
        return int(found.group(1)) * KiB

    def check(self) -> None:
        """It is alive, and none of what came since the last look was its own fault."""
        assert self.server.child.returncode is None
        assert {disk["name"] for disk in self.server.status()["disks"]} == {"vda", "other"}
        lines = self.server.log.splitlines()
        faults = [line for line in lines[self._looked :] if " ERROR " in line or "Traceback" in line]
        self._looked = len(lines)
        assert not faults, faults[:10]

    def stop(self) -> None:
        self.check()
        self.server.stop()


class Witness:
    """A guest and a backup on the other disk, as busy as they can be. Use it as a context.

    It connects anew all the time, unless there is no room for `newcomers`.
    """

    def __init__(self, field: Field, *, newcomers: bool = True) -> None:
        self.rounds = 0
        self._newcomers = newcomers
        self._field = field
        self._begun = threading.Event()
        self._over = threading.Event()
        self._running = in_thread(self._run)

    def _open(self, export: str, *, tcp: bool) -> Connection:
        where = NbdUri.parse(self._field.server.uri(export, tcp=tcp))
        return connect(where, contexts=[BASE_ALLOCATION], extended=not tcp, timeout=SECONDS)

    def _run(self) -> None:
        frozen = pattern(WITNESS_SIZE)
        with self._open("other", tcp=False) as guest, self._open("other@w", tcp=True) as backup:
            active = guest.read(0, WITNESS_SIZE)
            for number in count():
                offset, length = number * 7919 % (WITNESS_SIZE - 5000), number * 31 % 5000 + 1
                active[offset : offset + length] = data = pattern(length, number)
                guest.write(offset, data, fua=number % 50 == 0)
                assert guest.read(0, WITNESS_SIZE) == active
                assert backup.read(0, WITNESS_SIZE) == frozen
                assert sum(n for n, _ in backup.block_status(0, WITNESS_SIZE)[BASE_ALLOCATION]) == WITNESS_SIZE
                if self._newcomers and number % 20 == 0:
                    with self._open("other@w", tcp=False) as other:
                        assert other.read(offset, length) == frozen[offset : offset + length]
                self.rounds += 1
                self._begun.set()
                if self._over.is_set():
                    return

    def __enter__(self) -> Witness:
        assert self._begun.wait(SECONDS)
        return self

    def check(self) -> None:
        """It is at work still, or raise what ended it."""
        if self._running.over.is_set():
            self._running.wait()

    def __exit__(self, *exc: object) -> None:
        self._over.set()
        self._running.wait()


MEMORY = 160 * MiB
"""What the server may ever have (resident) while a handful of strangers talk to it: about 60 MiB of programs, 1.5 MiB
for each connection, and what one option or one reply takes for a moment."""
