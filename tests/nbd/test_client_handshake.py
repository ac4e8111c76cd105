"""The client's side against scripted servers: what it asks, what it makes of the answers, when it gives up."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from fleecing.errors import ProtocolError
from fleecing.nbd import options
from fleecing.nbd.client_handshake import (
    MAX_EXPORTS,
    MAX_REPLY,
    ClientHandshake,
    ExportListing,
    ExportRefused,
    ReplyMode,
    TlsMode,
)
from fleecing.nbd.constants import IHAVEOPT, NBDMAGIC, OLDSTYLE_MAGIC, HandshakeFlag, Info, Opt, Rep, TransmissionFlag
from fleecing.nbd.options import BlockSizes
from tests.nbd.talk import every_way, feed

FLAGS = TransmissionFlag.HAS_FLAGS | TransmissionFlag.SEND_FLUSH
SIZE = 1 << 30
MODERN = options.GREETING.pack(NBDMAGIC, IHAVEOPT, HandshakeFlag.FIXED_NEWSTYLE | HandshakeFlag.NO_ZEROES)


def greeting(flags: int) -> bytes:
    return options.GREETING.pack(NBDMAGIC, IHAVEOPT, flags)


def reply(number: Opt, kind: Rep = Rep.ACK, data: bytes = b"") -> bytes:
    return options.option_reply(number, kind, data)


def served(*more: bytes) -> bytes:
    """The answer to GO."""
    export = reply(Opt.GO, Rep.INFO, options.info_export(SIZE, FLAGS))
    return export + b"".join(reply(Opt.GO, Rep.INFO, item) for item in more) + reply(Opt.GO)


def asked(sent: bytes) -> list[tuple[int, bytes]]:
    """The (option, data) pairs behind the client's flags."""
    found = []
    at = options.CLIENT_FLAGS.size
    while at < len(sent):
        magic, number, length = options.OPTION.unpack_from(sent, at)
        assert magic == IHAVEOPT
        at += options.OPTION.size
        found.append((number, sent[at : at + length]))
        at += length
    return found


def numbers(sent: bytes) -> list[int]:
    return [number for number, _ in asked(sent)]


def client(
    stream: bytes,
    *,
    structured: bool = True,
    extended: bool = True,
    contexts: Sequence[str] = (),
    tls: TlsMode = TlsMode.OFF,
) -> tuple[ClientHandshake, bytes, str | None]:
    """What a client with these wishes makes of a server's bytes: its side, what it sent, its error."""

    def make() -> ClientHandshake:
        return ClientHandshake("vda", structured=structured, extended=extended, contexts=contexts, tls=tls)

    side, outcome = every_way(make, stream)
    return side, outcome.sent, outcome.error


# Modes


def test_best_mode_is_asked_first_and_taken() -> None:
    side, sent, _ = client(MODERN + reply(Opt.EXTENDED_HEADERS) + served())
    assert numbers(sent) == [Opt.EXTENDED_HEADERS, Opt.GO]
    assert side.agreement is not None
    assert (side.agreement.mode, side.agreement.size, side.agreement.flags) == (ReplyMode.EXTENDED, SIZE, FLAGS)


@pytest.mark.parametrize("refusal", [Rep.ERR_UNSUP, Rep.ERR_POLICY, Rep.ERR_INVALID])
def test_refused_extended_headers_fall_back_to_structured_replies(refusal: Rep) -> None:
    side, sent, _ = client(MODERN + reply(Opt.EXTENDED_HEADERS, refusal) + reply(Opt.STRUCTURED_REPLY) + served())
    assert numbers(sent) == [Opt.EXTENDED_HEADERS, Opt.STRUCTURED_REPLY, Opt.GO]
    assert side.agreement is not None and side.agreement.mode is ReplyMode.STRUCTURED


