"""One target under fire: hypothesis makes the inputs and makes those that hit small."""

from __future__ import annotations

import faulthandler
import os
import resource
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from hypothesis import HealthCheck, Phase, Verbosity, given, settings
from hypothesis import seed as seeded

from fleecing.units import GiB
from scripts.fuzzing.target import Case, Ear, Target, load, save
from scripts.fuzzing.targets import TARGETS

BATCH = 25
"""Inputs between two new seeds."""

HANG_SECONDS = 40
"""What one input may take. Nothing asserts a time: whoever takes this long hangs."""

SMALLER_SECONDS = 30.0
"""How long an input that hit is made smaller."""

MEMORY = 2 * GiB
"""What this process may take besides what it has at the start, as addresses."""

MOST_WORDS = 2000
"""Characters of an error that are told."""

Tell = Callable[[str], None]


class Hang(Exception):
    """One input took HANG_SECONDS."""


class _Over(BaseException):
    """The time is over; not an Exception, so that hypothesis makes nothing of it."""


@dataclass(frozen=True)
class Hit:
    """The smallest input that was found to hit, and how."""

    case: Case
    error: BaseException
    where: str

    def __str__(self) -> str:
        return f"{type(self.error).__name__}: {str(self.error)[:MOST_WORDS]}\n{self.where}"


def scratch() -> tempfile.TemporaryDirectory[str]:
    """A folder in memory, where there is one: every start and stop syncs. Its name is short: sockets are in it."""
    return tempfile.TemporaryDirectory(prefix="fuzz-", dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None)


def fire(name: str, folder: Path, seed: int, seconds: float, keep: Path, tell: Tell) -> Hit | None:
    """Shoot for so long, and at least once; the hit is kept in a file of the folder `keep`."""
    end = time.monotonic() + seconds
    shooting = _Shooting(name, folder, end)
    hit = shooting.run(seed)
    tell(f"{name}: {shooting.shots} inputs in {time.monotonic() - end + seconds:.1f} s, {'HIT' if hit else 'no hit'}")
    if hit is None:
        return None
    tell(f"{name}: {hit}")
    if hit.case:  # else it was not of an input
        keep.mkdir(parents=True, exist_ok=True)
        path = keep / f"fuzz-{name}-{seed}.json"
        save(path, name, hit.case)
        tell(f"{name}: ./scripts/fuzz {path}    shoots it again")
    return hit


def replay(path: Path, tell: Tell) -> Hit | None:
    """Shoot one input that was kept."""
    name, case = load(path)
    with scratch() as folder:
        hit = _Shooting(name, Path(folder), 0).once(case)
    tell(f"{path}: {'no hit' if hit is None else hit}")
    return hit


class _Shooting:
    def __init__(self, name: str, folder: Path, end: float) -> None:
        self.shots = 0
        self._end = end
        self._hit: Hit | None = None
        self._ear = Ear()
        self._target: Target = TARGETS[name](folder)

    def once(self, case: Case) -> Hit | None:
        try:
            try:
                self._shoot(case)
            finally:
                self._target.close()
        except Exception as e:
            return _hit(case, e)
        finally:
            self._ear.close()
        return None

    def run(self, seed: int) -> Hit | None:
        case: Case = {}
        with _bounded_memory():
            try:
                batch = 0
                while self._hit is None and (time.monotonic() < self._end or not batch):
                    self._batch(seed + (batch << 32))
                    batch += 1
            except _Over:
                pass
            except Exception as e:  # of hypothesis, where a hit comes and goes
                self._hit = self._hit or _hit(case, e)
        try:
            self._target.close()
        except Exception as e:
            self._hit = self._hit or _hit(case, e)
        finally:
            self._ear.close()
        return self._hit

    def _batch(self, seed: int) -> None:
        @seeded(seed)
        @settings(
            max_examples=BATCH,
            database=None,
            deadline=None,
            phases=[Phase.generate, Phase.shrink],
            suppress_health_check=list(HealthCheck),
            verbosity=Verbosity.quiet,
            print_blob=False,
            report_multiple_bugs=False,
        )
        @given(self._target.cases)
        def shoot(case: Case) -> None:
            if time.monotonic() > self._end and self.shots:
                raise _Over
            self.shots += 1
            try:
                self._shoot(case)
            except Exception as e:
                if self._hit is None:
                    self._end = time.monotonic() + SMALLER_SECONDS
                if self._hit is None or len(repr(case)) <= len(repr(self._hit.case)):
                    self._hit = _hit(case, e)
                raise

        try:
            shoot()
        except Exception:
            if self._hit is None:
                raise

    def _shoot(self, case: Case) -> None:
        with _in_time():
            self._target.run(case)
        self._ear.check()


def _hit(case: Case, error: BaseException) -> Hit:
    return Hit(case, error, "".join(traceback.format_tb(error.__traceback__)[-10:]))


@contextmanager
def _in_time() -> Iterator[None]:
    def over(number: int, frame: object) -> None:
        faulthandler.dump_traceback()
        raise Hang(f"still at it after {HANG_SECONDS} s")

    before = signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, HANG_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def _bounded_memory() -> Iterator[None]:
    """More than MEMORY is a MemoryError, and that a hit."""
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
