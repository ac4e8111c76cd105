"""Sums over things that come and go, which never go backwards."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, Protocol, Self, TypeVar


class Figures(Protocol):
    """What is summed up."""

    def add(self, other: Self, /) -> None:
        """Take the other's figures into these."""


F = TypeVar("F", bound=Figures)
F_co = TypeVar("F_co", bound=Figures, covariant=True)


class Counting(Protocol[F_co]):
    """A thing that counts while it lives, in a way of its own."""

    def figures(self) -> F_co:
        """What it has counted so far."""


class Ledger(Generic[F]):
    """Those that count now, and the sum of those that have ended. For any thread."""

    def __init__(self, nothing: Callable[[], F]) -> None:
        """`nothing` gives figures of nothing at all."""
        self._nothing = nothing
        self._lock = threading.Lock()
        self._ended = nothing()  # under the lock, as are the next
        self._open: set[Counting[F]] = set()
        self._opened = 0

    def open(self, counting: Counting[F]) -> None:
        """One more counts from now on."""
        with self._lock:
            self._open.add(counting)
            self._opened += 1

    def close(self, counting: Counting[F]) -> None:
        """It counts no more; twice does no harm."""
        with self._lock:
            if counting in self._open:
                self._open.remove(counting)
                self._ended.add(counting.figures())

    @property
    def opened(self) -> int:
        """How many there ever were."""
        return self._opened

    def total(self) -> F:
        """New figures: of all that there ever were."""
        found = self._nothing()
        with self._lock:
            found.add(self._ended)
            for counting in self._open:
                found.add(counting.figures())
        return found
