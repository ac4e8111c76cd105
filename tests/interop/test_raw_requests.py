"""Requests that no well-behaved client sends, in every reply mode: each gets its error, and the connection lives on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from fleecing.nbd.constants import ReplyMode
from tests.images import FULL, KIB, MIB, little_space, make_image, make_sparse, random_bytes
from tests.raw_client import (
    BLOCK_STATUS,
    CACHE,
    DF,
    EINVAL,
    EIO,
    ENOSPC,
    ENOTSUP,
    EOVERFLOW,
    EPERM,
    FAST_ZERO,
    FLUSH,
    FUA,
    NO_HOLE,
    READ,
    REQ_ONE,
    TRIM,
    WRITE,
    WRITE_ZEROES,
    RawClient,
)
from tests.serving import Serve, Server

SIZE = 100 * MIB + 777
HEAD = random_bytes(MIB)
MODES = pytest.mark.parametrize("mode", list(ReplyMode), ids=lambda mode: mode.name.lower())
LAST = (1 << 64) - 1


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server for all requests of this file: none may do it any harm. Nothing in the first MiB is changed."""
    folder = tmp_path_factory.mktemp("raw")
    make_sparse(folder / "disk.raw", SIZE, {0: HEAD})
    server = Server(folder / "server", folder / "disk.raw")
    try:
        server.snapshot(name="s")
        server.snapshot(name="trimmed")
        yield server
    finally:
        server.stop()


REFUSED = {
    "read beyond the end": (READ, 0, SIZE - 1, 2, EINVAL),
    "read at the end": (READ, 0, SIZE, 1, EINVAL),
    "read far beyond the end": (READ, 0, 1 << 63, 512, EINVAL),
    "read that ends at 2^64": (READ, 0, LAST - 511, 512, EINVAL),
    "read that goes round 2^64": (READ, 0, LAST, 512, EINVAL),
    "read above the maximum payload": (READ, 0, 0, 64 * MIB + 1, EINVAL),
    "read with an unknown flag": (READ, 1 << 15, 0, 512, EINVAL),
    "read with NO_HOLE": (READ, NO_HOLE, 0, 512, EINVAL),
    "read with REQ_ONE": (READ, REQ_ONE, 0, 512, EINVAL),
    "trim beyond the end": (TRIM, 0, SIZE - 1, 2, EINVAL),
    "trim that goes round 2^64": (TRIM, 0, LAST, 2, EINVAL),
    "trim with FAST_ZERO": (TRIM, FAST_ZERO, MIB, 512, EINVAL),
    "cache beyond the end": (CACHE, 0, SIZE, 4096, EINVAL),
    "cache that goes round 2^64": (CACHE, 0, LAST, LAST & 0xFFFFFFFF, EINVAL),
    "cache with an unknown flag": (CACHE, 1 << 9, 0, 4096, EINVAL),
    "block status beyond the end": (BLOCK_STATUS, 0, SIZE - 1, 2, EINVAL),
    "block status that goes round 2^64": (BLOCK_STATUS, 0, LAST, 512, EINVAL),
    "block status without a context": (BLOCK_STATUS, 0, 0, 512, EINVAL),
    "flush with an unknown flag": (FLUSH, 1 << 7, 0, 0, EINVAL),
    "resize, which is not offered": (8, 0, 4096, 0, EINVAL),
    "unknown command": (999, 0, 0, 512, EINVAL),
    "unknown command with everything set": (0xFFFF, 0xFFDF, LAST, 0xFFFFFFFF, EINVAL),
}

REFUSED_WRITES = {
    "write beyond the end": (WRITE, 0, SIZE - 1, 2, ENOSPC),
    "write at the end": (WRITE, 0, SIZE, 1, ENOSPC),
    "write that goes round 2^64": (WRITE, 0, LAST, 2, ENOSPC),
    "write with DF": (WRITE, DF, MIB, 512, EINVAL),
    "write with an unknown flag": (WRITE, 1 << 12, MIB, 512, EINVAL),
    "long write beyond the end": (WRITE, 0, SIZE - 40 * MIB + 1, 40 * MIB, ENOSPC),
    "zeroes beyond the end": (WRITE_ZEROES, 0, SIZE - 1, 2, ENOSPC),
    "zeroes far beyond the end": (WRITE_ZEROES, FAST_ZERO, 1 << 62, 1 << 20, ENOSPC),
    "zeroes that go round 2^64": (WRITE_ZEROES, NO_HOLE, LAST, 2, ENOSPC),
    "zeroes with DF": (WRITE_ZEROES, DF, MIB, 512, EINVAL),
}


