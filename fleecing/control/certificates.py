"""The server's certificates: a folder laid out as QEMU and nbdkit have it.

DIR/server-cert.pem    the certificate, with those between it and its authority behind it
DIR/server-key.pem     its private key, without a passphrase
DIR/ca-cert.pem        where clients must have a certificate: the authorities that theirs may come from
DIR/ca-crl.pem         if it is there: what those authorities have revoked
"""

from __future__ import annotations

import os
import ssl
from dataclasses import dataclass

from fleecing.errors import ConfigError
from fleecing.server.tls import server_context

CERTIFICATE, KEY, AUTHORITIES, REVOKED = "server-cert.pem", "server-key.pem", "ca-cert.pem", "ca-crl.pem"


@dataclass(frozen=True)
class Certificates:
    """The folder, and whether clients must have a certificate, too."""

    folder: str
    verify_client: bool

    def load(self) -> ssl.SSLContext:
        """What the files are at this moment. Raises ConfigError, one sentence with the file's name."""
        paths = {name: os.path.join(self.folder, name) for name in (CERTIFICATE, KEY, AUTHORITIES, REVOKED)}
        needed = (CERTIFICATE, KEY, AUTHORITIES) if self.verify_client else (CERTIFICATE, KEY)
        for name in needed:
            try:
                with open(paths[name], "rb"):
                    pass
            except OSError as e:
                raise ConfigError(f"TLS needs {paths[name]}, which cannot be read: {e.strerror}") from None
        try:
            return server_context(
                paths[CERTIFICATE],
                paths[KEY],
                client_ca=paths[AUTHORITIES] if self.verify_client else None,
                revoked=paths[REVOKED] if self.verify_client and os.path.exists(paths[REVOKED]) else None,
            )
        except OSError as e:
            reason = e.reason if isinstance(e, ssl.SSLError) and e.reason else e.strerror or e
            raise ConfigError(f"the TLS files in {self.folder} cannot be used: {reason}") from None

    def flaw(self, context: ssl.SSLContext) -> str | None:
        """What every client that looks will refuse the certificate for (it has expired), as a sentence, or None."""
        certificate = os.path.join(self.folder, CERTIFICATE)
        client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        client.check_hostname = False
        client.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # it is its own authority here
        client.load_verify_locations(certificate)
        try:
            _shake_hands(client, context)
        except ssl.SSLCertVerificationError as e:
            return f"clients will refuse {certificate}: {e.verify_message}"
        except ssl.SSLError as e:
            return f"clients will refuse {certificate}: {e.reason}"
        return None

    def renew(self) -> ssl.SSLContext:
        """As `load`, in the place of certificates that are in use: refuses what has a flaw, too."""
        context = self.load()
        if (flaw := self.flaw(context)) is not None:
            raise ConfigError(flaw)
        return context


def _shake_hands(client: ssl.SSLContext, server: ssl.SSLContext) -> None:
    """A handshake in memory, as far as the client's judgement. Raises ssl.SSLError."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    asking = client.wrap_bio(to_client, to_server)
    answering = server.wrap_bio(to_server, to_client, server_side=True)
    for _ in range(4):
        for side in (asking, answering):
            try:
                side.do_handshake()
            except ssl.SSLWantReadError:
                continue
            return  # the client has seen all that it needs
