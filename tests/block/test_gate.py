"""The gate: who is inside, and who waits."""

from __future__ import annotations

import threading
import time
from functools import partial

from fleecing.block.gate import Gate
from tests.block.rig import SECONDS, in_thread


def soon() -> float:
    return time.monotonic() + SECONDS


def test_closing_waits_for_those_inside() -> None:
    gate = Gate()
    gate.enter("a")
    gate.close()
    assert not gate.wait_empty(time.monotonic() + 0.01)
    waiting = in_thread(lambda: gate.wait_empty(soon()))
    gate.leave("a")
    waiting.wait()
    assert gate.wait_empty(soon())


def test_nobody_enters_a_closed_gate_until_it_opens() -> None:
    gate = Gate()
    gate.close()
    assert not gate.try_enter("a")
    late = in_thread(lambda: gate.enter("b"))
    assert gate.wait_empty(soon())
    assert not late.over.is_set()
    gate.open()
    late.wait()
    gate.leave("b")
    gate.leave("b")


def test_no_change_is_inside_while_the_gate_is_closed_and_empty() -> None:
    """The guarantee behind every snapshot, under as many switches of threads as can be had."""
    gate, stop, inside, seen = Gate(), threading.Event(), [0] * 4, []

    def change(number: int) -> None:
        while not stop.is_set():
            gate.enter(number)
            inside[number] = 1
            inside[number] = 0
            gate.leave(number)

    changers = [in_thread(partial(change, number)) for number in range(4)]
    for _ in range(300):
        gate.close()
        assert gate.wait_empty(soon())
        seen.append(sum(inside))
        gate.open()
    stop.set()
    for changer in changers:
        changer.wait()
    assert seen == [0] * 300