def test_refused_structured_replies_fall_back_to_simple_ones() -> None:
    refused = reply(Opt.EXTENDED_HEADERS, Rep.ERR_UNSUP) + reply(Opt.STRUCTURED_REPLY, Rep.ERR_UNSUP)
    side, _, _ = client(MODERN + refused + served(), contexts=["base:allocation"])
    assert side.agreement is not None and side.agreement.mode is ReplyMode.SIMPLE and not side.agreement.contexts


def test_refused_go_falls_back_to_export_name() -> None:
    answer = reply(Opt.GO, Rep.ERR_UNSUP) + options.EXPORT_NAME_ANSWER.pack(SIZE, FLAGS)
    side, sent, _ = client(MODERN + reply(Opt.STRUCTURED_REPLY) + answer, extended=False)
    assert asked(sent)[-1] == (Opt.EXPORT_NAME, b"vda")
    assert side.agreement is not None
    assert (side.agreement.mode, side.agreement.size) == (ReplyMode.STRUCTURED, SIZE)


def test_go_must_not_be_unsupported_after_extended_headers() -> None:
    side, sent, error = client(MODERN + reply(Opt.EXTENDED_HEADERS) + reply(Opt.GO, Rep.ERR_UNSUP))
    assert side.agreement is None and error is not None
    assert numbers(sent)[-1] == Opt.ABORT


@pytest.mark.parametrize("flags, zeroes", [(0, 124), (HandshakeFlag.NO_ZEROES, 0)])
def test_server_without_fixed_newstyle_is_asked_by_export_name_alone(flags: int, zeroes: int) -> None:
    answer = options.EXPORT_NAME_ANSWER.pack(SIZE, FLAGS) + bytes(zeroes)
    side, sent, _ = client(greeting(flags) + answer, contexts=["base:allocation"])
    assert asked(sent) == [(Opt.EXPORT_NAME, b"vda")]
    assert options.CLIENT_FLAGS.unpack_from(sent) == (flags,)
    assert side.agreement is not None and side.agreement.mode is ReplyMode.SIMPLE


def test_unknown_handshake_flags_are_not_echoed() -> None:
    _, sent, _ = client(greeting(0xFFFF))
    assert options.CLIENT_FLAGS.unpack_from(sent) == (3,)


# Contexts


def selected(*pairs: tuple[int, str]) -> bytes:
    items = [reply(Opt.SET_META_CONTEXT, Rep.META_CONTEXT, options.meta_context_item(*pair)) for pair in pairs]
    return b"".join(items) + reply(Opt.SET_META_CONTEXT)


def with_contexts(answer: bytes) -> tuple[ClientHandshake, bytes, str | None]:
    return client(
        MODERN + reply(Opt.STRUCTURED_REPLY) + answer + served(), extended=False, contexts=("base:allocation", "x-a:b")
    )


def test_contexts_that_the_server_has_get_their_ids() -> None:
    side, sent, _ = with_contexts(selected((0xFFFFFFFF, "x-a:b")))
    assert options.parse_meta_query(asked(sent)[1][1]) == ("vda", ("base:allocation", "x-a:b"))
    assert side.agreement is not None and side.agreement.contexts == {"x-a:b": 0xFFFFFFFF}


@pytest.mark.parametrize("refusal", [Rep.ERR_UNSUP, Rep.ERR_UNKNOWN, Rep.ERR_TOO_BIG])
def test_refused_contexts_are_done_without(refusal: Rep) -> None:
    side, _, _ = with_contexts(
        selected((1, "x-a:b"))[: -options.OPTION_REPLY.size] + reply(Opt.SET_META_CONTEXT, refusal)
    )
    assert side.agreement is not None and side.agreement.contexts == {}


@pytest.mark.parametrize(
    "pairs",
    [
        [(1, "x-other:c")],
        [(1, "x-a:b"), (2, "x-a:b")],
        [(1, "x-a:b"), (1, "base:allocation")],
    ],
)
def test_contexts_that_make_no_sense_are_a_violation(pairs: list[tuple[int, str]]) -> None:
    side, _, error = with_contexts(selected(*pairs))
    assert side.agreement is None
    assert error is not None and error.startswith("ProtocolError")


