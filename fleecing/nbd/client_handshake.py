"""The client's side of the handshake: from the greeting to an agreement, to a list of exports, or to a refusal.

It asks for the best and takes what there is: extended headers, else structured replies, else simple ones; GO, else
EXPORT_NAME. A refusal is ExportRefused; the goodbye (ABORT) is then in `data_to_send`. The owner of the socket calls
`connection_lost` when the server hangs up, which is how EXPORT_NAME is refused.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, NoReturn, TypeVar

from fleecing.errors import FleecingError, ProtocolError
from fleecing.nbd import options
from fleecing.nbd.constants import (
    DEFAULT_MAXIMUM_PAYLOAD,
    DEFAULT_MINIMUM_BLOCK,
    DEFAULT_PREFERRED_BLOCK,
    IHAVEOPT,
    MAX_EXPORT_SIZE,
    MAX_MINIMUM_BLOCK,
    NBDMAGIC,
    OLDSTYLE_MAGIC,
    OPTION_REPLY_MAGIC,
    REP_FLAG_ERROR,
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
from fleecing.units import is_power_of_two

__all__ = ["ClientAgreement", "ClientHandshake", "ExportListing", "ExportRefused", "ReplyMode", "TlsMode"]

MAX_REPLY: Final = 1 << 16
"""The longest option reply that is taken, in bytes; the longest sound one holds two strings."""
MAX_EXPORTS: Final = 1 << 16
"""How many exports of a listing are taken."""
MAX_FOUND_CONTEXTS: Final = 256
"""How many contexts of a listing are taken."""

_LOGGER: Final = logging.getLogger(__name__)
_WANTED_ITEMS: Final = (Info.NAME, Info.DESCRIPTION, Info.BLOCK_SIZE)
_DEFAULT_SIZES: Final = BlockSizes(DEFAULT_MINIMUM_BLOCK, DEFAULT_PREFERRED_BLOCK, DEFAULT_MAXIMUM_PAYLOAD)
_REPLY_NAMES: Final = {int(reply): reply.name for reply in Rep}

T = TypeVar("T")


class ExportRefused(FleecingError):
    """The server answers, and will not serve what was asked for. `reply` is its error, None if it just hung up."""

    def __init__(self, text: str, reply: int | None = None) -> None:
        super().__init__(text)
        self.reply = reply
        self.text = text


@dataclass(frozen=True)
class ClientAgreement:
    """What the two sides agreed on. Sizes are bytes."""

    name: str
    """As the server calls the export, where it said so."""
    description: str
    size: int
    flags: TransmissionFlag
    mode: ReplyMode
    contexts: Mapping[str, int]
    """The ids of those contexts asked for that the server has."""
    sizes: BlockSizes = _DEFAULT_SIZES

    @property
    def minimum_block(self) -> int:
        return self.sizes.minimum

    @property
    def preferred_block(self) -> int:
        return self.sizes.preferred

    @property
    def maximum_payload(self) -> int:
        return self.sizes.maximum_payload


class _ClientConversation(Conversation):
    """What every client does: the greeting, TLS, options with their replies, and the goodbye."""

    def __init__(self, *, tls: TlsMode, logger: Logger) -> None:
        self._tls = tls
        self._fixed_newstyle = False
        self._zeroes = True
        super().__init__(logger)

    def connection_lost(self) -> NoReturn:
        """The server hung up before the end of the handshake: raises what that means."""
        self._fail(self._failure or ExportRefused("the server closed the connection during the handshake"))

    def _greet(self) -> Steps[None]:
        """The greeting and, if wanted, TLS."""
        magic, second, flags = options.GREETING.unpack((yield from self._read(options.GREETING.size)))
        if magic != NBDMAGIC:
            raise ProtocolError(f"the peer is no NBD server: it greets with {magic:#018x}")
        if second == OLDSTYLE_MAGIC:
            raise ProtocolError("the server speaks the oldstyle handshake, which is obsolete")
        if second != IHAVEOPT:
            raise ProtocolError(f"unknown handshake {second:#018x}")
        # "The client SHOULD ignore any handshake flags it does not recognize"
        self._fixed_newstyle = bool(flags & HandshakeFlag.FIXED_NEWSTYLE)
        self._zeroes = not flags & HandshakeFlag.NO_ZEROES
        answer = (ClientFlag.C_FIXED_NEWSTYLE if self._fixed_newstyle else 0) | (
            0 if self._zeroes else ClientFlag.C_NO_ZEROES
        )
        self._outgoing += options.CLIENT_FLAGS.pack(answer)
        if self._tls is not TlsMode.OFF:
            yield from self._ask_for_tls()

    def _ask_for_tls(self) -> Steps[None]:
        try:
            if not self._fixed_newstyle:
                raise OptionError(Rep.ERR_UNSUP, "the server does not speak fixed newstyle")
            yield from self._simple_option(Opt.STARTTLS)
        except OptionError as error:
            if self._tls is TlsMode.REQUIRE:
                self._refuse(f"the server does not start TLS: {error}", error.reply)
            return
        yield from self._start_tls()

    def _simple_option(self, number: Opt) -> Steps[None]:
        """An option without data whose success is an ACK."""
        self._ask(number)
        reply, _ = yield from self._reply(number)
        if reply != Rep.ACK:
            raise ProtocolError(f"{_reply_name(reply)} in answer to {number.name}")

    def _ask(self, number: Opt, data: bytes = b"") -> None:
        if self._debug:
            self._log.debug("> %s, %d bytes", number.name, len(data))
        self._outgoing += options.option(number, data)

    def _reply(self, number: Opt) -> Steps[tuple[int, bytes]]:
        """The next reply to the option: its type and data. Raises OptionError for an error reply."""
        header = yield from self._read(options.OPTION_REPLY.size)
        magic, echoed, reply, length = options.OPTION_REPLY.unpack(header)
        if magic != OPTION_REPLY_MAGIC:
            raise ProtocolError(f"option reply magic {magic:#018x} instead of {OPTION_REPLY_MAGIC:#018x}")
        if echoed != number:
            raise ProtocolError(f"a reply to {option_name(echoed)} where {number.name} was asked")
        if length > MAX_REPLY:
            raise ProtocolError(f"a reply to {number.name} of {length} bytes; {MAX_REPLY} is the limit")
        data = yield from self._read(length)
        if self._debug:
            self._log.debug("< %s, %s, %d bytes", number.name, _reply_name(reply), length)
        if reply & REP_FLAG_ERROR:
            known = Rep(reply) if reply in _REPLY_NAMES else Rep.ERR_POLICY
            raise OptionError(known, _printable(data) or f"{number.name} was refused")
        if reply == Rep.ACK and data:
            raise ProtocolError(f"an ACK to {number.name} with {length} bytes of data")
        return reply, data

    def _check_unwelcome(self, number: Opt, error: OptionError) -> None:
        """Give up after an error that no other option can mend; after ERR_SHUTDOWN a client MUST."""
        if error.reply in (Rep.ERR_SHUTDOWN, Rep.ERR_TLS_REQD):
            self._refuse(f"the server refuses {number.name}: {error}", error.reply)

    def _refuse(self, text: str, reply: int | None) -> NoReturn:
        """Say goodbye, in the soft way that is asked of clients, and tell the owner why."""
        if self._fixed_newstyle:
            self._outgoing += options.option(Opt.ABORT)
        raise ExportRefused(text, reply)


class ClientHandshake(_ClientConversation):
    """Asks for one export ("" = the server's default one). `agreement` is set when the transmission phase begins.

    `find_contexts` are queries, for instance "qemu:dirty-bitmap:"; what they find is selected with the `contexts`.
    """

    def __init__(
        self,
        export_name: str,
        *,
        structured: bool = True,
        extended: bool = True,
        contexts: Sequence[str] = (),
        find_contexts: Sequence[str] = (),
        tls: TlsMode = TlsMode.OFF,
        logger: Logger = _LOGGER,
    ) -> None:
        try:
            options.string(export_name.encode(), "export name")
        except (UnicodeEncodeError, OptionError) as error:
            raise ValueError(f"{export_name!r} cannot be an export's name: {error}") from None
        self.agreement: ClientAgreement | None = None
        self._name = export_name
        self._structured = structured
        self._extended = extended
        self._wanted_contexts = list(contexts)
        self._find_contexts = find_contexts
        super().__init__(tls=tls, logger=logger)

    def connection_lost(self) -> NoReturn:
        """The server hung up before an agreement: raises what that means."""
        text = f"the server closed the connection instead of serving export {self._name!r}; is there one?"
        self._fail(self._failure or ExportRefused(text))

    def _run(self) -> Steps[None]:
        yield from self._greet()
        if not self._fixed_newstyle:
            self.agreement = yield from self._export_name()
            return
        mode = yield from self._agree_on_mode()
        contexts: dict[str, int] = {}
        if mode is not ReplyMode.SIMPLE:
            if self._find_contexts:
                yield from self._look_for_contexts()
            if self._wanted_contexts:
                contexts = yield from self._select_contexts()
        try:
            self.agreement = yield from self._go(mode, contexts)
        except OptionError as error:
            if error.reply != Rep.ERR_UNSUP or mode is ReplyMode.EXTENDED:
                self._refuse(f"the server refuses export {self._name!r}: {error}", error.reply)
            # "clients SHOULD be prepared to also handle NBD_REP_ERR_UNSUP by falling back to using NBD_OPT_EXPORT_NAME"
            self.agreement = yield from self._export_name(mode, contexts)

    def _agree_on_mode(self) -> Steps[ReplyMode]:
        """The best of what this side wants and the server grants; each refusal leads to the next."""
        wanted = [
            (self._extended, Opt.EXTENDED_HEADERS, ReplyMode.EXTENDED),
            (self._structured, Opt.STRUCTURED_REPLY, ReplyMode.STRUCTURED),
        ]
        for wants, number, mode in wanted:
            if not wants:
                continue
            try:
                yield from self._simple_option(number)
            except OptionError as error:
                self._check_unwelcome(number, error)
                continue
            return mode
        return ReplyMode.SIMPLE

    def _look_for_contexts(self) -> Steps[None]:
        """Add to the wanted contexts what the queries find; a refusal finds nothing, and GO will say what is wrong."""
        self._ask(Opt.LIST_META_CONTEXT, options.meta_query(self._name, self._find_contexts))
        found: list[str] = []
        while True:
            try:
                reply, data = yield from self._reply(Opt.LIST_META_CONTEXT)
            except OptionError as error:
                self._check_unwelcome(Opt.LIST_META_CONTEXT, error)
                return
            if reply == Rep.ACK:
                break
            if reply != Rep.META_CONTEXT:
                raise ProtocolError(f"{_reply_name(reply)} in answer to LIST_META_CONTEXT")
            if len(found) == MAX_FOUND_CONTEXTS:
                raise ProtocolError(f"the server lists more than {MAX_FOUND_CONTEXTS} contexts")
            found.append(_sound(options.parse_meta_context_item, data)[1])
        # A server may answer a query more widely than it was asked
        self._wanted_contexts += [
            name
            for name in dict.fromkeys(found)
            if name not in self._wanted_contexts and name.startswith(tuple(self._find_contexts))
        ]

    def _select_contexts(self) -> Steps[dict[str, int]]:
        """The ids of the contexts that the server has; a refusal means none, and GO will say what is wrong."""
        selected: dict[str, int] = {}
        self._ask(Opt.SET_META_CONTEXT, options.meta_query(self._name, self._wanted_contexts))
        while True:
            try:
                reply, data = yield from self._reply(Opt.SET_META_CONTEXT)
            except OptionError as error:
                self._check_unwelcome(Opt.SET_META_CONTEXT, error)
                return {}
            if reply == Rep.ACK:
                return selected
            if reply != Rep.META_CONTEXT:
                raise ProtocolError(f"{_reply_name(reply)} in answer to SET_META_CONTEXT")
            identity, context = _sound(options.parse_meta_context_item, data)
            if context not in self._wanted_contexts or context in selected or identity in selected.values():
                raise ProtocolError(f"the server selects context {context!r} with id {identity} out of turn")
            selected[context] = identity

    def _go(self, mode: ReplyMode, contexts: Mapping[str, int]) -> Steps[ClientAgreement]:
        """Choose the export. Raises OptionError when the server refuses it."""
        export: tuple[int, TransmissionFlag] | None = None
        sizes = _DEFAULT_SIZES
        texts = {Info.NAME: self._name, Info.DESCRIPTION: ""}
        self._ask(Opt.GO, options.info_request(self._name, _WANTED_ITEMS))
        while True:
            reply, data = yield from self._reply(Opt.GO)
            if reply == Rep.ACK:
                break
            if reply != Rep.INFO:
                raise ProtocolError(f"{_reply_name(reply)} in answer to GO")
            match _sound(options.info_type, data):
                case Info.EXPORT:
                    export = _sound(options.parse_info_export, data)
                case Info.BLOCK_SIZE:
                    sizes = _plausible(_sound(options.parse_info_block_size, data))
                case Info.NAME | Info.DESCRIPTION as item:
                    texts[Info(item)] = _sound(options.parse_info_string, data)
                case _:
                    pass  # "MUST ignore information types that it does not recognize"
        if export is None:
            raise ProtocolError("the server acknowledges GO without telling the size of the export")
        size, flags = export
        return self._checked(
            ClientAgreement(texts[Info.NAME], texts[Info.DESCRIPTION], size, flags, mode, contexts, sizes)
        )

    def _export_name(
        self, mode: ReplyMode = ReplyMode.SIMPLE, contexts: Mapping[str, int] | None = None
    ) -> Steps[ClientAgreement]:
        """Choose the export the old way: an answer without a header, or the end of the connection."""
        self._ask(Opt.EXPORT_NAME, self._name.encode())
        size, flags = options.EXPORT_NAME_ANSWER.unpack((yield from self._read(options.EXPORT_NAME_ANSWER.size)))
        if self._zeroes:
            yield from self._skip(ZERO_PADDING)
        told = TransmissionFlag(flags)
        return self._checked(ClientAgreement(self._name, "", size, told, mode, contexts or {}, _DEFAULT_SIZES))

    def _checked(self, agreement: ClientAgreement) -> ClientAgreement:
        if agreement.size > MAX_EXPORT_SIZE:
            raise ProtocolError(f"the server tells a size of {agreement.size} bytes, which is no size of a file")
        if self._debug:
            self._log.debug("= %r", agreement)
        return agreement


class ExportListing(_ClientConversation):
    """Asks for the names of the exports; `exports` is set when the server has told them all."""

    def __init__(self, *, tls: TlsMode = TlsMode.OFF, logger: Logger = _LOGGER) -> None:
        self.exports: tuple[tuple[str, str], ...] | None = None
        """(name, description) of each."""
        super().__init__(tls=tls, logger=logger)

    def _run(self) -> Steps[None]:
        yield from self._greet()
        if not self._fixed_newstyle:
            raise ExportRefused("the server is too old to list its exports")
        found: list[tuple[str, str]] = []
        self._ask(Opt.LIST)
        while True:
            try:
                reply, data = yield from self._reply(Opt.LIST)
            except OptionError as error:
                self._refuse(f"the server does not list its exports: {error}", error.reply)
            if reply == Rep.ACK:
                break
            if reply != Rep.SERVER:
                raise ProtocolError(f"{_reply_name(reply)} in answer to LIST")
            if len(found) == MAX_EXPORTS:
                raise ProtocolError(f"the server lists more than {MAX_EXPORTS} exports")
            found.append(_sound(options.parse_server_item, data))
        self.exports = tuple(found)
        self._outgoing += options.option(Opt.ABORT)
        self.closing = True


def _sound(parse: Callable[[bytes], T], data: bytes) -> T:
    """What a reply says; a server whose reply makes no sense breaks a MUST."""
    try:
        return parse(data)
    except OptionError as error:
        raise ProtocolError(f"the server sends a reply that makes no sense: {error.text}") from None


def _plausible(sizes: BlockSizes) -> BlockSizes:
    """Section "Size constraints": what a server may tell."""
    if not is_power_of_two(sizes.minimum) or sizes.minimum > MAX_MINIMUM_BLOCK:
        raise ProtocolError(f"the server tells a minimum block of {sizes.minimum} bytes")
    if not is_power_of_two(sizes.preferred) or sizes.preferred < sizes.minimum:
        raise ProtocolError(f"the server tells a preferred block of {sizes.preferred} bytes")
    if sizes.maximum_payload < sizes.minimum:
        raise ProtocolError(f"the server tells a maximum payload of {sizes.maximum_payload} bytes")
    return sizes


def _printable(text: bytes) -> str:
    """A server's words, fit for a log and a terminal."""
    return "".join(sign if sign.isprintable() else " " for sign in text.decode("utf-8", "replace"))


def _reply_name(reply: int) -> str:
    return _REPLY_NAMES.get(reply, f"reply {reply:#x}")
