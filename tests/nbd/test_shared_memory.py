"""Who is offered fleecing:shared-memory (docs/shared-memory.md)."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fleecing.nbd import options
from fleecing.nbd.constants import SHARED_MEMORY, Opt, ReplyMode
from fleecing.nbd.handshake import ServerHandshake, TlsMode
from tests.nbd.talk import BOTH, MONDAY, Catalog, go, meta

CATALOG = Catalog(replace(MONDAY, contexts=(*MONDAY.contexts, SHARED_MEMORY)))
NAME = MONDAY.name


def talked(*, local: bool, tls: bool = False, mode: Opt = Opt.EXTENDED_HEADERS) -> tuple[ServerHandshake, bytes]:
    """A client that lists all contexts and selects this one; the handshake, and what the server has said."""
    side = ServerHandshake(CATALOG, local=local, tls=TlsMode.ALLOW)
    side.receive(options.CLIENT_FLAGS.pack(BOTH))
    if tls:
        side.receive(options.option(Opt.STARTTLS))
        side.tls_started()
    side.receive(options.option(mode) + meta(Opt.LIST_META_CONTEXT, NAME))
    side.receive(meta(Opt.SET_META_CONTEXT, NAME, SHARED_MEMORY) + go(NAME))
    return side, side.data_to_send()


def test_a_client_on_the_same_host_is() -> None:
    side, said = talked(local=True)
    assert said.count(SHARED_MEMORY.encode()) == 2
    assert side.agreement is not None and side.agreement.limits().shared_memory


@pytest.mark.parametrize("local, tls", [(False, False), (True, True), (False, True)])
def test_nobody_else_is(*, local: bool, tls: bool) -> None:
    side, said = talked(local=local, tls=tls)
    assert SHARED_MEMORY.encode() not in said
    assert side.agreement is not None and not side.agreement.limits().shared_memory


def test_it_is_of_no_use_without_extended_headers() -> None:
    side, _ = talked(local=True, mode=Opt.STRUCTURED_REPLY)
    assert side.agreement is not None and side.agreement.mode is ReplyMode.STRUCTURED
    assert side.agreement.contexts == ((1, SHARED_MEMORY),)
