"""Records what real clients send: `.venv/bin/python -m tests.fuzz.record` makes tests/fuzz/recordings again.

Each client talks to a real server through a relay on a Unix socket, which writes down the client's side of each
connection. One file a connection, NAME.bin or NAME-NUMBER.bin: the bytes from the first to the last, nothing else.
"""

from __future__ import annotations

import socket
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from fleecing.client.dial import connect
from fleecing.nbd.constants import BASE_ALLOCATION
from fleecing.nbd.uri import NbdUri
from fleecing.units import KiB
from tests.peers import listen_unix, load_libnbd, run
from tests.serving import Server

RECORDINGS = Path(__file__).parent / "recordings"
SIZE = 8 * KiB
DISK, SNAPSHOT = "vda", "vda@s"


class Relay:
    """Passes bytes between clients at `path` and the server; `said` holds what each client sent."""

    def __init__(self, path: Path, server: Path) -> None:
        self.path = path
        self.said: list[bytearray] = []
        self._server = server
        self._listener = listen_unix(path)
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            server = socket.socket(socket.AF_UNIX)
            server.connect(str(self._server))
            said = bytearray()
            self.said.append(said)
            for source, target, copy in ((client, server, said), (server, client, None)):
                self._threads.append(threading.Thread(target=_pass_on, args=(source, target, copy)))
                self._threads[-1].start()

    def close(self) -> None:
        """Once the clients are through."""
        self._listener.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        self._listener.close()


def _pass_on(source: socket.socket, target: socket.socket, copy: bytearray | None) -> None:
    try:
        while data := source.recv(1 << 16):
            if copy is not None:
                copy += data
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)
    except OSError:
        pass  # one of the two has gone without a goodbye: what it said until then is what counts


@contextmanager
def relay(folder: Path, server: Server) -> Iterator[Relay]:
    made = Relay(folder / "relay.sock", server.unix)
    try:
        yield made
    finally:
        made.close()
        made.path.unlink()


def clients(folder: Path) -> dict[str, Callable[[Path], object]]:
    """What each client is to do, by the name of its recording; each is given the socket to connect to."""
    source = folder / "source.raw"
    source.write_bytes(b"some data" + bytes(SIZE - 18) + b"more data")
    out = str(folder / "out.raw")

    def uri(path: Path, export: str = DISK) -> str:
        return str(NbdUri(export=export, socket=str(path)))

    def qemu_io(path: Path) -> None:
        commands = ["write -P 1 0 512", "write -f -z 512 1k", "discard 2k 2k", "read 0 4k", "flush", "map"]
        run("qemu-io", "-f", "raw", *[part for command in commands for part in ("-c", command)], uri(path))

    return {
        "qemu-img-info": lambda path: run("qemu-img", "info", uri(path)),
        "qemu-img-map": lambda path: run("qemu-img", "map", "--output=json", uri(path, SNAPSHOT)),
        "qemu-img-convert": lambda path: run("qemu-img", "convert", "-O", "raw", uri(path), out),
        "qemu-img-convert-to": lambda path: run("qemu-img", "convert", "-n", "-O", "raw", str(source), uri(path)),
        "qemu-io": qemu_io,
        "nbdinfo-list": lambda path: run("nbdinfo", "--list", uri(path, "")),
        "nbdinfo-map": lambda path: run("nbdinfo", "--map", uri(path, SNAPSHOT)),
        "nbdcopy-from": lambda path: run("nbdcopy", "--connections=1", uri(path, SNAPSHOT), out),
        "nbdcopy-to": lambda path: run("nbdcopy", "--connections=1", "--flush", str(source), uri(path)),
        "libnbd-simple": libnbd_simple,
        "fleecing": fleecing_client,
    }


def libnbd_simple(path: Path) -> None:
    """As the kernel's client: simple replies, and a goodbye."""
    handle = load_libnbd().NBD()
    handle.set_request_structured_replies(False)
    handle.set_export_name(DISK)
    handle.connect_unix(str(path))
    handle.pwrite(b"x" * 100, 5)
    handle.pread(512, 0)
    handle.trim(1024, 4096)
    handle.zero(512, 1024)
    handle.cache(512, 0)
    handle.flush()
    handle.shutdown()


def fleecing_client(path: Path) -> None:
    """Our own: extended headers, which no client of Debian 12 speaks."""
    with connect(NbdUri(export=DISK, socket=str(path)), contexts=[BASE_ALLOCATION]) as ours:
        ours.write(5, b"x" * 100, fua=True)
        ours.read(0, 4096)
        ours.block_status(0, SIZE)
        ours.write_zeroes(512, 1024, no_hole=True)
        ours.trim(4096, 4096)
        ours.flush()


def main() -> None:
    """Make all recordings again."""
    for old in RECORDINGS.glob("*.bin"):
        old.unlink()
    RECORDINGS.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        image = folder / "disk.raw"
        image.write_bytes(bytes(range(256)) * (SIZE // 256))
        server = Server(folder / "server", image)
        try:
            server.freeze(DISK, name="s")
            for client, talk in clients(folder).items():
                with relay(folder, server) as between:
                    talk(between.path)
                save(client, between.said)
        finally:
            server.stop()


def save(client: str, said: list[bytearray]) -> None:
    """Connections that say the same are one recording."""
    different = list(dict.fromkeys(bytes(stream) for stream in said if stream))
    for number, stream in enumerate(different, 1):
        path = RECORDINGS / (f"{client}-{number}.bin" if len(different) > 1 else f"{client}.bin")
        path.write_bytes(stream)
        sys.stdout.write(f"{path.name}: {len(stream)} bytes\n")


if __name__ == "__main__":
    main()
