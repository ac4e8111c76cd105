"""libnbd's Python module against the server, with its strict mode off where it should send what it would not."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.images import KIB, MIB, make_sparse, random_bytes
from tests.serving import Server

SIZE = 4 * MIB + 777
HEAD = random_bytes(MIB)
MODES = pytest.mark.parametrize("structured", [True, False], ids=["structured", "simple"])
FAR = (1 << 63) - 4096  # libnbd takes no offset that is negative as a signed number


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server for all requests of this file. Nobody changes the first MiB of the disk, nor snapshot s."""
    folder = tmp_path_factory.mktemp("libnbd")
    make_sparse(folder / "disk.raw", SIZE, {0: HEAD})
    server = Server(folder / "server", folder / "disk.raw")
    try:
        server.snapshot(name="s")
        yield server
    finally:
        server.stop()


Connect = Callable[..., Any]


@pytest.fixture
def connect(libnbd: ModuleType, server: Server) -> Iterator[Connect]:
    """Connects handles whose strict mode is off: `connect("vda@s", structured=False)`; hung up with the test."""
    handles = []

    def make(export: str, *, structured: bool = True, tcp: bool = False, contexts: tuple[str, ...] = ()) -> Any:
        handle = libnbd.NBD()
        handles.append(handle)
        handle.set_strict_mode(0)
        handle.set_request_structured_replies(structured)
        for context in contexts:
            handle.add_meta_context(context)
        handle.connect_uri(server.uri(export, tcp=tcp))
        assert handle.get_structured_replies_negotiated() is structured
        return handle

    yield make
    for handle in handles:
        handle.shutdown()


def error_of(libnbd: ModuleType, call: Callable[..., object], *arguments: object) -> str | None:
    """The name of the error that the call ends in, or None."""
    number = 0
    try:
        call(*arguments)
    except libnbd.Error as e:
        if e.errnum is None:
            pytest.fail(f"the connection is dead: {e.string}")
        number = e.errnum
    return errno.errorcode[number] if number else None


def extents(handle: Any, offset: int, length: int, flags: int = 0) -> dict[str, list[tuple[int, int]]]:
    """(length, status) of what one BLOCK_STATUS answers, by context."""
    found: dict[str, list[tuple[int, int]]] = {}

    def take(context: str, _offset: int, entries: list[int], _error: object) -> None:
        found[context] = list(zip(entries[::2], entries[1::2], strict=True))

    handle.block_status(length, offset, take, flags=flags)
    return found


@MODES
def test_illegal_requests_get_the_error_that_the_document_asks_for(
    connect: Connect, libnbd: ModuleType, structured: bool
) -> None:
    df, no_hole = libnbd.CMD_FLAG_DF, libnbd.CMD_FLAG_NO_HOLE
    req_one, fast_zero = libnbd.CMD_FLAG_REQ_ONE, libnbd.CMD_FLAG_FAST_ZERO
    for export in ("vda", "vda@s"):
        h = connect(export, structured=structured)
        beyond = "ENOSPC" if export == "vda" else "EPERM"
        wrong_flag = "EINVAL" if export == "vda" else "EPERM"
        cases: dict[str, tuple[str, Callable[..., object], tuple[object, ...]]] = {
            "read over the end": ("EINVAL", h.pread, (2, SIZE - 1)),
            "read at the end": ("EINVAL", h.pread, (1, SIZE)),
            "read far away": ("EINVAL", h.pread, (512, FAR)),
            "read with REQ_ONE": ("EINVAL", h.pread, (1, 0, req_one)),
            "write over the end": (beyond, h.pwrite, (b"12", SIZE - 1)),
            "write far away": (beyond, h.pwrite, (b"12", FAR)),
            "write with DF": (wrong_flag, h.pwrite, (b"12", 0, df)),
            "zeroes over the end": (beyond, h.zero, (2, SIZE - 1)),
            "zeroes over the end, fast": (beyond, h.zero, (2, SIZE - 1, fast_zero)),
            "zeroes with REQ_ONE": (wrong_flag, h.zero, (2, 0, req_one)),
            "trim over the end": ("EINVAL", h.trim, (2, SIZE - 1)),
            "trim far away": ("EINVAL", h.trim, (1 << 30, FAR)),
            "trim with NO_HOLE": ("EINVAL", h.trim, (2, MIB, no_hole)),
            "cache over the end": ("EINVAL", h.cache, (2, SIZE - 1)),
            "flush with DF": ("EINVAL", h.flush, (df,)),
            "block status without a context": ("EINVAL", h.block_status, (512, 0, lambda *_: 0)),
        }
        got = {}
        for name, (_, call, arguments) in cases.items():
            got[name] = error_of(libnbd, call, *arguments)
            assert h.pread(100, 7) == HEAD[7:107], f"after {name}"
        assert got == {name: case[0] for name, case in cases.items()}, export


