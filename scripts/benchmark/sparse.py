"""Large empty disks: how long a snapshot takes to make, and what memory it takes."""

from __future__ import annotations

from fleecing.units import KiB, MiB
from scripts.benchmark.model import Figures, Measure, Offer

_BITMAPS = 3
"""Bitmaps that a snapshot cannot do without, one bit a cluster each: to copy, readable, copied."""


def bitmaps_of(size: int, cluster: int = 64 * KiB) -> int:
    """Their bytes, for a disk of `size` bytes."""
    return _BITMAPS * (size // cluster // 8)


def creation(size: int) -> Measure:
    """A measure: two snapshots, one after the other. The slower creation, what the server's memory grows by for each,
    in bytes of bitmaps, and what it holds in the end."""

    def measure(offer: Offer) -> Figures:
        child = offer.server.child
        before = child.memory()
        with offer.server.snapshot() as first, offer.server.snapshot() as second:
            after = child.memory()
            return {
                "seconds": max(first.create_seconds, second.create_seconds),
                "rss": after / MiB,
                "growth": (after - before) / 2 / bitmaps_of(size),
            }

    return measure
