"""Pushes: the pull's engine inside the server, one thread for each job and a few for its reads.

A job does not outlive the server. STATE/.job-ID.json says what it would leave behind: it is there before a snapshot or
a file is made, and removed when nothing is left to undo; the next start undoes what a killed server left.
"""

from __future__ import annotations

import glob
import logging
import os
import secrets
import threading
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Final

from fleecing.block.image_lock import loop_file
from fleecing.block.snapshot_access import SnapshotAccess
from fleecing.control.disk import Snapshot
from fleecing.control.fields import Name
from fleecing.control.manager import Manager
from fleecing.control.models import JobChange, JobInfo, JobState, PushRequest, SnapshotRequest
from fleecing.control.state import Kept, read_json, remove, write_json
from fleecing.errors import ControlError, FleecingError, ImageError, sentence
from fleecing.events import Event, Value, of_export, tell
from fleecing.pull.destination import Destination, Format
from fleecing.pull.engine import copy
from fleecing.pull.limiter import Bandwidth
from fleecing.pull.node_source import NodeSource
from fleecing.pull.options import Progress, PullOptions, Trim
from fleecing.pull.qcow2_codec import Compression
from fleecing.pull.target import PART
from fleecing.units import KiB

log = logging.getLogger(__name__)

_RECORDS: Final = ".job-*.json"
KEPT: Final = 100
"""Ended jobs that are remembered."""
THREADS: Final = 2
"""Reads of a job at a time."""
PIECE: Final = 512 * KiB
"""Bytes of a read: between two of them the guest may go first."""


class JobRecord(Kept):
    """A push that is under way: found at a start, its own snapshot and the file it was making are removed."""

    disk: Name
    snapshot: Name | None
    part: str | None


class _Cancelled(Exception):
    """Stops the copy from its progress call."""


class Job:
    """One push. `progress` and `state` are written by its thread, and read by any."""

    def __init__(
        self, number: int, manager: Manager, request: PushRequest, path: str, on_end: Callable[[JobState], None]
    ) -> None:
        """Checks all that can be checked now, and makes the snapshot. Raises ControlError; nothing is left then."""
        self.number = number
        self.state = JobState.RUNNING
        self._on_end = on_end
        self._manager = manager
        self._request = request
        self._path = path
        self._progress: Progress | None = None
        self._error: str | None = None
        self._started = datetime.now(UTC)
        self._ended: datetime | None = None
        self._cancelled = threading.Event()
        self._bandwidth = Bandwidth(request.bandwidth or 0)
        self._destination = _destination(request)
        disk, at, name = request.source.partition("@")
        for known in manager.disks.values():
            if _is_same(request.target, known.settings.path):
                raise ControlError(409, f"{request.target} is the image of disk '{known.name}': name another target")
        manager.disk(disk)
        if at and request.quiesce:
            raise ControlError(400, f"snapshot '{request.source}' is there already: quiesce goes with a disk only")
        self._own = None if at else f"push-{self._started:%Y%m%d-%H%M%S}-{secrets.token_hex(3)}"
        part = request.target + PART if self._destination.is_new_file else None
        write_json(path, JobRecord(disk=disk, snapshot=self._own, part=part))
        try:
            if self._own is not None:
                manager.create(SnapshotRequest(disks=[disk], name=self._own, quiesce=request.quiesce))
            self._snapshot: Snapshot = manager.snapshot(disk, self._own or name)
            if not isinstance(self._snapshot.node, SnapshotAccess):
                raise ControlError(409, f"snapshot '{request.source}' is broken and cannot be pushed")
            if self._snapshot.record.since is not None:
                raise ControlError(409, f"snapshot '{request.source}' has changes only: push a full one")
        except BaseException:
            self._clean()
            raise
        self._thread = threading.Thread(target=self._run, name=f"job-{number}")
        self._tell_started()
        self._thread.start()

    def info(self) -> JobInfo:
        """It at this moment."""
        told = self._progress
        return JobInfo(
            id=self.number,
            source=self._snapshot.export.name,
            target=self._request.target,
            state=self.state,
            error=self._error,
            done=told.done if told else 0,
            total=told.total if told else None,
            data=told.data if told else 0,
            rate=round(told.rate) if told else 0,
            bandwidth=self._bandwidth.rate or None,
            started=self._started,
            ended=self._ended,
        )

    def change(self, change: JobChange) -> JobInfo:
        """Raises ControlError where it has ended."""
        if self.state is not JobState.RUNNING:
            raise ControlError(409, f"job {self.number} has ended ({self.state}): nothing of it can be changed")
        self._bandwidth.set(change.bandwidth or 0)
        return self.info()

    def _tell_started(self) -> None:
        text = "job %d: pushing %s to %s"
        source, target = self._request.source, self._request.target
        tell(log, logging.INFO, Event.JOB_STARTED, text, self.number, source, target, **self._fields(), state="running")

    def _fields(self) -> dict[str, Value]:
        export = of_export(self._snapshot.export.name)
        return {"job": self.number, "source": self._request.source, "target": self._request.target, **export}

    def cancel(self) -> None:
        """Stop it, and wait for its end; one that has ended stays as it is."""
        self._cancelled.set()
        self._thread.join()

    def _tell(self, progress: Progress) -> None:
        self._progress = progress
        if self._cancelled.is_set():
            raise _Cancelled

    def _run(self) -> None:
        state = JobState.FAILED
        try:
            self._copy()
            state = JobState.DONE
        except _Cancelled:
            state = JobState.CANCELLED
        except (FleecingError, OSError) as e:
            self._error = sentence(e)
        except Exception as e:
            log.exception("job %d ended in an error that nobody expected", self.number)
            self._error = f"internal error: {type(e).__name__}"
        self._clean()
        self._ended = datetime.now(UTC)
        self._on_end(state)
        self.state = state
        tell(
            log,
            logging.INFO if state is not JobState.FAILED else logging.ERROR,
            Event.JOB_ENDED,
            "job %d, %s to %s: %s",
            self.number,
            self._request.source,
            self._request.target,
            self._error or state,
            **self._fields(),
            state=str(state),
            reason=self._error,
        )

    def _copy(self) -> None:
        node = self._snapshot.node
        assert isinstance(node, SnapshotAccess)
        options = PullOptions(
            connections=THREADS,
            depth=1,
            piece=PIECE,
            trim=Trim.SNAPSHOT if self._request.trim else Trim.NEVER,
            bandwidth=self._bandwidth,
        )
        node.retain()
        try:
            source = NodeSource(node, self._snapshot.export.name)
            copy(source, self._destination.open, options, progress=self._tell, interval=0.1)
        finally:
            node.release()

    def _clean(self) -> None:
        """Delete the job's own snapshot; what cannot be deleted now, the next start deletes."""
        try:
            if self._own is not None:
                self._manager.delete(self._request.source, self._own)
            remove(self._path)
        except (ControlError, OSError) as e:
            log.error("job %d: its snapshot %s is left: %s", self.number, self._own, e)


