"""The transmission phase of one client, in a thread of its own: receive, cut, validate, serve, answer.

One receive takes all that is there. All whole requests in it are served in order, their replies gathered and sent
together; then comes the next receive. So a client that sends one request at a time pays one receive and one send a
request, and one with many in flight shares them.

    quick     READ, BLOCK_STATUS, TRIM of a snapshot                                 here, in order
              a WRITE with nothing to save first, or from memory only                here, together behind the others
    waiting   FLUSH, FUA, a WRITE that waits for a disk, TRIM, WRITE_ZEROES          in other threads;
              they answer when they are done, in any order, and hold up nobody here

Where a quick one hangs after all, in a temp that takes no copy, a fresh thread serves the connection from the next
request on, and the old one ends when its call comes back (`Superseded`).

Short READs of one of many clients come from the poller's thread (poller.py), while this one sleeps; who of the two is
awake has the connection's state for itself.

A READ goes straight into the memory that is sent, behind the place of its header. It must be copied there: pages of the
active image handed to the socket by reference (sendfile, splice) would show later guest writes.

The memory of a connection is fixed: its two buffers, the limited payloads of the waiting requests, and for a client
without structured replies one READ of up to the maximum payload, out of a budget shared by all.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
from collections.abc import Callable

from fleecing.block.change_pool import Superseded
from fleecing.errors import ProtocolError
from fleecing.events import Event, of_export, tell
from fleecing.nbd.constants import (
    EXTENDED_REQUEST_MAGIC,
    REQUEST_MAGIC,
    SHARED_MEMORY,
    Cmd,
    CmdFlag,
    ReplyMode,
    command_name,
)
from fleecing.nbd.handshake import Agreement
from fleecing.nbd.transmission import EXTENDED_REQUEST, REQUEST, data_header, data_header_writer, payload_length
from fleecing.server import messages
from fleecing.server.budget import Budget
from fleecing.server.client_memory import ClientMemory
from fleecing.server.export import MAXIMUM_PAYLOAD, Export, answer_to
from fleecing.server.limits import LEAST_IN_FLIGHT, Limits
from fleecing.server.meter import Meter, clock
from fleecing.server.outbox import GATHER, LARGEST_PIECE, Outbox, TellingOutbox
from fleecing.server.poller import Poller
from fleecing.server.service import PlainWrite, Service
from fleecing.server.shares import Shares
from fleecing.server.tls import Stream, TlsSocket
from fleecing.units import KiB

log = logging.getLogger(__name__)
message_log = messages.log

LONGEST_WHOLE = LEAST_IN_FLIGHT
"""Bytes of the longest payload that is received whole, since it may have to wait in another thread; a longer one is
written piece by piece as it comes in."""

RECEIVE_SIZE = LONGEST_WHOLE + 64 * KiB
"""Bytes of the receive buffer: a MiB of WRITEs, with their headers."""

CHEAP_MOVE = 16 * KiB
"""Bytes of a request in part that are moved to the buffer's beginning, which a batch of small ones then finds in the
cache; what is more stays where it is as long as the rest has room behind it."""

MAX_COLD = 64
"""READs put aside because they would wait for the disk; with more, they are served before the next request is."""

MAX_WRITES = 64
"""Plain WRITEs put aside to be done together."""

CALM = 16
"""Batches of nothing but READs that took no waiting, until the poller serves the connection; more, up to MOST_CALM, for
one that had something else for its own thread soon after."""

MOST_CALM = 4096

LONGEST_SHORT = 16 * KiB
"""Bytes of a READ that the poller serves."""

ROUND = 16
"""Requests of one client that the poller serves before it looks at the next client."""

_READ, _WRITE, _DISC = int(Cmd.READ), int(Cmd.WRITE), int(Cmd.DISC)


class Connection:
    """One client in the transmission phase. `sock` is blocking; `leftover` is what it sent behind the handshake."""

    def __init__(
        self,
        sock: Stream,
        peer: str,
        agreement: Agreement,
        export: Export,
        leftover: bytes,
        *,
        budget: Budget,
        memories: Budget,
        shares: Shares,
        poller: Poller,
        on_close: Callable[[Connection], None],
        limits: Limits | None = None,
    ) -> None:
        self.peer = peer
        self.export = export
        self.export_name = agreement.export.name
        self._sock = sock
        self._tcp = sock.family != socket.AF_UNIX
        self._mode = agreement.mode
        extended = agreement.mode is ReplyMode.EXTENDED
        header = EXTENDED_REQUEST if extended else REQUEST
        self._unpack, self._header_size = header.unpack_from, header.size
        self._magic = EXTENDED_REQUEST_MAGIC if extended else REQUEST_MAGIC
        self._size = agreement.export.size
        self._on_close = on_close
        receipts = export.receipts(name for _, name in agreement.contexts)
        self._turns = export.turns
        self._meter = meter = Meter()
        if receipts is None:
            self._out = Outbox(sock, meter, export.give_way)
        else:
            self._out = TellingOutbox(sock, meter, receipts.sent, export.give_way)
        self._read_cached = export.node.read_cached if receipts is None else receipts.counting(export.node.read_cached)
        self._memory: ClientMemory | None = None  # what it shares with us
        self._recv_into: Callable[[memoryview], int] = sock.recv_into
        if isinstance(sock, socket.socket) and SHARED_MEMORY in (name for _, name in agreement.contexts):
            self._memory = memory = ClientMemory(sock, memories)
            self._recv_into = memory.recv_into
        self._service = Service(
            agreement, export, self._out, meter, budget, shares, receipts, limits or Limits(), self._memory
        )
        self._data_size = len(data_header(self._mode, 0, 0, 1))
        self._put_header = data_header_writer(self._mode)
        self._buffer = bytearray(RECEIVE_SIZE)
        self._view = memoryview(self._buffer)
        self._view[: len(leftover)] = leftover
        self._cold: list[tuple[int, int, int]] = []  # cookie, offset, length
        self._writes: list[PlainWrite] = []  # their data lies in the buffer
        self._plain_write = int(CmdFlag.PAYLOAD_LEN) if extended else 0  # the flags of a WRITE without any
        self._wanted = 0  # bytes of the request at `_start` that is there in part, where its header is
        self._poller = poller
        # A TLS session has a buffer beside the socket's, which the poller would not see.
        is_plain = receipts is None and self._memory is None
        self._polled_sock = sock if isinstance(sock, socket.socket) and is_plain else None
        self._calm = 0  # batches since something else than READs that took no waiting
        self._calm_enough = CALM
        self._polled = 0  # batches that the poller has served since it has the connection
        self._start, self._end = 0, len(leftover)  # what is received and not served yet
        # The one that serves; replaced by the watch of the block layer's pool while it hangs.
        self._thread = threading.Thread(target=self._run, name=f"nbd {peer}", daemon=True)

    @property
    def requests(self) -> int:
        """Requests answered so far."""
        return self._meter.requests

    @property
    def bytes_read(self) -> int:
        return self._meter.bytes_read

    @property
    def bytes_written(self) -> int:
        return self._meter.all_bytes_written

    def start(self) -> None:
        """Serve the client in a thread of its own."""
        self._thread.start()

    def drain(self) -> None:
        """Receive no more: serve what has arrived, answer it, and close. Returns at once.

        Later requests get no ESHUTDOWN: a client that reconnects sends them again, and an error would reach its guest.
        """
        self._shutdown(socket.SHUT_RD)

    def kill(self) -> None:
        """Close now, whatever is under way. Returns at once."""
        self._shutdown(socket.SHUT_RDWR)

    def _shutdown(self, how: int) -> None:
        try:
            self._sock.shutdown(how)
        except OSError:
            pass  # closed already

    # The life of the thread.

    def _run(self) -> None:
        self._poller.join()
        self.export.retain()
        self.export.traffic.open(self._meter)
        self._meter.received = clock()
        self._go_on()

    def _hand_over(self) -> None:
        """Have a fresh thread go on behind the request in which this connection's thread hangs."""
        thread = threading.Thread(target=self._go_on, name=f"nbd {self.peer}", daemon=True)
        try:
            thread.start()
        except RuntimeError as e:  # none to be had: the one that hangs closes the connection when it is back
            self._tell_dropped(str(e), logging.WARNING)
            self.kill()
            return
        self._thread = thread

    def _go_on(self) -> None:
        superseded = False
        try:
            while self._serve_received():
                self._out.send()
                if self._calm >= self._calm_enough and self._is_for_the_poller():
                    self._be_polled()
                elif self._receive():
                    self._calm += 1
                else:
                    break
            self._out.send()
        except ProtocolError as e:
            self._tell_dropped(str(e))
        except OSError as e:
            log.debug("x %s of %s: %s", self.peer, self.export_name, e)
        except Exception:
            log.exception("client %s of %s dropped", self.peer, self.export_name)
        except Superseded:
            superseded = self._thread is not threading.current_thread()
        finally:
            if not superseded:
                self._close()

    def _tell_dropped(self, reason: str, level: int = logging.INFO) -> None:
        text = "client %s of %s dropped: %s"
        fields = of_export(self.export_name)
        tell(
            log,
            level,
            Event.CLIENT_DROPPED,
            text,
            self.peer,
            self.export_name,
            reason,
            client=self.peer,
            reason=reason,
            **fields,
        )

    def _close(self) -> None:
        """Let the waiting requests end and answer, then hang up."""
        self._turns.guest_busy = False
        self._service.wait_idle()
        self._out.settle()
        if self._out.stuck:
            self._tell_dropped("it does not read what is sent to it")
        if isinstance(self._sock, TlsSocket):
            self._sock.end()
        self._shutdown(socket.SHUT_RDWR)
        self._sock.close()
        self._meter.sent()  # what the client did not wait for
        self.export.traffic.close(self._meter)
        self.export.release()
        self._poller.leave()
        if self._memory is not None:
            with contextlib.suppress(
                OSError
            ):  # who knows what descriptor the client has sent, and how its closing goes
                self._memory.close()
        self._on_close(self)

    def _receive(self) -> bool:
        """Take what is there, waiting for at least a byte; False where the client has hung up."""
        rest, limit = self._end - self._start, RECEIVE_SIZE
        if not rest:
            self._start = self._end = 0
        elif rest < CHEAP_MOVE or self._start + self._wanted > RECEIVE_SIZE:
            if self._start:
                self._view[:rest] = self._view[self._start : self._end]
                self._start, self._end = 0, rest
        elif self._start + 2 * self._wanted > RECEIVE_SIZE:
            limit = self._start + self._wanted  # one more would be cut by the buffer's end, and moved
        self._turns.guest_busy = False
        received = self._recv_into(self._view[self._end : limit] if rest else self._view)
        self._turns.guest_busy = True
        self._end += received
        if self._tcp and received and self._end < limit:
            # TCP hands over what one segment brought; what came in meanwhile makes the batch larger.
            try:
                self._end += self._sock.recv_into(self._view[self._end : limit], 0, socket.MSG_DONTWAIT)
            except BlockingIOError:
                pass
        self._meter.received = clock()
        return received > 0

    # With the poller.

    def fileno(self) -> int:
        """Of the socket, for the poller."""
        assert self._polled_sock is not None
        return self._polled_sock.fileno()

    def _is_for_the_poller(self) -> bool:
        return (
            self._polled_sock is not None
            and self._start == self._end
            and self._poller.is_crowded
            and self.export.node.never_waits
            and not message_log.isEnabledFor(logging.DEBUG)
        )

    def _be_polled(self) -> None:
        """Sleep while the poller serves what comes in."""
        self._turns.guest_busy = False
        self._polled = 0
        self._poller.wait_for_more(self)
        self._calm = 0
        self._calm_enough = CALM if self._polled >= self._calm_enough else min(2 * self._calm_enough, MOST_CALM)

    def serve_at_once(self) -> bool:
        """In the poller's thread, while this connection's own sleeps; that one finds what is left where it looks."""
        try:
            return self._serve_at_once()
        except Exception as e:  # the connection's own thread meets it again
            log.debug("x %s of %s: %s", self.peer, self.export_name, e)
            return False

    def _serve_at_once(self) -> bool:
        header_size, size = self._header_size, self._size
        try:
            received = self._sock.recv_into(self._view[: ROUND * header_size], 0, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return True
        self._start, self._end = 0, received
        if not received or message_log.isEnabledFor(logging.DEBUG):
            return False
        self._turns.guest_busy = True
        self._polled += 1
        out, view, read_cached, put_header = self._out, self._out.view, self._read_cached, self._put_header
        meter = self._meter
        meter.received = clock()
        while self._end - self._start >= header_size:
            magic, flags, command, cookie, offset, length = self._unpack(self._buffer, self._start)
            is_short_read = command == _READ and not flags and 0 < length <= LONGEST_SHORT
            if magic != self._magic or not is_short_read or offset + length > size:
                return False
            data = out.used + self._data_size
            if not read_cached(offset, view[data : data + length]):
                return False
            put_header(view, out.used, cookie, offset, length)
            out.used = data + length
            meter.reads += 1
            meter.bytes_read += length
            self._start += header_size
        is_all = self._start == self._end and out.send_at_once()
        self._turns.guest_busy = False
        return is_all

    # Cut.

    def _serve_received(self) -> bool:
        """Serve all whole requests that are there; False after a DISC."""
        goes_on = self._serve_warm()
        if self._writes:
            self._serve_writes()
        if self._cold:
            self._serve_cold()
        return goes_on

    def _serve_writes(self) -> None:
        """The plain WRITEs, put aside so that they share one pass through the gate, and one copy of what they change.

        No request is ordered behind another that is in flight: "the server MAY process commands out of order". Where
        this thread hangs, a fresh one finds in `_writes` what is not done yet.
        """
        self._calm = 0
        writes = self._writes
        if len(writes) > 1:
            self._service.save_ahead(writes, self._hand_over)
            writes[:] = self._service.write_many(writes)
        while writes:
            cookie, offset, data = writes.pop(0)
            self._service.write(self._plain_write, cookie, offset, data, self._hand_over)

    def _serve_cold(self) -> None:
        """The READs whose bytes are not in memory: announced together, then read one by one."""
        self._calm = 0
        self._out.send()  # nobody else waits for the disk
        cold, self._cold = self._cold, []
        if len(cold) > 1:
            for _, offset, length in cold:
                self._service.announce(offset, length)
        for cookie, offset, length in cold:
            self._service.read_cold(cookie, offset, length)

    def _serve_warm(self) -> bool:  # noqa: C901 - every request comes through here: steps in line cost no calls
        """The same; READs that would wait for the disk are put aside in `_cold`."""
        unpack, header_size, right_magic = self._unpack, self._header_size, self._magic
        buffer, out, view, service, size = self._buffer, self._out, self._out.view, self._service, self._size
        read_cached, meter, data_size, put_header = self._read_cached, self._meter, self._data_size, self._put_header
        writes, longest_write, plain_write = self._writes, service.longest_write, self._plain_write
        debug = message_log.isEnabledFor(logging.DEBUG) and messages.wanted(self.export_name)
        while self._end - self._start >= header_size:
            magic, flags, command, cookie, offset, length = unpack(buffer, self._start)
            if magic != right_magic:
                raise ProtocolError(f"request with magic {magic:#x}: the stream is out of step")
            if debug:
                self._log_request(command, flags, cookie, offset, length)
            if command == _READ and not flags and 0 < length <= LARGEST_PIECE and offset + length <= size:
                # The hot path: what `Service.serve` does for the plain READ, in line.
                self._start += header_size
                used = out.used
                data = used + data_size
                try:
                    if not read_cached(offset, view[data : data + length]):
                        self._cold.append((cookie, offset, length))
                        if len(self._cold) >= MAX_COLD:
                            self._serve_cold()
                        continue
                except Exception as e:
                    service.refuse(_READ, cookie, offset, answer_to(e, f"READ of {length} bytes at {offset}"))
                else:
                    put_header(view, used, cookie, offset, length)
                    out.used = data + length
                    meter.reads += 1
                    meter.bytes_read += length
            elif (
                command == _WRITE
                and flags == plain_write
                and 0 < length <= longest_write
                and offset + length <= size
                and length <= LONGEST_WHOLE
            ):
                begin = self._start + header_size
                if self._end - begin < length:
                    self._wanted = header_size + length
                    return True
                self._start = begin + length
                writes.append((cookie, offset, self._view[begin : self._start]))
                if len(writes) >= MAX_WRITES:
                    self._serve_writes()
            elif command == _DISC:  # whatever it carries
                return False
            elif payload := payload_length(self._mode, flags, command, length):
                self._calm = 0
                if not self._serve_payload(command, flags, cookie, offset, length, header_size, payload):
                    return True
            else:
                self._calm = 0
                self._start += header_size
                service.serve(command, flags, cookie, offset, length)
            if out.used >= GATHER:
                out.send()
        return True

    def _log_request(self, command: int, flags: int, cookie: int, offset: int, length: int) -> None:
        text = "< %s of %s: %s flags %#x cookie %#x %d+%d"
        message_log.debug(text, self.peer, self.export_name, command_name(command), flags, cookie, offset, length)

    def _serve_payload(
        self, command: int, flags: int, cookie: int, offset: int, length: int, header_size: int, payload: int
    ) -> bool:
        """Serve a request that has a payload; False where it is not all there yet and fits the buffer."""
        if payload > MAXIMUM_PAYLOAD:
            raise ProtocolError(f"a payload of {payload} bytes is above the maximum of {MAXIMUM_PAYLOAD}")
        whole = header_size + payload
        if payload > LONGEST_WHOLE:
            if self._writes:
                self._serve_writes()  # what is received next takes the place of their data
            self._start += header_size  # only now: a fresh thread in the place of one that hangs there begins here
            self._serve_long_payload(command, flags, cookie, offset, payload)
            return True
        if self._end - self._start < whole:
            self._wanted = whole
            return False
        begin = self._start + header_size
        self._start += whole
        data = self._view[begin : begin + payload]
        if command == _WRITE:
            self._service.write(flags, cookie, offset, data, self._hand_over)
        else:
            self._service.serve(command, flags, cookie, offset, length, data)
        return True

    def _serve_long_payload(self, command: int, flags: int, cookie: int, offset: int, left: int) -> None:
        """Take a payload piece by piece: written as it comes in, or dropped where the request is refused."""
        write = self._service.begin_long_write(command, flags, cookie, offset, left)
        while left:
            if self._start == self._end:
                self._out.send()
                if not self._receive():
                    raise ProtocolError("the client hung up in the middle of a payload")
            piece = self._view[self._start : min(self._end, self._start + left)]
            write.take(piece)
            self._start += len(piece)
            left -= len(piece)
        write.end()
