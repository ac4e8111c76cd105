"""One run of `fleecing backup`: snapshot with checkpoint, pull, verify, delete; undone as a whole when it fails.

    DIR/.backup.json   what is under way: written before the snapshot is asked for, removed when nothing is left to do
    DIR/DISK/          the backups of each disk

    making   snapshot and checkpoint may be there, points may be there: all of it is taken back by the next run
    safe     every disk's new point is on disk and verified: only the snapshot and the old checkpoint are left to delete

So the checkpoint that the next increment begins with is deleted only after its successor's backup is safe.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Final

from fleecing.cli.chain_pull import SnapshotFacts, add_point, pull_point
from fleecing.cli.control_client import ControlClient
from fleecing.cli.params import choose_uri
from fleecing.control.names import check_name
from fleecing.errors import ControlError, FleecingError, ImageError, sentence
from fleecing.pull.chain import Chain, locked, new_chain
from fleecing.pull.chain_read import check_ground, verify
from fleecing.pull.manifest import MANIFEST, write_whole
from fleecing.pull.options import Progress as PullProgress
from fleecing.pull.options import PullOptions
from fleecing.pull.prune import prune
from fleecing.pull.qcow2_codec import Compression

RECORD: Final = ".backup.json"
"""No disk's folder begins with a dot."""

Say = Callable[[str], None]


@dataclass(frozen=True)
class BackupOptions:
    """`keep`: how many points of each disk stay, None for all. `pull` as for any pull."""

    full: bool = False
    keep: int | None = None
    compression: Compression = Compression.ZSTD
    pull: PullOptions = field(default_factory=PullOptions)
    snapshot: dict[str, Any] = field(default_factory=dict)
    """More of the request for the snapshot: temp_limit."""
    tls_certificates: str | None = None
    tls_hostname: str | None = None


@dataclass(frozen=True)
class BackupResult:
    """What was done for one disk. `reason`: why it is full although there were backups before."""

    disk: str
    point: str
    since: str | None
    reason: str | None
    data: int
    file: str


@dataclass
class _Record:
    """What backup.json says."""

    name: str
    disks: list[str]
    old: dict[str, str]
    """Disk to the checkpoint that this backup makes needless."""
    safe: bool = False

    def save(self, folder: Path) -> None:
        write_whole(folder / RECORD, (json.dumps(vars(self), indent=2) + "\n").encode())

    @classmethod
    def load(cls, folder: Path) -> _Record | None:
        try:
            content = json.loads((folder / RECORD).read_bytes())
            record = cls(**content)
            for name in (record.name, *record.disks, *record.old, *record.old.values()):
                check_name(name)
            return record
        except FileNotFoundError:
            return None
        except (ValueError, TypeError, AttributeError) as e:
            raise ImageError(str(folder / RECORD), -1, f"is no record of a backup: {e}") from None