def send(client: RawClient, command: int, flags: int, offset: int, length: int) -> int:
    payload = bytes(length) if command == WRITE else b""
    return client.request(command, flags, offset, length, payload).error


@MODES
def test_a_wrong_request_gets_its_error_and_the_next_one_is_served(server: Server, mode: ReplyMode) -> None:
    for export, requests in (("vda", REFUSED | REFUSED_WRITES), ("vda@s", REFUSED)):
        with RawClient(server.unix, export, mode) as client:
            got, want = {}, {}
            for name, (command, flags, offset, length, error) in requests.items():
                got[name], want[name] = send(client, command, flags, offset, length), error
                assert client.read(3, 1000) == HEAD[3:1003], f"after {name}"
            assert got == want, export


@MODES
def test_an_error_tells_why_where_the_reply_has_room_for_it(server: Server, mode: ReplyMode) -> None:
    with RawClient(server.unix, "vda", mode) as client:
        reply = client.request(READ, 0, SIZE - 1, 2)
        assert (str(SIZE) in reply.text) == (mode is not ReplyMode.SIMPLE)


@MODES
def test_a_snapshot_is_not_changed(server: Server, mode: ReplyMode) -> None:
    with RawClient(server.unix, "vda@s", mode) as client:
        for flags in (0, FUA):
            assert client.request(WRITE, flags, 0, 512, bytes(512)).error == EPERM
            assert client.request(WRITE, flags, SIZE, 2 * MIB, bytes(2 * MIB)).error == EPERM
            assert client.request(WRITE_ZEROES, flags, 0, 512).error == EPERM
        assert client.read(0, MIB) == HEAD


@MODES
def test_fast_zero_where_it_was_not_advertised_is_refused(server: Server, mode: ReplyMode) -> None:
    """nbdkit 1.32.5 aborts on it."""
    with RawClient(server.unix, "vda@s", mode) as client:
        for flags in (FAST_ZERO, FAST_ZERO | NO_HOLE, FAST_ZERO | FUA):
            assert client.request(WRITE_ZEROES, flags, 0, 4096).error in (EPERM, EINVAL)
        assert client.read(0, MIB) == HEAD


@MODES
@pytest.mark.parametrize("export", ["vda", "vda@trimmed"])
def test_every_command_takes_fua(server: Server, mode: ReplyMode, export: str) -> None:
    """NBD document, "Command flags": FUA MUST be accepted on all commands where SEND_FUA is set."""
    contexts = [] if mode is ReplyMode.SIMPLE else ["base:allocation"]
    with RawClient(server.unix, export, mode, contexts) as client:
        commands = [(TRIM, 50 * MIB, MIB), (FLUSH, 0, 0), (CACHE, 0, MIB)]
        if export == "vda":
            commands += [(WRITE, 60 * MIB, 100), (WRITE_ZEROES, 60 * MIB, MIB)]
        if contexts:
            commands.append((BLOCK_STATUS, 0, MIB))
        for command, offset, length in commands:
            assert send(client, command, FUA, offset, length) == 0, command
        reply = client.request(READ, FUA, 0, 100)
        assert reply.error == 0
        if mode is not ReplyMode.SIMPLE:
            assert reply.data == [(0, HEAD[:100])]


@MODES
@pytest.mark.parametrize("export", ["vda", "vda@s"])
def test_a_length_of_zero_is_answered(server: Server, mode: ReplyMode, export: str) -> None:
    """NBD document, "Size constraints": unspecified, "but the server SHOULD NOT disconnect"."""
    with RawClient(server.unix, export, mode) as client:
        for command in (READ, WRITE, TRIM, CACHE, WRITE_ZEROES, BLOCK_STATUS):
            for offset in (0, 1, SIZE):
                send(client, command, 0, offset, 0)
        assert client.read(0, MIB) == HEAD


