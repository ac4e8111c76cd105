"""Takes clients in: accepts, haggles, and hands each to a thread of its own.

Runs on the asyncio loop. The handshake is driven on the raw socket; when it is over, the socket becomes a blocking one
and belongs to a `Connection`. A client that is slow in the handshake costs a task and its time-out, nobody else's time.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
import struct
from collections.abc import Iterable

from fleecing.errors import ProtocolError
from fleecing.events import Event, of_export, tell
from fleecing.nbd.handshake import ServerHandshake, TlsMode
from fleecing.server.access import Catalog, ClientCatalog, Policy
from fleecing.server.budget import Budget
from fleecing.server.client_memory import MEMORIES
from fleecing.server.connection import Connection
from fleecing.server.door import Door
from fleecing.server.limits import Limits
from fleecing.server.peer import Certificate, peer_of
from fleecing.server.poller import Poller
from fleecing.server.shares import Shares
from fleecing.server.tls import Stream, TlsSocket
from fleecing.units import KiB

log = logging.getLogger(__name__)

SEND_BUFFER = 416 * KiB
"""Asked for as SO_SNDBUF: replies are gathered to pieces of that order, and go out in one call when they fit."""

_RECEIVE = 64 * KiB
_PROBES = 5


class NbdServer:
    """Serves a catalog's exports on any number of listening sockets. All methods are for the loop's thread."""

    def __init__(
        self,
        catalog: Catalog,
        *,
        limits: Limits | None = None,
        tls_mode: TlsMode = TlsMode.OFF,
        tls_context: ssl.SSLContext | None = None,
        policy: Policy | None = None,
    ) -> None:
        """`tls_context` is needed unless TLS is OFF for all listeners; without a `policy` all may do everything."""
        self._catalog = catalog
        self.policy = policy  # may be replaced at any time: later clients get the new one
        self._tls_mode = tls_mode
        self.tls_context = tls_context  # may be replaced at any time: later clients get the new one
        self._limits = limits or Limits()
        self._door = Door(self._limits)
        self._budget = Budget(self._limits.read_memory)
        self._memories = Budget(MEMORIES)
        self._shares = Shares(self._limits.all_requests_in_flight, self._limits.all_bytes_in_flight)
        self._poller = Poller()
        self._listeners: list[socket.socket] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._connections: set[Connection] = set()
        self._idle = asyncio.Event()  # no connections
        self._idle.set()

    @property
    def connections(self) -> Iterable[Connection]:
        """The clients in the transmission phase."""
        return tuple(self._connections)

    @property
    def read_memory(self) -> tuple[int, int]:
        """Bytes in use for long READs, and how many may be."""
        return self._budget.used, self._budget.total

    @property
    def in_flight(self) -> tuple[int, int]:
        """Requests of all clients that are under way in other threads, and bytes of their payload."""
        return self._shares.in_flight

    @property
    def turned_away(self) -> int:
        """Clients that were too many, ever."""
        return self._door.turned_away

    def add_listener(self, listener: socket.socket, *, tls_mode: TlsMode | None = None) -> None:
        """Accept clients on this listening socket from now on; it is closed with the server.

        `tls_mode` takes the place of the server's for the clients of this socket.
        """
        listener.setblocking(False)
        self._listeners.append(listener)
        tls = self._tls_mode if tls_mode is None else tls_mode
        self._own(asyncio.get_running_loop().create_task(self._accept(listener, tls)))

    async def close(self, grace: float) -> None:
        """Turn new clients away, let the others' requests end for up to `grace` seconds, then hang up."""
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for listener in self._listeners:
            listener.close()
        self._listeners.clear()
        for connection in self.connections:
            connection.drain()
        for hang_up in (False, True):
            if hang_up:
                for connection in self.connections:
                    log.warning("client %s of %s does not end: hung up", connection.peer, connection.export_name)
                    connection.kill()
            try:
                async with asyncio.timeout(grace):
                    await self._idle.wait()
                return
            except TimeoutError:
                continue
        log.error("%d clients have requests that do not end", len(self._connections))

    def _own(self, task: asyncio.Task[None]) -> None:
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _accept(self, listener: socket.socket, tls: TlsMode) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                sock, address = await loop.sock_accept(listener)
            except OSError as e:
                # Out of file descriptors or memory: clients that leave make room.
                log.warning("cannot accept a client: %s", e)
                await asyncio.sleep(0.1)
                continue
            peer = _peer_name(listener, address)
            ip = address[0] if isinstance(address, tuple) else ""
            if self._door.enter(peer, ip):
                self._own(loop.create_task(self._welcome(sock, peer, ip, tls)))
            else:
                sock.close()

    async def _welcome(self, sock: socket.socket, peer: str, ip: str, tls: TlsMode) -> None:
        """The handshake; on success the socket goes to a connection, else it is closed."""
        connection = None
        try:
            connection = await self._haggle(sock, peer, ip, tls)
            if connection is not None and not self._start(connection):
                connection = None
        except ProtocolError as e:
            self._tell_dropped(peer, f"{e}", "client %s dropped in the handshake: %s")
        except TimeoutError:
            self._tell_dropped(peer, f"no end of the handshake in {self._limits.handshake_seconds:g} s")
        except OSError as e:
            log.debug("x %s in the handshake: %s", peer, e)
        except Exception:
            log.exception("client %s dropped in the handshake", peer)
        finally:
            if connection is None:
                self._door.leave(ip)
                sock.close()
        if connection is not None:
            name = connection.export_name
            tell(
                log,
                logging.INFO,
                Event.CLIENT_CAME,
                "client %s opened %s",
                peer,
                name,
                client=peer,
                **of_export(name),
            )

    def _start(self, connection: Connection) -> bool:
        """List the connection and have it served; False where the system has no thread left for it."""
        self._connections.add(connection)  # before it serves: a client that got an answer is listed
        try:
            connection.start()
        except RuntimeError as e:  # clients that leave make room
            self._connections.discard(connection)
            self._tell_dropped(connection.peer, str(e), level=logging.WARNING)
            return False
        self._idle.clear()
        return True

    async def _haggle(self, sock: socket.socket, peer: str, ip: str, tls: TlsMode) -> Connection | None:
        loop = asyncio.get_running_loop()
        _tune(sock, self._limits)
        catalog = self._catalog
        if self.policy is not None:
            catalog = ClientCatalog(catalog, self.policy, peer_of(sock), peer)
        handshake = ServerHandshake(
            catalog,
            tls=tls,
            most_data=self._limits.option_bytes,
            longest_name=self._limits.name_bytes,
            local=sock.family == socket.AF_UNIX,
        )
        async with asyncio.timeout(self._limits.handshake_seconds):
            stream = await self._drive(handshake, sock, catalog)
        if handshake.agreement is None:
            if not handshake.closing:
                log.debug("x %s hung up in the handshake", peer)
            return None
        name = handshake.agreement.export.name
        export = catalog.open(name)
        if export is None:
            self._tell_dropped(peer, f"{name} is gone")
            return None
        if isinstance(catalog, ClientCatalog):
            log.info("client %s (%s) may do with %s: %s", peer, catalog.client, name, catalog.access(name))
        sock.setblocking(True)
        return Connection(
            stream,
            peer,
            handshake.agreement,
            export,
            handshake.leftover,
            budget=self._budget,
            memories=self._memories,
            shares=self._shares,
            poller=self._poller,
            on_close=lambda connection: self._closed(loop, connection, ip),
            limits=self._limits,
        )

    async def _drive(self, handshake: ServerHandshake, sock: socket.socket, catalog: Catalog) -> Stream:
        """Carry bytes between the client and the handshake until it is over or the client hangs up."""
        loop = asyncio.get_running_loop()
        tls: TlsSocket | None = None

        async def send() -> None:
            if reply := handshake.data_to_send():
                await (loop.sock_sendall(sock, reply) if tls is None else tls.send_all(reply))

        await send()
        while not handshake.done:
            data = await (loop.sock_recv(sock, _RECEIVE) if tls is None else tls.receive(_RECEIVE))
            if not data:
                break
            try:
                handshake.receive(data)
            finally:
                await send()
            if handshake.wants_tls:
                assert self.tls_context is not None
                tls = TlsSocket(sock, self.tls_context)
                await tls.handshake()
                if isinstance(catalog, ClientCatalog) and (found := tls.peer_certificate()) is not None:
                    catalog.identify(Certificate.of(found))
                handshake.tls_started()
                await send()
        return tls or sock

    def _closed(self, loop: asyncio.AbstractEventLoop, connection: Connection, ip: str) -> None:
        """Called by the connection's thread at its end."""
        try:
            loop.call_soon_threadsafe(self._forget, connection, ip)
        except RuntimeError:
            pass  # the loop is closed: the process ends

    def _forget(self, connection: Connection, ip: str) -> None:
        self._connections.discard(connection)
        self._door.leave(ip)
        if not self._connections:
            self._idle.set()
        tell(
            log,
            logging.INFO,
            Event.CLIENT_LEFT,
            "client %s left %s: %d requests, %d bytes read, %d written",
            connection.peer,
            connection.export_name,
            connection.requests,
            connection.bytes_read,
            connection.bytes_written,
            client=connection.peer,
            requests=connection.requests,
            bytes_read=connection.bytes_read,
            bytes_written=connection.bytes_written,
            **of_export(connection.export_name),
        )

    @staticmethod
    def _tell_dropped(
        peer: str, reason: str, text: str = "client %s dropped: %s", *, level: int = logging.INFO
    ) -> None:
        """Of a client that is no connection yet."""
        tell(log, level, Event.CLIENT_DROPPED, text, peer, reason, client=peer, reason=reason)


def _tune(sock: socket.socket, limits: Limits) -> None:
    sock.setblocking(False)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
    if limits.send_seconds:
        # Counts when the socket blocks, after the handshake: a send that can take nothing for so long is EAGAIN.
        seconds, rest = divmod(limits.send_seconds, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", int(seconds), int(rest * 1e6)))
    if sock.family in (socket.AF_INET, socket.AF_INET6):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        if limits.keepalive_seconds:
            idle = max(1, round(limits.keepalive_seconds / 2))
            interval = max(1, round((limits.keepalive_seconds - idle) / _PROBES))
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, idle)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, interval)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, _PROBES)
            if 0 < limits.send_seconds <= limits.keepalive_seconds:
                # No probes are sent while a reply waits for its acknowledgement, or while the window is closed, which
                # is what `send_seconds` allows: this bounds both.
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, round(1000 * limits.keepalive_seconds))


def _peer_name(listener: socket.socket, address: object) -> str:
    if isinstance(address, tuple) and len(address) >= 2:
        host, port = address[:2]
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    return "unix"