class Jobs:
    """All pushes of a server."""

    def __init__(self, manager: Manager, state_dir: str) -> None:
        """Undoes first what an earlier server left."""
        self._manager = manager
        self._state_dir = state_dir
        self._jobs: dict[int, Job] = {}
        self._last = 0
        self._ended: Counter[JobState] = Counter()
        self._ended_lock = threading.Lock()
        self._lock = threading.Lock()
        self._closed = False
        for path in glob.glob(os.path.join(glob.escape(state_dir), _RECORDS)):
            self._undo(path)

    def _undo(self, path: str) -> None:
        try:
            record = read_json(path, JobRecord)
            if record.disk not in self._manager.disks:
                return  # another server's
            if record.snapshot is not None:
                self._manager.delete(record.disk, record.snapshot)
            if record.part is not None and os.path.lexists(record.part):
                os.unlink(record.part)
            remove(path)
            log.warning("leftover of an earlier run: a push of disk %s was undone", record.disk)
        except (ControlError, ImageError, OSError) as e:
            log.error("a push that did not end is left as it is: %s", e)

    def start(self, request: PushRequest) -> JobInfo:
        """Raises ControlError where it cannot begin."""
        with self._lock:
            if self._closed:
                raise ControlError(503, "the server is stopping")
            self._last += 1
            path = os.path.join(self._state_dir, f".job-{secrets.token_hex(8)}.json")
            try:
                job = self._jobs[self._last] = Job(self._last, self._manager, request, path, self._count)
            except OSError as e:
                raise ControlError(500, f"state folder {self._state_dir} cannot take the job: {e.strerror}") from e
            ended = [number for number, job in self._jobs.items() if job.state is not JobState.RUNNING]
            for number in ended[:-KEPT]:
                del self._jobs[number]
        return job.info()

    @property
    def running(self) -> int:
        """Jobs that have not ended."""
        return sum(job.state is JobState.RUNNING for job in list(self._jobs.values()))

    def ended(self, state: JobState) -> int:
        """Jobs that ended so, ever."""
        return self._ended[state]

    def _count(self, state: JobState) -> None:
        with self._ended_lock:
            self._ended[state] += 1

    def infos(self) -> list[JobInfo]:
        return [job.info() for job in list(self._jobs.values())]

    def get(self, number: str) -> Job:
        """Raises ControlError where there is none."""
        is_number = number.isascii() and number.isdecimal() and len(number) < 20
        found = self._jobs.get(int(number)) if is_number else None
        if found is None:
            raise ControlError(404, f"there is no job {number[:40]}: `fleecing job list` shows them all")
        return found

    def close(self) -> None:
        """Cancel all, and wait for them."""
        with self._lock:
            self._closed = True
        for job in self._jobs.values():
            job.cancel()


def _destination(request: PushRequest) -> Destination:
    """Raises ControlError where the target cannot be one; nothing is made."""
    target = request.target
    if "://" not in target and not os.path.isabs(target):
        raise ControlError(400, f"target '{target}' is no absolute path and no NBD URI")
    try:
        destination = Destination(target, format=request.format, compression=Compression[request.compress.upper()])
        if destination.format is Format.QCOW2 and not destination.is_new_file:
            raise ControlError(400, f"target '{target}' is written over as it is: the format qcow2 is for new files")
        if request.compress != "none" and destination.format is not Format.QCOW2:
            raise ControlError(400, f"target '{target}' is raw: compress goes with the format qcow2")
        destination.prepare()
    except ValueError as e:
        raise ControlError(400, str(e)) from None
    except ImageError as e:
        raise ControlError(409, sentence(e)) from None
    return destination


def _is_same(target: str, image: str) -> bool:
    """The same file, the same device under another name, or a loop device of that file."""
    try:
        one, other = os.stat(target), os.stat(image)
        if os.path.samestat(one, other) or (one.st_rdev != 0 and one.st_rdev == other.st_rdev):
            return True
        file = loop_file(one)
        return file is not None and os.path.samestat(os.stat(file), other)
    except OSError:
        return False