# What GO tells


def test_information_is_taken_over() -> None:
    side, _, _ = client(
        MODERN
        + reply(Opt.EXTENDED_HEADERS)
        + served(
            options.info_string(Info.NAME, "real name"),
            options.info_string(Info.DESCRIPTION, "näher"),
            options.info_block_size(BlockSizes(512, 65536, 0xFFFFFFFF)),
            b"\xff\xffunknown",
        )
    )
    assert side.agreement is not None
    told = side.agreement
    assert (told.name, told.description) == ("real name", "näher")
    assert (told.minimum_block, told.preferred_block, told.maximum_payload) == (512, 65536, 0xFFFFFFFF)


def test_without_information_the_defaults_hold() -> None:
    side, sent, _ = client(MODERN + reply(Opt.EXTENDED_HEADERS) + served())
    assert side.agreement is not None
    told = side.agreement
    assert (told.name, told.description) == ("vda", "")
    assert (told.minimum_block, told.preferred_block, told.maximum_payload) == (1, 4096, 1 << 25)
    assert Info.BLOCK_SIZE in options.parse_info_request(asked(sent)[-1][1])[1]


@pytest.mark.parametrize(
    "sizes", [(0, 4096, 1 << 25), (3, 4096, 1 << 25), (1 << 17, 1 << 17, 1 << 25), (512, 256, 512)]
)
def test_impossible_block_sizes_are_a_violation(sizes: tuple[int, int, int]) -> None:
    item = options.info_block_size(BlockSizes(*sizes))
    _, _, error = client(MODERN + reply(Opt.EXTENDED_HEADERS) + served(item))
    assert error is not None and error.startswith("ProtocolError")


# Refusals


@pytest.mark.parametrize("refusal", [Rep.ERR_UNKNOWN, Rep.ERR_POLICY, Rep.ERR_TLS_REQD, Rep.ERR_SHUTDOWN])
def test_refused_export_is_told_in_the_servers_words_and_said_goodbye_to(refusal: Rep) -> None:
    why = options.option_reply(Opt.GO, refusal, b"not for you")
    side = ClientHandshake("vda", extended=False, structured=False)
    side.receive(MODERN)
    with pytest.raises(ExportRefused, match=f"'vda': {refusal.name}: not for you") as caught:
        side.receive(why)
    assert caught.value.reply == refusal
    assert numbers(side.data_to_send())[-1] == Opt.ABORT


def test_a_servers_words_cannot_steer_a_terminal() -> None:
    why = options.option_reply(Opt.GO, Rep.ERR_POLICY, b"no\x1b[2J\nyes \xff")
    _, _, error = client(MODERN + why, extended=False, structured=False)
    assert error is not None and error.endswith("ERR_POLICY: no [2J yes \ufffd")


def test_unknown_error_reply_is_a_refusal() -> None:
    strange = options.OPTION_REPLY.pack(0x0003E889045565A9, Opt.GO, 0xFFFFFFFF, 0)
    _, _, error = client(MODERN + strange, extended=False, structured=False)
    assert error is not None and error.startswith("ExportRefused")


@pytest.mark.parametrize("number", [Opt.EXTENDED_HEADERS, Opt.STRUCTURED_REPLY])
@pytest.mark.parametrize("refusal", [Rep.ERR_SHUTDOWN, Rep.ERR_TLS_REQD])
def test_server_that_will_serve_nothing_is_left_at_once(number: Opt, refusal: Rep) -> None:
    _, sent, error = client(MODERN + reply(number, refusal), extended=number == Opt.EXTENDED_HEADERS)
    assert error is not None and error.startswith("ExportRefused")
    assert numbers(sent) == [number, Opt.ABORT]