class Backup:
    """The work on one folder; `run` once. Raises ControlError, ImageError, OSError and what a pull raises."""

    def __init__(
        self, client: ControlClient, folder: str, disks: Sequence[str], options: BackupOptions, say: Say
    ) -> None:
        self._client = client
        self._folder = Path(folder)
        self._disks = list(disks)
        self._options = options
        self._say = say
        self._chains: dict[str, Chain] = {}

    def run(self, progress: Callable[[str, PullProgress], None]) -> list[BackupResult]:
        """Back up; `progress` is told the disk that is being pulled, and how far it is."""
        self._check_disks()
        if (self._folder / MANIFEST).is_file():
            problem = "has the backups of one disk itself, and would hide those of folders in it: name another folder"
            raise ImageError(str(self._folder), -1, problem)
        self._folder.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            stack.enter_context(locked(self._folder, say=self._say))
            earlier = _Record.load(self._folder)
            if earlier is not None:
                self._say(
                    f"The backup {earlier.name} was cut off: {'finishing' if earlier.safe else 'undoing'} it first"
                )
            for disk in dict.fromkeys([*self._disks, *(earlier.disks if earlier is not None else [])]):
                self._chains[disk] = stack.enter_context(new_chain(str(self._folder / disk), self._say))
            if earlier is not None:
                self._end(earlier)
            record, since, reason = self._plan()
            try:
                record.save(self._folder)
                results = self._make(record, since, reason, progress)
            except BaseException:
                self._try_to_end(record)
                raise
            record.safe = True
            record.save(self._folder)
            try:
                self._end(record)
                self._prune()
            except (FleecingError, OSError):
                self._say(f"The backup {record.name} is safe; what is left to be tidied, the next one does")
                raise
        return results

    def _check_disks(self) -> None:
        """Raises ControlError before anything is made where that would be in vain."""
        known = [disk["name"] for disk in self._client.request("GET", "/v1/disks")["disks"]]
        for disk in self._disks:
            if disk not in known:
                raise ControlError(404, f"there is no disk '{disk}': this server has {', '.join(known)}")

    def _plan(self) -> tuple[_Record, str | None, str | None]:
        """The record of this run, the checkpoint that its increments begin with, and why there is none."""
        # Nobody else's snapshot may have this name: what is undone is deleted by it
        name = f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(3)}"
        last = {disk: self._chains[disk].last for disk in self._disks}
        old = {disk: point.checkpoint for disk, point in last.items() if point is not None and point.checkpoint}
        record = _Record(name, self._disks, old)
        if self._options.full:
            return record, None, "asked for" if old else None
        if not any(last.values()):
            return record, None, None
        if len(old) < len(self._disks) or len(set(old.values())) > 1:
            return record, None, "the disks' last backups are not of one instant"
        for disk in self._disks:
            try:
                check_ground(self._chains[disk], len(self._chains[disk].points) - 1)
            except (ImageError, OSError) as e:
                return record, None, f"what an increment of {disk} would stand on is damaged: {sentence(e)}"
        return record, next(iter(old.values())), None

    def _make(
        self, record: _Record, since: str | None, reason: str | None, progress: Callable[[str, PullProgress], None]
    ) -> list[BackupResult]:
        request = {"disks": record.disks, "name": record.name, "checkpoint": record.name, **self._options.snapshot}
        if since is not None:
            request |= {"since": since, "or_full": True}
        made = self._client.request("POST", "/v1/snapshots", request)["snapshots"]
        infos = {info["disk"]: info for info in made}
        sizes: dict[str, int] = {}
        for disk in record.disks:
            info = infos[disk]
            pull_point(
                self._chains[disk],
                choose_uri(info["uris"], self._options.tls_certificates, self._options.tls_hostname),
                SnapshotFacts.of(info),
                self._options.pull,
                lambda told, disk=disk: progress(disk, told),  # type: ignore[misc]
                compression=self._options.compression,
                resume=False,
            )
            sizes[disk] = info["size"]
        results = []
        for disk in record.disks:
            chain, info = self._chains[disk], infos[disk]
            point = add_point(chain, SnapshotFacts.of(info), sizes[disk])
            verify(chain, len(chain.points) - 1, lambda count: None)
            why = info["reason"] or reason
            results.append(BackupResult(disk, point.name, point.since, why, point.data, str(chain.path(point.file))))
        return results

    # The end, of this run or of one that was cut off

    def _try_to_end(self, record: _Record) -> None:
        """What cannot be undone now is undone by the next run."""
        try:
            self._end(record)
        except (FleecingError, OSError) as e:
            following = ", the next backup will do that" if (self._folder / RECORD).exists() else ""
            self._say(f"Not all could be undone{following}: {sentence(e)}")

    def _end(self, record: _Record) -> None:
        """All of it, whatever fails: without the folder the snapshot would stay for good. Raises the first error."""
        problems: list[FleecingError | OSError] = []
        for disk in record.disks:
            needless = record.old.get(disk) if record.safe else record.name
            steps = [] if record.safe else [partial(self._chains[disk].drop_last, record.name)]
            steps.append(partial(self._delete, "snapshots", disk, record.name))
            if needless is not None:
                steps.append(partial(self._delete, "checkpoints", disk, needless))
            for step in steps:
                try:
                    step()
                except (FleecingError, OSError) as e:
                    problems.append(e)
        if problems:
            raise problems[0]
        (self._folder / RECORD).unlink(missing_ok=True)

    def _delete(self, kind: str, disk: str, name: str) -> None:
        """Gone already is as good; so is a disk that the server does not have any more."""
        try:
            self._client.request("DELETE", f"/v1/{kind}/{disk}@{name}")
        except ControlError as e:
            if e.status != 404:
                raise

    def _prune(self) -> None:
        if self._options.keep is None:
            return
        for disk in self._disks:
            gone = prune(
                self._chains[disk], self._options.keep, lambda count: None, compression=self._options.compression
            )
            if gone:
                self._say(f"{disk}: {len(gone)} old points removed")
