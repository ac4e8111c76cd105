"""Strangers: whatever bytes come, an answer or a clean end; fixed memory; in step as long as the talk goes on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleecing.errors import ProtocolError, RequestError
from fleecing.nbd import options
from fleecing.nbd.client_handshake import ClientHandshake, ExportListing, ExportRefused
from fleecing.nbd.constants import REP_FLAG_ERROR, Info, Opt, Rep, ReplyMode
from fleecing.nbd.conversation import Conversation
from fleecing.nbd.handshake import MAX_HELD, MAX_UNSENT, ServerHandshake, TlsMode
from fleecing.nbd.transmission import RequestLimits, check_request, status_payload
from tests.nbd.talk import BOTH, CATALOG, SECRET, VDA, Catalog, go, info, meta, replies

FLAGS = options.CLIENT_FLAGS.pack(BOTH)
PROBE = 0x7E57
"""An option that no server knows: the answer to it shows whether the stream is in step."""

CLIENT_STREAM = b"".join(
    (
        FLAGS,
        options.option(Opt.LIST),
        options.option(Opt.STRUCTURED_REPLY),
        meta(Opt.LIST_META_CONTEXT, "vda"),
        meta(Opt.SET_META_CONTEXT, "vda", "base:allocation", "qemu:"),
        info(Opt.INFO, "vda", *Info),
        options.option(99, b"data"),
        options.option(Opt.EXTENDED_HEADERS),
        go("vda", Info.BLOCK_SIZE),
    )
)
"""A recording: what a thorough client says."""


def record_server(client: Conversation) -> bytes:
    """A recording: what our server says to that client."""
    server = ServerHandshake(CATALOG)
    said = b""
    while data := server.data_to_send():
        said += data
        client.receive(data)
        server.receive(client.data_to_send())
    return said


def thorough_client() -> ClientHandshake:
    return ClientHandshake("vda", contexts=["base:allocation", "x-no:such", "qemu:allocation-depth"])


def damaged(stream: bytes) -> Iterator[bytes]:
    """The stream with each byte in turn replaced by values that change lengths and numbers most."""
    for at, old in enumerate(stream):
        for new in {0, 1, 0xFF, 0x80, old ^ 1, (old + 1) & 0xFF} - {old}:
            yield stream[:at] + bytes([new]) + stream[at + 1 :]


def survives(side: Conversation, data: bytes) -> None:
    """Only the errors that are meant to come, and nothing kept that need not be."""
    try:
        side.receive(data)
    except (ProtocolError, ExportRefused):
        assert side.done
        assert side.leftover == b""
    else:
        assert len(side._incoming) <= len(data)
    assert len(side._outgoing) < MAX_UNSENT


def test_server_survives_every_damaged_byte() -> None:
    for stream in damaged(CLIENT_STREAM):
        survives(ServerHandshake(CATALOG), stream)


@pytest.mark.parametrize("make", [thorough_client, ExportListing])
def test_client_survives_every_damaged_byte(make: Callable[[], Conversation]) -> None:
    for stream in damaged(record_server(make())):
        survives(make(), stream)


@pytest.mark.parametrize("tls", TlsMode)
def test_server_survives_an_end_at_every_byte(tls: TlsMode) -> None:
    for end in range(len(CLIENT_STREAM)):
        side = ServerHandshake(CATALOG, tls=tls)
        side.receive(CLIENT_STREAM[:end])
        assert side.agreement is None and not side.closing


pieces = st.lists(st.binary(max_size=600), max_size=8)


@given(pieces=pieces, flags=st.sampled_from([b"", FLAGS, options.CLIENT_FLAGS.pack(0)]), tls=st.sampled_from(TlsMode))
def test_server_survives_bytes_at_random(pieces: list[bytes], flags: bytes, tls: TlsMode) -> None:
    side = ServerHandshake(CATALOG, tls=tls)
    for piece in [flags, *pieces]:
        try:
            side.receive(piece)
        except ProtocolError:
            return


@given(pieces=pieces, start=st.integers(0, 300))
def test_client_survives_bytes_at_random(pieces: list[bytes], start: int) -> None:
    side = thorough_client()
    for piece in [record_server(thorough_client())[:start], *pieces]:
        try:
            side.receive(piece)
        except (ProtocolError, ExportRefused):
            return


# Options at random: every one gets its one final reply, and the stream stays in step

known_names = st.sampled_from(["", "vda", "vda@monday", "secret", "nosuch"])
queries = st.lists(st.sampled_from(["base:", "base:allocation", "qemu:", "x-a:b", "", "q" * 5000]), max_size=5)
one_option = st.one_of(
    st.builds(options.option, st.integers(0, 20).filter(lambda n: n not in (1, 2, 5, 7)), st.binary(max_size=300)),
    st.builds(options.option, st.integers(12, 2**32 - 1), st.sampled_from([b"", bytes(MAX_HELD + 1)])),
    st.builds(options.option, st.sampled_from([Opt.LIST, Opt.STRUCTURED_REPLY, Opt.EXTENDED_HEADERS, Opt.PEEK_EXPORT])),
    st.builds(lambda name, items: info(Opt.INFO, name, *items), known_names, st.lists(st.sampled_from(Info))),
    st.builds(
        lambda number, name, asked: meta(number, name, *asked),
        st.sampled_from([Opt.LIST_META_CONTEXT, Opt.SET_META_CONTEXT]),
        known_names,
        queries,
    ),
    st.just(go("nosuch", *Info)),
)


@given(
    sent=st.lists(one_option, max_size=12),
    tls=st.sampled_from(TlsMode),
    cut=st.integers(1, 100),
)
def test_every_option_gets_one_final_reply(sent: list[bytes], tls: TlsMode, cut: int) -> None:
    side = ServerHandshake(Catalog(VDA, SECRET), tls=tls)
    stream = FLAGS + b"".join(sent) + options.option(PROBE)
    answered = b""
    for at in range(0, len(stream), cut * 97):
        side.receive(stream[at : at + cut * 97])
        answered += side.data_to_send()
    found = replies(answered[options.GREETING.size :])
    final = [option for option, reply, _ in found if reply == Rep.ACK or reply & REP_FLAG_ERROR]
    asked = [options.OPTION.unpack_from(message)[1] for message in sent]
    assert final == [*asked, PROBE]
    if tls is not TlsMode.REQUIRE:
        assert found[-1][:2] == (PROBE, Rep.ERR_UNSUP)


# Transmission

modes = st.sampled_from(ReplyMode)
u64 = st.integers(0, 2**64 - 1)


@given(
    mode=modes,
    size=st.integers(0, 2**63 - 1),
    exponent=st.integers(0, 16),
    told=st.integers(0, 2**13 - 1),
    command=st.integers(0, 2**16 - 1) | st.integers(0, 10),
    flags=st.integers(0, 2**16 - 1) | st.integers(0, 63),
    offset=u64,
    length=u64,
    contexts=st.booleans(),
)
def test_any_request_is_served_or_refused(
    mode: ReplyMode,
    size: int,
    exponent: int,
    told: int,
    command: int,
    flags: int,
    offset: int,
    length: int,
    contexts: bool,
) -> None:
    described = replace(VDA, size=size, minimum_block=1 << exponent, flags=type(VDA.flags)(told))
    limits = RequestLimits(
        size=described.size,
        flags=described.flags,
        mode=mode,
        maximum_payload=1 << 26,
        contexts=contexts,
        minimum_block=described.minimum_block,
    )
    try:
        check_request(limits, command, flags, offset, length)
    except RequestError as error:
        assert error.error in (1, 22, 28)  # noqa: PT017 - which error it is, is another test's business
    else:
        assert command <= 7
        assert offset + length <= size or command in (2, 3)


@given(payload=st.binary(max_size=64), selected=st.sets(st.integers(0, 5)))
def test_any_status_payload_is_served_or_refused(payload: bytes, selected: set[int]) -> None:
    try:
        _, ids = status_payload(payload, selected)
    except RequestError:
        return
    assert selected.issuperset(ids)
