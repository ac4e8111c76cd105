"""Requests of several clients in flight at once, on a real server, with the answers that each of them may get.

    burst = Burst(world)
    burst.change(...); burst.read(...); burst.trim(...)     sent, on any connection, in any number
    burst.create(); burst.delete(...)                       over the control socket, meanwhile
    burst.finish()                                          all answers are taken, then checked, then the model moves on

The changes of one burst do not overlap: what each does is certain, only when it does it is not.
"""

from __future__ import annotations

from collections.abc import Callable

from fleecing.client.connection import Connection
from fleecing.client.request import Request
from fleecing.errors import RequestError
from fleecing.nbd.constants import BASE_ALLOCATION, NbdError
from fleecing.server.meta_context import CLUSTER_STATE
from tests.block.rig import in_thread
from tests.server.model import Change, Doubt, Frozen, check_zeroes, clusters, clusters_within
from tests.server.world import SIZE, View, World

Answer = Callable[[RequestError | None], None]


class Burst:
    """See above. `line` is the number of the connection to send on."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.changes: list[Change] = []
        self._sent: list[tuple[Connection, Request, Answer]] = []
        self._trims: list[tuple[Frozen, range]] = []
        self._beside: list[Callable[[], None]] = []  # what is to be waited for, and done when all is over
        self._ending: list[View] = []
        self._in_doubt: dict[View, list[Change]] = {}  # for snapshots of this burst

    # The guest

    def change(self, change: Change, line: int = 0) -> None:
        """A change of the active disk; it must succeed, whatever becomes of the snapshots."""
        guest = self.world.guests[line]
        match change.kind:
            case "write" | "fua":
                request = guest.submit_write(change.offset, change.data, fua=change.kind == "fua")
            case "trim":
                request = guest.submit_trim(change.offset, change.length)
            case _:
                no_hole = change.kind == "no_hole"
                request = guest.submit_write_zeroes(change.offset, change.length, no_hole=no_hole)
        self.changes.append(change)
        for view in self.world.views:
            view.frozen.touched(change, for_sure=False)
        self._send(guest, request, _must_succeed)

    def guest_read(self, offset: int, length: int, line: int = 0) -> None:
        """Each byte is the old one or, where a change of this burst is in flight, the new one."""
        data, guest = bytearray(length), self.world.guests[line]
        old = bytes(self.world.active[offset : offset + length])

        def check(error: RequestError | None) -> None:
            _must_succeed(error)
            allowed = [old]
            for change in self.changes:
                if change.offset < offset + length and offset < change.end:
                    allowed.append(_laid_over(old, offset, change))
            if data not in allowed:
                assert all(byte in choice for byte, choice in zip(data, zip(*allowed, strict=True), strict=True))

        self._send(guest, guest.submit_read(offset, data), check)

    def guest_status(self, offset: int, length: int, line: int = 0) -> None:
        """What is told to be a hole is one, unless a change of this burst makes or fills it."""
        guest, active = self.world.guests[line], bytearray(self.world.active)
        request = guest.submit_block_status(offset, length)

        def check(error: RequestError | None) -> None:
            _must_succeed(error)
            doubts = [Doubt(c.offset, c.data, c.data) for c in self.changes]
            check_zeroes(active, doubts, offset, length, request.status[BASE_ALLOCATION])

        self._send(guest, request, check)

    # The backup

    def read(self, view: View, offset: int, length: int, line: int = 0) -> None:
        """The bytes of the instant of creation, or the error that belongs to a trim or to the snapshot's end."""
        data, frozen = bytearray(length), view.frozen
        readable = frozen.readable(offset, length)

        def check(error: RequestError | None) -> None:
            if error is not None:
                self._check_refusal(view, error, clusters(offset, length), told=line < 2)
                return
            assert readable, f"{frozen.export}: {length} bytes at {offset} were read though trimmed"
            frozen.check_data(offset, data)

        self._send(view.lines[line], view.lines[line].submit_read(offset, data), check)

    def status(self, view: View, offset: int, length: int, line: int = 0) -> None:
        """Block status: on `line` 1 of the clusters only, answered also where nothing can be read; on 0 of all."""
        frozen = view.frozen
        asked = clusters(offset, length) if line == 0 else range(0)
        request = view.lines[line].submit_block_status(offset, length)

        def check(error: RequestError | None) -> None:
            if error is not None:
                self._check_refusal(view, error, asked, told=True)
                return
            frozen.check_states(offset, length, request.status[CLUSTER_STATE])
            if line == 0:
                frozen.check_allocation(offset, length, request.status[BASE_ALLOCATION])

        self._send(view.lines[line], request, check)

    def trim(self, view: View, offset: int, length: int, line: int = 0) -> None:
        """Give up what lies whole in the range."""
        gone = clusters_within(offset, length, SIZE)
        view.frozen.maybe_trimmed.update(gone)
        self._trims.append((view.frozen, gone))

        def check(error: RequestError | None) -> None:
            if error is not None:
                self._check_refusal(view, error, range(0), told=line < 2)

        self._send(view.lines[line], view.lines[line].submit_trim(offset, length), check)

    def _check_refusal(self, view: View, error: RequestError, asked: range, *, told: bool) -> None:
        """An error is right for the reason that it names only. `told`: the reply has room for the reason."""
        assert error.error == NbdError.EINVAL, error
        trimmed = not (view.frozen.trimmed | view.frozen.maybe_trimmed).isdisjoint(asked)
        deleted = view in self._ending
        if told:
            assert (trimmed and "trimmed" in error.text) or (deleted and "deleted" in error.text), error.text
        else:
            assert trimmed or deleted, error

    # Snapshots come and go

    def create(self) -> None:
        """Take a snapshot while everything else goes on. All changes of the burst are in doubt for it."""
        made: list[str] = []
        running = in_thread(lambda: made.append(self.world.freeze()))

        def add() -> None:
            running.wait()
            self._add(made[0], self.changes)

        self._beside.append(add)

    def create_and_wait(self) -> View:
        """Take a snapshot, to be read at once. The changes sent before are in doubt for it, those after are not."""
        return self._add(self.world.freeze(), list(self.changes))

    def _add(self, export: str, in_doubt: list[Change]) -> View:
        contents = bytearray(self.world.active)
        doubts = [Doubt(c.offset, bytes(contents[c.offset : c.end]), c.data) for c in in_doubt]
        view = self.world.add(export, contents, doubts)
        for change in in_doubt:
            view.frozen.touched(change, for_sure=False)
        self._in_doubt[view] = in_doubt
        return view

    def delete(self, view: View) -> None:
        """Make an end of a snapshot while others may be reading it."""
        self._ending.append(view)
        self.world.views.remove(view)
        temp = self.world.server.temp(view.frozen.export)
        running = in_thread(lambda: self.world.server.delete(view.frozen.export))

        def ended() -> None:
            running.wait()
            assert not temp.exists()

        self._beside.append(ended)

    # The end

    def _send(self, line: Connection, request: Request, check: Answer) -> None:
        self._sent.append((line, request, check))

    def finish(self) -> None:
        """Take all answers, check them, and let the model do what was done."""
        try:
            self._finish()
        except BaseException:
            self.world.failed = True
            raise

    def _finish(self) -> None:
        answers: list[tuple[Answer, RequestError | None]] = []
        for line, request, check in self._sent:
            try:
                line.wait(request)
            except RequestError as e:
                answers.append((check, e))
            else:
                answers.append((check, None))
        for done in self._beside:
            done()
        for check, error in answers:
            check(error)
        for view in self.world.views:
            for change in self.changes:
                if change not in self._in_doubt.get(view, ()):
                    view.frozen.touched(change, for_sure=True)
        for frozen, gone in self._trims:
            frozen.trimmed.update(gone)
            frozen.maybe_trimmed.clear()
        for change in self.changes:
            self.world.active[change.offset : change.end] = change.data


def _must_succeed(error: RequestError | None) -> None:
    assert error is None, error


def _laid_over(old: bytes, offset: int, change: Change) -> bytes:
    """The bytes at `offset` after this change alone."""
    begin, stop = max(offset, change.offset), min(offset + len(old), change.end)
    new = change.data[begin - change.offset : stop - change.offset]
    return old[: begin - offset] + new + old[stop - offset :]
