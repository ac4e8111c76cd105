"""Pulling a snapshot as the next point of a folder of backups."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

from fleecing.errors import ImageError
from fleecing.nbd.uri import NbdUri
from fleecing.pull.chain import Chain
from fleecing.pull.chain_read import check_ground
from fleecing.pull.engine import ProgressCall, pull
from fleecing.pull.manifest import Point
from fleecing.pull.options import Check, PullOptions, PullReport
from fleecing.pull.qcow2_codec import Compression


@dataclass(frozen=True)
class SnapshotFacts:
    """What a server tells of a snapshot, as far as a chain wants to know."""

    name: str
    """Of the point: that of the checkpoint, else that of the snapshot."""
    export: str
    created: str
    since: str | None = None
    checkpoint: str | None = None
    bitmap: str | None = None

    @classmethod
    def of(cls, info: dict[str, Any]) -> SnapshotFacts:
        """From the control API's answer."""
        return cls(
            name=info["checkpoint"] or info["name"],
            export=info["export"],
            created=info["created"],
            since=info["since"],
            checkpoint=info["checkpoint"],
            bitmap=info["bitmap"] if info["since"] is not None else None,
        )

    @classmethod
    def unknown(cls, export: str) -> SnapshotFacts:
        """Nobody tells: a full image, now."""
        name = export.replace("@", "-").strip("./") or "disk"
        if not all(sign.isalnum() or sign in "._-" for sign in name):
            raise ImageError(export, -1, "is no name for a file of backups: pull it by the name DISK@SNAPSHOT")
        return cls(name=name, export=export, created=datetime.now(UTC).isoformat())


def pull_point(
    chain: Chain,
    uri: NbdUri,
    facts: SnapshotFacts,
    options: PullOptions,
    progress: ProgressCall,
    *,
    compression: Compression,
    resume: bool,
) -> PullReport | None:
    """Make the file of the next point, with its journal beside it; None where an earlier run had made all of it.

    The chain does not know it until `add_point`. Raises ImageError where the points that an increment stands on are
    damaged, and what `pull` raises; what was pulled stays for `resume`.
    """
    destination = chain.destination(facts.name, since=facts.since, compression=compression, resume=resume)
    if (earlier := destination.finished(uri)) is not None:
        earlier.close()
        return None
    if facts.since is not None:
        check_ground(chain, len(chain.points) - 1)
    chain.begin(facts.name)
    journal = destination.prepare()
    assert journal is not None, "a new file always has one"
    bitmap = "" if facts.since is None else facts.bitmap
    options = replace(options, check=Check.SHA256, bitmap=bitmap)
    try:
        return pull(uri, destination.open, options, journal=journal, progress=progress)
    finally:
        journal.close()


def add_point(chain: Chain, facts: SnapshotFacts, size: int) -> Point:
    """Make what `pull_point` made the last point of the chain. `size` of the disk, in bytes."""
    return chain.add(
        facts.name,
        size=size,
        created=facts.created,
        since=facts.since,
        checkpoint=facts.checkpoint,
        snapshot=facts.export,
    )
