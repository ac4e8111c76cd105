"""Guests that are frozen around the instant of a snapshot: their file systems and programs are consistent in it.

    STATE/.frozen-ID.json   written, durably, before anything is asked of the guest
    before, agent's freeze  each with its limit of time
    the instant             milliseconds: all that takes time was prepared before
    agent's thaw, after     tried once at once; where that fails, again and again by a thread of its own
    the file is removed     when the guest is known to be thawed

The server does this itself, so nothing depends on who asked for it. Whatever fails or ends in between, the guest is
thawed: by this process, and where that is killed, by the next one that serves one of its disks.

A snapshot counts only where the thaw confirms that the guest was frozen until then: else it is not made.
"""

from __future__ import annotations

import glob
import logging
import os
import secrets
import threading
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Final

from fleecing.control.config import GuestSettings
from fleecing.control.disk import Disk
from fleecing.control.guest_agent import AgentRefused, GuestAgent, HookError
from fleecing.control.hook_command import HookCommand
from fleecing.control.state import FrozenRecord, read_json, remove, write_json
from fleecing.errors import ControlError, ImageError
from fleecing.events import Event, Value, tell

log = logging.getLogger(__name__)

END_SECONDS = 30.0
"""How long the end of the server waits for guests to be thawed."""

FIRST_PAUSE_SECONDS = 0.1
MOST_PAUSE_SECONDS = 10.0
"""Between two tries to thaw a guest; each is twice as long as the one before."""

_RECORDS: Final = ".frozen-*.json"


class FrozenGuest:
    """One guest from its record to the record's removal. For one thread at a time, but for `abort`."""

    def __init__(self, record: FrozenRecord, path: str, environ: Mapping[str, str], *, asked: bool = False) -> None:
        """`asked`: nobody knows how far an earlier process came."""
        self.record = record
        self.path = path
        self.flaw: str | None = None  # why nobody knows whether the guest was frozen all the time
        self._environ = {**environ, "FLEECING_GUEST": record.guest, "FLEECING_DISKS": " ".join(record.disks)}
        self._agent_due = asked and record.agent is not None  # whether the agent may have frozen it
        self._after_due = asked and record.after is not None
        self._agent: GuestAgent | None = None
        self._count: int | None = None  # file systems that were frozen, None = nobody knows
        self._freezing = False
        self._aborted = False
        self._running: GuestAgent | HookCommand | None = None

    def freeze(self, before: str | None) -> None:
        """Raises HookError; the guest may be frozen all the same then."""
        started = time.monotonic()
        self._freezing = True
        try:
            self._after_due = self.record.after is not None
            if before is not None:
                self._run(before)
            if self.record.agent is not None:
                self._freeze_agent(self._connect(self.record.agent))
        except HookError:
            self._disconnect()  # a late answer would be taken for that to the thaw
            raise
        finally:
            self._freezing = False
        seconds = time.monotonic() - started
        files = "" if self._count is None else f", {self._count} file systems"
        text = "guest %s is frozen%s, which took %.3f s"
        self._tell(logging.INFO, Event.GUEST_FROZEN, text, files, seconds, file_systems=self._count, seconds=seconds)

    def _freeze_agent(self, agent: GuestAgent) -> None:
        if agent.is_frozen():
            raise HookError("somebody else has frozen it already")
        self._agent_due = True
        try:
            self._count = agent.freeze()
        except AgentRefused:
            self._agent_due = _may_be_frozen(agent)
            raise

    def thaw(self) -> bool:
        """Do what is left of it; False = there was nothing. Raises HookError where something is left: try again."""
        problem: HookError | None = None
        due = self._agent_due or self._after_due
        if self._agent_due:
            try:
                self._thaw_agent()
                self._agent_due = False
            except HookError as e:
                problem = e
        self._disconnect()
        if self._after_due and self.record.after is not None:
            try:
                self._run(self.record.after)
                self._after_due = False
            except HookError as e:
                problem = problem or e
        if problem is not None:
            raise problem
        return due

    def _thaw_agent(self) -> None:
        assert self.record.agent is not None
        same = self._agent is not None
        agent = self._agent or self._connect(self.record.agent)
        try:
            count = agent.thaw()
        except AgentRefused as e:
            if _may_be_frozen(agent):
                raise
            self.flaw = str(e)  # Windows thaws by itself after 10 s, and says so here
            return
        if not same:
            self.flaw = "the connection to its agent was lost meanwhile"
        elif self._count and not count:
            self.flaw = "somebody else thawed it before the snapshot was there"

    def abort(self) -> None:
        """Have its freezing fail now, if it goes on. From any thread."""
        self._aborted = True
        running = self._running
        if self._freezing and running is not None:
            running.abort()

    def _connect(self, path: str) -> GuestAgent:
        self._agent = GuestAgent(path, self.record.hook_seconds)
        self._begin(self._agent)
        self._agent.connect()
        return self._agent

    def _disconnect(self) -> None:
        agent, self._agent = self._agent, None
        if agent is not None:
            agent.close()

    def _run(self, command: str) -> None:
        process = HookCommand(command, self._environ, self.record.hook_seconds)
        self._begin(process)
        process.wait()

    def _begin(self, step: GuestAgent | HookCommand) -> None:
        self._running = step
        if self._freezing and self._aborted:
            step.abort()

    def tell_stuck(self, problem: Exception) -> None:
        """That it is not thawed."""
        text = "guest %s is NOT thawed: %s; this is tried again until it is"
        self._tell(logging.ERROR, Event.GUEST_STUCK, text, problem, reason=str(problem))

    def tell_thawed(self, seconds: float | None) -> None:
        """`seconds` that it was frozen for, None = nobody knows."""
        words = "" if seconds is None else f", it was frozen for {seconds:.3f} s"
        self._tell(logging.INFO, Event.GUEST_THAWED, "guest %s is thawed%s", words, seconds=seconds)

    def _tell(self, level: int, event: Event, text: str, *args: object, **fields: Value) -> None:
        guest = self.record.guest
        tell(log, level, event, text, guest, *args, guest=guest, disks=" ".join(self.record.disks), **fields)


