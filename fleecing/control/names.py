"""Names of disks and snapshots, and the export names made of them."""

from __future__ import annotations

import re

NAME_PATTERN = r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}"
NAME_RULE = "1 to 128 letters, digits and . _ -, the first one neither . nor -"

_NAME = re.compile(NAME_PATTERN, re.ASCII)
_NOT_ALLOWED = re.compile(r"[^A-Za-z0-9._-]+")


def check_name(text: str) -> str:
    """The same text if it may name a disk or a snapshot. Raises ValueError with the rule.

    Names become folder names and command line words, hence no leading dot or dash; `@` parts disk from snapshot.
    """
    if _NAME.fullmatch(text) is None:
        raise ValueError(f"'{text[:140]}' is no name: allowed are {NAME_RULE}")
    return text


def clean_name(text: str) -> str:
    """The nearest allowed name: "My disk (2)" becomes "My-disk-2"; "disk" where nothing is left."""
    return _NOT_ALLOWED.sub("-", text).lstrip(".-")[:128].rstrip("-") or "disk"


def export_name(disk: str, snapshot: str) -> str:
    """The export of a snapshot: DISK@SNAPSHOT."""
    return f"{disk}@{snapshot}"


def check_export(text: str) -> str:
    """The same text if it may name an export, DISK or DISK@SNAPSHOT. Raises ValueError."""
    disk, at, snapshot = text.partition("@")
    check_name(disk)
    if at:
        check_name(snapshot)
    return text


def split_export(text: str) -> tuple[str, str]:
    """(disk, snapshot) of "DISK@SNAPSHOT". Raises ValueError where it is something else."""
    disk, at, snapshot = text.partition("@")
    if not at:
        raise ValueError(f"'{text[:140]}' names no snapshot: write DISK@SNAPSHOT, as in vda@monday")
    return check_name(disk), check_name(snapshot)


def snapshot_path(which: tuple[str, str]) -> str:
    """The API's path of a snapshot; names need no quoting."""
    return f"/v1/snapshots/{which[0]}@{which[1]}"
