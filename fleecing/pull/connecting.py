"""Making a connection for a pull that may be stopped meanwhile, or through.

Nothing cuts short the search for a name, a network that swallows packets, or a server that takes the connection and
says nothing. So a thread of its own waits for it, and nobody waits for that thread once there is no use in it.
"""

from __future__ import annotations

from collections.abc import Callable
from threading import Event, Lock, Thread
from typing import Final, Generic, Protocol, TypeVar

_POLL_SECONDS: Final = 0.1
"""How often who waits looks whether there is still any use in it."""


class _Closable(Protocol):
    def close(self) -> None: ...


Made = TypeVar("Made", bound=_Closable)


def connect_unless(is_over: Callable[[], bool], connect: Callable[[], Made]) -> Made:
    """What `connect` makes, or the error that it raises; ConnectionError once `is_over()` is true before it returns."""
    attempt = _Attempt(connect)
    attempt.start()
    while not attempt.ended.wait(_POLL_SECONDS):
        if is_over():
            attempt.give_up()
            raise ConnectionError("nobody needs the connection any more")
    return attempt.result()


class _Attempt(Thread, Generic[Made]):
    def __init__(self, connect: Callable[[], Made]) -> None:
        super().__init__(name="connecting", daemon=True)
        self.ended = Event()
        self._connect = connect
        self._made: Made | None = None
        self._error: Exception | None = None
        self._given_up = False
        self._lock = Lock()

    def run(self) -> None:
        try:
            self._made = self._connect()
        except Exception as e:
            self._error = e
        self.ended.set()
        self._close_what_nobody_wants()

    def give_up(self) -> None:
        """Nobody wants the connection any more, whenever it comes."""
        self._given_up = True
        self._close_what_nobody_wants()

    def _close_what_nobody_wants(self) -> None:
        with self._lock:
            if self._given_up and self._made is not None:
                self._made.close()

    def result(self) -> Made:
        """When it has ended."""
        if self._error is not None:
            raise self._error
        assert self._made is not None
        return self._made
