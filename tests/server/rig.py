"""A connection in this process: a client's socket at one end, a real disk whose file has faults at the other."""

from __future__ import annotations

import errno
import os
import socket
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from fleecing.block.copy_before_write import CopyBeforeWrite
from fleecing.block.file import FileNode
from fleecing.block.hostfile import HostFile
from fleecing.block.node import Buffer
from fleecing.nbd import options
from fleecing.nbd.constants import ClientFlag, Cmd, Opt, ReplyMode
from fleecing.nbd.handshake import Agreement, ExportInfo, ServerHandshake
from fleecing.server.budget import Budget
from fleecing.server.client_memory import MEMORIES
from fleecing.server.connection import Connection
from fleecing.server.export import MAXIMUM_PAYLOAD, Export, active_export
from fleecing.server.limits import Limits
from fleecing.server.poller import Poller
from fleecing.server.shares import Shares
from fleecing.units import KiB
from tests.block.rig import SECONDS
from tests.server.wire import Wire

CLUSTER = 64 * KiB


class Barrier:
    """A place in the file's calls that a test can close: who comes there waits, and says so."""

    def __init__(self) -> None:
        self._open = threading.Event()
        self._open.set()
        self._arrived = threading.Semaphore(0)

    def close(self) -> None:
        self._open.clear()

    def open(self) -> None:
        self._open.set()

    def pass_through(self) -> None:
        if not self._open.is_set():
            self._arrived.release()
            assert self._open.wait(SECONDS)

    def wait_for_one(self) -> None:
        """Until one more has come to the closed place."""
        assert self._arrived.acquire(timeout=SECONDS)


class FaultyHost(HostFile):
    """The file under an active image: some bytes fail, some are not in memory, changes and flushes can be held up."""

    def __init__(self, path: str, fd: int) -> None:
        super().__init__(path, fd)
        self.bad = range(0)
        """Bytes that can be neither read nor written."""
        self.cold = False
        """Nothing is in memory: `read_cached` always says that it would wait."""
        self.changes = Barrier()
        self.syncs = Barrier()
        self.synced = 0

    def _check(self, offset: int, length: int) -> None:
        if offset < self.bad.stop and self.bad.start < offset + length:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    def read_into(self, offset: int, buffer: memoryview) -> int:
        self._check(offset, len(buffer))
        return super().read_into(offset, buffer)

    def read_cached(self, offset: int, buffer: memoryview) -> bool:
        self._check(offset, len(buffer))
        return not self.cold and super().read_cached(offset, buffer)

    def copy_to(self, offset: int, length: int, target: HostFile, at: int) -> bool:
        try:
            self._check(offset, length)
        except OSError:
            return False
        return not self.cold and super().copy_to(offset, length, target, at)

    def write(self, offset: int, data: Buffer) -> None:
        self.changes.pass_through()
        self._check(offset, len(data))
        super().write(offset, data)

    def punch(self, offset: int, length: int) -> bool:
        self.changes.pass_through()
        self._check(offset, length)
        return super().punch(offset, length)

    def sync(self) -> None:
        self.syncs.pass_through()
        super().sync()
        self.synced += 1


class Disk:
    """An active disk with its export, in a folder of its own."""

    def __init__(self, folder: Path, contents: bytes) -> None:
        self.path = folder / "disk.img"
        self.path.write_bytes(contents)
        self.host = FaultyHost.open(str(self.path))
        self.node = CopyBeforeWrite(FileNode(self.host))
        self.export = active_export("vda", "the disk", self.node, cluster_size=CLUSTER)

    @property
    def contents(self) -> bytes:
        return self.path.read_bytes()

    def close(self) -> None:
        self.host.changes.open()
        self.host.syncs.open()
        self.node.close(SECONDS)


class OneExport:
    """A catalog of one."""

    def __init__(self, info: ExportInfo) -> None:
        self._info = info

    def names(self) -> list[tuple[str, str]]:
        return [(self._info.name, self._info.description)]

    def find(self, name: str) -> ExportInfo | None:
        return self._info


def agree(export: Export, mode: ReplyMode, contexts: Sequence[str] = (), *, local: bool = True) -> Agreement:
    """What the real handshake comes to for such a client; contexts get the ids 1, 2, ... in the export's order."""
    said = [options.CLIENT_FLAGS.pack(ClientFlag.C_FIXED_NEWSTYLE | ClientFlag.C_NO_ZEROES)]
    if mode is ReplyMode.STRUCTURED:
        said.append(options.option(Opt.STRUCTURED_REPLY))
    if mode is ReplyMode.EXTENDED:
        said.append(options.option(Opt.EXTENDED_HEADERS))
    if contexts:
        said.append(options.option(Opt.SET_META_CONTEXT, options.meta_query(export.name, contexts)))
    said.append(options.option(Opt.GO, options.info_request(export.name, ())))
    handshake = ServerHandshake(OneExport(export.info), local=local)
    handshake.receive(b"".join(said))
    assert handshake.agreement is not None
    return handshake.agreement


def _tcp_pair() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = socket.create_connection(listener.getsockname())
        server, _ = listener.accept()
    for sock in (client, server):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return client, server


class Line(Wire):
    """A client in the transmission phase, with the server's connection at hand."""

    def __init__(
        self,
        export: Export,
        mode: ReplyMode,
        contexts: Sequence[str] = (),
        *,
        leftover: bytes = b"",
        budget: Budget | None = None,
        memories: Budget | None = None,
        buffer: int | None = None,
        limits: Limits | None = None,
        shares: Shares | None = None,
        poller: Poller | None = None,
        tcp: bool = False,
    ) -> None:
        """`leftover` came behind the handshake; `buffer`: bytes that the kernel holds of what the server sends."""
        client, server = _tcp_pair() if tcp else socket.socketpair()
        client.settimeout(SECONDS)
        if buffer is not None:
            server.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer)
        super().__init__(client, mode)
        self.closed = threading.Event()
        self.connection = Connection(
            server,
            "test",
            agree(export, mode, contexts, local=not tcp),
            export,
            leftover,
            budget=budget or Budget(4 * MAXIMUM_PAYLOAD),
            memories=memories or Budget(MEMORIES),
            shares=shares or Shares(Limits().all_requests_in_flight, Limits().all_bytes_in_flight),
            poller=poller or Poller(),
            on_close=lambda _: self.closed.set(),
            limits=limits,
        )
        self.connection.start()

    def end(self) -> None:
        """Say goodbye; the server must hang up and have nothing more to say."""
        self.send(self.request(Cmd.DISC))
        self.wait_closed()
        assert self.ended()
        self.sock.close()

    def hang_up(self) -> None:
        """Go without a goodbye; the server must notice."""
        self.sock.close()
        self.wait_closed()

    def wait_closed(self) -> None:
        assert self.closed.wait(SECONDS), "the connection does not end"

    def give_up(self) -> None:
        """At a test's end, however it went."""
        self.connection.kill()
        self.sock.close()
        changes = self.connection.export.changes
        if changes is not None and isinstance(changes.file.host, FaultyHost):
            changes.file.host.changes.open()
            changes.file.host.syncs.open()
        self.wait_closed()


MakeLine = Callable[..., Line]
"""The fixture `line`: takes what Line takes; each ends with the test."""

MakeDisk = Callable[[bytes], Disk]
"""The fixture `make_disk`."""