def _may_be_frozen(agent: GuestAgent) -> bool:
    """After an error of the agent."""
    try:
        return agent.is_frozen()
    except AgentRefused:
        return False  # it has no such commands
    except HookError:
        return True


class Quiesce:
    """The guests of one creation: entered before the instant, left after it. Leaving raises nothing, see `check`."""

    def __init__(
        self, guests: Guests, wanted: Sequence[tuple[FrozenRecord, str | None]], draft: str, name: str
    ) -> None:
        """`wanted`: a record for each guest, and its command before; `name` of the snapshot."""
        self._guests = guests
        self._wanted = wanted
        self._draft = draft
        self._name = name
        self._frozen: list[FrozenGuest] = []
        self._since = 0.0
        self._problem: str | None = None

    def __enter__(self) -> None:
        """Raises ControlError; what was frozen is thawed then, or going to be."""
        for record, before in self._wanted:
            try:
                guest = self._guests.begin(record, self._draft, {"FLEECING_SNAPSHOT": self._name})
                self._frozen.append(guest)
                guest.freeze(before)
            except (HookError, OSError) as e:
                self._thaw()
                raise ControlError(
                    503, f"snapshot '{self._name}' was not made: guest '{record.guest}' cannot be frozen: {e}"
                ) from None
            except BaseException:
                self._thaw()
                raise
        self._since = time.monotonic()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thaw()

    def _thaw(self) -> None:
        for guest in reversed(self._frozen):
            try:
                if guest.thaw():
                    guest.tell_thawed(time.monotonic() - self._since if self._since else None)
            except Exception as e:  # whatever it is, the guest must not stay frozen for it
                self._problem = f"guest '{guest.record.guest}' is not thawed yet: {e}; the server goes on trying"
                try:
                    self._guests.go_on(guest, e)
                except RuntimeError as none:  # no thread to be had: its record is left, and the next server thaws it
                    self._problem = f"guest '{guest.record.guest}' is not thawed: {e}; {none}: restart the server"
                continue
            if guest.flaw is not None:
                self._problem = f"guest '{guest.record.guest}' may not have been frozen: {guest.flaw}"
            self._guests.end(guest)

    def check(self) -> None:
        """Raises ControlError where a guest was not frozen all the time, or is not known to be thawed."""
        if self._problem is not None:
            raise ControlError(503, f"snapshot '{self._name}' was not made: {self._problem}")