@pytest.mark.parametrize("tcp", [False, True], ids=["unix", "tcp"])
@MODES
def test_unaligned_requests_of_every_kind_are_served(connect: Connect, structured: bool, tcp: bool) -> None:
    h = connect("vda", structured=structured, tcp=tcp)
    frozen = connect("vda@s", structured=structured, tcp=tcp)
    model = bytearray(h.pread(SIZE, 0))
    for offset, data in (
        (MIB + 1, b"\1"),
        (2 * MIB - 3, b"\2" * 7),
        (SIZE - 5, b"\3" * 5),
        (3 * MIB + 511, b"\4" * 70000),
    ):
        h.pwrite(data, offset)
        model[offset : offset + len(data)] = data
    for offset, length in ((3 * MIB + 600, 1), (3 * MIB + 4095, 9000), (SIZE - 1, 1)):
        h.zero(length, offset)
        model[offset : offset + length] = bytes(length)
    for offset, length in ((3 * MIB + 700, 3), (3 * MIB + 20001, 20002)):
        h.trim(length, offset)  # a file: trimmed bytes read as zeroes
        model[offset : offset + length] = bytes(length)
    h.cache(3, 5)
    h.flush()
    assert h.pread(SIZE, 0) == bytes(model)
    for offset, length in ((0, 1), (MIB - 1, 2), (65535, 2), (SIZE - 1, 1), (4097, 3 * MIB)):
        assert h.pread(length, offset) == bytes(model[offset : offset + length])
        assert frozen.pread(length, offset) == (HEAD + bytes(SIZE - MIB))[offset : offset + length]


@MODES
def test_every_command_takes_fua(connect: Connect, libnbd: ModuleType, structured: bool) -> None:
    h = connect("vda", structured=structured, contexts=("base:allocation",) if structured else ())
    fua = libnbd.CMD_FLAG_FUA
    assert h.pread(10, 0, fua) == HEAD[:10]
    h.pwrite(b"fua", MIB, fua)
    h.zero(4096, MIB + 4096, fua | libnbd.CMD_FLAG_NO_HOLE | libnbd.CMD_FLAG_FAST_ZERO)
    h.trim(4096, MIB + 8192, fua)
    h.flush(fua)
    h.cache(4096, 0, fua)
    if structured:
        assert extents(h, 0, MIB, fua) == {"base:allocation": [(MIB, 0)]}
    assert h.pread(3, MIB) == b"fua"


@MODES
def test_fast_zero_on_a_snapshot_is_refused(connect: Connect, libnbd: ModuleType, structured: bool) -> None:
    h = connect("vda@s", structured=structured)
    assert not h.can_fast_zero()
    assert not h.can_zero()
    for flags in (libnbd.CMD_FLAG_FAST_ZERO, libnbd.CMD_FLAG_FAST_ZERO | libnbd.CMD_FLAG_NO_HOLE):
        assert error_of(libnbd, h.zero, 4096, 0, flags) in {"EPERM", "EINVAL"}
    assert h.pread(MIB, 0) == HEAD


@MODES
def test_lengths_of_zero_leave_the_connection_alive(connect: Connect, libnbd: ModuleType, structured: bool) -> None:
    for export in ("vda", "vda@s"):
        h = connect(export, structured=structured)
        for call in (h.trim, h.zero, h.cache, h.pread):
            error_of(libnbd, call, 0, 1)
            assert h.pread(9, 0) == HEAD[:9]
        error_of(libnbd, h.pwrite, b"", SIZE)
        assert h.pread(9, 0) == HEAD[:9]


