"""Field types that configuration and API share. A bad value raises ValueError with a sentence for the operator."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, BeforeValidator, Field, WithJsonSchema

from fleecing.control.names import NAME_PATTERN, check_export, check_name
from fleecing.control.sizes import check_cluster_size, check_temp_limit
from fleecing.units import MAX_SIZE, parse_size


def _parse_if_text(value: object) -> object:
    return parse_size(value) if isinstance(value, str) else value


Name = Annotated[str, AfterValidator(check_name), Field(json_schema_extra={"pattern": f"^{NAME_PATTERN}$"})]
ExportName = Annotated[str, AfterValidator(check_export)]

Size = Annotated[
    int,
    Field(strict=True, ge=0, le=MAX_SIZE),
    BeforeValidator(_parse_if_text),
    WithJsonSchema({"type": ["integer", "string"], "minimum": 0, "maximum": MAX_SIZE}, mode="validation"),
]
"""Bytes, given as a number or as text: 65536, "64K", "10 GiB"."""

ClusterSize = Annotated[Size, AfterValidator(check_cluster_size)]
TempLimit = Annotated[Size, AfterValidator(check_temp_limit)]
