"""How large the parts of a temp image are, and where those lie that never move.

    cluster 0      header, extensions, backing file name
            1      refcount blocks for everything up to the first free cluster
                   refcount table \\ sized once for the worst case, and sparse: creating
                   L1 table       / them costs nothing, and nothing ever moves
                   data clusters, L2 tables, further refcount blocks, in the order of need

A further refcount block lies in the first cluster of the range that it counts, so it counts itself, and its place is
known before it is needed.
"""

from __future__ import annotations

from dataclasses import dataclass

from fleecing.block.qcow2 import layout
from fleecing.errors import ImageError
from fleecing.units import align_up, div_up, format_size, is_power_of_two


@dataclass(frozen=True, slots=True)
class Geometry:
    """Sizes in bytes end in `size` or `offset`; everything else counts clusters or entries."""

    size: int  # virtual, a multiple of 512
    cluster_size: int
    l1_entries: int
    l1_offset: int
    table_clusters: int  # refcount table
    table_offset: int

    @property
    def cluster_bits(self) -> int:
        return self.cluster_size.bit_length() - 1

    @property
    def guest_clusters(self) -> int:
        return div_up(self.size, self.cluster_size)

    @property
    def l2_entries(self) -> int:
        """Guest clusters that one L2 table maps."""
        return self.cluster_size // layout.ENTRY_BYTES

    @property
    def l1_clusters(self) -> int:
        return div_up(self.l1_entries * layout.ENTRY_BYTES, self.cluster_size)

    @property
    def block_entries(self) -> int:
        """Host clusters that one refcount block counts."""
        return self.cluster_size // layout.REFCOUNT_BYTES

    @property
    def capacity(self) -> int:
        """Host clusters that there can be: that the refcount table counts, and that entries can name."""
        counted = self.table_clusters * (self.cluster_size // layout.ENTRY_BYTES) * self.block_entries
        return min(counted, layout.MAX_HOST_BYTES // self.cluster_size)


def plan(path: str, size: int, cluster_size: int) -> tuple[Geometry, int]:
    """The geometry of a new image, and its first refcount blocks (clusters from 1 on). `size` in bytes, at least 1.

    Raises ImageError where the size and the cluster size do not go together within QEMU's limits.
    """
    smallest, largest = 1 << layout.MIN_CLUSTER_BITS, 1 << layout.MAX_CLUSTER_BITS
    if not (is_power_of_two(cluster_size) and smallest <= cluster_size <= largest):
        raise ImageError(path, -1, f"cluster size {cluster_size} is no power of two from {smallest} to {largest} bytes")
    if size < 1:
        raise ImageError(path, -1, f"a disk of {size} bytes cannot have a temp image")
    found = _fit(size, cluster_size)
    if found is None:
        fitting = [
            bits for bits in range(layout.MIN_CLUSTER_BITS, layout.MAX_CLUSTER_BITS + 1) if _fit(size, 1 << bits)
        ]
        way_out = f"use {format_size(1 << fitting[0])} or more" if fitting else "no cluster size is large enough"
        raise ImageError(
            path,
            -1,
            f"a disk of {format_size(size)} is too large for clusters of {format_size(cluster_size)}: {way_out}",
        )
    return found


def _fit(size: int, cluster_size: int) -> tuple[Geometry, int] | None:
    """None where a table would be larger than QEMU opens."""
    size = align_up(size, layout.SECTOR)
    entries = cluster_size // layout.ENTRY_BYTES
    counts = cluster_size // layout.REFCOUNT_BYTES
    data = div_up(size, cluster_size)
    l1_entries = div_up(data, entries)
    l1_clusters = div_up(l1_entries, entries)
    worst = 1 + l1_clusters + l1_entries + data
    blocks = div_up(worst, counts)
    while (need := div_up(worst + blocks + div_up(blocks, entries), counts)) > blocks:
        blocks = need
    max_blocks = layout.MAX_REFCOUNT_TABLE_BYTES // layout.ENTRY_BYTES
    # Twice the need where the limit allows it: a fragmented file can then grow instead of taking many short runs.
    table_clusters = div_up(min(2 * blocks, max_blocks), entries)
    if blocks > max_blocks or l1_entries * layout.ENTRY_BYTES > layout.MAX_L1_BYTES:
        return None
    fixed = 1 + table_clusters + l1_clusters
    first_blocks = 1
    while (need := div_up(fixed + first_blocks, counts)) > first_blocks:
        first_blocks = need
    table_offset = (1 + first_blocks) * cluster_size
    l1_offset = table_offset + table_clusters * cluster_size
    geometry = Geometry(size, cluster_size, l1_entries, l1_offset, table_clusters, table_offset)
    return (geometry, first_blocks) if worst + blocks + table_clusters <= geometry.capacity else None