def test_df_gives_one_chunk(connect: Connect, libnbd: ModuleType) -> None:
    for export in ("vda", "vda@s"):
        h = connect(export)
        assert h.can_df()
        chunks: list[tuple[int, int]] = []

        def take(data: bytes, offset: int, *_: object, chunks: list[tuple[int, int]] = chunks) -> None:
            chunks.append((offset, len(data)))

        h.pread_structured(64 * KIB, MIB - 1000, take, libnbd.CMD_FLAG_DF)
        assert chunks == [(MIB - 1000, 64 * KIB)]


def test_one_extent_is_asked_for_with_req_one(connect: Connect, libnbd: ModuleType) -> None:
    h = connect("vda@s", contexts=("base:allocation", "qemu:allocation-depth", "fleecing:cluster-state"))
    assert extents(h, 0, MIB, libnbd.CMD_FLAG_REQ_ONE) == {
        "base:allocation": [(MIB, 0)],
        "qemu:allocation-depth": [(MIB, 2)],
        "fleecing:cluster-state": [(MIB, 0)],
    }


def test_contexts_that_are_not_there_are_not_answered(connect: Connect) -> None:
    h = connect("vda", contexts=("base:allocation", "qemu:dirty-bitmap:none", "x-other:thing"))
    assert h.can_meta_context("base:allocation")
    assert not h.can_meta_context("qemu:dirty-bitmap:none")
    assert list(extents(h, 0, SIZE)) == ["base:allocation"]


def test_exports_and_contexts_are_listed(libnbd: ModuleType, server: Server) -> None:
    handle = libnbd.NBD()
    handle.set_opt_mode(True)
    handle.connect_uri(server.uri("vda@s"))
    names: list[str] = []
    handle.opt_list(lambda name, _description: names.append(name))
    assert names == ["vda", "vda@s"]
    contexts: list[str] = []
    handle.opt_list_meta_context(contexts.append)
    assert contexts == [
        "base:allocation",
        "qemu:allocation-depth",
        "fleecing:cluster-state",
        "fleecing:read-once",
        "fleecing:shared-memory",
    ]
    handle.opt_info()
    assert handle.get_size() == SIZE
    handle.opt_abort()


@pytest.mark.parametrize("flags", [0, 1, 2, 3])
def test_a_client_of_any_handshake_is_served(libnbd: ModuleType, server: Server, flags: int) -> None:
    """Without fixed newstyle it can only use EXPORT_NAME, whose answer has 124 zeroes unless NO_ZEROES was agreed."""
    handle = libnbd.NBD()
    handle.set_handshake_flags(flags)
    handle.set_export_name("vda")
    handle.connect_unix(str(server.unix))
    assert handle.get_size() == SIZE
    assert handle.pread(MIB, 0) == HEAD
    handle.shutdown()


def test_many_requests_in_flight_are_all_answered(connect: Connect, libnbd: ModuleType) -> None:
    h = connect("vda")
    writes = {2 * MIB + n * 4099: random_bytes(4099, seed=n) for n in range(200)}
    commands = [h.aio_pwrite(libnbd.Buffer.from_bytearray(bytearray(data)), offset) for offset, data in writes.items()]
    while h.aio_in_flight() > 0:
        h.poll(-1)
    assert all(h.aio_command_completed(cookie) for cookie in commands)
    buffers = {offset: libnbd.Buffer(4099) for offset in writes}
    commands = [h.aio_pread(buffer, offset) for offset, buffer in buffers.items()]
    while h.aio_in_flight() > 0:
        h.poll(-1)
    assert all(h.aio_command_completed(cookie) for cookie in commands)
    assert {offset: bytes(buffer.to_bytearray()) for offset, buffer in buffers.items()} == writes


def test_a_flush_on_one_connection_covers_writes_of_another(connect: Connect, server: Server) -> None:
    """CAN_MULTI_CONN: what one connection was told is written, every other one reads."""
    first, second = connect("vda"), connect("vda", tcp=True)
    assert first.can_multi_conn()
    for n in range(50):
        first.pwrite(bytes([n]) * 100, 3 * MIB)
        assert second.pread(100, 3 * MIB) == bytes([n]) * 100
    second.flush()
    disk = Path(server.status()["disks"][0]["path"])
    with disk.open("rb") as image:
        image.seek(3 * MIB)
        assert image.read(100) == bytes([49]) * 100
