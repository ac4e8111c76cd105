"""From an NBD URI to a connection in the transmission phase: socket, handshake, limits in time."""

from __future__ import annotations

import errno
import logging
import socket
import ssl
import time
from collections.abc import Sequence
from typing import Final

from fleecing.client.connection import Connection
from fleecing.client.tls import TlsSocket, client_context, refused, start_tls
from fleecing.errors import FleecingError, ProtocolError
from fleecing.nbd.client_handshake import ClientHandshake, ExportListing, TlsMode
from fleecing.nbd.uri import NbdUri

log = logging.getLogger(__name__)

_RECEIVE: Final = 1 << 16
_BUFFER: Final = 1 << 18
"""Bytes that the kernel may hold for us each way on a Unix socket, whose default is less than one large reply."""


def connect(
    uri: NbdUri,
    *,
    contexts: Sequence[str] = (),
    find_contexts: Sequence[str] = (),
    structured: bool = True,
    extended: bool = True,
    timeout: float = 60.0,
) -> Connection:
    """A connection to the export of `uri`, with the best replies and those of `contexts` that the server has.

    `find_contexts` are queries ("qemu:dirty-bitmap:"); the contexts that they find are selected, too. `timeout`
    (seconds) holds for this call as a whole and for each call of the connection. A URI of nbds asks for TLS, and takes
    nothing else. Raises OSError, ProtocolError, and ExportRefused with the server's text.
    """
    handshake = ClientHandshake(
        uri.export,
        structured=structured,
        extended=extended,
        contexts=contexts,
        find_contexts=find_contexts,
        tls=_mode(uri),
    )
    sock = _talk(uri, handshake, timeout)
    agreement = handshake.agreement
    if agreement is None or handshake.leftover:
        sock.close()
        raise ProtocolError(f"{uri} sent {len(handshake.leftover)} bytes that nobody asked for")
    stream = TlsSocket(sock) if isinstance(sock, ssl.SSLSocket) else sock
    return Connection(stream, agreement, peer=str(uri), timeout=timeout)


def list_exports(uri: NbdUri, *, timeout: float = 60.0) -> tuple[tuple[str, str], ...]:
    """(name, description) of each export of the server. Raises as `connect`."""
    listing = ExportListing(tls=_mode(uri))
    _talk(uri, listing, timeout).close()
    assert listing.exports is not None
    return listing.exports


def _mode(uri: NbdUri) -> TlsMode:
    """nbds: TLS, or nothing: a server that offers none, or somebody between who says so, is refused."""
    return TlsMode.REQUIRE if uri.tls else TlsMode.OFF


def _talk(uri: NbdUri, handshake: ClientHandshake | ExportListing, timeout: float) -> socket.socket:
    """Open the socket and run the handshake to its end; an `ssl.SSLSocket` where it went through TLS."""
    context = client_context(uri) if uri.tls else None
    deadline = time.monotonic() + timeout
    try:
        sock = _open(uri, timeout)
    except OSError as e:  # without an errno: of a path that is too long
        raise OSError(e.errno or errno.ENAMETOOLONG, e.strerror or str(e), str(uri)) from e
    try:
        sock.sendall(handshake.data_to_send())
        while not handshake.done:
            sock.settimeout(max(0.001, deadline - time.monotonic()))
            data = sock.recv(_RECEIVE)
            if time.monotonic() > deadline:
                raise TimeoutError
            if not data:
                handshake.connection_lost()
            handshake.receive(data)
            sock.sendall(handshake.data_to_send())
            if handshake.wants_tls:
                assert context is not None
                sock.settimeout(max(0.001, deadline - time.monotonic()))
                sock = start_tls(sock, uri, context)
                handshake.tls_started()
                sock.sendall(handshake.data_to_send())
    except TimeoutError:
        sock.close()
        raise TimeoutError(f"{uri}: no end of the handshake within {timeout:g} s") from None
    except ssl.SSLError as e:
        sock.close()
        raise refused(uri, e) from None
    except (BrokenPipeError, ConnectionResetError):
        sock.close()
        handshake.connection_lost()
    except (OSError, FleecingError):
        _goodbye(sock, handshake.data_to_send())
        raise
    return sock


def _goodbye(sock: socket.socket, data: bytes) -> None:
    """Send what the handshake has left to say, if the server still listens, and hang up."""
    try:
        sock.sendall(data)
    except OSError as e:
        log.debug("x no goodbye: %s", e)
    sock.close()


def _open(uri: NbdUri, timeout: float) -> socket.socket:
    if uri.socket is None:
        sock = socket.create_connection((uri.host, uri.port), timeout=timeout)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return sock
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.settimeout(timeout)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER)
        sock.connect(uri.socket)
    except OSError:
        sock.close()
        raise
    return sock
