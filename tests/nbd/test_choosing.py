"""EXPORT_NAME, INFO, GO and LIST: what is told of an export, and what is agreed when it is chosen."""

from __future__ import annotations

import struct
from dataclasses import replace

import pytest

from fleecing.nbd import layouts, options
from fleecing.nbd.constants import Info, Opt, Rep, ReplyMode, TransmissionFlag
from fleecing.nbd.handshake import MAX_HELD, ServerHandshake
from tests.nbd.talk import (
    BOTH,
    CATALOG,
    FIXED,
    MONDAY,
    NO_ZEROES,
    VDA,
    Catalog,
    every_way,
    feed,
    go,
    haggle,
    info,
    kinds,
    meta,
)


def export_name(name: bytes, flags: int) -> tuple[ServerHandshake, bytes, str | None]:
    stream = options.CLIENT_FLAGS.pack(flags) + options.option(Opt.EXPORT_NAME, name)
    side, outcome = every_way(lambda: ServerHandshake(CATALOG), stream)
    return side, outcome.sent[18:], outcome.error


def items(found: list[tuple[int, int, bytes]]) -> dict[int, bytes]:
    """The information items by type, as raw data."""
    return {struct.unpack_from(">H", data)[0]: data for _, reply, data in found if reply == Rep.INFO}


# EXPORT_NAME


@pytest.mark.parametrize("flags", [0, FIXED])
def test_export_name_is_answered_with_124_zeroes(flags: int) -> None:
    side, sent, _ = export_name(b"vda", flags)
    answer = layouts.EXPORT_NAME_ANSWER_WITH_ZEROES.parse(sent)
    assert len(sent) == 134
    assert (answer.size, answer.transmission_flags) == (VDA.size, VDA.flags)
    assert side.agreement is not None and side.agreement.export is VDA


@pytest.mark.parametrize("flags", [NO_ZEROES, BOTH])
def test_export_name_is_answered_without_zeroes_where_agreed(flags: int) -> None:
    _, sent, _ = export_name(b"vda", flags)
    assert sent == struct.pack(">QH", VDA.size, VDA.flags)


def test_empty_export_name_is_the_default_export() -> None:
    side, _, _ = export_name(b"", BOTH)
    assert side.agreement is not None and side.agreement.export.name == "vda"


@pytest.mark.parametrize("name", [b"nosuch", b"\xff", b"vda\0", b"x" * 4097])
def test_export_name_that_cannot_be_satisfied_drops_the_client(name: bytes) -> None:
    side, sent, error = export_name(name, BOTH)
    assert sent == b"" and side.agreement is None
    assert error is not None and "EXPORT_NAME cannot be satisfied" in error


def test_export_name_too_long_to_hold_drops_the_client() -> None:
    stream = options.CLIENT_FLAGS.pack(BOTH) + options.option(Opt.EXPORT_NAME, b"x" * (MAX_HELD + 1))
    assert "ERR_TOO_BIG" in str(feed(ServerHandshake(CATALOG), [stream]).error)


def test_export_name_after_structured_replies_keeps_them() -> None:
    side, _, _ = agree(options.option(Opt.STRUCTURED_REPLY), options.option(Opt.EXPORT_NAME, b"vda"))
    assert side.agreement is not None and side.agreement.mode is ReplyMode.STRUCTURED
    assert TransmissionFlag.SEND_DF in side.agreement.flags


def test_export_name_after_extended_headers_drops_the_client() -> None:
    side, _, error = agree(options.option(Opt.EXTENDED_HEADERS), options.option(Opt.EXPORT_NAME, b"vda"))
    assert side.agreement is None
    assert error is not None and "EXTENDED_HEADERS" in error


def agree(*sent: bytes) -> tuple[ServerHandshake, bytes, str | None]:
    """As haggle, for streams that end in an answer without a reply header."""
    stream = options.CLIENT_FLAGS.pack(BOTH) + b"".join(sent)
    side, outcome = every_way(lambda: ServerHandshake(CATALOG), stream)
    return side, outcome.sent, outcome.error


# INFO and GO


def test_go_tells_the_export_and_begins_the_transmission() -> None:
    side, found, _ = haggle(go("vda"))
    assert kinds(found) == [Rep.INFO, Rep.ACK]
    assert found[0][2] == struct.pack(">HQH", 0, VDA.size, VDA.flags)
    assert side.done and side.agreement is not None
    assert side.agreement.mode is ReplyMode.SIMPLE and side.agreement.contexts == ()


