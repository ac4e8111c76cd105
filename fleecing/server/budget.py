"""Memory that all connections share and none may have for itself."""

from __future__ import annotations

import threading


class Budget:
    """`total` bytes, to be taken and given back."""

    def __init__(self, total: int) -> None:
        self.total = total
        self._left = total
        self._changed = threading.Condition()

    @property
    def used(self) -> int:
        """Bytes that are taken now."""
        return self.total - self._left

    def take(self, count: int, timeout: float) -> bool:
        """Take `count` bytes (at most the total); False where they are not free within `timeout` seconds."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._left >= count, timeout):
                return False
            self._left -= count
            return True

    def give_back(self, count: int) -> None:
        """The bytes are free again."""
        with self._changed:
            self._left += count
            self._changed.notify_all()
