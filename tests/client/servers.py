"""Servers for the client's tests: the real ones on a Unix socket, and one that follows a script."""

from __future__ import annotations

import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

from fleecing.nbd.constants import BASE_ALLOCATION, TransmissionFlag
from fleecing.nbd.handshake import Agreement, ExportInfo, ServerHandshake
from fleecing.nbd.uri import NbdUri
from tests.peers import Child, listen_unix, require

MIB = 1 << 20
TIMEOUT = 20.0
"""Seconds; far above what any of these servers needs."""


@contextmanager
def activated(folder: Path, *command: str) -> Iterator[NbdUri]:
    """A server that takes its listening socket by socket activation, as nbdkit and qemu-nbd do."""
    path = folder / "peer.sock"
    with Child(command, folder, activate=listen_unix(path)) as child:
        yield NbdUri(socket=str(path))
        child.stop(deadline=3)  # qemu-nbd sometimes waits for ever for a client that has left in its handshake


def nbdkit(folder: Path, *arguments: str) -> AbstractContextManager[NbdUri]:
    return activated(folder, "nbdkit", "-f", *arguments)


@contextmanager
def nbd_server(folder: Path, image: Path) -> Iterator[NbdUri]:
    """nbd-server as inetd would start it: a process for each connection."""
    command = [require("nbd-server"), "0", str(image), "-C", "/dev/null", "-d"]
    ended = threading.Event()

    def serve(sock: socket.socket) -> None:
        with subprocess.Popen(command, stdin=sock.fileno(), stdout=subprocess.DEVNULL) as process:
            while process.poll() is None and not ended.wait(0.01):
                pass
            process.kill()

    with served(folder, serve) as uri:
        try:
            yield uri
        finally:
            ended.set()


Script = Callable[[socket.socket, Agreement], None]

FLAGS = (
    TransmissionFlag.HAS_FLAGS
    | TransmissionFlag.SEND_FLUSH
    | TransmissionFlag.SEND_TRIM
    | TransmissionFlag.SEND_WRITE_ZEROES
    | TransmissionFlag.CAN_MULTI_CONN
)


class _Catalog:
    def __init__(self, flags: TransmissionFlag, contexts: tuple[str, ...]) -> None:
        self._info = ExportInfo("", "scripted", 64 * MIB, flags, 1, 65536, 32 * MIB, contexts)

    def names(self) -> list[tuple[str, str]]:
        return [("", "scripted")]

    def find(self, name: str) -> ExportInfo | None:
        return self._info if name == "" else None


def shake_hands(
    sock: socket.socket, flags: TransmissionFlag, contexts: tuple[str, ...], *, local: bool = False
) -> Agreement:
    """Our own server's handshake, run to the transmission phase."""
    handshake = ServerHandshake(_Catalog(flags, contexts), local=local)
    sock.sendall(handshake.data_to_send())
    while handshake.agreement is None:
        data = sock.recv(65536)
        if not data:
            raise ConnectionError("the client hung up")
        handshake.receive(data)
        sock.sendall(handshake.data_to_send())
    assert not handshake.leftover
    return handshake.agreement


@contextmanager
def served(folder: Path, serve: Callable[[socket.socket], None]) -> Iterator[NbdUri]:
    """A server that runs `serve` in a thread for each connection and hangs up when it returns or meets an OSError."""
    path = folder / "scripted.sock"
    listener = listen_unix(path)
    accepted: list[socket.socket] = []
    threads: list[threading.Thread] = []

    def run(sock: socket.socket) -> None:
        try:
            serve(sock)
        except OSError:
            pass  # the client hung up, which is what many of the scripts provoke
        sock.close()

    def accept() -> None:
        while True:
            try:
                sock, _ = listener.accept()
            except OSError:
                return
            accepted.append(sock)
            threads.append(threading.Thread(target=run, args=(sock,)))
            threads[-1].start()

    acceptor = threading.Thread(target=accept)
    acceptor.start()
    try:
        yield NbdUri(socket=str(path))
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        acceptor.join(TIMEOUT)
        listener.close()
        for sock in accepted:
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        for thread in threads:
            thread.join(TIMEOUT)


def scripted(
    folder: Path,
    script: Script,
    *,
    flags: TransmissionFlag = FLAGS,
    contexts: tuple[str, ...] = (BASE_ALLOCATION,),
    local: bool = False,
) -> AbstractContextManager[NbdUri]:
    """A server of 64 MiB whose transmission phase is `script`; `local`: it offers to share memory."""

    def serve(sock: socket.socket) -> None:
        script(sock, shake_hands(sock, flags, contexts, local=local))

    return served(folder, serve)


@contextmanager
def cutting(folder: Path, uri: NbdUri, budgets: list[int]) -> Iterator[NbdUri]:
    """A relay in front of a Unix socket: each connection is cut after so many bytes from the server; then no more."""
    lock = threading.Lock()
    inner = uri.socket
    assert inner is not None

    def relay(client: socket.socket) -> None:
        with lock:
            budget = budgets.pop(0) if budgets else 1 << 62
        with socket.socket(socket.AF_UNIX) as server:
            server.connect(inner)
            up = threading.Thread(target=pump, args=(client, server, 1 << 62))
            up.start()
            pump(server, client, budget)
            for sock in (client, server):
                try:
                    sock.shutdown(socket.SHUT_RDWR)
                except OSError:
                    pass  # the other side was first
            up.join()

    with served(folder, relay) as outer:
        yield NbdUri(socket=outer.socket, export=uri.export)


def pump(source: socket.socket, sink: socket.socket, budget: int) -> None:
    try:
        while budget and (data := source.recv(min(65536, budget))):
            sink.sendall(data)
            budget -= len(data)
        sink.shutdown(socket.SHUT_WR)
    except OSError:
        pass  # either side hung up, which is what this is for


def take(sock: socket.socket, count: int) -> bytes:
    """Exactly so many bytes from the client."""
    data = b""
    while len(data) < count:
        piece = sock.recv(count - len(data))
        if not piece:
            raise ConnectionError("the client hung up")
        data += piece
    return data
