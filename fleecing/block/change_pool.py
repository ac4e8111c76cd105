"""Threads for guest changes that have something to save first, and a watch over their time.

A connection's own thread serves what is quick. A change that must wait for a copy is handed over here, so that a slow
temp holds up neither the other requests of that connection nor, beyond its deadline, the change itself: a thread that
hangs in a call to the operating system cannot be woken, so the watch takes the change away from it, gives it to a
fresh thread, and lets the old one go when its call comes back.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from queue import SimpleQueue

log = logging.getLogger(__name__)

WATCH_INTERVAL = 0.2
"""Seconds between two looks at the deadlines: how much later than its deadline a change may be taken over."""


class Change:
    """One change that a guest asked for.

    `ranges` (offset, length) are the bytes it changes, `apply` does it, `done` is told the outcome, once: None or the
    error. `deadline` (time.monotonic, as is `started`) is when saving what it overwrites must be over.
    """

    __slots__ = ("apply", "deadline", "done", "ranges", "started")

    def __init__(
        self,
        ranges: list[tuple[int, int]],
        apply: Callable[[], None],
        done: Callable[[Exception | None], None],
        started: float,
        deadline: float,
    ) -> None:
        self.ranges = ranges
        self.started = started
        self.apply = apply
        self.done = done
        self.deadline = deadline


class Attempt:
    """One thread's try at a change. Whoever takes it, worker or watch, goes on with the change; the other does not."""

    __slots__ = ("_ticket", "change", "thread")

    def __init__(self, change: Change, thread: threading.Thread) -> None:
        self.change = change
        self.thread = thread
        self._ticket = [True]

    def take(self) -> bool:
        """True for the first caller only (a list's pop is one step under the GIL)."""
        try:
            return self._ticket.pop()
        except IndexError:
            return False


class ChangePool:
    """Runs `perform(attempt)` for each change in one of `workers` threads.

    `perform` takes the attempt before it applies or answers the change, drops the matter where that fails, and returns
    whether it could.
    `expired(attempt)` is called for a change past its deadline, taken from its thread; it returns whether the change is
    to be tried again.
    """

    def __init__(
        self, perform: Callable[[Attempt], bool], expired: Callable[[Attempt], bool], *, workers: int, name: str
    ) -> None:
        self._perform = perform
        self._expired = expired
        self._name = name
        self._workers = workers
        self._queue: SimpleQueue[Change | None] = SimpleQueue()
        self._pending: set[Change] = set()  # submitted and not over
        self._running: set[Attempt] = set()
        self._start_lock = threading.Lock()
        self._threads: list[threading.Thread] = []  # that do not hang; under _start_lock
        self._busy = threading.Event()
        self._stopped = threading.Event()

    def submit(self, change: Change) -> None:
        """Have the change performed; returns at once."""
        if not self._threads:
            self._start()
        self._pending.add(change)
        self._queue.put(change)
        if not self._busy.is_set():
            self._busy.set()

    def grow(self, workers: int) -> None:
        """Have at least so many threads from now on."""
        with self._start_lock:
            missing = workers - self._workers
            self._workers = max(workers, self._workers)
            if self._threads:
                for _ in range(missing):
                    self._start_worker()

    def close(self, timeout: float) -> None:
        """End the threads when they are through with what was submitted; wait `timeout` seconds at most for that."""
        deadline = time.monotonic() + timeout
        with self._start_lock:
            threads = list(self._threads)
            for _ in threads:
                self._queue.put(None)
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        self._stopped.set()
        self._busy.set()

    def _start(self) -> None:
        with self._start_lock:
            if not self._threads:
                for _ in range(self._workers):
                    self._start_worker()
                threading.Thread(target=self._watch, name=f"{self._name} watch", daemon=True).start()

    def _start_worker(self) -> None:
        thread = threading.Thread(target=self._work, name=f"{self._name} copy", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _work(self) -> None:
        while (change := self._queue.get()) is not None:
            attempt = Attempt(change, threading.current_thread())
            self._running.add(attempt)
            was_ours = self._perform(attempt)
            self._running.discard(attempt)
            if not was_ours:  # another thread has this one's place
                return
            self._pending.discard(change)

    def _watch(self) -> None:
        while not self._stopped.is_set():
            self._busy.wait()
            if not self._pending:
                self._busy.clear()
                if self._pending:  # submitted between the look and the clear
                    self._busy.set()
                continue
            self._stopped.wait(WATCH_INTERVAL)
            now = time.monotonic()
            for attempt in list(self._running):
                if now >= attempt.change.deadline and attempt.take():
                    self._take_over(attempt)

    def _take_over(self, attempt: Attempt) -> None:
        """The thread of this attempt hangs: have another in its place, and the change answered or tried again."""
        log.warning("%s: a guest change waits for a copy beyond its time: taken over", self._name)
        with self._start_lock:
            self._threads.remove(attempt.thread)
            self._start_worker()
        self._running.discard(attempt)
        if self._expired(attempt):
            self._queue.put(attempt.change)
        else:
            self._pending.discard(attempt.change)
