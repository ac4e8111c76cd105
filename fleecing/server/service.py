"""The requests of one client: validate, serve, answer.

All methods are called by the connection's thread. What may have to wait (a change of the active disk, FLUSH, FUA) is
submitted to the block layer and answered later by the thread that ends it, through `Outbox.late`; up to
`requests_in_flight` with `bytes_in_flight` of payload may be under way so, then the connection waits; and there are
bounds for all clients together (`shares`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fleecing.errors import BlockError, RequestError
from fleecing.nbd.constants import Cmd, CmdFlag, NbdError, ReplyMode, command_name
from fleecing.nbd.handshake import Agreement
from fleecing.nbd.transmission import (
    block_status_reply,
    check_request,
    data_chunk_header,
    data_header,
    done_reply,
    error_reply,
    shared_read_payload,
    status_payload,
)
from fleecing.server import messages
from fleecing.server.budget import Budget
from fleecing.server.client_memory import ClientMemory
from fleecing.server.export import Export, answer_to
from fleecing.server.limits import Limits
from fleecing.server.meta_context import block_status
from fleecing.server.meter import Meter, kind_of
from fleecing.server.outbox import GATHER, LARGEST_PIECE, Outbox
from fleecing.server.read_once import Receipts
from fleecing.server.shares import Shares
from fleecing.units import KiB

LARGEST_STATUS_PAYLOAD = 64 * KiB
"""Bytes of a BLOCK_STATUS payload that are looked at; it lists context ids, of which there are a handful."""

BUDGET_SECONDS = 30.0
"""How long a READ with a simple reply waits for its share of the memory that all connections have together: so much
longer than the time after which those who have it and do not read are dropped."""

_READ, _WRITE = int(Cmd.READ), int(Cmd.WRITE)
_FUA = int(CmdFlag.FUA)
_PAYLOAD_LEN = int(CmdFlag.PAYLOAD_LEN)
_READ_ONCE = int(CmdFlag.READ_ONCE)

Done = Callable[[Exception | None], None]

PlainWrite = tuple[int, int, memoryview]
"""A WRITE without flags: cookie, offset, data."""


class Service:
    """Serves one client's requests on one export; replies go into `out`."""

    def __init__(
        self,
        agreement: Agreement,
        export: Export,
        out: Outbox,
        meter: Meter,
        budget: Budget,
        shares: Shares,
        receipts: Receipts | None,
        limits: Limits,
        memory: ClientMemory | None = None,
    ) -> None:
        """`receipts`: what is sent once and trimmed then, where the client or the export wants that.

        `memory`: what the client may share with us, where it has said that it will.
        """
        self._meter = meter
        self._mode = agreement.mode
        self._limits = agreement.limits()
        self.longest_write = self._limits.longest[_WRITE]  # bytes; 0 where this client may not write
        numbers = [number for number, _ in agreement.contexts]
        contexts = export.contexts(name for _, name in agreement.contexts)
        self._contexts = dict(zip(numbers, contexts, strict=True))
        self._node = export.node
        self._export_name = export.name
        self._receipts = receipts
        self._memory = memory
        self._shared_unsent = 0  # bytes that were put there since the last send
        self._changes = export.changes
        self._submit_trim = export.submit_trim
        self._out = out
        self._budget = budget
        self._share = shares.share(
            limits.requests_in_flight,
            limits.bytes_in_flight,
            machine=export.changes is not None and export.info.writable,
        )
        self._budget_seconds = limits.send_seconds + BUDGET_SECONDS

    # Answers.

    def refuse(self, kind: int, cookie: int, offset: int, error: RequestError, *, at: int | None = None) -> None:
        """The reply of a request that failed; the text, and where it failed, goes with it where it is structured."""
        if self._out.failed:  # where it was the sending that failed, the request is answered and counted already
            raise ConnectionError("the client is gone") from error
        messages.log_refusal(self._export_name, cookie, error)
        self._meter.refused(kind)
        self._out.put(error_reply(self._mode, cookie, offset, error.error, error.text, at=at))

    def _done(self, kind: int, cookie: int, offset: int, length: int) -> None:
        self._meter.answered(kind, length)
        self._out.put(done_reply(self._mode, cookie, offset))

    def _when_done(
        self, kind: int, cookie: int, offset: int, length: int, doing: str, *, flags: int = 0, held: int = 0
    ) -> Done:
        """What to call, once, when a submitted request is over. `held` bytes of payload are given back then."""
        self._hold(held)
        return self._answering(kind, cookie, offset, length, doing, flags, held, self._meter.received)

    def _answering(
        self, kind: int, cookie: int, offset: int, length: int, doing: str, flags: int, held: int, since: float
    ) -> Done:
        def answer(error: Exception | None) -> None:
            if error is None:
                reply = done_reply(self._mode, cookie, offset)
            else:
                failure = answer_to(error, doing)
                messages.log_refusal(self._export_name, cookie, failure)
                reply = error_reply(self._mode, cookie, offset, failure.error, failure.text)
            self._meter.late(kind, length, since, failed=error is not None)
            self._out.late(reply)
            self._share.give_back(held)

        def flush_first(error: Exception | None) -> None:
            changes = self._changes
            if error is None and changes is not None:
                _start(answer, lambda: changes.submit_flush(answer))
            else:
                answer(error)

        return flush_first if flags & _FUA else answer

    def _hold(self, count: int) -> None:
        # All sending is done without the lock: the threads that answer need it, and must not wait for the client.
        if self._out.behind:
            self._out.settle()
        if not self._share.try_take(count):
            self._out.send()  # or the client may wait for a reply that is not sent
            self._share.take(count)

    def wait_idle(self) -> None:
        """Wait until nothing is under way in other threads."""
        self._share.wait_idle()

    # WRITE.

    def save_ahead(self, writes: Sequence[PlainWrite], hand_over: Callable[[], None]) -> None:
        """Save together what these WRITEs overwrite, where that is simple; `write_many` comes next.

        `hand_over` has a fresh thread serve the connection, these WRITEs first, in the place of one that hangs.
        """
        changes = self._changes
        if changes is not None and changes.snapshots:
            self._out.send()  # nobody else waits for the copies
            changes.save_ahead([(offset, data) for _, offset, data in writes], hand_over)

    def write_many(self, writes: Sequence[PlainWrite]) -> list[PlainWrite]:
        """Checked WRITEs whose payload is all there; returns those that have to wait, to be given to `write`."""
        assert self._changes is not None
        outcomes = self._changes.write_many([(offset, data) for _, offset, data in writes])
        left = []
        count = written = 0
        done, mode = self._out.put, self._mode
        for write, outcome in zip(writes, outcomes, strict=True):
            cookie, offset, data = write
            if outcome is True:
                count += 1
                written += len(data)
                done(done_reply(mode, cookie, offset))
            elif outcome is False:
                left.append(write)
            else:
                self.refuse(_WRITE, cookie, offset, answer_to(outcome, f"WRITE of {len(data)} bytes at {offset}"))
        self._meter.writes += count  # none of these replies has left yet: there is room for all of them
        self._meter.bytes_written += written
        return left

    def write(self, flags: int, cookie: int, offset: int, data: memoryview, hand_over: Callable[[], None]) -> None:
        """A WRITE whose payload is all there. `data` is not used any more when this returns.

        `hand_over` has a fresh thread serve the connection from here on, in the place of this one where it hangs.
        """
        length = len(data)
        try:
            check_request(self._limits, _WRITE, flags, offset, length)
            changes = self._changes
            assert changes is not None  # a snapshot's limits let no WRITE through
            if not changes.write_now(offset, data) and not changes.write_saving(
                offset, data, lambda: self._go_on_without(flags, cookie, offset, length, hand_over)
            ):
                held = bytes(data)
                doing = f"WRITE of {length} bytes at {offset}"
                done = self._when_done(_WRITE, cookie, offset, length, doing, flags=flags, held=length)
                _start(done, lambda: changes.submit_write(offset, held, done))
            elif flags & _FUA:
                done = self._when_done(_WRITE, cookie, offset, length, f"FUA of WRITE at {offset}")
                _start(done, lambda: changes.submit_flush(done))
            else:
                self._done(_WRITE, cookie, offset, length)
        except Exception as e:
            self.refuse(_WRITE, cookie, offset, answer_to(e, f"WRITE of {length} bytes at {offset}"))

    def _go_on_without(self, flags: int, cookie: int, offset: int, length: int, hand_over: Callable[[], None]) -> Done:
        """The connection's thread hangs in saving what this WRITE overwrites: answer it later, serve the next now.

        Called by another thread. The payload is held without waiting for room: this happens once until that thread is
        back (`CopyBeforeWrite.write_saving`).
        """
        self._share.take_now(length)
        doing = f"WRITE of {length} bytes at {offset}"
        done = self._answering(_WRITE, cookie, offset, length, doing, flags, length, self._meter.received)
        hand_over()
        return done

    def begin_long_write(self, command: int, flags: int, cookie: int, offset: int, length: int) -> LongWrite:
        """A payload that is larger than the receive buffer begins."""
        refusal = None
        try:
            if command != _WRITE:
                raise RequestError(NbdError.EINVAL, f"command {command} with a payload of {length} bytes")
            check_request(self._limits, command, flags, offset, length)
        except RequestError as e:
            refusal = e
        return LongWrite(self, kind_of(command), flags, cookie, offset, length, refusal)

    # Everything else.

    def serve(
        self, command: int, flags: int, cookie: int, offset: int, length: int, payload: memoryview | None = None
    ) -> None:
        """A request other than WRITE and DISC. With extended headers any may come with a `payload`."""
        kind = kind_of(command)
        try:
            contexts = tuple(self._contexts)
            if payload is not None and command == Cmd.BLOCK_STATUS:
                if len(payload) > LARGEST_STATUS_PAYLOAD:
                    raise RequestError(NbdError.EINVAL, f"a block status payload of {len(payload)} bytes is too long")
                length, contexts = status_payload(bytes(payload), self._contexts)
            elif command == Cmd.READ and flags & _PAYLOAD_LEN and self._memory is not None:
                length, position = shared_read_payload(b"" if payload is None else bytes(payload))
                check_request(self._limits, command, flags, offset, length)
                self._read_shared(self._memory, flags, cookie, offset, length, position)
                return
            check_request(self._limits, command, flags, offset, length)
            if not length and command != Cmd.FLUSH:
                self._done(kind, cookie, offset, 0)
            elif command == Cmd.READ:
                self._read(flags, cookie, offset, length)
            elif command == Cmd.BLOCK_STATUS:
                self._block_status(flags, cookie, offset, length, contexts)
            elif command == Cmd.CACHE:
                self._node.prefetch(offset, length)
                self._done(kind, cookie, offset, length)
            else:
                self._change(Cmd(command), flags, cookie, offset, length)
        except Exception as e:
            self.refuse(kind, cookie, offset, answer_to(e, f"{command_name(command)} of {length} bytes at {offset}"))

    def _block_status(self, flags: int, cookie: int, offset: int, length: int, contexts: tuple[int, ...]) -> None:
        nodes = [self._contexts[number] for number in contexts]
        runs = block_status(nodes, offset, length, one=bool(flags & CmdFlag.REQ_ONE))
        reply = block_status_reply(self._mode, cookie, offset, list(zip(contexts, runs, strict=True)))
        self._meter.answered(int(Cmd.BLOCK_STATUS), length)
        self._out.put(reply)

    def _change(self, command: Cmd, flags: int, cookie: int, offset: int, length: int) -> None:
        """FLUSH, TRIM, WRITE_ZEROES."""
        changes = self._changes
        if changes is None:  # a snapshot: its trim waits for nobody or for the disk, and there is nothing to flush
            submit_trim = self._submit_trim
            if command is Cmd.TRIM and submit_trim is not None:
                doing = f"TRIM of {length} bytes at {offset}"
                done = self._when_done(command, cookie, offset, length, doing)
                _start(done, lambda: submit_trim(offset, length, done))
                return
            if command is Cmd.TRIM:
                self._node.discard(offset, length)
            self._done(command, cookie, offset, length)
            return
        if command is Cmd.FLUSH:
            done = self._when_done(command, cookie, offset, length, "FLUSH")
            _start(done, lambda: changes.submit_flush(done))
            return
        doing = f"{command.name} of {length} bytes at {offset}"
        done = self._when_done(command, cookie, offset, length, doing, flags=flags)
        if command is Cmd.TRIM:
            _start(done, lambda: changes.submit_discard(offset, length, done))
        else:
            may_unmap, fast_only = not flags & CmdFlag.NO_HOLE, bool(flags & CmdFlag.FAST_ZERO)
            _start(done, lambda: changes.submit_zeroes(offset, length, done, may_unmap=may_unmap, fast_only=fast_only))

    # READ, where the connection's hot path does not serve it.

    def _read(self, flags: int, cookie: int, offset: int, length: int) -> None:
        if length <= LARGEST_PIECE:
            self._read_piece(data_header(self._mode, cookie, offset, length), offset, length)
            self._meter.answered(_READ, length)
        elif self._mode is ReplyMode.SIMPLE:
            self._read_whole(cookie, offset, length)
        elif flags & CmdFlag.DF:
            # "If the server [...] cannot [...] it MAY reply with NBD_EOVERFLOW" to a DF read of more than 65536 bytes.
            raise RequestError(NbdError.EOVERFLOW, f"READ with DF of {length} bytes is above {LARGEST_PIECE}")
        elif not self._read_pieces(cookie, offset, length):
            return
        if self._receipts is not None:
            self._receipts.note(offset, length, once=bool(flags & _READ_ONCE))

    def _read_shared(
        self, memory: ClientMemory, flags: int, cookie: int, offset: int, length: int, position: int
    ) -> None:
        """Read straight into the client's memory: no byte of it goes through the socket. Without length, attach it."""
        if not length:
            memory.attach()
            self._done(_READ, cookie, offset, 0)
            return
        part = memory.part(position, length)
        for start in range(0, length, LARGEST_PIECE):
            piece = part[start : start + LARGEST_PIECE]
            self._shared_unsent += len(piece)
            if self._shared_unsent >= GATHER:
                self._out.give_way()
            try:
                self._node.read_into(offset + start, piece)
            except BaseException:
                part[:] = bytes(length)  # bytes that are not the snapshot's may have come by before it was noticed
                raise
        self._done(_READ, cookie, offset, length)
        if self._receipts is not None:
            self._receipts.note(offset, length, once=bool(flags & _READ_ONCE))
        if self._shared_unsent >= GATHER:
            self._shared_unsent = 0
            self._out.send()  # the client can go on with it, or is gone

    def announce(self, offset: int, length: int) -> None:
        """A READ that is served soon. Whatever is wrong with it is told when it is."""
        try:
            self._node.prefetch(offset, length)
        except (OSError, BlockError):
            pass

    def read_cold(self, cookie: int, offset: int, length: int) -> None:
        """A checked READ of at most LARGEST_PIECE that waits for the disk."""
        try:
            self._read_piece(data_header(self._mode, cookie, offset, length), offset, length)
            self._meter.answered(_READ, length)
            if self._receipts is not None:
                self._receipts.note(offset, length)
        except Exception as e:
            self.refuse(_READ, cookie, offset, answer_to(e, f"READ of {length} bytes at {offset}"))
        if self._out.used >= GATHER:
            self._out.send()

    def _read_pieces(self, cookie: int, offset: int, length: int) -> bool:
        """Chunk by chunk. One that fails ends the reply with an error chunk, and the connection goes on: False."""
        end = offset + length
        for start in range(offset, end, LARGEST_PIECE):
            count = min(LARGEST_PIECE, end - start)
            header = data_chunk_header(self._mode, cookie, offset, start, count, done=start + count == end)
            try:
                self._read_piece(header, start, count)
            except Exception as e:
                self.refuse(_READ, cookie, offset, answer_to(e, f"READ of {count} bytes at {start}"), at=start)
                return False
            if start + count == end:
                self._meter.answered(_READ, length)
            if self._out.used >= GATHER:
                self._out.send()
        return True

    def _read_piece(self, header: bytes, offset: int, length: int) -> None:
        """Read straight into what is sent; the header goes in front when the bytes are there."""
        out = self._out
        begin = out.used + len(header)
        self._node.read_into(offset, out.view[begin : begin + length])
        out.view[out.used : begin] = header
        out.used = begin + length

    def _read_whole(self, cookie: int, offset: int, length: int) -> None:
        """A long READ with a simple reply, which has no way to tell an error once it has begun: read all, then send."""
        if not self._budget.take(length, self._budget_seconds):
            raise RequestError(NbdError.ENOMEM, f"no memory for a READ of {length} bytes: other clients have it all")
        try:
            buffer = memoryview(bytearray(length))
            for start in range(0, length, LARGEST_PIECE):
                self._node.read_into(offset + start, buffer[start : start + LARGEST_PIECE])
            self._meter.answered(_READ, length)
            self._out.send_now([data_header(self._mode, cookie, offset, length), buffer])
        finally:
            self._budget.give_back(length)


