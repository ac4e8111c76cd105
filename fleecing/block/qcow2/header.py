"""The first cluster of a temp image: header, extensions, backing file name."""

from __future__ import annotations

import os
from dataclasses import dataclass

from construct import ConstructError

from fleecing.block.qcow2 import layout, layouts
from fleecing.block.qcow2.geometry import Geometry
from fleecing.block.qcow2.layout import ExtensionType
from fleecing.errors import ImageError
from fleecing.units import align_up, div_up


@dataclass(frozen=True, slots=True)
class Header:
    """What a temp image's first cluster says."""

    geometry: Geometry
    backing_file: str
    backing_format: str


def build(path: str, header: Header) -> bytes:
    """The bytes of the first cluster, without the zeroes at its end. Raises ImageError where they do not fit."""
    geometry = header.geometry
    name = os.fsencode(header.backing_file)
    if not name.startswith(b"/"):
        raise ImageError(path, -1, f"backing file '{header.backing_file}' is no absolute path")
    if len(name) > layout.MAX_BACKING_NAME:
        raise ImageError(
            path, -1, f"the backing file's path has {len(name)} bytes, qcow2 takes {layout.MAX_BACKING_NAME}"
        )
    extensions = b"".join(
        layouts.EXTENSION.build({"type": kind, "length": len(data), "data": data})
        for kind, data in (
            (ExtensionType.BACKING_FORMAT, header.backing_format.encode()),
            (ExtensionType.END, b""),
        )
    )
    name_offset = layout.HEADER_LENGTH + len(extensions)
    if name_offset + len(name) > geometry.cluster_size:
        room = geometry.cluster_size - name_offset
        raise ImageError(
            path,
            -1,
            f"the backing file's path has {len(name)} bytes, clusters of {geometry.cluster_size} bytes take {room}",
        )
    fields = {
        "version": layout.VERSION,
        "backing_file_offset": name_offset,
        "backing_file_size": len(name),
        "cluster_bits": geometry.cluster_bits,
        "size": geometry.size,
        "crypt_method": 0,
        "l1_size": geometry.l1_entries,
        "l1_table_offset": geometry.l1_offset,
        "refcount_table_offset": geometry.table_offset,
        "refcount_table_clusters": geometry.table_clusters,
        "nb_snapshots": 0,
        "snapshots_offset": 0,
        "incompatible_features": 0,
        "compatible_features": 0,
        "autoclear_features": 0,
        "refcount_order": layout.REFCOUNT_ORDER,
        "header_length": layout.HEADER_LENGTH,
    }
    return bytes(layouts.HEADER.build(fields)) + extensions + name


def parse(path: str, data: bytes, file_length: int) -> Header:
    """The header in `data`, the first bytes of the file, the first cluster at least. Raises ImageError.

    Refuses whatever a temp image does not use (snapshots, encryption, feature bits): nobody here could go on with it.
    """
    try:
        fields = layouts.HEADER.parse(data)
    except ConstructError:
        raise ImageError(path, 0, "is no qcow2 image") from None
    values = {name: value for name, value in fields.items() if isinstance(value, int)}
    _check_fields(path, values)
    cluster_size = 1 << values["cluster_bits"]
    geometry = Geometry(
        size=values["size"],
        cluster_size=cluster_size,
        l1_entries=values["l1_size"],
        l1_offset=values["l1_table_offset"],
        table_clusters=values["refcount_table_clusters"],
        table_offset=values["refcount_table_offset"],
    )
    _check_geometry(path, geometry, file_length)
    first = data[:cluster_size]
    offset, length = values["backing_file_offset"], values["backing_file_size"]
    if not offset or not length or length > layout.MAX_BACKING_NAME or offset + length > len(first):
        raise ImageError(path, 8, f"backing file name of {length} bytes at {offset} is not within the first cluster")
    backing_format = _backing_format(path, first[:offset], values["header_length"])
    return Header(geometry, os.fsdecode(first[offset : offset + length]), backing_format)


def _check_fields(path: str, values: dict[str, int]) -> None:
    def refuse(offset: int, text: str) -> ImageError:
        return ImageError(path, offset, text)

    if values["version"] != layout.VERSION:
        raise refuse(4, f"qcow2 version {values['version']}, a temp image has {layout.VERSION}")
    bits = values["cluster_bits"]
    if not layout.MIN_CLUSTER_BITS <= bits <= layout.MAX_CLUSTER_BITS:
        raise refuse(20, f"cluster_bits {bits} is not from {layout.MIN_CLUSTER_BITS} to {layout.MAX_CLUSTER_BITS}")
    size = values["size"]
    if not 0 < size < 1 << 63 or size % layout.SECTOR:
        raise refuse(24, f"size {size} is no multiple of {layout.SECTOR} bytes within the limits")
    # "Incompatible features: ... an implementation must fail to open an image if an unknown bit is set"; of the known
    # ones a temp image uses none.
    incompatible = values["incompatible_features"]
    if incompatible:
        raise refuse(72, f"incompatible features {layout.Incompatible(incompatible)!r}, a temp image has none")
    for name, offset in (("crypt_method", 32), ("nb_snapshots", 60), ("autoclear_features", 88)):
        if values[name]:
            raise refuse(offset, f"{name} is {values[name]}, a temp image has none")
    if values["refcount_order"] != layout.REFCOUNT_ORDER:
        raise refuse(96, f"refcount_order {values['refcount_order']}, a temp image has {layout.REFCOUNT_ORDER}")
    length = values["header_length"]
    if length < layout.HEADER_LENGTH or length % 8 or length >= 1 << bits:
        raise refuse(100, f"header_length {length} is impossible")


def _check_geometry(path: str, geometry: Geometry, file_length: int) -> None:
    entries, size = geometry.l1_entries, geometry.cluster_size
    if (
        entries < div_up(geometry.guest_clusters, geometry.l2_entries)
        or entries * layout.ENTRY_BYTES > layout.MAX_L1_BYTES
    ):
        raise ImageError(path, 36, f"an L1 table of {entries} entries for a disk of {geometry.size} bytes")
    if not 0 < geometry.table_clusters * size <= layout.MAX_REFCOUNT_TABLE_BYTES:
        raise ImageError(path, 56, f"a refcount table of {geometry.table_clusters} clusters")
    for field, offset, length in (
        (40, geometry.l1_offset, align_up(entries * layout.ENTRY_BYTES, size)),
        (48, geometry.table_offset, geometry.table_clusters * size),
    ):
        if offset % size or not size <= offset <= file_length - length:
            raise ImageError(path, field, f"a table of {length} bytes at {offset} in a file of {file_length} bytes")


def _backing_format(path: str, data: bytes, offset: int) -> str:
    """The backing format in the extensions from `offset` to the end of `data`."""
    found = ""
    while True:
        try:
            extension = layouts.EXTENSION.parse(data[offset:])
        except ConstructError:
            raise ImageError(path, offset, "header extensions without an end") from None
        if extension.type == ExtensionType.END:
            break
        if extension.type == ExtensionType.BACKING_FORMAT:
            found = extension.data.decode("ascii", "replace")
        offset += 8 + align_up(extension.length, 8)
    if not found:
        raise ImageError(path, offset, "has no backing format, a temp image names it")
    return found
