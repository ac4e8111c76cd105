"""Hostile servers: whatever comes back, our client ends with an error that says so, or with a sound answer."""

from __future__ import annotations

import socket
import threading
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from hypothesis import strategies as st

from fleecing.client.connection import Connection
from fleecing.client.dial import connect, list_exports
from fleecing.errors import FleecingError
from fleecing.nbd.client_handshake import ClientHandshake, ExportListing
from fleecing.nbd.constants import (
    BASE_ALLOCATION,
    EXTENDED_REPLY_MAGIC,
    STRUCTURED_REPLY_MAGIC,
    NbdError,
    ReplyMode,
    TransmissionFlag,
)
from fleecing.nbd.handshake import ExportInfo, ServerHandshake
from fleecing.nbd.transmission import CHUNK, EXTENDED_CHUNK, block_status_reply, data_header, done_reply, error_reply
from fleecing.nbd.uri import NbdUri
from fleecing.pull.engine import pull
from fleecing.pull.options import PullOptions
from fleecing.pull.target import RawTarget
from fleecing.units import KiB, MiB
from scripts.fuzzing.damage import apply, edits
from scripts.fuzzing.target import Case, Finding

SIZE = 256 * KiB
SECONDS = 5.0
MODES: Mapping[str, tuple[bool, bool]] = {
    "SIMPLE": (False, False),
    "STRUCTURED": (True, False),
    "EXTENDED": (True, True),
}
"""(structured, extended) of each."""

_FLAGS = TransmissionFlag.HAS_FLAGS | TransmissionFlag.SEND_FLUSH | TransmissionFlag.SEND_TRIM


class _Catalog:
    def names(self) -> list[tuple[str, str]]:
        return [("", "hostile"), ("vda@s", "a snapshot")]

    def find(self, name: str) -> ExportInfo:
        return ExportInfo(name, "hostile", SIZE, _FLAGS, 1, 4096, MiB, (BASE_ALLOCATION,))


def _handshake(client: ClientHandshake | ExportListing) -> bytes:
    """What a good server says to this client."""
    server, said = ServerHandshake(_Catalog()), b""
    while data := server.data_to_send():
        said += data
        client.receive(data)
        server.receive(client.data_to_send())
    return said


def _client(mode: str) -> ClientHandshake:
    structured, extended = MODES[mode]
    return ClientHandshake("", structured=structured, extended=extended, contexts=[BASE_ALLOCATION])


_u32, _u64 = st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1)
_cookies = st.integers(1, 4) | _u64
_lengths = st.sampled_from([0, 1, 512, 4096, SIZE, 2**31, 2**32 - 1]) | _u32
_replies = st.lists(
    st.one_of(
        st.tuples(st.just("data"), _cookies, st.sampled_from([0, 4096]) | _u64, st.sampled_from([1, 4096, 64 * KiB])),
        st.tuples(st.just("done"), _cookies, st.just(0), st.just(0)),
        st.tuples(st.just("error"), _cookies, st.sampled_from([int(e) for e in NbdError]) | _u32, st.just(0)),
        st.tuples(st.just("status"), _cookies, _u32, _lengths),
        st.tuples(st.just("chunk"), _cookies, st.integers(0, 2**16 - 1), _lengths),
    ),
    max_size=6,
)
_DOINGS = ["read", "status", "flush", "trim", "list", "pull"]


class Client:
    """The bundled client and the pull against a server that says what the case says, and hangs up."""

    cases = st.fixed_dictionaries(
        {
            "mode": st.sampled_from(list(MODES)),
            "replies": _replies,
            "edits": st.just([]) | edits,
            "doings": st.lists(st.sampled_from(_DOINGS), min_size=1, max_size=3),
        }
    )

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(folder / "hostile"))
        self._listener.listen(64)
        self._uri = NbdUri(socket=str(folder / "hostile"))
        self._says = b""
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            with sock, suppress(OSError):
                sock.settimeout(SECONDS)
                sock.sendall(self._says)
                sock.shutdown(socket.SHUT_WR)
                while sock.recv(1 << 16):
                    pass

    def run(self, case: Case) -> None:
        mode = case["mode"]
        for doing in case["doings"]:
            listing = doing == "list"
            said = _handshake(ExportListing() if listing else _client(mode))
            replies = b"" if listing else b"".join(_reply(ReplyMode[mode], *words) for words in case["replies"])
            self._says = apply(said + replies, case["edits"])
            _expecting_errors(lambda doing=doing: self._do(doing, mode))  # type: ignore[misc]
        if left := [path.name for path in self._folder.iterdir() if path.name != "hostile"]:
            raise Finding(f"a pull left {left}")

    def _do(self, doing: str, mode: str) -> None:
        structured, extended = MODES[mode]
        if doing == "list":
            list_exports(self._uri, timeout=SECONDS)
        elif doing == "pull":
            target = self._folder / "target"
            options = PullOptions(connections=2, reconnect=0)
            pull(self._uri, lambda size: RawTarget.create(str(target), size), options)
            target.unlink()
        else:
            contexts = [BASE_ALLOCATION] if structured else []
            with connect(self._uri, contexts=contexts, structured=structured, extended=extended, timeout=SECONDS) as c:
                self._ask(c, doing)

    @staticmethod
    def _ask(connection: Connection, doing: str) -> None:
        if doing == "read":
            if len(connection.read(0, 4096)) != 4096:
                raise Finding("a read of another length")
        elif doing == "status":
            for extents in connection.block_status(0, 64 * KiB).values():
                if not extents or min(n for n, _ in extents) < 1 or sum(n for n, _ in extents) > 64 * KiB:
                    raise Finding(f"extents that cannot be: {extents[:5]}")
        elif doing == "trim":
            connection.trim(0, 4096)
        else:
            connection.flush()

    def close(self) -> None:
        """End the server."""
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(SECONDS)


def _reply(mode: ReplyMode, kind: str, cookie: int, number: int, length: int) -> bytes:
    if kind == "data":
        return data_header(mode, cookie, number, length) + bytes(length)
    if kind == "done":
        return done_reply(mode, cookie, 0)
    if kind == "error":
        return error_reply(mode, cookie, 0, number, "hostile")
    if mode is ReplyMode.SIMPLE:
        return bytes(4) + cookie.to_bytes(8, "big")
    if kind == "status":
        return block_status_reply(mode, cookie, 0, [(1, [(length, number)])])
    if mode is ReplyMode.EXTENDED:
        return EXTENDED_CHUNK.pack(EXTENDED_REPLY_MAGIC, 1, number, cookie, 0, length)
    return CHUNK.pack(STRUCTURED_REPLY_MAGIC, 1, number, cookie, length)


def _expecting_errors(call: Callable[[], None]) -> None:
    """Errors that the client may end with; a ValueError only where it refuses to send what the export has not."""
    try:
        call()
    except (FleecingError, OSError):
        pass
    except ValueError as e:
        if traceback.extract_tb(e.__traceback__)[-1].name != "_check":
            raise
