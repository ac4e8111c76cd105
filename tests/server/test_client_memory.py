"""READs that are answered in memory of the client (docs/shared-memory.md)."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from fleecing.block.snapshot_access import SnapshotAccess
from fleecing.errors import RequestError
from fleecing.nbd.constants import READ_ONCE, SHARED_MEMORY, Cmd, CmdFlag, NbdError, ReplyMode
from fleecing.server.budget import Budget
from fleecing.server.client_memory import MOST, ClientMemory
from fleecing.server.export import Export, snapshot_export
from fleecing.units import KiB, MiB
from tests.block.rig import CLUSTER, Rig, pattern
from tests.server.rig import Line, MakeDisk, MakeLine
from tests.server.wire import Reply

SIZE = 2 * MiB + 5
EXTENDED = ReplyMode.EXTENDED
PAYLOAD_LEN = CmdFlag.PAYLOAD_LEN


class Memory:
    """What a client shares."""

    def __init__(
        self,
        size: int = MiB,
        *,
        allocated: int | None = None,
        seals: int = fcntl.F_SEAL_SHRINK,
        flags: int = os.MFD_ALLOW_SEALING,
    ) -> None:
        self.size = size
        self.fd = os.memfd_create("test", flags)
        os.ftruncate(self.fd, size)
        if allocated is None:
            allocated = size
        if allocated:
            os.posix_fallocate(self.fd, 0, allocated)
        if flags & os.MFD_ALLOW_SEALING:
            fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, seals)

    def read(self, position: int, length: int) -> bytes:
        return os.pread(self.fd, length, position)

    def close(self) -> None:
        os.close(self.fd)


@pytest.fixture
def memory() -> Iterator[Memory]:
    made = Memory()
    yield made
    made.close()


@pytest.fixture
def export(snapshot: SnapshotAccess) -> Export:
    return snapshot_export("vda@s", "", snapshot)


def attach(client: Line, *fds: int) -> Reply:
    socket.send_fds(client.sock, [client.shared_read(0, 0, 0)], fds)
    return client.reply()


def shared(client: Line, offset: int, length: int, position: int, *, flags: int = 0) -> Reply:
    client.send(client.shared_read(offset, length, position, flags=flags))
    return client.reply()


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def maps() -> int:
    return Path("/proc/self/maps").read_text().count("memfd:test")


# Reading


@pytest.mark.parametrize("fault", ["warm", "cold"])
def test_the_bytes_are_in_the_memory_when_the_reply_is_there(
    make_disk: MakeDisk, line: MakeLine, memory: Memory, fault: str
) -> None:
    disk = make_disk(pattern(SIZE))
    disk.host.cold = fault == "cold"
    client = line(disk.export, EXTENDED, [SHARED_MEMORY])
    assert attach(client, memory.fd).error == 0
    for offset, length, position in [(0, 1, 5), (SIZE - 1, 1, 0), (4097, MiB - 7, 7), (MiB, MiB, 0), (3, 256 * KiB, 1)]:
        reply = shared(client, offset, length, position)
        assert (reply.error, reply.pieces) == (0, [])
        assert memory.read(position, length) == pattern(SIZE)[offset : offset + length]
    assert client.connection.bytes_read == 2 + MiB - 7 + MiB + 256 * KiB
    assert client.ask(Cmd.READ, 0, SIZE).data == pattern(SIZE)  # as ever
    client.end()
    assert maps() == 0


def test_a_snapshot_is_frozen_there_as_well(rig: Rig, export: Export, line: MakeLine, memory: Memory) -> None:
    client = line(export, EXTENDED, [SHARED_MEMORY])
    assert attach(client, memory.fd).error == 0
    rig.disk.write(CLUSTER // 2, b"new" * CLUSTER)
    assert shared(client, 0, MiB, 0).error == 0
    assert memory.read(0, MiB) == pattern(SIZE)[:MiB]


def test_many_in_flight_each_have_their_place(rig: Rig, export: Export, line: MakeLine, memory: Memory) -> None:
    client = line(export, EXTENDED, [SHARED_MEMORY])
    assert attach(client, memory.fd).error == 0
    places = range(0, MiB, CLUSTER)
    client.send(*[client.shared_read(MiB - CLUSTER - place, CLUSTER, place) for place in places])
    assert all(not reply.error for reply in client.replies(len(places)).values())
    wanted = [pattern(SIZE)[MiB - CLUSTER - place : MiB - place] for place in places]
    assert memory.read(0, MiB) == b"".join(wanted)


def test_it_goes_with_read_once(snapshot: SnapshotAccess, export: Export, line: MakeLine, memory: Memory) -> None:
    client = line(export, EXTENDED, [READ_ONCE, SHARED_MEMORY])
    assert attach(client, memory.fd).error == 0
    assert shared(client, 0, MiB, 0, flags=CmdFlag.READ_ONCE).error == 0
    assert memory.read(0, MiB) == pattern(SIZE)[:MiB]
    reply = shared(client, 0, 1, 0)
    assert (reply.error, reply.text) == (NbdError.EINVAL, "cluster at offset 0: trimmed")
    assert shared(client, MiB, CLUSTER, 0).error == 0
    client.end()
    assert [n for n in range(SIZE // CLUSTER) if not snapshot.clusters.access[n]] == list(range(MiB // CLUSTER))


def test_a_read_once_export_counts_them(snapshot: SnapshotAccess, line: MakeLine, memory: Memory) -> None:
    client = line(snapshot_export("vda@s", "", snapshot, read_once_grace=0), EXTENDED, [SHARED_MEMORY])
    assert attach(client, memory.fd).error == 0
    assert shared(client, 0, CLUSTER - 1, 0).error == 0
    assert shared(client, CLUSTER - 1, 1, CLUSTER - 1).error == 0
    assert memory.read(0, CLUSTER) == pattern(SIZE)[:CLUSTER]
    assert shared(client, 0, 1, 0).error == NbdError.EINVAL
    assert shared(client, CLUSTER, 1, 0).error == 0


def test_an_error_on_the_way_is_told_and_the_connection_goes_on(
    make_disk: MakeDisk, line: MakeLine, memory: Memory
) -> None:
    disk = make_disk(pattern(SIZE))
    disk.host.bad = range(MiB - 1, MiB)
    client = line(disk.export, EXTENDED, [SHARED_MEMORY])
    assert attach(client, memory.fd).error == 0
    reply = shared(client, 0, MiB, 0)
    assert (reply.error, reply.text) == (NbdError.EIO, f"READ of {MiB} bytes at 0: Input/output error")
    assert memory.read(0, MiB) == bytes(MiB)  # nothing stays of what may not be the snapshot's
    assert shared(client, MiB, MiB, 0).error == 0
    assert memory.read(0, MiB) == pattern(SIZE)[MiB : 2 * MiB]


# What is refused


def test_without_the_context_or_the_memory_there_is_nothing(
    rig: Rig, export: Export, line: MakeLine, memory: Memory
) -> None:
    without = line(export, EXTENDED)
    assert attach(without, memory.fd).error == NbdError.EINVAL
    client = line(export, EXTENDED, [SHARED_MEMORY])
    reply = shared(client, 0, 512, 0)
    assert (reply.error, reply.text) == (NbdError.EINVAL, "512 bytes at 0 are not within 0 bytes of shared memory")
    reply = shared(client, 0, 0, 0)
    assert reply.error == NbdError.EINVAL and reply.text.startswith("no descriptor has come of memory to be shared")
    for one in (without, client):
        assert one.ask(Cmd.READ, 0, 512).data == pattern(SIZE)[:512]


def test_compact_headers_have_no_place_for_it(rig: Rig, export: Export, line: MakeLine) -> None:
    client = line(export, ReplyMode.STRUCTURED, [SHARED_MEMORY])
    assert client.ask(Cmd.READ, 0, 512, flags=PAYLOAD_LEN).error == NbdError.EINVAL
    assert client.ask(Cmd.READ, 0, 512).data == pattern(SIZE)[:512]


@pytest.mark.parametrize(
    "offset, length, position",
    [
        (0, MiB, 1),
        (0, 1, MiB),
        (0, 512, (1 << 64) - 512),
        (SIZE - 1, 2, 0),
        (SIZE, 1, 0),
        (0, (1 << 64) - 1, 0),
        (1 << 63, 512, 0),
    ],
)
def test_ranges_are_held_against_disk_and_memory(
    rig: Rig, export: Export, line: MakeLine, memory: Memory, offset: int, length: int, position: int
) -> None:
    client = line(export, EXTENDED, [SHARED_MEMORY])
    assert attach(client, memory.fd).error == 0
    before = memory.read(0, MiB)
    assert shared(client, offset, length, position).error == NbdError.EINVAL
    assert memory.read(0, MiB) == before
    assert shared(client, SIZE - 1, 1, MiB - 1).error == 0
    assert memory.read(MiB - 1, 1) == pattern(SIZE)[-1:]


@pytest.mark.parametrize("payload", [b"", bytes(1), bytes(15), bytes(17), bytes(70 * KiB), bytes(2 * MiB)])
def test_another_payload_is_refused(rig: Rig, export: Export, line: MakeLine, memory: Memory, payload: bytes) -> None:
    client = line(export, EXTENDED, [SHARED_MEMORY])
    assert attach(client, memory.fd).error == 0
    assert client.ask(Cmd.READ, 0, len(payload), payload=payload, flags=PAYLOAD_LEN).error == NbdError.EINVAL
    assert client.ask(Cmd.READ, 0, 512).data == pattern(SIZE)[:512]


def test_memory_is_attached_once(rig: Rig, export: Export, line: MakeLine, memory: Memory) -> None:
    client = line(export, EXTENDED, [SHARED_MEMORY])
    assert attach(client, memory.fd).error == 0
    other = Memory()
    before = descriptors()
    reply = attach(client, other.fd)
    assert (reply.error, reply.text) == (NbdError.EINVAL, "this connection has its shared memory already")
    assert descriptors() == before
    other.close()
    assert shared(client, 0, MiB, 0).error == 0
    assert memory.read(0, MiB) == pattern(SIZE)[:MiB]


def test_memory_belongs_to_one_connection(rig: Rig, export: Export, line: MakeLine, memory: Memory) -> None:
    first, second = line(export, EXTENDED, [SHARED_MEMORY]), line(export, EXTENDED, [SHARED_MEMORY])
    assert attach(first, memory.fd).error == 0
    assert attach(second, memory.fd).error == NbdError.EINVAL
    assert second.ask(Cmd.READ, 0, 512).data == pattern(SIZE)[:512]


def refused(fd: int) -> str:
    """What the server says of it; nothing of it stays."""
    before = descriptors(), maps()
    ours, theirs = socket.socketpair()
    with ours, theirs:
        socket.send_fds(ours, [b"x"], [fd])
        memory = ClientMemory(theirs, Budget(1))
        assert memory.recv_into(memoryview(bytearray(2))) == 1
        with pytest.raises(RequestError) as caught:
            memory.attach()
        assert caught.value.error == NbdError.EINVAL
        memory.close()
    del memory
    assert (descriptors(), maps()) == before
    return caught.value.text


def test_memory_that_could_fail_or_cost_us_is_refused() -> None:
    for made, why in [
        (Memory(seals=0), "it is not sealed against shrinking"),
        (Memory(seals=fcntl.F_SEAL_GROW), "it is not sealed against shrinking"),
        (Memory(flags=0), "it is not sealed against shrinking"),
        (Memory(allocated=0), "it is not allocated in full"),
        (Memory(allocated=MiB - mmap.PAGESIZE), "it is not allocated in full"),
        (_with_blocks_behind(), "it is not allocated in full"),
        (Memory(0), f"it has 0 bytes, 1 to {MOST} are possible"),
        (Memory(MOST + 1, allocated=0), f"it has {MOST + 1} bytes, 1 to {MOST} are possible"),
        (Memory(seals=fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL), "Operation not permitted"),
        (Memory(seals=fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_WRITE), "Operation not permitted"),
    ]:
        assert refused(made.fd).endswith(why)
        made.close()


def test_what_is_no_memory_is_refused(tmp_path: Path, memory: Memory) -> None:
    plain = tmp_path / "file"
    plain.write_bytes(bytes(MiB))
    in_shm = Path("/dev/shm") / f"fleecing-test-{os.getpid()}"
    in_shm.write_bytes(bytes(MiB))
    reading, writing = os.pipe()
    opened = [os.open(path, os.O_RDWR) for path in (plain, in_shm, "/dev/zero", "/dev/null")]
    opened += [reading, writing, os.open(f"/proc/self/fd/{memory.fd}", os.O_RDONLY), os.open("/", os.O_RDONLY)]
    in_shm.unlink()
    for fd in opened:
        assert refused(fd).startswith("the memory to be shared is of no use: ")
        os.close(fd)


def test_memory_stays_as_it_was_attached(memory: Memory) -> None:
    """Or a reader could have the server allocate what the client gave back to the system."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        socket.send_fds(ours, [b"x"], [memory.fd])
        attached = ClientMemory(theirs, Budget(1))
        attached.recv_into(memoryview(bytearray(1)))
        attached.attach()
        for change in (
            lambda: os.ftruncate(memory.fd, 0),
            lambda: os.pwrite(memory.fd, b"x", 0),
            lambda: fcntl.fcntl(memory.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE),
        ):
            with pytest.raises(PermissionError):
                change()
        assert _punch(memory.fd) == _fallocate(memory.fd, 1, MiB) == errno.EPERM
        assert os.fstat(memory.fd).st_blocks * 512 == MiB
        attached.part(0, MiB)[:] = bytes(MiB)
        attached.close()


