"""NOTLS, SELECTIVETLS and FORCEDTLS ("TLS support"): who is told what before TLS, and what is forgotten."""

from __future__ import annotations

import pytest

from fleecing.errors import ProtocolError
from fleecing.nbd import options
from fleecing.nbd.constants import Info, Opt, Rep, ReplyMode
from fleecing.nbd.handshake import ServerHandshake, TlsMode
from tests.nbd.talk import (
    BOTH,
    MONDAY,
    NO_ZEROES,
    SECRET,
    TAIL,
    VDA,
    Catalog,
    feed,
    go,
    haggle,
    info,
    kinds,
    meta,
    replies,
)

STARTTLS = options.option(Opt.STARTTLS)
WITH_SECRET = Catalog(VDA, SECRET, MONDAY)


def under_tls(tls: TlsMode = TlsMode.ALLOW, *before: bytes) -> ServerHandshake:
    """A side whose client has just brought TLS up."""
    side = ServerHandshake(WITH_SECRET, tls=tls)
    outcome = feed(side, [options.CLIENT_FLAGS.pack(BOTH), *before, STARTTLS])
    assert replies(outcome.sent[18:])[-1] == (Opt.STARTTLS, Rep.ACK, b"")
    assert side.wants_tls
    side.tls_started()
    return side


def ask(side: ServerHandshake, *sent: bytes) -> list[Rep]:
    outcome = feed(side, sent)
    assert outcome.error is None
    return kinds(replies(outcome.sent))


# NOTLS


def test_without_tls_starttls_is_refused_by_policy() -> None:
    side, found, _ = haggle(STARTTLS, go("vda"))
    assert kinds(found) == [Rep.ERR_POLICY, Rep.INFO, Rep.ACK]
    assert not side.wants_tls and side.agreement is not None


def test_without_tls_nothing_is_told_to_require_it() -> None:
    _, found, _ = haggle(go("secret"), info(Opt.INFO, "secret"), options.option(77), catalog=WITH_SECRET)
    assert kinds(found) == [Rep.ERR_UNKNOWN, Rep.ERR_UNKNOWN, Rep.ERR_UNSUP]


# FORCEDTLS


@pytest.mark.parametrize("number", [*(set(Opt) - {Opt.STARTTLS, Opt.ABORT, Opt.EXPORT_NAME}), 77])
def test_required_tls_refuses_every_option_before_it(number: int) -> None:
    _, found, _ = haggle(options.option(number, options.info_request("vda", list(Info))), tls=TlsMode.REQUIRE)
    assert kinds(found) == [Rep.ERR_TLS_REQD]


def test_required_tls_lets_a_client_go() -> None:
    side, found, _ = haggle(options.option(Opt.ABORT), tls=TlsMode.REQUIRE)
    assert kinds(found) == [Rep.ACK] and side.closing


@pytest.mark.parametrize("name", [b"vda", b"nosuch"])
def test_required_tls_drops_export_name_before_it(name: bytes) -> None:
    _, found, error = haggle(options.option(Opt.EXPORT_NAME, name), tls=TlsMode.REQUIRE)
    assert found == []
    assert error is not None and "ERR_TLS_REQD" in error


def test_required_tls_serves_all_under_tls() -> None:
    side = under_tls(TlsMode.REQUIRE)
    assert ask(side, options.option(Opt.LIST), go("secret")) == [Rep.SERVER] * 3 + [Rep.ACK, Rep.INFO, Rep.ACK]
    assert side.agreement is not None and side.agreement.export is SECRET


def test_required_tls_drops_a_client_that_cannot_start_it() -> None:
    _, found, error = haggle(flags=NO_ZEROES, tls=TlsMode.REQUIRE)
    assert found == []
    assert error is not None and "C_FIXED_NEWSTYLE" in error


# SELECTIVETLS