@MODES
def test_a_flush_with_an_offset_and_a_length_is_answered(server: Server, mode: ReplyMode) -> None:
    with RawClient(server.unix, "vda", mode) as client:
        assert client.request(FLUSH, 0, LAST, 4096).error in (0, EINVAL)
        assert client.read(0, MIB) == HEAD


@pytest.mark.parametrize("mode", [ReplyMode.STRUCTURED, ReplyMode.EXTENDED])
def test_a_read_with_df_comes_in_one_chunk_or_not_at_all(server: Server, mode: ReplyMode) -> None:
    """NBD document: MUST be supported up to 65536 bytes, MAY be EOVERFLOW above."""
    for export in ("vda", "vda@s"):
        with RawClient(server.unix, export, mode) as client:
            reply = client.request(READ, DF, 12345, 64 * KIB)
            assert (reply.error, reply.data) == (0, [(12345, HEAD[12345 : 12345 + 64 * KIB])])
            reply = client.request(READ, DF, 0, 64 * MIB)
            assert reply.error == EOVERFLOW or len(reply.data) == 1
            assert client.read(0, MIB) == HEAD


def test_df_without_structured_replies_is_refused(server: Server) -> None:
    with RawClient(server.unix, "vda", ReplyMode.SIMPLE) as client:
        assert client.request(READ, DF, 0, 512).error == EINVAL
        assert client.read(0, 512) == HEAD[:512]


@pytest.mark.parametrize("mode", [ReplyMode.STRUCTURED, ReplyMode.EXTENDED])
def test_one_extent_is_one_extent(server: Server, mode: ReplyMode) -> None:
    with RawClient(server.unix, "vda@s", mode, ["base:allocation", "fleecing:cluster-state"]) as client:
        reply = client.request(BLOCK_STATUS, REQ_ONE, 0, 40 * MIB)
        assert {context: len(extents) for context, extents in reply.extents.items()} == dict.fromkeys(
            client.contexts.values(), 1
        )
        assert all(extents[0][0] <= 40 * MIB for extents in reply.extents.values())


@pytest.mark.parametrize("mode", [ReplyMode.STRUCTURED, ReplyMode.EXTENDED])
@pytest.mark.parametrize("offset, length", [(0, SIZE), (1, 1), (MIB - 1, 2), (4097, SIZE - 4097), (SIZE - 1, 1)])
def test_block_status_covers_the_whole_request_in_every_context(
    server: Server, mode: ReplyMode, offset: int, length: int
) -> None:
    """virtnbdbackup loses data where it does not (it walks the contexts side by side)."""
    for export in ("vda", "vda@s"):
        contexts = ["base:allocation", "qemu:allocation-depth", "fleecing:cluster-state"]
        with RawClient(server.unix, export, mode, contexts) as client:
            reply = client.request(BLOCK_STATUS, 0, offset, length)
            covered = {context: sum(count for count, _ in extents) for context, extents in reply.extents.items()}
            assert covered == dict.fromkeys(client.contexts.values(), length)


@MODES
def test_a_write_of_64_mib_is_served(server: Server, mode: ReplyMode) -> None:
    """The document lets a server refuse above its maximum only; nbd-tester-client's "huge" test writes 47.6 MiB."""
    with RawClient(server.unix, "vda", mode) as client:
        contents = random_bytes(64 * MIB, seed=2)
        assert client.request(WRITE, 0, 30 * MIB + 1, len(contents), contents).error == 0
        assert client.read(30 * MIB + 1, len(contents)) == contents


@MODES
def test_a_payload_above_64_mib_ends_that_connection_only(server: Server, mode: ReplyMode) -> None:
    with RawClient(server.unix, "vda", mode) as client, RawClient(server.unix, "vda", mode) as other:
        client.send(WRITE, 0, 0, 0, told=64 * MIB + 1)
        assert client.hung_up()
        assert other.read(0, MIB) == HEAD


