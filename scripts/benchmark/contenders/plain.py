"""nbdkit and nbd-server: plain exports of a file; neither has snapshots."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from scripts.benchmark.contenders.tls import certificates, with_certificates
from scripts.benchmark.house import House
from scripts.benchmark.model import Child, Offer, Transport
from scripts.benchmark.process import PATIENCE, BenchError, Daemon, Process

NBDKIT, NBDKIT_COW, NBD_SERVER = "nbdkit", "nbdkit-cow", "nbd-server"


class Plain:
    """A server that only serves its disk."""

    def __init__(self, child: Child, uri: str) -> None:
        self.child = child
        self.uri = uri

    def snapshot(self) -> AbstractContextManager[Offer]:
        raise BenchError("this server has no snapshots")


@contextmanager
def serve_nbdkit(house: House, image: Path, transport: Transport, *filters: str) -> Iterator[Plain]:
    """nbdkit's file plugin. Its socket is made here, so that it is ready before it starts."""
    if transport is Transport.UNIX:
        path = house.path("sock")
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(str(path))
        listener.listen(128)
        uri = f"nbd+unix:///?socket={path}"
    else:
        listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        uri = f"nbd://127.0.0.1:{listener.getsockname()[1]}/"
    options: list[str] = []
    if transport is Transport.TLS:
        options = ["--tls=require", f"--tls-certificates={certificates(house)}"]
        uri = with_certificates(house, uri)
    command = [NBDKIT, "-f", *options, *(f"--filter={name}" for name in filters), "file", str(image)]
    with Process(command, house.log, fds=[listener], env={"TMPDIR": str(house.folder)}) as child:
        yield Plain(child, uri)


@contextmanager
def serve_nbd_server(house: House, image: Path, transport: Transport) -> Iterator[Plain]:
    """nbd-server; it detaches itself, and has a process for each client."""
    config, pid_file = house.path("conf"), house.path("pid")
    path, port = house.path("sock"), house.free_port()
    is_unix = transport is Transport.UNIX
    where = f"unixsock={path}" if is_unix else f"listenaddr=127.0.0.1\nport={port}"
    config.write_text(f"[generic]\nallowlist=true\n{where}\n[vda]\nexportname={image}\n")
    with Daemon([NBD_SERVER, "-C", config, "-p", pid_file], house.log, pid_file) as child:
        _wait_for(str(path) if is_unix else ("127.0.0.1", port))
        yield Plain(child, f"nbd+unix:///vda?socket={path}" if is_unix else f"nbd://127.0.0.1:{port}/vda")


def _wait_for(address: str | tuple[str, int]) -> None:
    """nbd-server says nothing when it is ready: try to connect until it answers."""
    deadline = time.monotonic() + PATIENCE
    while True:
        with socket.socket(socket.AF_UNIX if isinstance(address, str) else socket.AF_INET) as probe:
            if not probe.connect_ex(address):
                return
        if time.monotonic() > deadline:
            raise BenchError(f"nbd-server does not answer at {address}")
        time.sleep(0.01)
