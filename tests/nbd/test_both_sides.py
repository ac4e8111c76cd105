"""The client's handshake against the server's, in memory, in every combination of wishes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from fleecing.nbd.client_handshake import ClientAgreement, ClientHandshake, ExportListing, ExportRefused
from fleecing.nbd.constants import ReplyMode, TransmissionFlag
from fleecing.nbd.conversation import Conversation
from fleecing.nbd.handshake import ServerHandshake, TlsMode
from tests.nbd.talk import CATALOG, MONDAY, SECRET, VDA, Catalog

STEPS = [1, 7, 1 << 16]


def cut(data: bytes, step: int) -> Iterator[bytes]:
    return (data[at : at + step] for at in range(0, len(data), step))


def meet(client: Conversation, server: Conversation, *, step: int = 1 << 16) -> None:
    """Carry bytes between the two, `step` at a time, until neither has anything to say; TLS comes up at once."""
    while True:
        to_client = server.data_to_send()
        for piece in cut(to_client, step):
            client.receive(piece)
        to_server = client.data_to_send()
        for piece in cut(to_server, step):
            server.receive(piece)
        if client.wants_tls and server.wants_tls:
            client.tls_started()
            server.tls_started()
        elif not to_client and not to_server:
            return


def agreements(client: ClientHandshake, server: ServerHandshake, step: int = 1 << 16) -> ClientAgreement:
    """What the client believes; the server believes the same."""
    meet(client, server, step=step)
    here, there = client.agreement, server.agreement
    assert here is not None and there is not None
    assert (here.mode, here.flags, here.size) == (there.mode, there.flags, there.export.size)
    assert (here.name, here.description) == (there.export.name, there.export.description)
    assert here.contexts == {name: number for number, name in there.contexts}
    assert here.maximum_payload == there.export.maximum_payload
    assert (here.minimum_block, here.preferred_block) == (there.export.minimum_block, there.export.preferred_block)
    assert client.leftover == server.leftover == b""
    return here


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("tls", [(TlsMode.OFF, TlsMode.OFF), (TlsMode.ALLOW, TlsMode.OFF), (TlsMode.OFF, TlsMode.ALLOW),
                                 (TlsMode.ALLOW, TlsMode.ALLOW), (TlsMode.REQUIRE, TlsMode.REQUIRE)])  # fmt: skip
@pytest.mark.parametrize("contexts", [(), ("base:allocation",), ("x-no:such", "qemu:allocation-depth")])
@pytest.mark.parametrize("structured, extended", [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("name", ["", "vda", "vda@monday"])
def test_both_sides_believe_the_same(
    name: str,
    structured: bool,
    extended: bool,
    contexts: tuple[str, ...],
    tls: tuple[TlsMode, TlsMode],
    step: int,
) -> None:
    client = ClientHandshake(name, structured=structured, extended=extended, contexts=contexts, tls=tls[0])
    server = ServerHandshake(CATALOG, tls=tls[1])
    agreed = agreements(client, server, step)
    best = ReplyMode.EXTENDED if extended else ReplyMode.STRUCTURED if structured else ReplyMode.SIMPLE
    assert agreed.mode is best
    known = [context for context in contexts if context in MONDAY.contexts and best is not ReplyMode.SIMPLE]
    assert list(agreed.contexts) == known
    assert (TransmissionFlag.SEND_DF in agreed.flags) == (best is not ReplyMode.SIMPLE)
    assert (TransmissionFlag.BLOCK_STATUS_PAYLOAD in agreed.flags) == (best is ReplyMode.EXTENDED and bool(known))
    assert client.tls_active == server.tls_active == (TlsMode.OFF not in tls)


@pytest.mark.parametrize("step", STEPS)
def test_unknown_export_is_refused_and_both_sides_part(step: int) -> None:
    client, server = ClientHandshake("nosuch"), ServerHandshake(CATALOG)
    with pytest.raises(ExportRefused, match="there is no export 'nosuch'"):
        meet(client, server, step=step)
    server.receive(client.data_to_send())
    assert server.closing and server.agreement is None


@pytest.mark.parametrize("tls", [TlsMode.ALLOW, TlsMode.REQUIRE])
def test_export_under_tls_is_reached_by_a_client_that_starts_it(tls: TlsMode) -> None:
    catalog = Catalog(VDA, SECRET)
    assert agreements(ClientHandshake("secret", tls=TlsMode.ALLOW), ServerHandshake(catalog, tls=tls)).name == "secret"
    with pytest.raises(ExportRefused, match="ERR_TLS_REQD"):
        meet(ClientHandshake("secret"), ServerHandshake(catalog, tls=tls))


@pytest.mark.parametrize("step", STEPS)
def test_listing_meets_the_catalog(step: int) -> None:
    client, server = ExportListing(), ServerHandshake(CATALOG)
    meet(client, server, step=step)
    assert client.exports == (("vda", "the active disk"), ("vda@monday", ""))
    assert client.closing and server.closing


def test_what_the_client_sends_at_once_behind_go_is_left_for_the_transmission() -> None:
    client, server = ClientHandshake("vda", structured=False, extended=False), ServerHandshake(CATALOG)
    client.receive(server.data_to_send())
    server.receive(client.data_to_send() + b"first request")
    assert server.agreement is not None and server.leftover == b"first request"
