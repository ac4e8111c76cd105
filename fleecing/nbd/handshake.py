"""The server's side of the handshake (NBD document, "Handshake", "Option types").

    greeting, client flags
      |
      +--> one option at a time: read it and all of its data, look at it, answer
      |      LIST, INFO, STRUCTURED_REPLY, ...    stay here; so does every option that is refused
      |      STARTTLS                             wait for TLS, forget everything, stay here
      |      ABORT                                ACK, then `closing`
      |      GO, EXPORT_NAME                      `agreement` is set, the transmission phase begins
      v
    ProtocolError: the client broke a MUST, or EXPORT_NAME (which has no error reply) cannot be satisfied: drop it

All else is an error reply: the server "MUST [...] simply error inbound options until the client gets the hint that it
is unwelcome". An option's data is read before anything is decided, so the stream stays in step whatever the answer.
Data above a limit (MAX_HELD) is consumed without being kept and answered with ERR_TOO_BIG; above MAX_CONSUMED it is
taken for denial of service.

What a client selected (reply mode, contexts) is held in two fields and checked when the export is chosen.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Final, Protocol

from fleecing.errors import ProtocolError
from fleecing.nbd import options
from fleecing.nbd.constants import (
    IHAVEOPT,
    MAX_STRING,
    NBDMAGIC,
    READ_ONCE,
    SHARED_MEMORY,
    ZERO_PADDING,
    ClientFlag,
    HandshakeFlag,
    Info,
    Opt,
    Rep,
    ReplyMode,
    TransmissionFlag,
)
from fleecing.nbd.conversation import Conversation, Logger, Steps, TlsMode
from fleecing.nbd.options import BlockSizes, OptionError, option_name
from fleecing.nbd.transmission import RequestLimits

__all__ = ["Agreement", "ExportCatalog", "ExportInfo", "ReplyMode", "ServerHandshake", "TlsMode"]

MAX_HELD: Final = 1 << 18
"""The longest option data that is kept, in bytes, where nothing else is said: more than the longest GO may have."""
MAX_CONSUMED: Final = 1 << 25
"""The longest option data that is put up with, in bytes (QEMU's limit as well)."""
MAX_UNSENT: Final = 1 << 20
"""Bytes of replies that may wait when a further option begins. "The client MUST NOT send any option until it has
received a final reply": one that piles them up does not read."""

_LOGGER: Final = logging.getLogger(__name__)
_SERVER_FLAGS: Final = HandshakeFlag.FIXED_NEWSTYLE | HandshakeFlag.NO_ZEROES
_CLIENT_FLAGS: Final = int(ClientFlag.C_FIXED_NEWSTYLE | ClientFlag.C_NO_ZEROES)
_WITHOUT_DATA: Final = frozenset({Opt.LIST, Opt.STARTTLS, Opt.STRUCTURED_REPLY, Opt.EXTENDED_HEADERS})
_WITH_DATA: Final = frozenset({Opt.INFO, Opt.GO, Opt.LIST_META_CONTEXT, Opt.SET_META_CONTEXT})


@dataclass(frozen=True)
class ExportInfo:
    """An export as the catalog describes it. Sizes are bytes."""

    name: str
    description: str
    size: int
    flags: TransmissionFlag
    """As for simple replies; what depends on the reply mode is set or cleared by the handshake."""
    minimum_block: int
    preferred_block: int
    maximum_payload: int
    contexts: tuple[str, ...]
    tls_only: bool = False
    writable: bool = True
    """False: WRITE and WRITE_ZEROES are EPERM even where the flags do not say READ_ONLY (see RequestLimits)."""
    trimmable: bool = True
    """False: TRIM is EPERM (without SEND_TRIM alone it is EINVAL)."""
    enterable: bool = True
    """False: this client may know of the export and no more."""

    def without_changes(self, *, write: bool, trim: bool) -> ExportInfo:
        """The same for a client that may not `write`, or not `trim`; READ_ONLY where neither is left."""
        flags = self.flags
        if write:
            flags &= ~(TransmissionFlag.SEND_WRITE_ZEROES | TransmissionFlag.SEND_FAST_ZERO)
        if trim:
            flags &= ~TransmissionFlag.SEND_TRIM
        writable, trimmable = self.writable and not write, self.trimmable and not trim
        if not (writable or trimmable):
            flags |= TransmissionFlag.READ_ONLY
        return replace(self, flags=flags, writable=writable, trimmable=trimmable)


class ExportCatalog(Protocol):
    """What the server has to offer at this moment."""

    def names(self) -> Iterable[tuple[str, str]]:
        """(name, description) of every export, for LIST."""

    def find(self, name: str) -> ExportInfo | None:
        """The export of that name; "" asks for the default export. The info carries the export's real name."""


@dataclass(frozen=True)
class Agreement:
    """What the two sides agreed on when the transmission phase begins."""

    export: ExportInfo
    mode: ReplyMode
    contexts: tuple[tuple[int, str], ...]
    """(id, name) in the order selected."""
    flags: TransmissionFlag
    """As told to the client."""

    def limits(self) -> RequestLimits:
        """What the connection's requests are held against."""
        return RequestLimits(
            size=self.export.size,
            flags=self.flags,
            mode=self.mode,
            maximum_payload=self.export.maximum_payload,
            contexts=bool(self.contexts),
            minimum_block=self.export.minimum_block,
            writable=self.export.writable,
            trimmable=self.export.trimmable,
            read_once=any(name == READ_ONCE for _, name in self.contexts),
            shared_memory=any(name == SHARED_MEMORY for _, name in self.contexts),
        )


class ServerHandshake(Conversation):
    """Greets a client and answers its options until `agreement` or `closing` is set, or ProtocolError is raised."""

    def __init__(
        self,
        catalog: ExportCatalog,
        *,
        tls: TlsMode = TlsMode.OFF,
        most_data: int = MAX_HELD,
        longest_name: int = MAX_STRING,
        local: bool = False,
        logger: Logger = _LOGGER,
    ) -> None:
        """`most_data` of an option and `longest_name` of an export that it asks for: bytes.

        `local`: the client comes through a Unix socket, over which it can send descriptors.
        """
        self.agreement: Agreement | None = None
        self.shutting_down = False
        """Set by the owner: "SHOULD error further options [...] with NBD_REP_ERR_SHUTDOWN"."""
        self._catalog = catalog
        self._tls = tls
        self._most_data = most_data
        self._longest_name = longest_name
        self._local = local
        self._fixed_newstyle = False
        self._zeroes = True
        self._forget()
        super().__init__(logger)

    def _run(self) -> Steps[None]:
        self._outgoing += options.GREETING.pack(NBDMAGIC, IHAVEOPT, _SERVER_FLAGS)
        (flags,) = options.CLIENT_FLAGS.unpack((yield from self._read(options.CLIENT_FLAGS.size)))
        if flags & ~_CLIENT_FLAGS:
            # "the server MUST close the TCP connection if it does not recognize the client's flags"
            raise ProtocolError(f"unknown client flags {flags & ~_CLIENT_FLAGS:#x}")
        # Without C_FIXED_NEWSTYLE a client may only use EXPORT_NAME; one that uses more is served all the same:
        # "Servers MAY choose to honour fixed newstyle from clients that didn't set this bit". TLS it cannot have: the
        # server "MUST operate in NOTLS mode unless [...] the client replied with NBD_FLAG_C_FIXED_NEWSTYLE".
        self._fixed_newstyle = bool(flags & ClientFlag.C_FIXED_NEWSTYLE)
        if self._tls is TlsMode.REQUIRE and not self._fixed_newstyle:
            raise ProtocolError("TLS is required here, and a client without C_FIXED_NEWSTYLE cannot have it")
        self._zeroes = not flags & ClientFlag.C_NO_ZEROES
        while self.agreement is None and not self.closing:
            number, data = yield from self._option()
            if number == Opt.STARTTLS and self._answer_starttls(data):
                yield from self._start_tls()
                self._forget()
            elif number == Opt.EXPORT_NAME:
                self._answer_export_name(data)
            elif number != Opt.STARTTLS:
                self._answer(number, data)

    def _forget(self) -> None:
        """Back to where a client begins. "the server MUST NOT preserve any negotiation state" over STARTTLS."""
        self._mode = ReplyMode.SIMPLE
        self._selected_for = ""
        self._contexts: tuple[str, ...] = ()

    def _option(self) -> Steps[tuple[int, bytes | None]]:
        """The next option and its data, None if that was too much to hold."""
        magic, number, length = options.OPTION.unpack((yield from self._read(options.OPTION.size)))
        if magic != IHAVEOPT:
            raise ProtocolError(f"option magic {magic:#018x} instead of {IHAVEOPT:#018x}")
        if length > MAX_CONSUMED:
            raise ProtocolError(f"{option_name(number)} with {length} bytes of data; {MAX_CONSUMED} is the limit")
        if len(self._outgoing) > MAX_UNSENT:
            raise ProtocolError("the client sends options without waiting for the replies")
        if self._debug:
            self._log.debug("< %s, %d bytes", option_name(number), length)
        if length <= self._most_data:
            return number, (yield from self._read(length))
        yield from self._skip(length)
        return number, None

    # Answers

    def _answer(self, number: int, data: bytes | None) -> None:
        """The answer to any option but STARTTLS and EXPORT_NAME."""
        if number == Opt.SET_META_CONTEXT:
            self._contexts = ()  # a new selection replaces the earlier one, also when it fails
        try:
            self._admit(number)
            self._dispatch(number, self._usable(number, data))
        except OptionError as error:
            self._refuse(number, error)

    def _dispatch(self, number: int, data: bytes) -> None:
        match number:
            case Opt.ABORT:
                self._reply(number, Rep.ACK)
                self.closing = True
            case Opt.LIST:
                self._list(number)
            case Opt.INFO | Opt.GO:
                self._info_or_go(number, data)
            case Opt.STRUCTURED_REPLY:
                self._structured_reply(number)
            case Opt.EXTENDED_HEADERS:
                self._mode = ReplyMode.EXTENDED
                self._reply(number, Rep.ACK)
            case Opt.LIST_META_CONTEXT:
                self._list_meta_context(number, data)
            case Opt.SET_META_CONTEXT:
                self._set_meta_context(number, data)
            case _:
                # what a server does not know, and PEEK_EXPORT, which was withdrawn ("Baseline")
                raise OptionError(Rep.ERR_UNSUP, f"{option_name(number)} is not supported")

    def _usable(self, number: int, data: bytes | None) -> bytes:
        """The data of the option as far as it matters: that of ABORT and of unknown options never does."""
        if number in _WITHOUT_DATA and data != b"":
            raise OptionError(Rep.ERR_INVALID, f"{option_name(number)} takes no data")
        if number in _WITH_DATA and data is None:
            raise OptionError(Rep.ERR_TOO_BIG, f"{option_name(number)} with more than {self._most_data} bytes of data")
        return data or b""

    def _admit(self, number: int) -> None:
        """Whether any option of this kind may be answered in the state that the connection and the server are in."""
        if number == Opt.ABORT:
            return
        if self.shutting_down:
            raise OptionError(Rep.ERR_SHUTDOWN, "the server is shutting down")
        if self._tls is TlsMode.REQUIRE and not self.tls_active and number != Opt.STARTTLS:
            # FORCEDTLS: "any other option, including NBD_OPT_INFO and unsupported options, [...] MUST reply with
            # NBD_REP_ERR_TLS_REQD if TLS has not been initiated"
            raise OptionError(Rep.ERR_TLS_REQD, "this server requires TLS: start it with STARTTLS")

    def _answer_starttls(self, data: bytes | None) -> bool:
        """Whether TLS is to be started now."""
        try:
            self._admit(Opt.STARTTLS)
            self._usable(Opt.STARTTLS, data)
            if self.tls_active:
                raise OptionError(Rep.ERR_INVALID, "TLS is already in use")
            if self._tls is TlsMode.OFF:
                raise OptionError(Rep.ERR_POLICY, "this server does not offer TLS")
            if not self._fixed_newstyle:
                raise OptionError(Rep.ERR_POLICY, "TLS needs a client that sets C_FIXED_NEWSTYLE")
        except OptionError as error:
            self._refuse(Opt.STARTTLS, error)
            return False
        if not self._incoming:  # otherwise _start_tls refuses
            self._reply(Opt.STARTTLS, Rep.ACK)
        return True

    def _answer_export_name(self, data: bytes | None) -> None:
        """The oldest way to choose an export. "If the server is unwilling to allow the export, it MUST terminate"."""
        try:
            self._admit(Opt.EXPORT_NAME)
            if data is None:
                raise OptionError(Rep.ERR_TOO_BIG, f"more than {self._most_data} bytes of data")
            if self._mode is ReplyMode.EXTENDED:
                raise OptionError(Rep.ERR_INVALID, "after EXTENDED_HEADERS a client MUST NOT use it")
            export = self._enterable(self._find(options.string(data, "export name"), Opt.EXPORT_NAME))
        except OptionError as error:
            raise ProtocolError(f"EXPORT_NAME cannot be satisfied: {error}") from None
        agreement = self._agree(export)
        self._outgoing += options.EXPORT_NAME_ANSWER.pack(export.size, agreement.flags)
        if self._zeroes:
            self._outgoing += bytes(ZERO_PADDING)
        self._enter(agreement)

    def _list(self, number: int) -> None:
        for name, description in self._catalog.names():
            if self._hidden_from_client(name):
                continue  # "MAY omit entries from this list if TLS has not been negotiated"
            self._reply(number, Rep.SERVER, options.server_item(name, description))
        self._reply(number, Rep.ACK)

    def _info_or_go(self, number: int, data: bytes) -> None:
        name, items = options.parse_info_request(data)
        export = self._find(name, number)
        if number == Opt.GO:
            self._enterable(export)
        agreement = self._agree(export)
        if Info.NAME in items:
            self._reply(number, Rep.INFO, options.info_string(Info.NAME, export.name))
        if Info.DESCRIPTION in items and export.description:
            self._reply(number, Rep.INFO, options.info_string(Info.DESCRIPTION, export.description))
        if Info.BLOCK_SIZE in items:
            sizes = BlockSizes(export.minimum_block, export.preferred_block, export.maximum_payload)
            self._reply(number, Rep.INFO, options.info_block_size(sizes))
        # "the server MUST send at least one NBD_REP_INFO, with an NBD_INFO_EXPORT information type"
        self._reply(number, Rep.INFO, options.info_export(export.size, agreement.flags))
        self._reply(number, Rep.ACK)
        if number == Opt.GO:
            self._enter(agreement)

    def _structured_reply(self, number: int) -> None:
        if self._mode is ReplyMode.EXTENDED:
            raise OptionError(Rep.ERR_EXT_HEADER_REQD, "extended headers are agreed on and take precedence")
        self._mode = ReplyMode.STRUCTURED
        self._reply(number, Rep.ACK)

    def _list_meta_context(self, number: int, data: bytes) -> None:
        name, queries = options.parse_meta_query(data)
        for context in options.matching_contexts(self._offered(self._find(name, number)), queries):
            self._reply(number, Rep.META_CONTEXT, options.meta_context_item(0, context))
        self._reply(number, Rep.ACK)

    def _set_meta_context(self, number: int, data: bytes) -> None:
        if self._mode is ReplyMode.SIMPLE:
            raise OptionError(Rep.ERR_INVALID, "meta contexts need structured replies or extended headers first")
        name, queries = options.parse_meta_query(data)
        export = self._find(name, number)
        self._selected_for = export.name
        self._contexts = options.selected_contexts(self._offered(export), queries)
        for identity, context in self._numbered_contexts():
            self._reply(number, Rep.META_CONTEXT, options.meta_context_item(identity, context))
        self._reply(number, Rep.ACK)

    # What the answers are made of

    def _find(self, name: str, number: int) -> ExportInfo:
        if len(name) > self._longest_name or len(name.encode()) > self._longest_name:
            raise OptionError(Rep.ERR_TOO_BIG, f"an export's name may have {self._longest_name} bytes here, not more")
        export = self._catalog.find(name)
        if export is None or self._hidden(export):
            if export is not None and number in (Opt.INFO, Opt.GO) and self._tls is TlsMode.ALLOW:
                # SELECTIVETLS: "MUST reply with NBD_REP_ERR_TLS_REQD if that export is TLS-only"; to no other option
                raise OptionError(Rep.ERR_TLS_REQD, f"export {name!r} is served under TLS only")
            what = f"there is no export {name!r}" if name else "there is no default export: name one"
            raise OptionError(Rep.ERR_UNKNOWN, what)
        return export

    def _offered(self, export: ExportInfo) -> tuple[str, ...]:
        """The contexts that this client may select. Under TLS nothing goes past TLS, no descriptor either."""
        if self._local and not self.tls_active:
            return export.contexts
        return tuple(name for name in export.contexts if name != SHARED_MEMORY)

    @staticmethod
    def _enterable(export: ExportInfo) -> ExportInfo:
        if not export.enterable:
            raise OptionError(Rep.ERR_POLICY, f"export {export.name!r} may not be opened by this client")
        return export

    def _hidden(self, export: ExportInfo) -> bool:
        return export.tls_only and not self.tls_active

    def _hidden_from_client(self, name: str) -> bool:
        if self.tls_active:
            return False
        export = self._catalog.find(name)
        return export is not None and self._hidden(export)

    def _numbered_contexts(self) -> tuple[tuple[int, str], ...]:
        return tuple(enumerate(self._contexts, 1))

    def _agree(self, export: ExportInfo) -> Agreement:
        """What would hold if the transmission phase began now with this export."""
        # contexts count if SET_META_CONTEXT "referred to the same export name that was ultimately selected"
        contexts = self._numbered_contexts() if export.name == self._selected_for else ()
        flags = export.flags | TransmissionFlag.HAS_FLAGS
        flags &= ~(TransmissionFlag.SEND_DF | TransmissionFlag.BLOCK_STATUS_PAYLOAD)
        if self._mode is not ReplyMode.SIMPLE:
            flags |= TransmissionFlag.SEND_DF
        if self._mode is ReplyMode.EXTENDED and contexts:
            flags |= TransmissionFlag.BLOCK_STATUS_PAYLOAD
        if TransmissionFlag.SEND_WRITE_ZEROES not in flags:
            flags &= ~TransmissionFlag.SEND_FAST_ZERO  # "MUST set [it] to 0 if NBD_FLAG_SEND_WRITE_ZEROES is not set"
        return Agreement(export, self._mode, contexts, flags)

    def _enter(self, agreement: Agreement) -> None:
        self.agreement = agreement
        if self._debug:
            self._log.debug(
                "= export %r, %s replies, flags %s, contexts %s",
                agreement.export.name,
                agreement.mode.value,
                agreement.flags.name,
                ", ".join(name for _, name in agreement.contexts) or "none",
            )

    def _reply(self, number: int, reply: Rep, data: bytes = b"") -> None:
        self._outgoing += options.option_reply(number, reply, data)
        if self._debug:
            self._log.debug("> %s, %s, %d bytes", option_name(number), reply.name, len(data))

    def _refuse(self, number: int, error: OptionError) -> None:
        self._outgoing += options.error_option_reply(number, error)
        if self._debug:
            self._log.debug("> %s, %s", option_name(number), error)