def _punch(fd: int) -> int:
    keep_size_punch_hole = 3
    return _fallocate(fd, keep_size_punch_hole, 0)


def _fallocate(fd: int, mode: int, offset: int) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    return ctypes.get_errno() if libc.fallocate(fd, mode, offset, MiB) else 0


def _with_blocks_behind() -> Memory:
    """All holes; but as many blocks as it should have are there, behind its end."""
    memory = Memory(allocated=0)
    keep_size = 1
    assert not _fallocate(memory.fd, keep_size, MiB)
    assert os.fstat(memory.fd).st_blocks * 512 == MiB
    return memory


# Descriptors


def test_memories_are_counted_over_all_clients(rig: Rig, export: Export, line: MakeLine) -> None:
    memories = Budget(2)
    given = [Memory() for _ in range(3)]
    clients = [line(export, EXTENDED, [SHARED_MEMORY], memories=memories) for _ in given]
    assert [attach(client, each.fd).error for client, each in zip(clients, given, strict=True)] == [0, 0, 22]
    assert clients[2].ask(Cmd.READ, 0, 512).data == pattern(SIZE)[:512]
    clients[0].end()
    assert attach(clients[2], given[2].fd).error == 0
    clients[1].hang_up()
    clients[2].end()
    assert memories.used == 0
    for each in given:
        each.close()


