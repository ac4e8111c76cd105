"""Field types that configuration and API share. A bad value raises ValueError with a sentence for the operator."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, BeforeValidator, Field, WithJsonSchema

from fleecing.control.names import NAME_PATTERN, check_name
from fleecing.units import KiB, MiB, format_size, is_power_of_two, parse_size

MIN_CLUSTER = 4 * KiB
MAX_CLUSTER = 2 * MiB
DEFAULT_CLUSTER = 64 * KiB


def _parse_if_text(value: object) -> object:
    return parse_size(value) if isinstance(value, str) else value


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


Name = Annotated[str, AfterValidator(check_name), Field(json_schema_extra={"pattern": f"^{NAME_PATTERN}$"})]

Size = Annotated[
    int,
    Field(strict=True, ge=0),
    BeforeValidator(_parse_if_text),
    WithJsonSchema({"type": ["integer", "string"], "minimum": 0}, mode="validation"),
]
"""Bytes, given as a number or as text: 65536, "64K", "10 GiB"."""

ClusterSize = Annotated[Size, AfterValidator(check_cluster_size)]
TempLimit = Annotated[Size, AfterValidator(check_temp_limit)]
