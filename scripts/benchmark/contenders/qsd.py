"""qemu-storage-daemon: its plain export, and its fleecing graph as QEMU's own image-fleecing test builds it.

guest export -> copy-before-write -+- file ----> disk
                                   +- target --> temp qcow2
snapshot export -> snapshot-access -> copy-before-write
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from scripts.benchmark.contenders.tls import certificates, with_certificates
from scripts.benchmark.house import House
from scripts.benchmark.model import Offer, Transport
from scripts.benchmark.process import BenchError, Process, run

THREADS, IO_URING = "qsd-threads", "qsd-io_uring"
PROGRAM = "qemu-storage-daemon"


class Qsd:
    """A running daemon, told by QMP. The disk has no export of its own while a snapshot exists."""

    def __init__(self, house: House, child: Process, base: str, size: int, aio: str) -> None:
        self.child = child
        self._house = house
        self._base = base
        self._size = size
        self._aio = aio
        self._numbers = itertools.count(1)
        self._top = "disk"
        self._events: list[str] = []
        self._tell("qmp_capabilities")
        self._export("plain", "disk")
        self.uri = self._uri("plain")

    def _uri(self, export: str) -> str:
        return self._base.replace("EXPORT", export)

    def _tell(self, command: str, **arguments: Any) -> None:
        self.child.tell(json.dumps({"execute": command, "arguments": arguments}))
        while "event" in (answer := self._next()):
            self._events.append(answer["event"])
        if "error" in answer:
            raise BenchError(f"{PROGRAM}: {command}: {answer['error']['desc']}")

    def _next(self) -> dict[str, Any]:
        message: dict[str, Any] = json.loads(self.child.wait_line(r"^\{"))
        return message

    def _export(self, name: str, node: str) -> None:
        self._tell("block-export-add", type="nbd", id=name, name=name, **{"node-name": node}, writable=True)

    def _unexport(self, name: str) -> None:
        self._tell("block-export-del", id=name, mode="hard")
        while "BLOCK_EXPORT_DELETED" not in self._events:
            self._events.append(self._next().get("event", ""))
        self._events.clear()

    def _add(self, driver: str, name: str, **options: Any) -> None:
        self._tell("blockdev-add", driver=driver, **{"node-name": name}, **options)

    @contextmanager
    def snapshot(self) -> Iterator[Offer]:
        temp = self._house.path("temp.qcow2")
        run(["qemu-img", "create", "-q", "-f", "qcow2", temp, str(self._size)], self._house.log)
        n = next(self._numbers)
        below, guest_below = self._top, "plain" if self._top == "disk" else f"guest{n - 1}"
        guest, view, names = f"guest{n}", f"view{n}", [f"snap{n}", f"cbw{n}", f"temp{n}", f"tempfile{n}"]
        start = time.monotonic()
        self._unexport(guest_below)
        file = {"filename": str(temp), "aio": self._aio, "locking": "off", "discard": "unmap"}
        self._add("file", names[3], **file)
        self._add("qcow2", names[2], file=names[3], discard="unmap")
        self._add("copy-before-write", names[1], file=below, target=names[2])
        self._add("snapshot-access", names[0], file=names[1])
        self._export(guest, names[1])
        self._export(view, names[0])
        self._top = names[1]
        seconds = time.monotonic() - start
        try:
            yield Offer(self, self._uri(guest), self._uri(view), str(temp), seconds)
        finally:
            self._unexport(view)
            self._unexport(guest)
            for name in names:
                self._tell("blockdev-del", **{"node-name": name})
            self._top = below
            self._export(guest_below, below)
            temp.unlink()


@contextmanager
def serve(house: House, image: Path, transport: Transport, aio: str) -> Iterator[Qsd]:
    """Start it on this image, with this way of asynchronous I/O ("threads" or "io_uring")."""
    extra: list[str] = []
    if transport is Transport.UNIX:
        path = house.path("sock")
        address, base = f"addr.type=unix,addr.path={path}", f"nbd+unix:///EXPORT?socket={path}"
    else:
        port = house.free_port()
        address, base = f"addr.type=inet,addr.host=127.0.0.1,addr.port={port}", f"nbd://127.0.0.1:{port}/EXPORT"
    if transport is Transport.TLS:
        credentials = f"tls-creds-x509,id=tls,endpoint=server,verify-peer=off,dir={certificates(house)}"
        extra, address = ["--object", credentials], f"{address},tls-creds=tls"
        base = with_certificates(house, base)
    node = f"driver=file,node-name=disk,filename={image},aio={aio},locking=off,discard=unmap"
    command = [PROGRAM, "--chardev", "stdio,id=qmp", "--monitor", "chardev=qmp", *extra, "--blockdev", node]
    with Process([*command, "--nbd-server", address], house.log, listen="stdout") as child:
        child.wait_line('"QMP"')
        yield Qsd(house, child, base, image.stat().st_size, aio)
