"""What the tests of the handshake speak: a catalog, streams of options, and every way to feed them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from construct import GreedyRange, Struct, Terminated

from fleecing.errors import FleecingError
from fleecing.nbd import layouts, options
from fleecing.nbd.constants import ClientFlag, Info, Opt, Rep, TransmissionFlag
from fleecing.nbd.conversation import Conversation
from fleecing.nbd.handshake import ExportInfo, ServerHandshake, TlsMode

VDA = ExportInfo(
    name="vda",
    description="the active disk",
    size=1 << 30,
    flags=TransmissionFlag.HAS_FLAGS | TransmissionFlag.SEND_FLUSH | TransmissionFlag.SEND_FUA,
    minimum_block=1,
    preferred_block=65536,
    maximum_payload=1 << 26,
    contexts=("base:allocation", "qemu:allocation-depth"),
)
MONDAY = replace(
    VDA,
    name="vda@monday",
    description="",
    flags=TransmissionFlag.HAS_FLAGS | TransmissionFlag.READ_ONLY | TransmissionFlag.SEND_TRIM,
    contexts=("base:allocation", "fleecing:cluster-state", "qemu:allocation-depth", "qemu:dirty-bitmap:backup"),
)
SECRET = replace(VDA, name="secret", tls_only=True)

Side = TypeVar("Side", bound=Conversation)

FIXED = int(ClientFlag.C_FIXED_NEWSTYLE)
NO_ZEROES = int(ClientFlag.C_NO_ZEROES)
BOTH = FIXED | NO_ZEROES
TAIL = b"tail \xff\x00"
"""Fewer bytes than an option's header: where the handshake is not over, they change nothing."""


class Catalog:
    """Exports by name; "" is the first of them."""

    def __init__(self, *exports: ExportInfo) -> None:
        self.exports = {export.name: export for export in exports}

    def names(self) -> Iterable[tuple[str, str]]:
        return [(export.name, export.description) for export in self.exports.values()]

    def find(self, name: str) -> ExportInfo | None:
        return self.exports.get(name or next(iter(self.exports), ""))


CATALOG = Catalog(VDA, MONDAY)


@dataclass(frozen=True)
class Outcome:
    """What came of feeding a stream to one side."""

    sent: bytes
    error: str | None
    side: Conversation


def feed(side: Conversation, pieces: Iterable[bytes]) -> Outcome:
    """Pass the pieces in one by one, taking what is to be sent after each, as a socket's owner does."""
    sent = side.data_to_send()
    error = None
    for piece in pieces:
        try:
            side.receive(piece)
        except FleecingError as failure:
            error = f"{type(failure).__name__}: {failure}"
        sent += side.data_to_send()
    return Outcome(sent, error, side)


def every_way(make: Callable[[], Side], stream: bytes, *, tail: bytes = TAIL) -> tuple[Side, Outcome]:
    """Feed the stream whole, byte by byte and with a tail: what comes of it must be the same. Gives the first."""
    side = make()
    whole = feed(side, [stream])
    bytewise = feed(make(), [stream[at : at + 1] for at in range(len(stream))])
    assert (bytewise.sent, bytewise.error) == (whole.sent, whole.error)
    tailed = feed(make(), [stream + tail])
    assert (tailed.sent, tailed.error) == (whole.sent, whole.error)
    assert side.leftover == bytewise.side.leftover == b""
    agreed = tailed.side.done and not tailed.side.closing and tailed.error is None
    assert tailed.side.leftover == (tail if agreed else b"")
    return side, whole


def haggle(
    *sent: bytes, flags: int = BOTH, catalog: Catalog = CATALOG, tls: TlsMode = TlsMode.OFF
) -> tuple[ServerHandshake, list[Reply], str | None]:
    """A client's options, fed in every way; gives the side, the replies behind the greeting, and the error."""
    stream = options.CLIENT_FLAGS.pack(flags) + b"".join(sent)
    side, outcome = every_way(lambda: ServerHandshake(catalog, tls=tls), stream)
    return side, replies(outcome.sent[options.GREETING.size :]), outcome.error


Reply = tuple[int, int, bytes]
"""(option echoed, reply type, data)"""

_REPLIES = Struct("replies" / GreedyRange(layouts.OPTION_REPLY), Terminated)


def replies(sent: bytes) -> list[Reply]:
    """The option replies in a stream that holds nothing else."""
    return [(reply.option, reply.reply, bytes(reply.data)) for reply in _REPLIES.parse(sent).replies]


def kinds(found: Sequence[Reply]) -> list[Rep]:
    """The reply types alone."""
    return [Rep(reply) for _, reply, _ in found]


def info(number: Opt, name: str, *items: Info) -> bytes:
    return options.option(number, options.info_request(name, items))


def go(name: str, *items: Info) -> bytes:
    return info(Opt.GO, name, *items)


def meta(number: Opt, name: str, *queries: str) -> bytes:
    return options.option(number, options.meta_query(name, queries))
