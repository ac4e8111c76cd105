"""LIST_META_CONTEXT and SET_META_CONTEXT ("Metadata querying")."""

from __future__ import annotations

import pytest

from fleecing.nbd import options
from fleecing.nbd.constants import Opt, Rep
from fleecing.nbd.handshake import MAX_HELD, ServerHandshake
from tests.nbd.talk import BOTH, CATALOG, MONDAY, Reply, feed, go, haggle, kinds, meta, replies

STRUCTURED = options.option(Opt.STRUCTURED_REPLY)


def told(found: list[Reply], number: Opt) -> list[tuple[int, str]]:
    """The (id, name) pairs in answer to the option."""
    return [
        options.parse_meta_context_item(data)
        for option, reply, data in found
        if (option, reply) == (number, Rep.META_CONTEXT)
    ]


def listed(*queries: str) -> list[str]:
    _, found, _ = haggle(STRUCTURED, meta(Opt.LIST_META_CONTEXT, "vda@monday", *queries))
    assert found[-1] == (Opt.LIST_META_CONTEXT, Rep.ACK, b"")
    pairs = told(found, Opt.LIST_META_CONTEXT)
    assert all(number == 0 for number, _ in pairs)
    return [name for _, name in pairs]


def selected(*queries: str) -> tuple[tuple[int, str], ...]:
    side, found, _ = haggle(STRUCTURED, meta(Opt.SET_META_CONTEXT, "vda@monday", *queries), go("vda@monday"))
    assert side.agreement is not None
    assert tuple(told(found, Opt.SET_META_CONTEXT)) == side.agreement.contexts
    return side.agreement.contexts


@pytest.mark.parametrize(
    "queries, expected",
    [
        ([], list(MONDAY.contexts)),
        (["base:allocation"], ["base:allocation"]),
        (["base:"], ["base:allocation"]),
        (["qemu:"], ["qemu:allocation-depth", "qemu:dirty-bitmap:backup"]),
        (["qemu:dirty-bitmap:"], ["qemu:dirty-bitmap:backup"]),
        (["fleecing:", "base:", "base:allocation"], ["base:allocation", "fleecing:cluster-state"]),
        (["base:nosuch"], []),
        (["x-unknown:thing"], []),
        (["nocolon"], []),
        ([""], []),
        ([":"], []),
    ],
)
def test_list_tells_what_matches_any_query(queries: list[str], expected: list[str]) -> None:
    assert listed(*queries) == expected


@pytest.mark.parametrize(
    "queries, expected",
    [
        ([], []),
        (["base:allocation"], ["base:allocation"]),
        (["base:"], []),
        (["qemu:dirty-bitmap:"], []),
        (["base:allocation", "base:allocation"], ["base:allocation"]),
        (["qemu:allocation-depth", "x-unknown:", "base:allocation"], ["qemu:allocation-depth", "base:allocation"]),
        (["nocolon", "", ":", "base:nosuch"], []),
    ],
)
def test_set_selects_exact_names_in_the_order_asked(queries: list[str], expected: list[str]) -> None:
    contexts = selected(*queries)
    assert [name for _, name in contexts] == expected
    assert len({number for number, _ in contexts}) == len(expected)


def test_list_is_answered_without_structured_replies() -> None:
    _, found, _ = haggle(meta(Opt.LIST_META_CONTEXT, "vda"))
    assert kinds(found) == [Rep.META_CONTEXT, Rep.META_CONTEXT, Rep.ACK]


def test_set_without_structured_replies_is_invalid() -> None:
    _, found, _ = haggle(meta(Opt.SET_META_CONTEXT, "vda", "base:allocation"))
    assert kinds(found) == [Rep.ERR_INVALID]


def test_set_after_extended_headers_needs_no_structured_replies() -> None:
    side, _, _ = haggle(
        options.option(Opt.EXTENDED_HEADERS), meta(Opt.SET_META_CONTEXT, "vda", "base:allocation"), go("vda")
    )
    assert side.agreement is not None and [name for _, name in side.agreement.contexts] == ["base:allocation"]


def test_selection_is_kept_when_extended_headers_come_later() -> None:
    side, _, _ = haggle(
        STRUCTURED,
        meta(Opt.SET_META_CONTEXT, "vda", "base:allocation"),
        options.option(Opt.EXTENDED_HEADERS),
        go("vda"),
    )
    assert side.agreement is not None and len(side.agreement.contexts) == 1


