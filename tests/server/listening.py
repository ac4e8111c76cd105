"""An NbdServer on a loop in a thread of its own, and a log that can be waited for."""

from __future__ import annotations

import asyncio
import logging
import socket
import threading
from collections.abc import Coroutine, Iterable
from pathlib import Path
from typing import Any, TypeVar

import uvloop

from fleecing.nbd.handshake import ExportInfo
from fleecing.server.export import Export
from fleecing.server.listener import NbdServer
from tests.block.rig import SECONDS
from tests.peers import listen_tcp, listen_unix

T = TypeVar("T")


class Exports:
    """A catalog; "" is the first export. `gone`: those that are there when asked for and not when opened."""

    def __init__(self, *exports: Export) -> None:
        self.exports = {export.name: export for export in exports}
        self.gone: set[str] = set()
        self.fault: Exception | None = None

    def names(self) -> Iterable[tuple[str, str]]:
        return [(export.name, export.description) for export in self.exports.values()]

    def defaults(self) -> Iterable[str]:
        return [name for name in self.exports if "@" not in name]

    def find(self, name: str) -> ExportInfo | None:
        if self.fault is not None:
            raise self.fault
        export = self.exports.get(name or next(iter(self.exports)))
        return None if export is None else export.info

    def open(self, name: str) -> Export | None:
        return None if name in self.gone else self.exports.get(name)


class Listening:
    """The server, with a Unix socket and a TCP port."""

    def __init__(self, folder: Path, catalog: Exports, **options: Any) -> None:
        self.path = folder / "nbd.sock"
        self._loop = uvloop.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="loop")
        self._thread.start()
        self.server: NbdServer = self.call(self._start(catalog, listen_tcp(), options))
        self._clients: list[socket.socket] = []

    async def _start(self, catalog: Exports, tcp: socket.socket, options: dict[str, Any]) -> NbdServer:
        server = NbdServer(catalog, **options)
        server.add_listener(tcp)
        server.add_listener(listen_unix(self.path))
        self.address = tcp.getsockname()
        return server

    def call(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run it in the loop's thread, to its end."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(SECONDS)

    def close_server(self, grace: float = SECONDS) -> None:
        self.call(self.server.close(grace))

    def connect(self, *, tcp: bool = False) -> socket.socket:
        """A client that has said nothing yet."""
        sock = socket.socket(socket.AF_INET if tcp else socket.AF_UNIX, socket.SOCK_STREAM)
        self._clients.append(sock)
        sock.settimeout(SECONDS)
        sock.connect(self.address if tcp else str(self.path))
        return sock

    def stop(self) -> None:
        """At a test's end; clients that are still there are gone first."""
        for sock in self._clients:
            sock.close()
        self.close_server()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(SECONDS)
        self._loop.close()


class Log(logging.Handler):
    """What the project logs from DEBUG on; a test can wait for a message."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.entries: list[logging.LogRecord] = []
        self._came = threading.Condition()

    def emit(self, record: logging.LogRecord) -> None:
        with self._came:
            self.entries.append(record)
            self._came.notify_all()

    def wait_for(self, text: str, count: int = 1) -> logging.LogRecord:
        """The record number `count` whose message holds `text`."""

        def found() -> list[logging.LogRecord]:
            return [record for record in self.entries if text in record.getMessage()]

        with self._came:
            assert self._came.wait_for(lambda: len(found()) >= count, SECONDS), f"nobody logged '{text}'"
            return found()[count - 1]

    @property
    def worst(self) -> int:
        """The highest level of all."""
        return max((record.levelno for record in self.entries), default=logging.NOTSET)