class LongWrite:
    """A WRITE that is done piece by piece while its payload comes in.

    A piece that has something to save first is waited for: what the client sends next is behind it in the stream.
    After an error the rest is taken and dropped, so that the stream stays in step.
    """

    def __init__(
        self,
        service: Service,
        kind: int,
        flags: int,
        cookie: int,
        offset: int,
        length: int,
        refusal: RequestError | None,
    ) -> None:
        self._service = service
        self._kind = kind
        self._length = length
        self._since = service._meter.received
        self._flags, self._cookie, self._offset = flags, cookie, offset
        self._doing = f"WRITE of {length} bytes at {offset}"
        self._position = offset
        self._refusal = refusal

    def take(self, piece: memoryview) -> None:
        """The next bytes of the payload."""
        if self._refusal is None:
            try:
                self._service._node.write(self._position, piece)
            except Exception as e:
                self._refusal = answer_to(e, self._doing)
        self._position += len(piece)

    def end(self) -> None:
        """The payload is complete: answer."""
        service, cookie, offset, refusal = self._service, self._cookie, self._offset, self._refusal
        if refusal is None and self._flags & _FUA and (changes := service._changes) is not None:
            service._hold(0)
            done = service._answering(self._kind, cookie, offset, self._length, self._doing, 0, 0, self._since)
            _start(done, lambda: changes.submit_flush(done))
            return
        # Timed by itself, not with the batch that its last bytes came in.
        service._meter.late(self._kind, self._length, self._since, failed=refusal is not None)
        if refusal is None:
            service._out.put(done_reply(service._mode, cookie, offset))
        else:
            messages.log_refusal(service._export_name, cookie, refusal)
            service._out.put(error_reply(service._mode, cookie, offset, refusal.error, refusal.text))


def _start(done: Done, submit: Callable[[], None]) -> None:
    """Submit a request that is to call `done`; where that fails (there is no thread to be had) it is over at once."""
    try:
        submit()
    except Exception as e:
        done(e)
