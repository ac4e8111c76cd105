"""Flushes off the request path, many for the price of one."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable

Done = Callable[[Exception | None], None]


class Flusher:
    """One thread that flushes. Whoever asks while a flush runs is served, all together, by the next one.

    A flush that was asked for after a write returned covers that write: the flush that answers starts later than the
    question was put.
    """

    def __init__(self, flush: Callable[[], None], *, name: str) -> None:
        self._flush = flush
        self._name = name
        self._asked = threading.Condition()
        self._waiting: list[Done] = []  # under _asked, as are the two below
        self._thread: threading.Thread | None = None
        self._closed = False

    def submit(self, done: Done) -> None:
        """Flush, then call `done` with None or the error, in the flusher's thread. Returns at once.

        After `close` nothing is flushed, and `done` is called with an error in the caller's. Raises RuntimeError where
        no thread is to be had.
        """
        with self._asked:
            closed = self._closed
            if not closed:
                if self._thread is None:
                    thread = threading.Thread(target=self._run, name=f"{self._name} flush", daemon=True)
                    thread.start()
                    self._thread = thread
                self._waiting.append(done)
                self._asked.notify()
        if closed:
            done(OSError(errno.EBADF, f"{self._name} is closed"))

    def close(self, timeout: float) -> None:
        """End the thread when all that was asked for is answered; wait `timeout` seconds at most for that."""
        with self._asked:
            self._closed = True
            self._asked.notify()
        if self._thread is not None:
            self._thread.join(timeout)

    def _run(self) -> None:
        while True:
            with self._asked:
                self._asked.wait_for(lambda: self._waiting or self._closed)
                batch, self._waiting = self._waiting, []
            if not batch:
                return
            error: Exception | None = None
            try:
                self._flush()
            except Exception as e:
                error = e
            for done in batch:
                done(error)


def wait_for(submit: Callable[[Done], None]) -> None:
    """Wait for the end of what `submit` starts; raises the error that it tells its `done`."""
    outcome: list[Exception | None] = []
    over = threading.Lock()
    over.acquire()

    def done(error: Exception | None) -> None:
        outcome.append(error)
        over.release()

    submit(done)
    over.acquire()
    if outcome[0] is not None:
        raise outcome[0]