def test_server_that_hangs_up_refuses_the_export() -> None:
    side = ClientHandshake("vda")
    side.receive(greeting(0))
    with pytest.raises(ExportRefused, match="'vda'"):
        side.connection_lost()
    with pytest.raises(ExportRefused):
        side.receive(b"x")


def test_hanging_up_after_an_error_is_that_error() -> None:
    side = ClientHandshake("vda")
    with pytest.raises(ProtocolError, match="no NBD server"):
        side.receive(b"HTTP/1.1 400 Bad Request\r\n")
    with pytest.raises(ProtocolError, match="no NBD server"):
        side.connection_lost()


@pytest.mark.parametrize("name", ["x" * 4097, "a\0b", "lone \udc80"])
def test_impossible_export_name_is_a_mistake_of_the_caller(name: str) -> None:
    with pytest.raises(ValueError, match="cannot be an export's name"):
        ClientHandshake(name)


# Violations


@pytest.mark.parametrize(
    "stream",
    [
        b"SSH-2.0-OpenSSH_9.2p1 Debian",
        options.GREETING.pack(NBDMAGIC, OLDSTYLE_MAGIC, 0),
        options.GREETING.pack(NBDMAGIC, 12345, 0),
        MODERN + bytes(20),
        MODERN + reply(Opt.GO),
        MODERN + reply(Opt.EXTENDED_HEADERS, Rep.ACK, b"x"),
        MODERN + reply(Opt.EXTENDED_HEADERS, Rep.INFO),
        MODERN + reply(Opt.EXTENDED_HEADERS) + reply(Opt.GO),
        MODERN + reply(Opt.EXTENDED_HEADERS) + reply(Opt.GO, Rep.SERVER),
        MODERN + reply(Opt.EXTENDED_HEADERS) + reply(Opt.GO, Rep.INFO, b"\0"),
        MODERN + reply(Opt.EXTENDED_HEADERS) + reply(Opt.GO, Rep.INFO, bytes(11)),
        MODERN + reply(Opt.EXTENDED_HEADERS) + reply(Opt.GO, Rep.INFO, b"\0\1\xff"),
        MODERN + reply(Opt.EXTENDED_HEADERS) + reply(Opt.GO, Rep.INFO, options.info_export(1 << 63, 1)) + reply(Opt.GO),
        MODERN + options.OPTION_REPLY.pack(0x0003E889045565A9, Opt.EXTENDED_HEADERS, 1 << 31 | 1, MAX_REPLY + 1),
    ],
)
def test_server_that_breaks_the_protocol_is_left(stream: bytes) -> None:
    side, _, error = client(stream)
    assert error is not None and error.startswith("ProtocolError")
    assert side.agreement is None


# TLS


@pytest.mark.parametrize("tls", [TlsMode.ALLOW, TlsMode.REQUIRE])
def test_tls_comes_before_everything_else(tls: TlsMode) -> None:
    side = ClientHandshake("vda", tls=tls)
    outcome = feed(side, [MODERN, reply(Opt.STARTTLS)])
    assert numbers(outcome.sent) == [Opt.STARTTLS] and side.wants_tls
    side.tls_started()
    outcome = feed(side, [reply(Opt.EXTENDED_HEADERS), served()])
    assert side.agreement is not None


def test_refused_tls_is_done_without_where_it_is_a_wish() -> None:
    stream = MODERN + reply(Opt.STARTTLS, Rep.ERR_POLICY) + reply(Opt.EXTENDED_HEADERS) + served()
    side, _, _ = client(stream, tls=TlsMode.ALLOW)
    assert side.agreement is not None and not side.tls_active


@pytest.mark.parametrize("stream", [MODERN + reply(Opt.STARTTLS, Rep.ERR_POLICY), greeting(0)])
def test_refused_tls_is_the_end_where_it_is_required(stream: bytes) -> None:
    side, _, error = client(stream, tls=TlsMode.REQUIRE)
    assert side.agreement is None
    assert error is not None and error.startswith("ExportRefused")


