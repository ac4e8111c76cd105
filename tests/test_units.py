"""Sizes as people write them."""

from __future__ import annotations

import pytest

from fleecing.units import MAX_SIZE, GiB, KiB, TiB, format_size, parse_size


@pytest.mark.parametrize(
    "text, value",
    [
        ("0", 0),
        ("512", 512),
        ("64K", 64 * KiB),
        ("1.5 GiB", 3 * GiB // 2),
        (" 2tb ", 2 * TiB),
        (str(MAX_SIZE), MAX_SIZE),
    ],
)
def test_a_size_is_read(text: str, value: int) -> None:
    assert parse_size(text) == value


@pytest.mark.parametrize("text", ["", "K", "-1", "1e9", "64 KK", "0x10", "9" * 5000, "1." + "9" * 5000])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is no size: give bytes, or a number with K, M, G or T"):
        parse_size(text)


@pytest.mark.parametrize("text", ["8E", "9" * 20, "9" * 60, str(MAX_SIZE + 1)])
def test_a_size_that_nothing_can_have_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=f"'{text}' is too large: at most {MAX_SIZE} bytes"):
        parse_size(text)


def test_every_size_can_be_told() -> None:
    assert format_size(MAX_SIZE) == "8192 PiB"
    assert [format_size(n) for n in (0, 1023, 1024, 1536)] == ["0 B", "1023 B", "1 KiB", "1.5 KiB"]
