"""Disks that really fail: the kernel's own errors below temp and below the active image, under both policies.

What must hold in each case: the guest's disk has what the guest was told, and the snapshot is exact or broken with its
reason.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fleecing.block.hostfile import WritesLost
from fleecing.errors import SnapshotBroken
from fleecing.units import KiB, MiB
from tests.block.rig import Rig, in_thread
from tests.faulty import CAN_FAIL, Faults, faulty_file, faulty_folder, forget
from tests.images import make_image, random_bytes
from tests.peers import DEADLINE, run
from tests.raw_client import EINVAL, EIO, FLUSH, READ, WRITE, RawClient, Reply
from tests.serving import Serve, Server

SIZE = 4 * MiB
CLUSTER = 64 * KiB
OLD, NEW = random_bytes(SIZE), random_bytes(SIZE, seed=1)
POLICIES = pytest.mark.parametrize("policy", ["break-snapshot", "break-guest-write"])
LOST = "the disk of temp did not take what was written to it: Input/output error"

if not CAN_FAIL:
    pytest.skip("takes root", allow_module_level=True)


@pytest.fixture
def temp_dir(tmp_path: Path) -> Iterator[Faults]:
    """A temp folder on a disk that may fail."""
    with faulty_folder(tmp_path / "faulty", 32 * MiB) as folder:
        yield folder


@pytest.fixture
def image(tmp_path: Path) -> Iterator[Faults]:
    """An active image on a disk that may fail."""
    make_image(tmp_path / "real.img", SIZE)
    with faulty_file(tmp_path / "faulty", tmp_path / "real.img") as file:
        yield file


def lose_writes(faults: Faults) -> None:
    """What the file system has taken since its disk fails never comes there, and the disk is well again."""
    run("sync", "--file-system", str(faults.path), expect=None)
    faults.heal()


def write(guest: RawClient, offset: int, length: int) -> Reply:
    return guest.request(WRITE, 0, offset, 0, NEW[offset : offset + length])


def read(server: Server, offset: int = 0, length: int = SIZE, export: str = "vda@s") -> Reply:
    with RawClient(server.unix, export) as client:
        return client.request(READ, 0, offset, length)


def is_exact(reply: Reply, contents: bytes, offset: int = 0) -> bool:
    found = b"".join(piece for _, piece in sorted(reply.data))
    return not reply.error and found == contents[offset : offset + len(found)]


def wait_until(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + DEADLINE
    while not holds():
        assert time.monotonic() < end, "what must come does not come"
        time.sleep(0.02)


# Temp


def test_what_temps_disk_has_lost_is_never_read(temp_dir: Faults) -> None:
    """Once the system forgets the pages, they read as they were before, without any error."""
    rig = Rig(temp_dir.path, OLD)
    snapshot, host = rig.snapshot()
    temp_dir.fail_writes()  # first, for nobody knows when the system begins to write
    rig.disk.write(0, NEW[: SIZE // 2])
    lose_writes(temp_dir)
    forget(Path(host.path))
    for _ in range(2):
        with pytest.raises(SnapshotBroken, match=LOST):
            snapshot.read(SIZE // 2 - CLUSTER, 4096)
    assert rig.broken == [("s", LOST)]
    assert rig.disk.read(0, SIZE) == NEW[: SIZE // 2] + OLD[SIZE // 2 :]
    rig.close()


def test_one_of_many_readers_learns_of_the_loss_and_none_gets_what_was_before(temp_dir: Faults) -> None:
    rig = Rig(temp_dir.path, OLD)
    snapshot, host = rig.snapshot()
    temp_dir.fail_writes()
    rig.disk.write(0, NEW)
    lose_writes(temp_dir)
    forget(Path(host.path))

    def look(start: int) -> None:
        for offset in range(start, SIZE, 4 * CLUSTER):
            with pytest.raises(SnapshotBroken, match=LOST):
                snapshot.read(offset, CLUSTER)

    for reader in [in_thread(lambda n=n: look(n * CLUSTER)) for n in range(4)]:  # type: ignore[misc]
        reader.wait()
    rig.close()


def test_a_loss_that_one_was_told_of_is_told_to_a_sync_too(temp_dir: Faults) -> None:
    """The system tells it once; a durable copy must not count on the second answer."""
    rig = Rig(temp_dir.path, OLD)
    snapshot, host = rig.snapshot()
    temp_dir.fail_writes()
    rig.disk.write(0, NEW)
    lose_writes(temp_dir)
    for look in (host.check_written, snapshot.temp.sync, snapshot.temp.sync):
        with pytest.raises(WritesLost):
            look()
    rig.close()


@POLICIES
def test_a_loss_breaks_the_snapshot_before_anybody_reads_it(
    serve: Serve, tmp_path: Path, temp_dir: Faults, policy: str
) -> None:
    """Under either policy: no error for the guest could bring back what temp had taken."""
    make_image(tmp_path / "vda.img", SIZE)
    server = serve(tmp_path / "vda.img", "--temp-dir", str(temp_dir.path))
    server.snapshot(name="s", on_cbw_error=policy)
    with RawClient(server.unix, "vda") as guest:
        temp_dir.fail_writes()
        assert write(guest, 0, SIZE // 2).error == 0
        lose_writes(temp_dir)
        wait_until(lambda: server.show("vda@s")["state"] == "broken")
        assert server.show("vda@s")["broken"] == LOST
        reply = read(server)
        assert (reply.error, reply.text) == (EINVAL, f"snapshot broken: {LOST}")
        assert write(guest, SIZE // 2, SIZE // 2).error == 0
        assert is_exact(read(server, export="vda"), NEW)
    server.kill()
    server.start()
    assert server.show("vda@s")["broken"] == LOST


def test_a_server_that_ends_while_temps_disk_fails_leaves_no_snapshot_that_looks_whole(
    serve: Serve, tmp_path: Path, temp_dir: Faults
) -> None:
    make_image(tmp_path / "vda.img", SIZE)
    server = serve(tmp_path / "vda.img", "--temp-dir", str(temp_dir.path))
    server.snapshot(name="s")
    temp_dir.fail_writes()
    with RawClient(server.unix, "vda") as guest:
        assert write(guest, 0, SIZE).error == 0
    server.stop()
    temp_dir.heal()
    forget(next(temp_dir.path.glob("*.qcow2")))
    server.start()
    assert "Input/output error" in server.show("vda@s")["broken"] or server.show("vda@s")["broken"] == LOST
    assert read(server).error == EINVAL
    assert is_exact(read(server, export="vda"), NEW)


@POLICIES
def test_a_durable_snapshot_on_a_disk_that_fails(serve: Serve, tmp_path: Path, temp_dir: Faults, policy: str) -> None:
    make_image(tmp_path / "vda.img", SIZE)
    server = serve(tmp_path / "vda.img", "--temp-dir", str(temp_dir.path))
    server.snapshot(name="s", on_cbw_error=policy, durable=True)
    now = bytearray(OLD)
    with RawClient(server.unix, "vda") as guest:
        assert write(guest, 0, MiB).error == 0
        now[:MiB] = NEW[:MiB]
        temp_dir.fail_writes()
        reply = write(guest, MiB, CLUSTER)
        if policy == "break-snapshot":
            assert reply.error == 0
            now[MiB : MiB + CLUSTER] = NEW[MiB : MiB + CLUSTER]
            assert "Input/output error" in server.show("vda@s")["broken"]
            assert read(server).error == EINVAL
        else:
            assert reply.error == EIO
            temp_dir.heal()
            assert write(guest, MiB, CLUSTER).error == EIO  # a sync that failed once is not believed again
            assert server.show("vda@s")["state"] == "ready"
            assert is_exact(read(server), OLD)
        assert is_exact(read(server, export="vda"), bytes(now))


@POLICIES
def test_a_durable_snapshot_on_a_disk_that_hangs(serve: Serve, tmp_path: Path, temp_dir: Faults, policy: str) -> None:
    make_image(tmp_path / "vda.img", SIZE)
    server = serve(tmp_path / "vda.img", "--temp-dir", str(temp_dir.path))
    server.snapshot(name="s", on_cbw_error=policy, durable=True, cbw_timeout=1)
    now = bytearray(OLD)
    with RawClient(server.unix, "vda") as guest:
        temp_dir.hang()
        reply = write(guest, 0, CLUSTER)
        if policy == "break-snapshot":
            assert reply.error == 0
            now[:CLUSTER] = NEW[:CLUSTER]
            assert server.show("vda@s")["broken"] == "temp did not take a copy within cbw-timeout (1 s)"
            assert read(server).error == EINVAL
        else:
            assert reply.error == EIO
            assert "cbw-timeout" in reply.text
        temp_dir.resume()
        if policy == "break-guest-write":
            wait_until(lambda: write(guest, 0, CLUSTER).error == 0)
            now[:CLUSTER] = NEW[:CLUSTER]
            assert is_exact(read(server), OLD)
        assert is_exact(read(server, export="vda"), bytes(now))


# The active image


@POLICIES
def test_old_contents_that_cannot_be_read(serve: Serve, image: Faults, policy: str) -> None:
    server = serve(image.path)
    server.snapshot(name="s", on_cbw_error=policy)
    now = bytearray(OLD)
    with RawClient(server.unix, "vda") as guest:
        image.fail_reads()
        forget(image.path)
        for offset in (0, SIZE - 4096):
            assert read(server, offset, 4096).error == EIO
            assert guest.request(READ, 0, offset, 4096).error == EIO
        reply = write(guest, 0, CLUSTER)
        image.heal()
        if policy == "break-snapshot":
            assert reply.error == 0
            now[:CLUSTER] = NEW[:CLUSTER]
            assert (
                server.show("vda@s")["broken"]
                == "copy before a guest write failed: the image cannot be read: Input/output error"
            )
            assert read(server).error == EINVAL
        else:
            assert reply.error == EIO
            assert is_exact(read(server), OLD)
            assert write(guest, 0, CLUSTER).error == 0
            now[:CLUSTER] = NEW[:CLUSTER]
            assert is_exact(read(server), OLD)
        assert is_exact(guest.request(READ, 0, 0, SIZE), bytes(now))


@POLICIES
def test_an_image_that_takes_no_writes_is_the_guests_error_and_harms_no_snapshot(
    serve: Serve, image: Faults, policy: str
) -> None:
    server = serve(image.path)
    server.snapshot(name="s", on_cbw_error=policy)
    with RawClient(server.unix, "vda") as guest:
        image.fail_writes()
        assert write(guest, CLUSTER, CLUSTER).error == EIO
        assert write(guest, 0, MiB).error == EIO
        image.heal()
        assert is_exact(read(server), OLD)
        assert write(guest, 0, SIZE).error == 0
        assert guest.request(FLUSH, 0, 0, 0).error == 0
        assert is_exact(guest.request(READ, 0, 0, SIZE), NEW)
    assert is_exact(read(server), OLD)


def test_an_image_that_hangs_holds_up_nobody_but_its_own_clients(serve: Serve, image: Faults, tmp_path: Path) -> None:
    make_image(tmp_path / "other.img", SIZE)
    server = serve({"vda": image.path, "vdb": tmp_path / "other.img"})
    server.freeze("vda", "vdb", name="s")
    with RawClient(server.unix, "vda") as guest, RawClient(server.unix, "vda@s") as reader:
        image.hang()
        forget(image.path)
        waiting = [(guest, guest.send(WRITE, 0, 0, 0, NEW[:CLUSTER])), (reader, reader.send(READ, 0, MiB, CLUSTER))]
        with RawClient(server.unix, "vdb") as other:
            assert write(other, 0, SIZE).error == 0
        assert is_exact(read(server, export="vdb@s"), OLD)
        assert server.show("vda@s")["state"] == "ready"
        image.resume()
        first, second = [client.reply(cookie) for client, cookie in waiting]
    assert first.error == 0
    assert is_exact(second, OLD, MiB)
    assert is_exact(read(server), OLD)
