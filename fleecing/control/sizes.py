"""Which sizes a disk's clusters and a snapshot's temp may have. A bad one raises ValueError with a sentence."""

from __future__ import annotations

from fleecing.units import KiB, MiB, format_size, is_power_of_two

MIN_CLUSTER = 4 * KiB
MAX_CLUSTER = 2 * MiB
DEFAULT_CLUSTER = 64 * KiB


def check_cluster_size(value: int) -> int:
    """The same bytes if copying can be done in clusters of that size. Raises ValueError."""
    if not (MIN_CLUSTER <= value <= MAX_CLUSTER and is_power_of_two(value)):
        raise ValueError(
            f"cluster size {format_size(value)} is not possible: "
            f"give a power of two from {format_size(MIN_CLUSTER)} to {format_size(MAX_CLUSTER)}"
        )
    return value


def check_temp_limit(value: int) -> int:
    """The same bytes if they can be a quota. Raises ValueError."""
    if value <= 0:
        raise ValueError("temp limit 0 leaves no space for any copy: give a size above 0, or none for no limit")
    return value
