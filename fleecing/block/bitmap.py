"""Bits by cluster: arithmetic between bytes and clusters, and runs of equal bits."""

from __future__ import annotations

from collections.abc import Iterator

from bitarray import bitarray

from fleecing.units import align_up, div_up


def ones(count: int) -> bitarray:
    """`count` bits, all set; see `zeroes`."""
    bits = zeroes(count)
    bits[:count] = 1
    return bits


def zeroes(count: int) -> bitarray:
    """`count` bits, all clear, and more clear ones up to a whole byte, so that all maps can be combined."""
    bits = bitarray(align_up(count, 8), endian="little")
    bits.setall(0)
    return bits


def little(bits: bitarray, count: int) -> bitarray:
    """The same bits as this project's maps have them: a whole number of bytes, least significant bit first."""
    result = zeroes(count)
    result[:count] = bits[:count]
    return result


def clusters_touched(offset: int, length: int, cluster_size: int) -> tuple[int, int]:
    """The clusters [first, end) that a range of bytes has at least one byte in: rounded outwards."""
    return offset // cluster_size, (offset + length - 1) // cluster_size + 1


def clusters_within(offset: int, length: int, cluster_size: int, size: int) -> tuple[int, int]:
    """The clusters [first, end) that a range of bytes covers whole: rounded inwards.

    The last cluster of an image may be short; it is covered when the range reaches the end of the image.
    """
    end = offset + length
    last = div_up(size, cluster_size) if end >= size else end // cluster_size
    return div_up(offset, cluster_size), last


def rescale(bits: bitarray, granularity: int, wanted: int, size: int) -> bitarray:
    """New bits for each `wanted` bytes of the same `size` bytes: set where any byte of the range had its bit set.

    Both granularities are powers of two.
    """
    if granularity == wanted:
        return bits.copy()
    result = bits.copy()
    while granularity < wanted:
        if len(result) % 2:
            result.append(0)
        result = result[::2] | result[1::2]
        granularity *= 2
    if granularity > wanted:
        result = _repeated(result, granularity // wanted)
    return little(result, div_up(size, wanted))


def _repeated(bits: bitarray, times: int) -> bitarray:
    """Each bit `times` times. Byte by byte out of a table: the guest may be waiting, and Python's bits are slow."""
    table = []
    for byte in range(256):
        wide = bitarray(endian="little")
        for at in range(8):
            wide += bitarray(times * str(byte >> at & 1), endian="little")
        table.append(wide.tobytes())
    result = bitarray(endian="little")
    result.frombytes(b"".join(map(table.__getitem__, bits.tobytes())))
    return result


def bit_runs(bits: bitarray, first: int, end: int) -> Iterator[tuple[int, int, int]]:
    """(start, stop, bit) for each run of equal bits in [first, end).

    Bits that other threads change meanwhile are seen either way; an empty run is never given.
    """
    while first < end:
        bit = bits[first]
        stop = bits.find(1 - bit, first, end)
        if stop < 0:
            stop = end
        if stop > first:
            yield first, stop, bit
            first = stop