def test_go_with_all_items_tells_them_all() -> None:
    _, found, _ = haggle(go("vda", *Info))
    told = items(found)
    assert told[Info.NAME][2:] == b"vda"
    assert told[Info.DESCRIPTION][2:] == b"the active disk"
    assert told[Info.BLOCK_SIZE] == struct.pack(">HIII", 3, 1, 65536, 1 << 26)
    assert set(told) == set(Info)


def test_an_empty_description_is_not_told() -> None:
    _, found, _ = haggle(go("vda@monday", *Info))
    assert set(items(found)) == set(Info) - {Info.DESCRIPTION}


def test_name_of_the_default_export_is_the_real_one() -> None:
    side, found, _ = haggle(go("", Info.NAME))
    assert items(found)[Info.NAME][2:] == b"vda"
    assert side.agreement is not None and side.agreement.export.name == "vda"


def test_unknown_items_are_ignored() -> None:
    _, found, _ = haggle(options.option(Opt.GO, options.info_request("vda", [4, 999, 0xFFFF])))
    assert kinds(found) == [Rep.INFO, Rep.ACK]


def test_most_items_that_the_format_allows_are_accepted() -> None:
    stream = options.CLIENT_FLAGS.pack(BOTH) + options.option(Opt.GO, options.info_request("vda", range(65535)))
    side = ServerHandshake(CATALOG)
    side.receive(stream)
    assert side.agreement is not None


def test_info_stays_in_the_handshake_and_go_tells_the_same() -> None:
    side, found, _ = haggle(info(Opt.INFO, "vda", *Info), go("vda", *Info))
    assert [data for option, _, data in found if option == Opt.INFO] == [
        data for option, _, data in found if option == Opt.GO
    ]
    assert side.agreement is not None


@pytest.mark.parametrize("number", [Opt.INFO, Opt.GO])
def test_unknown_export_is_refused_without_information(number: Opt) -> None:
    side, found, _ = haggle(info(number, "nosuch", *Info))
    assert found == [(number, Rep.ERR_UNKNOWN, b"there is no export 'nosuch'")]
    assert side.agreement is None and not side.done


def test_default_export_of_an_empty_catalog_is_unknown() -> None:
    _, found, _ = haggle(go(""), catalog=Catalog())
    assert kinds(found) == [Rep.ERR_UNKNOWN]


def test_go_may_be_tried_again_after_a_refusal() -> None:
    side, found, _ = haggle(go("nosuch"), go("vda"))
    assert kinds(found) == [Rep.ERR_UNKNOWN, Rep.INFO, Rep.ACK]
    assert side.agreement is not None


def test_name_of_4096_bytes_is_looked_up_and_a_longer_one_is_invalid() -> None:
    long = Catalog(replace(VDA, name="x" * 4096))
    _, found, _ = haggle(go("x" * 4097), go("x" * 4096), catalog=long)
    assert kinds(found) == [Rep.ERR_INVALID, Rep.INFO, Rep.ACK]


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0\0\0",
        b"\0\0\0\3vda",  # no number of items
        b"\0\0\0\3vda\0",
        b"\0\0\0\4vda\0\0",  # a name longer than the data less 6
        b"\xff\xff\xff\xffvda\0\0",
        b"\0\0\0\3vda\0\1",  # an item is missing
        b"\0\0\0\3vda\0\1\0",
        b"\0\0\0\3vda\0\0\0",  # something follows
        b"\0\0\0\3v\0a\0\0",
        b"\0\0\0\3v\xffa\0\0",
    ],
)
@pytest.mark.parametrize("number", [Opt.INFO, Opt.GO])
def test_malformed_info_and_go_are_invalid(number: Opt, data: bytes) -> None:
    _, found, error = haggle(options.option(number, data), go("vda"))
    assert error is None
    assert kinds(found) == [Rep.ERR_INVALID, Rep.INFO, Rep.ACK]


# Flags


@pytest.mark.parametrize(
    "prepare, added",
    [
        ([], TransmissionFlag(0)),
        ([options.option(Opt.STRUCTURED_REPLY)], TransmissionFlag.SEND_DF),
        ([options.option(Opt.EXTENDED_HEADERS)], TransmissionFlag.SEND_DF),
        (
            [options.option(Opt.STRUCTURED_REPLY), meta(Opt.SET_META_CONTEXT, "vda", "base:allocation")],
            TransmissionFlag.SEND_DF,
        ),
        (
            [options.option(Opt.EXTENDED_HEADERS), meta(Opt.SET_META_CONTEXT, "vda", "base:allocation")],
            TransmissionFlag.SEND_DF | TransmissionFlag.BLOCK_STATUS_PAYLOAD,
        ),
    ],
)
def test_flags_that_depend_on_the_mode_are_added_where_they_hold(prepare: list[bytes], added: TransmissionFlag) -> None:
    side, found, _ = haggle(*prepare, go("vda"))
    assert side.agreement is not None
    assert side.agreement.flags == VDA.flags | added
    assert items(found)[Info.EXPORT] == struct.pack(">HQH", 0, VDA.size, VDA.flags | added)