@MODES
def test_a_wrong_magic_ends_that_connection_only(server: Server, mode: ReplyMode) -> None:
    with RawClient(server.unix, "vda", mode) as client, RawClient(server.unix, "vda", mode) as other:
        client.socket.sendall(b"\x12\x56\x09\x53" + bytes(28))
        assert client.hung_up()
        assert other.read(0, MIB) == HEAD


@MODES
@pytest.mark.parametrize("sent", [1, 16, 27, 28 + 100])
def test_a_client_that_vanishes_in_a_request_harms_nobody(server: Server, mode: ReplyMode, sent: int) -> None:
    with RawClient(server.unix, "vda", mode) as other:
        with RawClient(server.unix, "vda", mode) as client:
            magic = 0x21E41C71 if mode is ReplyMode.EXTENDED else 0x25609513
            header = magic.to_bytes(4, "big") + bytes(2) + b"\0\1" + bytes(16) + b"\0\0\x10\0"
            client.socket.sendall((header + bytes(4096))[:sent])
        assert other.read(0, MIB) == HEAD


@MODES
def test_an_io_error_is_answered_and_the_connection_lives_on(serve: Serve, tmp_path: Path, mode: ReplyMode) -> None:
    """An image that somebody shrinks under the server: what is cut off is EIO, the rest is served."""
    contents = make_image(tmp_path / "disk.raw", 4 * MIB)
    server = serve(tmp_path / "disk.raw")
    server.snapshot(name="s")
    with (tmp_path / "disk.raw").open("r+b") as image:
        image.truncate(3 * MIB)
    for export in ("vda", "vda@s"):
        with RawClient(server.unix, export, mode) as client:
            assert client.request(READ, 0, 3 * MIB, 512).error == EIO
            assert client.request(READ, 0, 3 * MIB - 1, 2).error == EIO
            reply = client.request(READ, 0, 0, 4 * MIB)
            assert reply.error == EIO
            if mode is not ReplyMode.SIMPLE:
                assert reply.error_offset is None or reply.error_offset <= 3 * MIB
                for offset, piece in reply.data:
                    assert piece == contents[offset : offset + len(piece)]
            assert client.read(0, 3 * MIB) == contents[: 3 * MIB]
    assert "shrunk" in server.status()["disks"][0]["problem"]


@MODES
@pytest.mark.parametrize("how", FULL)
def test_no_space_is_enospc_and_the_connection_lives_on(
    serve: Serve, tmp_path: Path, mode: ReplyMode, how: str
) -> None:
    with little_space(how, tmp_path / "small", MIB) as (small, wrapper):
        with (small / "disk.raw").open("wb") as image:
            image.truncate(8 * MIB)
        server = serve(small / "disk.raw", wrapper=wrapper)
        with RawClient(server.unix, "vda", mode) as client:
            assert client.request(WRITE, 0, 0, 2 * MIB, bytes(2 * MIB)).error == ENOSPC
            assert client.request(TRIM, 0, 0, 8 * MIB).error == 0
            assert client.request(WRITE, 0, 0, 4, b"next").error == 0
            assert client.read(0, 4) == b"next"
        server.stop()


@MODES
def test_zeroes_that_cannot_be_had_fast_are_enotsup_and_change_nothing(
    serve: Serve, shared_memory: Path, mode: ReplyMode
) -> None:
    """A tmpfs has no FALLOC_FL_ZERO_RANGE, so zeroes that keep their space must be written there."""
    contents = make_image(shared_memory / "disk.raw", MIB)
    server = serve(shared_memory / "disk.raw")
    with RawClient(server.unix, "vda", mode) as client:
        assert client.request(WRITE_ZEROES, FAST_ZERO | NO_HOLE, 4096, 8192).error == ENOTSUP
        assert client.read(0, MIB) == contents
        assert client.request(WRITE_ZEROES, NO_HOLE, 4096, 8192).error == 0
        assert client.request(WRITE_ZEROES, FAST_ZERO, 16384, 4096).error == 0
        assert client.read(0, 20480) == contents[:4096] + bytes(8192) + contents[12288:16384] + bytes(4096)
