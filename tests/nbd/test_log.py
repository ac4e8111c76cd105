"""What a handshake says to the log: at DEBUG every message with a sign in front, above that nothing."""

from __future__ import annotations

import logging

import pytest

from fleecing.nbd import options
from fleecing.nbd.client_handshake import ClientHandshake
from fleecing.nbd.constants import Opt
from fleecing.nbd.handshake import ServerHandshake
from tests.nbd.talk import BOTH, CATALOG, go
from tests.nbd.test_both_sides import meet


def lines(caplog: pytest.LogCaptureFixture, name: str) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == f"fleecing.nbd.{name}"]


def test_both_sides_log_each_message_at_debug(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    meet(ClientHandshake("vda", extended=False, contexts=["base:allocation"]), ServerHandshake(CATALOG))
    server = lines(caplog, "handshake")
    assert server[:2] == ["< STRUCTURED_REPLY, 0 bytes", "> STRUCTURED_REPLY, ACK, 0 bytes"]
    assert server[-1].startswith("= export 'vda', structured replies, flags ")
    assert server[-1].endswith("contexts base:allocation")
    client = lines(caplog, "client_handshake")
    assert client[:2] == ["> STRUCTURED_REPLY, 0 bytes", "< STRUCTURED_REPLY, ACK, 0 bytes"]
    assert client[-1].startswith("= ClientAgreement(name='vda'")


def test_refusals_are_logged_with_their_reason(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    side = ServerHandshake(CATALOG)
    side.receive(options.CLIENT_FLAGS.pack(BOTH) + go("no\nsuch") + options.option(77))
    assert lines(caplog, "handshake")[1::2] == [
        r"> GO, ERR_UNKNOWN: there is no export 'no\nsuch'",
        "> option 77, ERR_UNSUP: option 77 is not supported",
    ]


def test_the_owner_may_bring_a_logger_of_its_own(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    side = ServerHandshake(CATALOG, logger=logging.getLogger("connection.7"))
    side.receive(options.CLIENT_FLAGS.pack(BOTH) + options.option(Opt.ABORT))
    assert {record.name for record in caplog.records} == {"connection.7"}


def test_nothing_is_logged_above_debug(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    meet(ClientHandshake("vda"), ServerHandshake(CATALOG))
    assert caplog.records == []
