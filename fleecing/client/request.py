"""One request in flight: what was asked, and what its replies have brought so far."""

from __future__ import annotations

from bisect import bisect
from collections.abc import Callable
from typing import Final

from fleecing.errors import ProtocolError, RequestError
from fleecing.nbd.constants import Cmd, NbdError

Extents = list[tuple[int, int]]
"""(length in bytes, status) pairs, in order, without gaps; the first starts at the offset asked for."""

MakeBuffer = Callable[[int], memoryview]
"""Gives a buffer of so many bytes."""

MAX_PIECES: Final = 1024
"""Into how many separate pieces the content of one READ may be scattered at any moment.

The document sets no limit; real servers send their chunks in order, which is one piece. This one bounds memory.
"""


class Request:
    """A request and its result. `finished` turns true once; after that nothing here changes any more.

    `buffer` belongs to the request from its sending until `finished`: a READ is received into it, and it holds
    anything when the request fails. With `make_buffer` there is none before its first bytes come. `error` is None where
    the request succeeded. `status` has an entry for each meta context; contexts may cover different lengths, none more
    than the request. `position` is that of `buffer` in the shared memory, where the server fills it by itself.
    """

    __slots__ = (
        "_make_buffer",
        "_pieces",
        "buffer",
        "command",
        "cookie",
        "error",
        "finished",
        "length",
        "offset",
        "position",
        "status",
    )

    def __init__(
        self,
        command: Cmd,
        cookie: int,
        offset: int,
        length: int,
        buffer: memoryview | None = None,
        make_buffer: MakeBuffer | None = None,
        position: int | None = None,
    ) -> None:
        self.command = command
        self.cookie = cookie
        self.offset = offset
        self.length = length
        self.buffer = buffer
        self.position = position
        self._make_buffer = make_buffer
        self.finished = False
        self.error: RequestError | None = None
        self.status: dict[str, Extents] = {}
        self._pieces: list[tuple[int, int]] = []

    def __repr__(self) -> str:
        return f"{self.command.name} of {self.length} bytes at offset {self.offset}"

    def part(self, offset: int, length: int) -> memoryview:
        """Where the content of [offset, offset + length) goes. Raises ProtocolError unless it is wanted and new.

        "Content chunks MUST NOT overlap" and lie "within the bounds of the request" ("Structured reply types").
        """
        end = offset + length
        if self.position is not None or (self.buffer is None and self._make_buffer is None):
            raise ProtocolError(f"the server sent data in answer to {self!r}")
        if offset < self.offset or end > self.offset + self.length:
            raise ProtocolError(f"the server sent {length} bytes at offset {offset} in answer to {self!r}")
        self._cover(offset, end)
        if self.buffer is None:
            assert self._make_buffer is not None
            self.buffer = self._make_buffer(self.length)
        return self.buffer[offset - self.offset : end - self.offset]

    def _cover(self, start: int, end: int) -> None:
        """Enter a piece into the sorted list of those that have come, where neighbours are one."""
        pieces = self._pieces
        if pieces and pieces[-1][1] == start:  # as real servers do
            pieces[-1] = (pieces[-1][0], end)
            return
        after = bisect(pieces, (start, 0))
        before = after - 1
        if (before >= 0 and pieces[before][1] > start) or (after < len(pieces) and pieces[after][0] < end):
            raise ProtocolError(f"the server sent the bytes at offset {start} twice in answer to {self!r}")
        if after < len(pieces) and pieces[after][0] == end:
            end = pieces.pop(after)[1]
        if before >= 0 and pieces[before][1] == start:
            pieces[before] = (pieces[before][0], end)
        else:
            pieces.insert(after, (start, end))
            if len(pieces) > MAX_PIECES:
                raise ProtocolError(f"the server scattered its answer to {self!r} into more than {MAX_PIECES} pieces")

    def fail(self, error: int, text: str) -> None:
        """Note an error; the first one is kept. `text` is the server's, "" where it gave none."""
        if self.error is None:
            self.error = RequestError(error, text or f"the server answered {error_name(error)} to {self!r}")

    def finish(self, contexts: int) -> None:
        """The last reply has come. Raises ProtocolError where a success lacks content, or one of the meta contexts."""
        if self.error is None:
            is_by_chunks = self.command is Cmd.READ and self.position is None
            if is_by_chunks and self._pieces != [(self.offset, self.offset + self.length)]:
                raise ProtocolError(f"the server ended its answer to {self!r} without all of the data")
            if self.command is Cmd.BLOCK_STATUS and len(self.status) != contexts:
                raise ProtocolError(f"the server ended its answer to {self!r} without all of the meta contexts")
        self.finished = True


def error_name(error: int) -> str:
    """The name of an NBD error value; a number for what the document does not know."""
    try:
        return NbdError(error).name
    except ValueError:
        return f"error {error}"
