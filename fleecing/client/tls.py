"""TLS of the client's side: certificates as libnbd and QEMU lay them out, and a socket that `Connection` can use.

DIR/ca-cert.pem                         who may have signed the server's certificate
DIR/client-cert.pem, client-key.pem     this client's own, where the server asks for one
"""

from __future__ import annotations

import os
import socket
import ssl
from collections.abc import Callable

from fleecing.errors import FleecingError
from fleecing.nbd.client_handshake import ExportRefused
from fleecing.nbd.uri import NbdUri

FINAL = 0
"""`reply` of a refusal that asking again does not mend."""


class TlsSocket:
    """A socket under TLS with the calls that a connection makes; for one thread, but `shutdown`."""

    def __init__(self, sock: ssl.SSLSocket) -> None:
        self._sock = sock

    def fileno(self) -> int:
        return self._sock.fileno()

    def setblocking(self, flag: bool, /) -> None:  # noqa: FBT001 - the name and form of the socket's call
        self._sock.setblocking(flag)

    def recv_into(self, view: memoryview) -> int:
        """As of a plain socket. Raises BlockingIOError where no whole record has come, ConnectionError for TLS."""
        try:
            return self._sock.recv_into(view)
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            raise BlockingIOError from None
        except ssl.SSLError as e:
            raise ConnectionError(f"TLS: {e.reason or e}") from None

    def recvmsg_into(self, parts: list[memoryview]) -> tuple[int]:
        """Bytes received, into the first part only: a record does not scatter. Raises as `recv_into`."""
        return (self.recv_into(parts[0]),)

    def sendmsg(self, parts: list[bytes | bytearray | memoryview]) -> int:
        """Bytes sent, of the first part only: a record does not gather. Raises as `recv_into`."""
        return self.send(parts[0])

    def send(self, data: bytes | bytearray | memoryview) -> int:
        try:
            return self._sock.send(data)
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            raise BlockingIOError from None
        except ssl.SSLError as e:
            raise ConnectionError(f"TLS: {e.reason or e}") from None

    def shutdown(self, how: int) -> None:
        """For other threads. That of the SSL socket would take TLS away first, and leave a plain socket to write to."""
        socket.socket.shutdown(self._sock, how)

    def close(self) -> None:
        """With close_notify, if the server's buffers take it now."""
        try:
            self._sock.unwrap()
        except (OSError, ValueError):
            pass  # it does not answer at once, or is gone
        self._sock.close()


def client_context(uri: NbdUri) -> ssl.SSLContext:
    """What `uri` asks for: TLS 1.2 or later, the server's certificate and name verified unless tls-verify-peer=0.

    Raises OSError with the name of a file that cannot be read or used, and ExportRefused.
    """
    if uri.tls_type not in (None, "x509"):
        raise ExportRefused(f"{uri}: this client speaks TLS with certificates only, not tls-type={uri.tls_type}", FINAL)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if uri.tls_verify_peer is False:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    folder = uri.tls_certificates
    if folder is None:
        context.load_default_certs()
        return context
    certificate, key = (os.path.join(folder, f"client-{what}.pem") for what in ("cert", "key"))
    if context.verify_mode is not ssl.CERT_NONE:
        _load(os.path.join(folder, "ca-cert.pem"), context.load_verify_locations)
    if os.path.lexists(certificate):
        _load(certificate, lambda path: context.load_cert_chain(path, key))
    return context


def _load(path: str, load: Callable[[str], None]) -> None:
    try:
        load(path)
    except ssl.SSLError as e:
        raise OSError(e.errno, f"cannot be used for TLS: {e.reason or e}", path) from None
    except OSError as e:
        raise OSError(e.errno, f"cannot be read for TLS: {e.strerror}", path) from None


def start_tls(sock: socket.socket, uri: NbdUri, context: ssl.SSLContext) -> ssl.SSLSocket:
    """TLS on a socket whose time-out is set; it is taken over. Raises ExportRefused where either side refuses."""
    try:
        return context.wrap_socket(sock, server_hostname=uri.tls_hostname or uri.host)
    except ssl.SSLError as e:
        raise refused(uri, e) from None


def refused(uri: NbdUri, error: ssl.SSLError) -> FleecingError:
    """The sentence for an error of TLS."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return ExportRefused(f"{uri}: the server's certificate is not accepted: {error.verify_message}", FINAL)
    return ExportRefused(f"{uri}: TLS: {error.reason or error}", FINAL)