def test_no_descriptor_stays_behind(rig: Rig, export: Export, line: MakeLine, memory: Memory) -> None:
    client = line(export, EXTENDED, [SHARED_MEMORY])
    before = descriptors()
    more = [Memory() for _ in range(6)]
    socket.send_fds(client.sock, [client.request(Cmd.READ, 0, 1)], [each.fd for each in more])
    assert client.reply().data == pattern(SIZE)[:1]
    for each in more[1:]:
        each.close()
    assert shared(client, 0, 0, 0).error == 0  # the first one has come
    assert shared(client, 0, MiB, 0).error == 0
    assert more[0].read(0, MiB) == pattern(SIZE)[:MiB]
    more[0].close()
    assert descriptors() == before + 1  # that of the map
    client.end()
    assert descriptors() == before - 2
    assert maps() == 0


def test_a_client_that_never_attaches_leaves_nothing(rig: Rig, export: Export, line: MakeLine, memory: Memory) -> None:
    before = descriptors()
    client = line(export, EXTENDED, [SHARED_MEMORY])
    socket.send_fds(client.sock, [client.request(Cmd.READ, 0, 1)], [memory.fd, memory.fd])
    assert client.reply().error == 0
    client.end()
    assert descriptors() == before


def test_clients_without_the_context_send_descriptors_in_vain(
    rig: Rig, export: Export, line: MakeLine, memory: Memory
) -> None:
    client = line(export, EXTENDED)
    before = descriptors()
    for _ in range(3):
        socket.send_fds(client.sock, [client.request(Cmd.READ, 0, 1)], [memory.fd] * 5)
        assert client.reply().data == pattern(SIZE)[:1]
    assert descriptors() == before


def test_a_client_that_vanishes_in_the_middle(make_disk: MakeDisk, line: MakeLine) -> None:
    disk = make_disk(pattern(SIZE))
    before = descriptors()
    for _ in range(5):
        client, memory = line(disk.export, EXTENDED, [SHARED_MEMORY]), Memory()
        assert attach(client, memory.fd).error == 0
        memory.close()
        client.send(*[client.shared_read(0, MiB, 0) for _ in range(8)])
        client.hang_up()
    assert (descriptors(), maps()) == (before, 0)
