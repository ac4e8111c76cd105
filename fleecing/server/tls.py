"""TLS on a socket that two threads use at once.

`ssl.SSLSocket` may not be read and written by two threads at the same time, and a connection needs just that: its own
thread waits for requests while others send late replies. So TLS runs in memory (`ssl.SSLObject` between two BIOs) under
a lock that is held for the encryption only; the socket itself is read without it.
"""

from __future__ import annotations

import asyncio
import select
import socket
import ssl
import threading

from fleecing.errors import ProtocolError
from fleecing.units import KiB

_CIPHERTEXT = 256 * KiB


def server_context(
    certificate: str, key: str, *, client_ca: str | None = None, revoked: str | None = None
) -> ssl.SSLContext:
    """TLS 1.2 or later with this certificate chain and key (PEM files); with `client_ca`, clients must have one of it.

    `revoked` is a file of revocation lists of `client_ca`. Raises OSError (ssl.SSLError is one) where a file cannot be
    read or used.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.load_cert_chain(certificate, key, password="")  # else OpenSSL asks for one on the terminal, and waits
    if client_ca is not None:
        context.load_verify_locations(client_ca)
        context.verify_mode = ssl.CERT_REQUIRED
    if revoked is not None:
        context.load_verify_locations(revoked)
        context.verify_flags |= ssl.VERIFY_CRL_CHECK_LEAF
    return context


class TlsSocket:
    """A socket under TLS with the calls that a connection makes of a plain one.

    One thread receives; sends are ordered by the caller. Every other use may come from any thread.
    """

    def __init__(self, sock: socket.socket, context: ssl.SSLContext) -> None:
        self._sock = sock
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_side=True)
        self._lock = threading.Lock()  # held for every call of the four above
        self._buffer = memoryview(bytearray(_CIPHERTEXT))
        self.family = sock.family

    async def handshake(self) -> None:
        """Agree on keys; the socket is non-blocking still. Raises ProtocolError where the client does not."""
        loop = asyncio.get_running_loop()
        done = False
        while not done:
            try:
                self._tls.do_handshake()
                done = True
            except ssl.SSLWantReadError:
                pass
            except ssl.SSLError as e:
                await self._send_alert()
                raise ProtocolError(f"TLS handshake failed: {e.reason or e}") from None
            if out := self._outgoing.read():
                await loop.sock_sendall(self._sock, out)
            if not done:
                data = await loop.sock_recv(self._sock, _CIPHERTEXT)
                if not data:
                    raise ProtocolError("the client hung up in the TLS handshake")
                self._incoming.write(data)

    async def _send_alert(self) -> None:
        if out := self._outgoing.read():
            await asyncio.get_running_loop().sock_sendall(self._sock, out)

    async def receive(self, count: int) -> bytes:
        """Up to `count` decrypted bytes, while the socket is non-blocking; b"" where the client has hung up."""
        buffer = bytearray(count)
        while (found := self._decrypt(memoryview(buffer))) is None:
            data = await asyncio.get_running_loop().sock_recv(self._sock, _CIPHERTEXT)
            if not data:
                return b""
            with self._lock:
                self._incoming.write(data)
        return bytes(buffer[:found])

    async def send_all(self, data: bytes) -> None:
        """Encrypt and send, while the socket is non-blocking."""
        await asyncio.get_running_loop().sock_sendall(self._sock, self._encrypt(data))

    def peer_certificate(self) -> ssl._PeerCertRetDictType | None:
        """The client's certificate as `ssl` describes it; None where it has none, or none was asked for."""
        return self._tls.getpeercert() or None

    def _decrypt(self, view: memoryview) -> int | None:
        """Fill `view` from what has come in: bytes of it, 0 at the end of the stream, None where more must come."""
        filled = 0
        with self._lock:
            while filled < len(view):
                try:
                    n: int = self._tls.read(len(view) - filled, view[filled:])  # type: ignore[assignment]
                except ssl.SSLWantReadError:
                    return filled or None
                except ssl.SSLZeroReturnError:
                    return filled
                except ssl.SSLError as e:
                    raise ProtocolError(f"TLS: {e.reason or e}") from None
                if not n:
                    return filled
                filled += n
        return filled

    def _encrypt(self, data: bytes | memoryview) -> bytes:
        with self._lock:
            try:
                view = memoryview(data)
                while view:
                    view = view[self._tls.write(view) :]
            except ssl.SSLError as e:
                raise ConnectionError(f"TLS: {e.reason or e}") from None
            return self._outgoing.read()

    # What a connection asks of a blocking socket.

    def recv_into(self, view: memoryview, nbytes: int = 0, flags: int = 0) -> int:
        """As `socket.recv_into`: 0 at the end; BlockingIOError with MSG_DONTWAIT where nothing is there."""
        while (found := self._decrypt(view)) is None:
            n = self._sock.recv_into(self._buffer, 0, flags)
            if not n:
                return 0
            with self._lock:
                self._incoming.write(self._buffer[:n])
        return found

    def sendall(self, data: bytes | memoryview) -> None:
        """As `socket.sendall`."""
        self._sock.sendall(self._encrypt(data))

    def send(self, data: bytes | memoryview, flags: int) -> int:
        """All of a short reply, or BlockingIOError at once where the socket takes none now (`flags` MSG_DONTWAIT).

        What is encrypted must go out whole and in its turn, so the look comes first; a socket that is writable takes
        a short record.
        """
        assert flags == socket.MSG_DONTWAIT
        poller = select.poll()
        poller.register(self._sock, select.POLLOUT)
        if not poller.poll(0):
            raise BlockingIOError
        encrypted = self._encrypt(data)
        try:
            self._sock.sendall(encrypted)
        except BlockingIOError:  # SO_SNDTIMEO: not to be tried again, a part of the record may be out
            raise TimeoutError("the client does not read") from None
        return len(data)

    def shutdown(self, how: int) -> None:
        """As `socket.shutdown`; "SHOULD" shut TLS down first is done by `close`."""
        self._sock.shutdown(how)

    def end(self) -> None:
        """Tell the client that the stream ends here (close_notify). A client that is gone does not mind."""
        with self._lock:
            try:
                self._tls.unwrap()
            except (ssl.SSLError, OSError, ValueError):
                pass
            out = self._outgoing.read()
        try:
            self._sock.send(out, socket.MSG_DONTWAIT)
        except OSError:
            pass

    def close(self) -> None:
        self._sock.close()


Stream = socket.socket | TlsSocket
"""What a connection talks through: both have recv_into, sendall, send, shutdown, close and family."""
