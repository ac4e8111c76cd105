"""A gate that guest changes pass through, and that a snapshot closes for an instant."""

from __future__ import annotations

import threading
import time


class Gate:
    """Open, it costs a change two set operations and no lock; closed, it holds new changes and waits for those inside.

    A change first says that it is inside and then looks whether the gate is closed; closing first closes and then looks
    who is inside. Whichever comes second sees the other, so no change is ever inside unnoticed. (Set operations and
    attribute reads are single steps under the GIL.) A token is any hashable that is inside at most once at a time.
    """

    def __init__(self) -> None:
        self._inside: set[object] = set()
        self._closed = False  # changed under `_changed`
        self._changed = threading.Condition()

    def try_enter(self, token: object) -> bool:
        """Go inside if the gate is open."""
        self._inside.add(token)
        if self._closed:
            self.leave(token)
            return False
        return True

    @property
    def closed(self) -> bool:
        """Whether somebody waits for those inside."""
        return self._closed

    def enter(self, token: object) -> None:
        """Go inside; wait where the gate is closed."""
        while not self.try_enter(token):
            with self._changed:
                self._changed.wait_for(lambda: not self._closed)

    def leave(self, token: object) -> None:
        """The change is over. Leaving twice does no harm."""
        self._inside.discard(token)
        if self._closed:
            with self._changed:
                self._changed.notify_all()

    def close(self) -> None:
        """Let nobody in any more. Only one may close a gate at a time."""
        with self._changed:
            assert not self._closed
            self._closed = True

    def wait_empty(self, deadline: float) -> bool:
        """Wait until all inside have left; False where they have not at `deadline` (time.monotonic)."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._inside, max(0.0, deadline - time.monotonic()))

    def open(self) -> None:
        """Let everybody in again."""
        with self._changed:
            self._closed = False
            self._changed.notify_all()
