"""Damage to files: the ways in which disks, file systems, programs and people spoil them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

SECTOR = 512

_numbers = st.one_of(
    st.integers(0, 2**64 - 1),
    st.sampled_from([0, 1, 2, 0xFF, 0x10000, 2**31, 2**32 - 1, 2**32, 2**63 - 1, 2**63, 2**64 - 1]),
    st.integers(0, 63).map(lambda bit: 1 << bit),
)
_edit = st.one_of(
    st.tuples(st.just("bit"), st.integers(0, 1 << 23), st.integers(0, 7)),
    st.tuples(st.just("put"), st.integers(0, 1 << 20), st.binary(min_size=1, max_size=40)),
    st.tuples(st.just("number"), st.integers(0, 1 << 17), _numbers),
    st.tuples(st.just("zero sector"), st.integers(0, 1 << 11), st.integers(1, 16)),
    st.tuples(st.just("copy sector"), st.integers(0, 1 << 11), st.integers(0, 1 << 11)),
    st.tuples(st.just("nest"), st.integers(0, 100), st.integers(1_000, 100_000)),
    st.tuples(st.just("cut"), st.integers(0, 1 << 20), st.integers(0, 0)),
    st.tuples(st.just("grow"), st.integers(1, 1 << 18), st.integers(0, 255)),
)
edits = st.lists(_edit, min_size=1, max_size=4)
"""What `apply` takes; places count from the file's start, modulo its length."""


def apply(data: bytes, changes: list[Any]) -> bytes:
    """The damaged contents."""
    made = bytearray(data)
    for kind, at, what in changes:
        size = max(1, len(made))
        if kind == "grow":
            made += bytes([what]) * at
        elif kind == "cut":
            del made[at % size :]
        elif kind == "bit" and made:
            made[at % size] ^= 1 << what
        elif kind == "nest":
            made[at % size : at % size] = b"[" * what
        elif kind == "put":
            _put(made, at % size, what)
        elif kind == "number":
            _put(made, at * 8 % size, what.to_bytes(8, "big"))
        elif kind == "zero sector":
            _put(made, at * SECTOR % size, bytes(what * SECTOR))
        elif kind == "copy sector":
            start = what * SECTOR % size
            _put(made, at * SECTOR % size, made[start : start + SECTOR])
    return bytes(made)


def _put(made: bytearray, at: int, data: bytes | bytearray) -> None:
    count = min(len(data), len(made) - at)
    made[at : at + count] = data[:count]


_leaves = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**65), 2**65),
    st.floats(),
    st.text(max_size=20),
    st.sampled_from(["", "..", "/", "a/b", "\0", "full", "active", "9" * 5000, 10**400, 1e308, 65536, 512, "x" * 300]),
)
values = st.recursive(
    _leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
)
"""Anything that JSON can say."""

json_edits = st.lists(
    st.tuples(st.sampled_from(["set", "delete", "add"]), st.lists(st.integers(0, 40), max_size=3), values),
    min_size=1,
    max_size=3,
)
"""What `apply_json` takes: a path of positions, modulo what there is at each step."""


def apply_json(data: bytes, changes: list[Any]) -> bytes:
    """The document with other values in some places; as it was where it is no JSON."""
    try:
        document = json.loads(data)
    except ValueError:
        return data
    for kind, path, value in changes:
        document = _changed(document, kind, list(path), value)
    return json.dumps(document).encode("utf-8", "surrogatepass")


def _changed(node: Any, kind: str, path: list[int], value: Any) -> Any:
    if isinstance(node, dict) and node and path:
        key = list(node)[path[0] % len(node)]
        if len(path) == 1 and kind == "delete":
            del node[key]
        elif len(path) == 1 and kind == "add":
            node["more"] = value
        else:
            node[key] = _changed(node[key], kind, path[1:], value)
        return node
    if isinstance(node, list) and node and path:
        place = path[0] % len(node)
        node[place] = _changed(node[place], kind, path[1:], value)
        return node
    return value


def spoil(path: Path, case: dict[str, Any]) -> None:
    """Change the file as the case says: `edits` to its bytes, `json` to its document, or `gone`."""
    if case.get("gone"):
        path.unlink()
        return
    data = path.read_bytes()
    if case.get("json"):
        data = apply_json(data, case["json"])
    path.write_bytes(apply(data, case.get("edits") or []))