@pytest.mark.parametrize("number", [Opt.LIST_META_CONTEXT, Opt.SET_META_CONTEXT])
def test_unknown_export_is_refused(number: Opt) -> None:
    _, found, _ = haggle(STRUCTURED, meta(number, "nosuch"))
    assert kinds(found) == [Rep.ACK, Rep.ERR_UNKNOWN]


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0\0\0\3vda",
        b"\0\0\0\3vda\0\0\0",
        b"\0\0\0\7vda\0\0\0\0",  # the name swallows the number of queries
        b"\0\0\0\3vda\0\0\0\1",
        b"\0\0\0\3vda\xff\xff\xff\xff",
        b"\0\0\0\3vda\0\0\0\1\0\0\0\5base",
        b"\0\0\0\3vda\0\0\0\1\0\0\0\1b!",  # something follows
        b"\0\0\0\3vda\0\0\0\1\0\0\0\1\0",
        b"\0\0\0\3vda\0\0\0\1\0\0\0\1\xff",
        b"\0\0\0\3vda\0\0\0\1\0\0\x10\1" + b"q" * 4097,
    ],
)
@pytest.mark.parametrize("number", [Opt.LIST_META_CONTEXT, Opt.SET_META_CONTEXT])
def test_malformed_queries_are_invalid(number: Opt, data: bytes) -> None:
    _, found, error = haggle(STRUCTURED, options.option(number, data), go("vda"))
    assert error is None
    assert kinds(found) == [Rep.ACK, Rep.ERR_INVALID, Rep.INFO, Rep.ACK]


@pytest.mark.parametrize(
    "second",
    [
        meta(Opt.SET_META_CONTEXT, "vda"),
        meta(Opt.SET_META_CONTEXT, "vda", "base:nosuch"),
        meta(Opt.SET_META_CONTEXT, "nosuch", "base:allocation"),
        options.option(Opt.SET_META_CONTEXT, b"nonsense"),
        meta(Opt.SET_META_CONTEXT, "vda@monday", "base:allocation"),
    ],
)
def test_new_selection_replaces_the_old_one_also_when_it_fails(second: bytes) -> None:
    side, _, _ = haggle(STRUCTURED, meta(Opt.SET_META_CONTEXT, "vda", "base:allocation"), second, go("vda"))
    assert side.agreement is not None and side.agreement.contexts == ()


def test_selection_too_long_to_hold_replaces_the_old_one_too() -> None:
    side = ServerHandshake(CATALOG)
    first = meta(Opt.SET_META_CONTEXT, "vda", "base:allocation")
    second = options.option(Opt.SET_META_CONTEXT, bytes(MAX_HELD + 1))
    outcome = feed(side, [options.CLIENT_FLAGS.pack(BOTH), STRUCTURED, first, second, go("vda")])
    assert Rep.ERR_TOO_BIG in kinds(replies(outcome.sent[18:]))
    assert side.agreement is not None and side.agreement.contexts == ()


def test_list_in_between_changes_no_selection() -> None:
    side, _, _ = haggle(
        STRUCTURED,
        meta(Opt.SET_META_CONTEXT, "vda", "base:allocation"),
        meta(Opt.LIST_META_CONTEXT, "vda@monday"),
        go("vda"),
    )
    assert side.agreement is not None and len(side.agreement.contexts) == 1


def test_selection_for_the_default_export_counts_under_its_real_name() -> None:
    side, _, _ = haggle(STRUCTURED, meta(Opt.SET_META_CONTEXT, "", "base:allocation"), go("vda"))
    assert side.agreement is not None and len(side.agreement.contexts) == 1


def test_selection_counts_for_export_name_too() -> None:
    stream = b"".join(
        (
            options.CLIENT_FLAGS.pack(BOTH),
            STRUCTURED,
            meta(Opt.SET_META_CONTEXT, "vda", "base:allocation"),
            options.option(Opt.EXPORT_NAME, b"vda"),
        )
    )
    side = ServerHandshake(CATALOG)
    side.receive(stream)
    assert side.agreement is not None and len(side.agreement.contexts) == 1