def test_allowed_tls_serves_open_exports_without_it() -> None:
    side, found, _ = haggle(options.option(Opt.LIST), go("vda"), catalog=WITH_SECRET, tls=TlsMode.ALLOW)
    assert [options.parse_server_item(data)[0] for _, reply, data in found if reply == Rep.SERVER] == [
        "vda",
        "vda@monday",
    ]
    assert side.agreement is not None


@pytest.mark.parametrize("number", [Opt.INFO, Opt.GO])
def test_allowed_tls_is_required_for_an_export_that_needs_it(number: Opt) -> None:
    _, found, _ = haggle(info(number, "secret", *Info), catalog=WITH_SECRET, tls=TlsMode.ALLOW)
    assert kinds(found) == [Rep.ERR_TLS_REQD]


def test_allowed_tls_hides_such_an_export_from_other_options() -> None:
    _, found, _ = haggle(
        options.option(Opt.STRUCTURED_REPLY),
        meta(Opt.LIST_META_CONTEXT, "secret"),
        meta(Opt.SET_META_CONTEXT, "secret"),
        catalog=WITH_SECRET,
        tls=TlsMode.ALLOW,
    )
    assert kinds(found) == [Rep.ACK, Rep.ERR_UNKNOWN, Rep.ERR_UNKNOWN]


def test_allowed_tls_drops_export_name_of_such_an_export() -> None:
    _, _, error = haggle(options.option(Opt.EXPORT_NAME, b"secret"), catalog=WITH_SECRET, tls=TlsMode.ALLOW)
    assert error is not None


def test_allowed_tls_is_not_for_clients_without_fixed_newstyle() -> None:
    _, found, _ = haggle(STARTTLS, flags=NO_ZEROES, tls=TlsMode.ALLOW)
    assert kinds(found) == [Rep.ERR_POLICY]


# Starting it


def test_tls_is_wanted_once() -> None:
    side = under_tls()
    assert side.tls_active and not side.wants_tls


def test_starting_tls_forgets_all_that_was_agreed() -> None:
    side = under_tls(
        TlsMode.ALLOW, options.option(Opt.EXTENDED_HEADERS), meta(Opt.SET_META_CONTEXT, "vda", "base:allocation")
    )
    ask(side, go("vda"))
    assert side.agreement is not None
    assert side.agreement.mode is ReplyMode.SIMPLE and side.agreement.contexts == ()


def test_selection_before_tls_does_not_count_after_it() -> None:
    side = under_tls(
        TlsMode.ALLOW, options.option(Opt.STRUCTURED_REPLY), meta(Opt.SET_META_CONTEXT, "vda", "base:allocation")
    )
    ask(side, options.option(Opt.STRUCTURED_REPLY), go("vda"))
    assert side.agreement is not None and side.agreement.contexts == ()


def test_starttls_under_tls_is_invalid() -> None:
    assert ask(under_tls(), STARTTLS) == [Rep.ERR_INVALID]


def test_starttls_with_data_is_invalid() -> None:
    _, found, _ = haggle(options.option(Opt.STARTTLS, b"x"), tls=TlsMode.ALLOW)
    assert kinds(found) == [Rep.ERR_INVALID]


@pytest.mark.parametrize("injected", [go("vda"), TAIL, b"\x16"])
def test_plaintext_behind_starttls_drops_the_client(injected: bytes) -> None:
    side = ServerHandshake(WITH_SECRET, tls=TlsMode.ALLOW)
    side.receive(options.CLIENT_FLAGS.pack(BOTH))
    side.data_to_send()
    with pytest.raises(ProtocolError, match="unencrypted"):
        side.receive(STARTTLS + injected)
    assert side.data_to_send() == b"" and not side.wants_tls


def test_plaintext_that_comes_instead_of_tls_drops_the_client() -> None:
    side = ServerHandshake(WITH_SECRET, tls=TlsMode.ALLOW)
    side.receive(options.CLIENT_FLAGS.pack(BOTH) + STARTTLS)
    with pytest.raises(ProtocolError, match="unencrypted"):
        side.receive(go("vda"))
    assert side.agreement is None