def test_flags_that_do_not_hold_are_taken_away() -> None:
    wrong = TransmissionFlag.SEND_DF | TransmissionFlag.BLOCK_STATUS_PAYLOAD | TransmissionFlag.SEND_FAST_ZERO
    side, _, _ = haggle(go("vda"), catalog=Catalog(replace(VDA, flags=wrong)))
    assert side.agreement is not None and side.agreement.flags == TransmissionFlag.HAS_FLAGS


def test_fast_zero_is_told_beside_write_zeroes() -> None:
    both = VDA.flags | TransmissionFlag.SEND_FAST_ZERO | TransmissionFlag.SEND_WRITE_ZEROES
    side, _, _ = haggle(go("vda"), catalog=Catalog(replace(VDA, flags=both)))
    assert side.agreement is not None and side.agreement.flags == both


def test_an_export_may_refuse_writes_without_telling_so() -> None:
    side, _, _ = haggle(go("vda"), catalog=Catalog(replace(VDA, writable=False)))
    assert side.agreement is not None
    assert TransmissionFlag.READ_ONLY not in side.agreement.flags and not side.agreement.limits().writable


def test_the_agreement_knows_its_limits() -> None:
    side, _, _ = haggle(
        options.option(Opt.EXTENDED_HEADERS),
        meta(Opt.SET_META_CONTEXT, "vda@monday", "base:allocation"),
        go("vda@monday"),
    )
    assert side.agreement is not None
    limits = side.agreement.limits()
    assert (limits.size, limits.mode, limits.maximum_payload) == (MONDAY.size, ReplyMode.EXTENDED, 1 << 26)
    assert limits.contexts and limits.flags == side.agreement.flags and limits.minimum_block == 1


# LIST


def test_list_tells_names_and_descriptions() -> None:
    _, found, _ = haggle(options.option(Opt.LIST))
    assert [options.parse_server_item(data) for _, _, data in found[:-1]] == [
        ("vda", "the active disk"),
        ("vda@monday", ""),
    ]
    assert found[-1] == (Opt.LIST, Rep.ACK, b"")


def test_list_of_nothing_is_an_ack() -> None:
    _, found, _ = haggle(options.option(Opt.LIST), catalog=Catalog())
    assert kinds(found) == [Rep.ACK]


@pytest.mark.parametrize("number", [Opt.LIST, Opt.STARTTLS, Opt.STRUCTURED_REPLY, Opt.EXTENDED_HEADERS])
def test_data_where_there_must_be_none_is_invalid(number: Opt) -> None:
    _, found, _ = haggle(options.option(number, b"x"), go("vda"))
    assert kinds(found)[0] == Rep.ERR_INVALID
    assert kinds(found)[-1] == Rep.ACK


# Reply modes


def test_structured_replies_may_be_asked_twice() -> None:
    side, found, _ = haggle(options.option(Opt.STRUCTURED_REPLY), options.option(Opt.STRUCTURED_REPLY), go("vda"))
    assert kinds(found)[:2] == [Rep.ACK, Rep.ACK]
    assert side.agreement is not None and side.agreement.mode is ReplyMode.STRUCTURED


def test_extended_headers_need_no_structured_replies_and_win_over_them() -> None:
    for before in ([], [options.option(Opt.STRUCTURED_REPLY)]):
        side, found, _ = haggle(*before, options.option(Opt.EXTENDED_HEADERS), go("vda"))
        assert Rep.ERR_EXT_HEADER_REQD not in kinds(found)
        assert side.agreement is not None and side.agreement.mode is ReplyMode.EXTENDED


def test_structured_replies_after_extended_headers_are_refused() -> None:
    side, found, _ = haggle(options.option(Opt.EXTENDED_HEADERS), options.option(Opt.STRUCTURED_REPLY), go("vda"))
    assert kinds(found)[1] == Rep.ERR_EXT_HEADER_REQD
    assert side.agreement is not None and side.agreement.mode is ReplyMode.EXTENDED
