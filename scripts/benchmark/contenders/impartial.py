"""Helper program: `fleecing` with a rule less: on a disk that it serves, the guest does not go first.

Takes the arguments of `fleecing`, and is Fleecing in all else: what stands beside it tells what the rule is worth.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

from fleecing.block.turns import Turns
from fleecing.cli.main import main
from fleecing.server.shares import Share, Shares


@contextmanager
def nobody_first() -> Iterator[None]:
    """Meanwhile a copy makes no pause for the guest, and a machine waits its turn like every client."""
    share = Shares.share

    def as_anybody(shares: Shares, requests: int, size: int, *, machine: bool) -> Share:
        return share(shares, requests, size, machine=False)

    with patch.object(Turns, "give_way", lambda turns: None), patch.object(Shares, "share", as_anybody):
        yield


if __name__ == "__main__":
    with nobody_first():
        main(prog_name="fleecing")