class Guests:
    """All guests of a server, by name; and those of them that are not thawed yet."""

    def __init__(self, settings: Mapping[str, GuestSettings], state_dir: str) -> None:
        self._settings = settings
        self._state_dir = state_dir
        self._changed = threading.Condition()
        self._frozen: set[FrozenGuest] = set()  # under _changed, as is the next
        self._closing = False
        self._over = threading.Event()  # nobody tries any more

    def recover(self, disks: Mapping[str, Disk]) -> None:
        """Thaw, in the background, what a killed server left frozen of these disks' guests. They are served by now."""
        for path in glob.glob(os.path.join(glob.escape(self._state_dir), _RECORDS)):
            try:
                record = read_json(path, FrozenRecord)
            except FileNotFoundError:
                continue
            except (OSError, ImageError) as e:
                log.error("a guest that may be frozen is left as it is: %s", e)
                continue
            if any(name in disks for name in record.disks):
                guest = FrozenGuest(record, path, {}, asked=True)
                with self._changed:
                    self._frozen.add(guest)
                self.go_on(guest, HookError("an earlier server ended while it was frozen"))

    def quiesce(self, disks: Sequence[Disk], name: str) -> Quiesce:
        """What freezes the guests of these disks, each once. Raises ControlError where a disk has none."""
        by_guest: dict[str, list[str]] = {}
        for disk in disks:
            if disk.settings.guest is None:
                raise ControlError(
                    409,
                    f"disk '{disk.name}' has no guest that could be frozen: name one in the configuration, "
                    "or serve with --guest-agent",
                )
            by_guest.setdefault(disk.settings.guest, []).append(disk.name)
        wanted = []
        for guest, names in by_guest.items():
            how = self._settings[guest]
            record = FrozenRecord(
                guest=guest, disks=tuple(names), agent=how.agent, after=how.after, hook_seconds=how.hook_seconds
            )
            wanted.append((record, how.before))
        # Where a kill may leave it, the next one takes its place: see Creation.
        return Quiesce(self, wanted, os.path.join(disks[0].folder.path, "frozen.json.new"), name)

    def begin(self, record: FrozenRecord, draft: str, environ: Mapping[str, str]) -> FrozenGuest:
        """Write it down first. Raises HookError where it cannot be frozen now, and OSError."""
        path = os.path.join(self._state_dir, f".frozen-{secrets.token_hex(8)}.json")
        guest = FrozenGuest(record, path, environ)
        with self._changed:
            if self._closing:
                raise HookError("the server is stopping")
            if any(other.record.guest == record.guest for other in self._frozen):
                raise HookError("it is not thawed yet from the last time")
            self._frozen.add(guest)
        try:
            write_json(path, record, draft=draft)
        except BaseException:
            self._forget(guest)
            raise
        return guest

    def end(self, guest: FrozenGuest) -> None:
        """It is thawed."""
        try:
            remove(guest.path)
        except OSError as e:
            log.error("guest %s is thawed, but the next server will thaw it again: %s", guest.record.guest, e)
        self._forget(guest)

    def _forget(self, guest: FrozenGuest) -> None:
        with self._changed:
            self._frozen.discard(guest)
            self._changed.notify_all()

    def go_on(self, guest: FrozenGuest, problem: Exception) -> None:
        """Try to thaw it until it is, in a thread of its own."""
        guest.tell_stuck(problem)
        threading.Thread(target=self._keep_thawing, args=(guest,), name="thaw", daemon=True).start()

    def _keep_thawing(self, guest: FrozenGuest) -> None:
        pause = FIRST_PAUSE_SECONDS
        while not self._over.is_set():
            try:
                guest.thaw()
            except HookError as e:
                log.warning("guest %s is still not thawed: %s", guest.record.guest, e)
            except Exception:
                log.exception("guest %s is still not thawed", guest.record.guest)
            else:
                guest.tell_thawed(None)
                self.end(guest)
                return
            self._over.wait(pause)
            pause = min(2 * pause, MOST_PAUSE_SECONDS)

    def close(self, seconds: float = END_SECONDS) -> None:
        """Freeze no more, give up freezes under way, and wait until all are thawed; while their disks are served.

        What is not thawed by then is left to the next server. Twice does no harm.
        """
        if self._over.is_set():
            return
        with self._changed:
            self._closing = True
            for guest in self._frozen:
                guest.abort()
            if not self._changed.wait_for(lambda: not self._frozen, seconds):
                left = ", ".join(guest.record.guest for guest in self._frozen)
                log.error("guests that are not thawed, and left to the next server: %s", left)
        self._over.set()
