"""Who is let in, and how much the log says of the others."""

from __future__ import annotations

import logging

import pytest

from fleecing.server.door import QUIET_SECONDS, Door
from fleecing.server.limits import Limits


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_clients_of_an_address_are_counted_for_themselves() -> None:
    door = Door(Limits(clients_per_address=2))
    assert [door.enter("p", ip) for ip in ("a", "a", "a", "b", "", "", "")] == [
        True,
        True,
        False,
        True,
        True,
        True,
        True,
    ]
    door.leave("a")
    assert door.enter("p", "a")
    assert not door.enter("p", "a")


def test_all_clients_are_counted() -> None:
    door = Door(Limits(clients=2))
    assert [door.enter("p", ip) for ip in ("a", "", "b")] == [True, True, False]
    door.leave("")
    assert door.enter("p", "b")


def test_a_crowd_outside_costs_one_line_in_ten_seconds(caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    door = Door(Limits(clients=1), clock)
    assert door.enter("first", "a")
    for number in range(1000):
        assert not door.enter(f"p{number}", "b")
    clock.now += QUIET_SECONDS
    assert not door.enter("late", "b")
    clock.now += QUIET_SECONDS
    assert not door.enter("later", "b")
    assert [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING] == [
        "client p0 turned away: 1 clients are connected",
        "client late turned away: 1 clients are connected, and 999 others before it",
        "client later turned away: 1 clients are connected",
    ]
    caplog.clear()
