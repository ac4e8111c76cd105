"""The machine under both sides of the handshake: bytes in, bytes out, a script in between.

A side of the handshake is one generator, written as if it could block: `yield from self._read(n)` gives the next n
bytes and yields while they lack. The owner of the socket passes in what arrives and sends what `data_to_send` returns:

    send(side.data_to_send())
    while not side.done:
        side.receive(recv())            # ProtocolError: send what is left, then drop the connection
        send(side.data_to_send())
        if side.wants_tls:
            ...                         # the TLS handshake on the socket; failed: drop the connection
            side.tls_started()
            send(side.data_to_send())

Memory: at most one message that a script cares to hold, plus what one call of `receive` brought.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Generator
from enum import Enum
from typing import NoReturn, TypeVar

from fleecing.errors import FleecingError, ProtocolError

T = TypeVar("T")
Steps = Generator[None, None, T]
"""A piece of a script: yields when it needs more bytes, returns a T."""

Logger = logging.Logger | logging.LoggerAdapter[logging.Logger]


class TlsMode(Enum):
    """Section "TLS support": what a side does about encryption, for the whole connection."""

    OFF = "off"
    """NOTLS."""
    ALLOW = "allow"
    """SELECTIVETLS for a server; a client asks for it and goes on without."""
    REQUIRE = "require"
    """FORCEDTLS."""


class Conversation(ABC):
    """One side of a handshake. Not for use by two threads at once; it may move from one to another.

    A side sets its own attributes before it calls this constructor, which runs the script to its first wait.
    """

    def __init__(self, logger: Logger) -> None:
        self.wants_tls = False
        """STARTTLS was agreed: start TLS on the socket now, pass no more bytes before `tls_started`."""
        self.tls_active = False
        self.closing = False
        """The end was agreed: send what is left, then close."""
        self._log = logger
        self._debug = logger.isEnabledFor(logging.DEBUG)
        self._incoming = bytearray()
        self._outgoing = bytearray()
        self._finished = False
        self._failure: FleecingError | None = None
        self._script = self._run()
        self._advance()

    @abstractmethod
    def _run(self) -> Steps[None]:
        """The script, from the first byte to the last of the handshake."""

    @property
    def done(self) -> bool:
        """The script is over: by agreement, by the end, or by an error that was raised."""
        return self._finished

    @property
    def leftover(self) -> bytes:
        """What came behind the last byte of the handshake: the beginning of the transmission phase."""
        return bytes(self._incoming) if self._finished else b""

    def receive(self, data: bytes | bytearray | memoryview) -> None:
        """Take what arrived, in pieces of any size. After an error every further call raises that error again."""
        if self._failure is not None:
            raise self._failure
        if self.closing or not data:
            return
        if self.wants_tls:
            self._fail(ProtocolError("unencrypted bytes arrived where the TLS handshake was agreed"))
        self._incoming += data
        self._advance()

    def data_to_send(self) -> bytes:
        """What is to be sent now; each byte is given once."""
        data = bytes(self._outgoing)
        self._outgoing.clear()
        return data

    def tls_started(self) -> None:
        """TLS is up on the socket: from now on `receive` takes decrypted bytes."""
        assert self.wants_tls
        self.wants_tls = False
        self.tls_active = True
        self._advance()

    def _advance(self) -> None:
        if self._finished:
            return
        try:
            next(self._script)
        except StopIteration:
            self._finished = True
            if self.closing:
                self._incoming.clear()  # whatever came behind the end is nobody's
        except FleecingError as error:
            self._fail(error)

    def _fail(self, error: FleecingError) -> NoReturn:
        self._failure = error
        self._finished = True
        self._incoming.clear()
        raise error

    def _read(self, length: int) -> Steps[bytes]:
        """The next `length` bytes."""
        while len(self._incoming) < length:
            yield
        data = bytes(self._incoming[:length])
        del self._incoming[:length]
        return data

    def _skip(self, length: int) -> Steps[None]:
        """Pass over the next `length` bytes without holding them."""
        while length > len(self._incoming):
            length -= len(self._incoming)
            self._incoming.clear()
            yield
        del self._incoming[:length]

    def _start_tls(self) -> Steps[None]:
        """Wait until TLS is up. What is already buffered was sent in the clear, by whoever it may have been.

        "all further data MUST be sent and received over TLS": bytes that an attacker put behind STARTTLS must never be
        taken for what the peer says under TLS.
        """
        if self._incoming:
            raise ProtocolError(f"{len(self._incoming)} unencrypted bytes arrived behind STARTTLS")
        self.wants_tls = True
        while self.wants_tls:
            yield