def test_plaintext_behind_the_servers_ack_is_refused() -> None:
    side = ClientHandshake("vda", tls=TlsMode.REQUIRE)
    with pytest.raises(ProtocolError, match="unencrypted"):
        side.receive(MODERN + reply(Opt.STARTTLS) + reply(Opt.EXTENDED_HEADERS))


# Listing


def listing(stream: bytes) -> tuple[ExportListing, bytes, str | None]:
    side, outcome = every_way(ExportListing, stream)
    return side, outcome.sent, outcome.error


def test_listing_gives_names_and_descriptions_and_says_goodbye() -> None:
    items = [("vda", "the active disk"), ("vda@monday", ""), ("", "ä")]
    answers = b"".join(reply(Opt.LIST, Rep.SERVER, options.server_item(*item)) for item in items)
    side, sent, _ = listing(MODERN + answers + reply(Opt.LIST))
    assert side.exports == tuple(items)
    assert side.closing and numbers(sent) == [Opt.LIST, Opt.ABORT]


def test_refused_listing_is_told() -> None:
    _, sent, error = listing(MODERN + reply(Opt.LIST, Rep.ERR_POLICY, b"no"))
    assert error is not None and "ERR_POLICY: no" in error
    assert numbers(sent) == [Opt.LIST, Opt.ABORT]


def test_server_that_hangs_up_lists_nothing() -> None:
    with pytest.raises(ExportRefused, match="closed the connection"):
        ExportListing().connection_lost()


def test_server_without_fixed_newstyle_cannot_list() -> None:
    _, _, error = listing(greeting(0))
    assert error is not None and error.startswith("ExportRefused")


def test_endless_listing_is_cut_off() -> None:
    side = ExportListing()
    side.receive(MODERN)
    item = reply(Opt.LIST, Rep.SERVER, options.server_item("x", ""))
    side.receive(item * MAX_EXPORTS)
    with pytest.raises(ProtocolError, match=str(MAX_EXPORTS)):
        side.receive(item)


# Contexts that are looked for

FOUND = b"".join(
    reply(Opt.LIST_META_CONTEXT, Rep.META_CONTEXT, options.meta_context_item(0, name))
    for name in ("qemu:dirty-bitmap:a", "qemu:allocation-depth")
) + reply(Opt.LIST_META_CONTEXT)


def seeker(stream: bytes) -> tuple[ClientHandshake, list[tuple[int, bytes]], str | None]:
    side, outcome = every_way(
        lambda: ClientHandshake("vda", extended=False, contexts=["x:y"], find_contexts=["qemu:dirty-bitmap:"]), stream
    )
    return side, asked(outcome.sent), outcome.error


def test_what_a_query_finds_is_selected_and_nothing_beside_it() -> None:
    selected = reply(Opt.SET_META_CONTEXT, Rep.META_CONTEXT, options.meta_context_item(7, "qemu:dirty-bitmap:a"))
    stream = MODERN + reply(Opt.STRUCTURED_REPLY) + FOUND + selected + reply(Opt.SET_META_CONTEXT) + served()
    side, sent, error = seeker(stream)
    assert error is None and side.agreement is not None
    assert side.agreement.contexts == {"qemu:dirty-bitmap:a": 7}
    assert (Opt.SET_META_CONTEXT, options.meta_query("vda", ["x:y", "qemu:dirty-bitmap:a"])) in sent


def test_a_server_that_lists_no_contexts_is_asked_for_the_others() -> None:
    refused = reply(Opt.LIST_META_CONTEXT, Rep.ERR_UNSUP)
    stream = MODERN + reply(Opt.STRUCTURED_REPLY) + refused + reply(Opt.SET_META_CONTEXT) + served()
    side, sent, error = seeker(stream)
    assert error is None and side.agreement is not None and not side.agreement.contexts
    assert (Opt.SET_META_CONTEXT, options.meta_query("vda", ["x:y"])) in sent
