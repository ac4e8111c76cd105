"""Bytes: units, alignment, and sizes as people write them."""

from __future__ import annotations

import re

KiB = 1 << 10
MiB = 1 << 20
GiB = 1 << 30
TiB = 1 << 40

MAX_SIZE = (1 << 63) - 1
"""Bytes; what a file offset can be. No disk, limit or bandwidth is larger."""

_SIZE = re.compile(r"(\d+)(?:\.(\d+))?\s*([KMGTPE]?)(?:i?B)?", re.IGNORECASE)
_LONGEST = 64
"""Characters that a size has at most."""
_POWERS = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40, "P": 50, "E": 60}


def align_down(value: int, alignment: int) -> int:
    """The largest multiple of `alignment` that is not above `value`."""
    return value - value % alignment


def align_up(value: int, alignment: int) -> int:
    """The smallest multiple of `alignment` that is not below `value`."""
    return -(-value // alignment) * alignment


def div_up(value: int, divisor: int) -> int:
    """How many pieces of `divisor` it takes to cover `value`."""
    return -(-value // divisor)


def is_power_of_two(value: int) -> bool:
    return value > 0 and value & (value - 1) == 0


def parse_size(text: str) -> int:
    """Bytes from "64K", "10G", "1.5 GiB", "512". Powers of 1024, as qemu-img takes them.

    Raises ValueError where the text is no size, is no whole number of bytes, or is above MAX_SIZE.
    """
    match = _SIZE.fullmatch(text.strip()[:_LONGEST])
    if match is None or len(text.strip()) > _LONGEST:
        text = text[:_LONGEST]
        raise ValueError(f"'{text}' is no size: give bytes, or a number with K, M, G or T, as in 64K or 10G")
    whole, fraction, unit = match.groups()
    shift = _POWERS[unit.upper()]
    value = int(whole) << shift
    if fraction is not None:
        scaled = int(fraction) << shift
        value += scaled // 10 ** len(fraction)
        if scaled % 10 ** len(fraction) and not shift:
            raise ValueError(f"'{text}' is no whole number of bytes")
    if value > MAX_SIZE:
        raise ValueError(f"'{text}' is too large: at most {MAX_SIZE} bytes (8 EiB) can be")
    return value


def format_size(value: int) -> str:
    """Bytes for people: "64 KiB", "1.5 GiB"; exact below 1 KiB."""
    if abs(value) < KiB:
        return f"{value} B"
    size = float(value)
    for unit in ("KiB", "MiB", "GiB", "TiB", "PiB"):
        size /= 1024
        if abs(size) < 1023.95 or unit == "PiB":
            break
    return f"{size:.1f} {unit}".replace(".0 ", " ")
