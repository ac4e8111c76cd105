"""Threads for guest changes that have to wait, and a watch over everybody's time.

A connection's own thread serves what is quick, also a copy from memory to memory. A change that must wait is handed
over here, so that it holds up no other request of that connection. And no slow temp holds a change up beyond its
deadline: a thread that hangs in a call to the operating system cannot be woken, so the watch takes the change away from
it, gives it to a fresh thread, and lets the old one go when its call comes back.
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


class Superseded(BaseException):
    """Another thread goes on in the place of this one, which must touch nothing any more and end."""


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
    """One thread's try at a change. Whoever takes it, thread or watch, goes on with the change; the other does not.

    `replace` puts another thread in the place of one that hangs. `deadline` (time.monotonic) is when that is done, None
    = the change's own.
    """

    __slots__ = ("_ticket", "change", "deadline", "replace")

    def __init__(self, change: Change, replace: Callable[[], None], deadline: float | None = None) -> None:
        self.change = change
        self.replace = replace
        self.deadline = deadline
        self._ticket = [True]

    def is_due(self, now: float) -> bool:
        """Whether its thread has had the time that it may take."""
        return now >= (self.change.deadline if self.deadline is None else self.deadline)

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
        self._hanging: set[Attempt] = set()  # taken from their threads, which have not come back
        self._taking = threading.Lock()  # held by the watch while it takes an attempt away
        self._start_lock = threading.Lock()
        self._threads: list[threading.Thread] = []  # that do not hang; under _start_lock, as are the next two
        self._watched = False
        self._short = False  # there were fewer threads to be had than there should be
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

    # A thread that is not the pool's.

    @property
    def hangs(self) -> bool:
        """Whether a thread has lost its change and not come back yet."""
        return bool(self._hanging)

    def begin(self, attempt: Attempt) -> None:
        """The calling thread tries this itself, under the eyes of the watch."""
        if not self._threads:
            self._start()
        self._running.add(attempt)
        if not self._busy.is_set():
            self._busy.set()

    def end(self, attempt: Attempt) -> None:
        """It has saved what there is to save. Raises Superseded where the watch has taken the change away meanwhile."""
        if attempt.take():
            self._running.discard(attempt)
            return
        with self._taking:  # until the watch is through with it
            self._hanging.discard(attempt)
        raise Superseded

    def grow(self, workers: int) -> None:
        """Have at least so many threads from now on."""
        with self._start_lock:
            self._workers = max(workers, self._workers)
            if self._threads:
                self._fill_up()

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
        """Raises RuntimeError where no thread is to be had; the next change tries again."""
        with self._start_lock:
            if not self._watched:
                threading.Thread(target=self._watch, name=f"{self._name} watch", daemon=True).start()
                self._watched = True
            if not self._threads:
                self._start_worker()  # one is enough to go on with, the watch starts the others
                self._fill_up()

    def _fill_up(self) -> None:
        """As many workers as there should be, or as there are threads to be had. Under _start_lock."""
        try:
            while len(self._threads) < self._workers:
                self._start_worker()
        except RuntimeError as e:
            if not self._short:
                self._short = True
                log.warning(
                    "%s: %d of %d threads for guest changes: %s", self._name, len(self._threads), self._workers, e
                )
        else:
            self._short = False

    def _start_worker(self) -> None:
        thread = threading.Thread(target=self._work, name=f"{self._name} copy", daemon=True)
        thread.start()
        self._threads.append(thread)

    def _work(self) -> None:
        thread = threading.current_thread()
        while (change := self._queue.get()) is not None:
            attempt = Attempt(change, lambda: self._replace(thread))
            self._running.add(attempt)
            if not self._perform(attempt):  # another thread has this one's place
                with self._taking:
                    self._hanging.discard(attempt)
                return
            self._running.discard(attempt)
            self._pending.discard(change)

    def _replace(self, thread: threading.Thread) -> None:
        """A worker hangs: have another in its place, later where none is to be had now."""
        with self._start_lock:
            self._threads.remove(thread)
            self._fill_up()

    def _watch(self) -> None:
        while not self._stopped.is_set():
            self._busy.wait()
            self._stopped.wait(WATCH_INTERVAL)  # first of all: with a change at a time this is woken once an interval
            now = time.monotonic()
            if len(self._threads) < self._workers:
                with self._start_lock:
                    self._fill_up()
            for attempt in list(self._running):
                if attempt.is_due(now):
                    with self._taking:
                        if attempt.take():
                            self._take_over(attempt)
            if not self._pending and not self._running:
                self._busy.clear()
                if self._pending or self._running:  # come between the look and the clear
                    self._busy.set()

    def _take_over(self, attempt: Attempt) -> None:
        """The thread of this attempt hangs: have another in its place, and the change answered or tried again."""
        if attempt.deadline is None:
            log.warning("%s: a guest change waits for a copy beyond its time: taken over", self._name)
        self._hanging.add(attempt)
        self._pending.add(attempt.change)
        attempt.replace()
        self._running.discard(attempt)
        if self._expired(attempt):
            self._queue.put(attempt.change)
        else:
            self._pending.discard(attempt.change)
