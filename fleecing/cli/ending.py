"""How a command that makes things ends when it is told to: what it has made is undone, as with Ctrl-C."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

_SIGNALS: Final = (signal.SIGTERM, signal.SIGHUP)


@contextmanager
def undone_when_ended() -> Iterator[None]:
    """SIGTERM, as of `systemctl stop`, and SIGHUP, as of a terminal that is closed, are KeyboardInterrupt in here.

    What is ignored (nohup) stays so.
    """
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
