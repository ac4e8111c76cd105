"""The first bytes, the client's flags, and the rules that hold for every option."""

from __future__ import annotations

import pytest

from fleecing.errors import ProtocolError
from fleecing.nbd import layouts, options
from fleecing.nbd.constants import ClientFlag, HandshakeFlag, Opt, Rep
from fleecing.nbd.handshake import MAX_CONSUMED, MAX_HELD, MAX_UNSENT, ExportInfo, ServerHandshake
from tests.nbd.talk import BOTH, CATALOG, FIXED, NO_ZEROES, VDA, Catalog, feed, go, haggle, kinds, replies


def flags(value: int) -> bytes:
    return options.CLIENT_FLAGS.pack(value)


def test_greeting_is_there_before_the_client_says_anything() -> None:
    greeting = layouts.GREETING.parse(ServerHandshake(CATALOG).data_to_send())
    assert greeting.handshake_flags == HandshakeFlag.FIXED_NEWSTYLE | HandshakeFlag.NO_ZEROES


def test_each_byte_is_to_be_sent_once() -> None:
    side = ServerHandshake(CATALOG)
    assert len(side.data_to_send()) == 18
    assert side.data_to_send() == b""


@pytest.mark.parametrize("value", [0, FIXED, NO_ZEROES, BOTH])
def test_every_known_client_flag_is_accepted(value: int) -> None:
    _, found, error = haggle(options.option(Opt.LIST), flags=value)
    assert error is None
    assert kinds(found) == [Rep.SERVER, Rep.SERVER, Rep.ACK]


@pytest.mark.parametrize("value", [4, BOTH | 1 << 31, 0xFFFFFFFF])
def test_unknown_client_flag_drops_the_client(value: int) -> None:
    _, found, error = haggle(flags=value)
    assert error is not None and "unknown client flags" in error
    assert found == []


def test_wrong_option_magic_drops_the_client() -> None:
    _, _, error = haggle(b"IHAVEOPS" + bytes(8))
    assert error is not None and "magic" in error


def test_an_error_is_raised_again_by_later_calls() -> None:
    side = ServerHandshake(CATALOG)
    with pytest.raises(ProtocolError):
        side.receive(flags(4))
    assert side.done
    with pytest.raises(ProtocolError, match="unknown client flags"):
        side.receive(b"more")


@pytest.mark.parametrize("number", [0, 4, 12, 77, 0xFFFFFFFF])
@pytest.mark.parametrize("length", [0, 1, 500, MAX_HELD, MAX_HELD + 1])
def test_unknown_option_is_unsupported_and_its_data_skipped(number: int, length: int) -> None:
    stream = flags(BOTH) + options.option(number, b"\xff" * length) + options.option(Opt.ABORT)
    outcome = feed(ServerHandshake(CATALOG), [stream])
    assert outcome.error is None
    found = replies(outcome.sent[options.GREETING.size :])
    assert [(option, reply) for option, reply, _ in found] == [(number, Rep.ERR_UNSUP), (Opt.ABORT, Rep.ACK)]


def test_error_replies_carry_a_sentence() -> None:
    _, found, _ = haggle(options.option(77))
    assert found[0][2] == b"option 77 is not supported"


@pytest.mark.parametrize("number", [Opt.INFO, Opt.GO, Opt.LIST_META_CONTEXT, Opt.SET_META_CONTEXT])
def test_data_too_long_to_hold_is_consumed_and_refused(number: Opt) -> None:
    stream = flags(BOTH) + options.option(number, bytes(MAX_HELD + 1)) + go("vda")
    side = ServerHandshake(CATALOG)
    outcome = feed(side, [stream[at : at + 1000] for at in range(0, len(stream), 1000)])
    assert kinds(replies(outcome.sent[18:])) == [Rep.ERR_TOO_BIG, Rep.INFO, Rep.ACK]
    assert side.agreement is not None


def test_data_that_is_only_consumed_is_not_held() -> None:
    side = ServerHandshake(CATALOG)
    side.receive(flags(BOTH) + options.OPTION.pack(0x49484156454F5054, Opt.INFO, MAX_CONSUMED))
    for _ in range(MAX_CONSUMED // 65536):
        side.receive(bytes(65536))
        assert len(side._incoming) == 0
    assert kinds(replies(side.data_to_send()[18:])) == [Rep.ERR_TOO_BIG]


def test_announcing_more_than_is_put_up_with_drops_the_client() -> None:
    _, found, error = haggle(options.OPTION.pack(0x49484156454F5054, Opt.INFO, MAX_CONSUMED + 1))
    assert found == []
    assert error is not None and str(MAX_CONSUMED) in error


def test_client_that_piles_up_options_without_reading_is_dropped() -> None:
    many = Catalog(*(ExportInfo(**{**vars(VDA), "name": f"disk{number}"}) for number in range(1000)))
    stream = flags(BOTH) + options.option(Opt.LIST) * 1000
    side = ServerHandshake(many)
    with pytest.raises(ProtocolError, match="without waiting"):
        side.receive(stream)
    assert len(side.data_to_send()) < 2 * MAX_UNSENT


def test_abort_is_acknowledged_and_ends_the_talk() -> None:
    side, found, error = haggle(options.option(Opt.ABORT), options.option(Opt.LIST))
    assert found == [(Opt.ABORT, Rep.ACK, b"")]
    assert side.closing and side.done and side.agreement is None and error is None


def test_abort_with_data_is_acknowledged() -> None:
    _, found, _ = haggle(options.option(Opt.ABORT, b"goodbye"))
    assert kinds(found) == [Rep.ACK]


def test_several_options_in_a_row_are_answered_in_order() -> None:
    side, found, _ = haggle(options.option(99), options.option(Opt.STRUCTURED_REPLY), go("vda"))
    assert [option for option, _, _ in found] == [99, Opt.STRUCTURED_REPLY, Opt.GO, Opt.GO]
    assert side.agreement is not None


def test_shutdown_refuses_all_but_abort() -> None:
    side = ServerHandshake(CATALOG)
    side.shutting_down = True
    stream = [options.option(number) for number in (Opt.LIST, Opt.GO, Opt.STARTTLS, 77, Opt.ABORT)]
    outcome = feed(side, [flags(int(ClientFlag.C_FIXED_NEWSTYLE)), *stream])
    assert kinds(replies(outcome.sent[18:])) == [Rep.ERR_SHUTDOWN] * 4 + [Rep.ACK]


def test_shutdown_drops_a_client_that_cannot_be_told() -> None:
    side = ServerHandshake(CATALOG)
    side.shutting_down = True
    outcome = feed(side, [flags(BOTH), options.option(Opt.EXPORT_NAME, b"vda")])
    assert outcome.error is not None and "ERR_SHUTDOWN" in outcome.error
