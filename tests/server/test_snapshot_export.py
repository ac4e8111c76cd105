"""The export of a snapshot: read and trim, what a guest changes saved first, and errors that tell causes apart."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from bitarray import bitarray

from fleecing.errors import ImageError, RequestError, TempLimitReached
from fleecing.nbd.constants import BASE_ALLOCATION, Cmd, CmdFlag, NbdError, ReplyMode
from fleecing.server.export import Export, active_export, answer_to, snapshot_export
from fleecing.server.meta_context import ALLOCATION_DEPTH, CLUSTER_STATE
from fleecing.units import KiB, MiB
from tests.block.rig import CLUSTER, SECONDS, Rig, in_thread, pattern
from tests.server.rig import MakeLine

SIZE = 10 * CLUSTER + 5
STRUCTURED = ReplyMode.STRUCTURED
CONTEXTS = [BASE_ALLOCATION, ALLOCATION_DEPTH, CLUSTER_STATE]


@pytest.fixture
def active(rig: Rig) -> Export:
    return active_export("vda", "", rig.disk, cluster_size=CLUSTER)


Freeze = Callable[..., Export]


@pytest.fixture
def freeze(rig: Rig) -> Freeze:
    return lambda **options: snapshot_export("vda@s", "", rig.snapshot(**options)[0])


def test_a_guests_changes_are_saved_first(
    rig: Rig, active: Export, freeze: Freeze, line: MakeLine, mode: ReplyMode
) -> None:
    guest, backup = line(active, mode), line(freeze(), mode)
    guest.send(
        guest.request(Cmd.WRITE, 10, payload=b"new" * 1000),
        guest.request(Cmd.WRITE, CLUSTER - 5, payload=b"across", flags=CmdFlag.FUA),
        guest.request(Cmd.TRIM, 3 * CLUSTER, CLUSTER),
        guest.request(Cmd.WRITE_ZEROES, 5 * CLUSTER - 1, 2),
    )
    assert not any(reply.error for reply in guest.replies(4).values())
    assert backup.ask(Cmd.READ, 0, SIZE).data == pattern(SIZE)
    assert guest.ask(Cmd.READ, 3 * CLUSTER, 100).data == bytes(100)


def test_a_long_write_is_saved_first(tmp_path: Path, line: MakeLine, mode: ReplyMode) -> None:
    (tmp_path / "long").mkdir()
    rig = Rig(tmp_path / "long", pattern(4 * MiB))
    guest = line(active_export("vda", "", rig.disk, cluster_size=CLUSTER), mode)
    backup = line(snapshot_export("vda@s", "", rig.snapshot()[0]), mode)
    data = pattern(3 * MiB + 7, 1)
    in_thread(lambda: guest.send(guest.request(Cmd.WRITE, 3, payload=data))).wait()
    assert guest.reply().error == 0
    assert backup.ask(Cmd.READ, 0, 4 * MiB).data == pattern(4 * MiB)
    assert guest.ask(Cmd.READ, 3, len(data)).data == data
    guest.end()
    backup.end()
    rig.close()


@pytest.mark.parametrize("command", [Cmd.WRITE, Cmd.WRITE_ZEROES])
@pytest.mark.parametrize("length", [1, 4096, 2 * MiB])
def test_a_snapshot_cannot_be_written(
    rig: Rig, freeze: Freeze, line: MakeLine, mode: ReplyMode, command: Cmd, length: int
) -> None:
    backup = line(freeze(), mode)
    payload = bytes(length) if command is Cmd.WRITE else b""
    in_thread(lambda: backup.send(backup.request(command, 0, length, payload=payload))).wait()
    assert backup.reply().error == NbdError.EPERM
    assert backup.ask(Cmd.READ, 0, SIZE).data == pattern(SIZE)


def test_flush_cache_and_fua_are_accepted_of_a_snapshot(freeze: Freeze, line: MakeLine, mode: ReplyMode) -> None:
    backup = line(freeze(), mode)
    for command in (Cmd.FLUSH, Cmd.CACHE, Cmd.TRIM, Cmd.READ):
        assert backup.ask(command, 0, 100, flags=CmdFlag.FUA).error == 0


def test_what_was_trimmed_cannot_be_read_and_the_text_says_why(freeze: Freeze, line: MakeLine, mode: ReplyMode) -> None:
    contexts = [] if mode is ReplyMode.SIMPLE else [BASE_ALLOCATION]
    backup = line(freeze(), mode, contexts)
    assert backup.ask(Cmd.TRIM, CLUSTER - 1, 2 * CLUSTER).error == 0  # holds cluster 1 whole, no other
    commands = [Cmd.READ] if mode is ReplyMode.SIMPLE else [Cmd.READ, Cmd.BLOCK_STATUS]
    for command in commands:
        for offset, length in [(CLUSTER, 1), (2 * CLUSTER - 1, 1), (0, SIZE)]:
            reply = backup.ask(command, offset, length)
            assert reply.error == NbdError.EINVAL
            assert mode is ReplyMode.SIMPLE or "trimmed" in reply.text
    assert backup.ask(Cmd.READ, 0, CLUSTER).data == pattern(SIZE)[:CLUSTER]
    assert backup.ask(Cmd.READ, 2 * CLUSTER, SIZE - 2 * CLUSTER).data == pattern(SIZE)[2 * CLUSTER :]
    assert backup.ask(Cmd.TRIM, 0, SIZE).error == 0  # again, and the short tail cluster
    assert backup.ask(Cmd.READ, SIZE - 1, 1).error == NbdError.EINVAL


def test_a_long_read_with_a_trimmed_cluster_in_the_middle_goes_on_after_the_error(
    tmp_path: Path, line: MakeLine, mode: ReplyMode
) -> None:
    (tmp_path / "long").mkdir()
    rig = Rig(tmp_path / "long", pattern(4 * MiB))
    backup = line(snapshot_export("vda@s", "", rig.snapshot()[0]), mode)
    backup.ask(Cmd.TRIM, 3 * MiB, CLUSTER)
    reply = backup.ask(Cmd.READ, 0, 4 * MiB)
    assert reply.error == NbdError.EINVAL
    if mode is not ReplyMode.SIMPLE:
        assert reply.at == 3 * MiB
        assert reply.data[: 3 * MiB] == pattern(4 * MiB)[: 3 * MiB]
    assert backup.ask(Cmd.READ, 100, 100).error == 0
    backup.end()
    rig.close()


def test_what_is_not_in_the_bitmap_says_so(freeze: Freeze, line: MakeLine) -> None:
    backup = line(freeze(bitmap=bitarray("10101010101")), STRUCTURED)
    reply = backup.ask(Cmd.READ, CLUSTER, 10)
    assert (reply.error, reply.text) == (NbdError.EINVAL, f"cluster at offset {CLUSTER}: not in bitmap")


def test_a_broken_snapshot_tells_its_cause_to_every_request(rig: Rig, active: Export, line: MakeLine) -> None:
    snapshot, temp = rig.snapshot()
    temp.fail = OSError(28, "No space left on device")
    guest = line(active, STRUCTURED)
    backup = line(snapshot_export("vda@s", "", snapshot), STRUCTURED, CONTEXTS)
    assert guest.ask(Cmd.WRITE, 0, payload=b"the guest comes first").error == 0
    for command in (Cmd.READ, Cmd.TRIM, Cmd.CACHE, Cmd.BLOCK_STATUS):
        reply = backup.ask(command, 0, CLUSTER)
        assert reply.error == NbdError.EINVAL
        assert reply.text.startswith("snapshot broken: ")
        assert "No space left" in reply.text


def test_a_snapshot_that_is_removed_under_its_reader_is_an_error(rig: Rig, line: MakeLine, mode: ReplyMode) -> None:
    snapshot, _ = rig.snapshot()
    backup = line(snapshot_export("vda@s", "", snapshot), mode)
    assert backup.ask(Cmd.READ, 0, 10).error == 0
    snapshot.remove(SECONDS)
    reply = backup.ask(Cmd.READ, 0, 10)
    assert reply.error == NbdError.EINVAL
    assert mode is ReplyMode.SIMPLE or reply.text == "snapshot broken: deleted"
    assert snapshot.temp.file.fd >= 0  # for the reader that is still there
    backup.end()
    assert snapshot.temp.file.fd < 0


def test_contexts_tell_of_copies_trims_and_holes(tmp_path: Path, line: MakeLine) -> None:
    (tmp_path / "holes").mkdir()
    rig = Rig(tmp_path / "holes", pattern(4 * CLUSTER), 8 * CLUSTER)
    backup = line(snapshot_export("vda@s", "", rig.snapshot()[0]), STRUCTURED, CONTEXTS)
    rig.disk.write(CLUSTER, b"x")
    rig.disk.write(6 * CLUSTER, b"x")
    status = backup.ask(Cmd.BLOCK_STATUS, 0, 8 * CLUSTER).status
    assert status[1] == [(4 * CLUSTER, 0), (4 * CLUSTER, 3)]
    assert status[2] == [(CLUSTER, 2), (CLUSTER, 1), (4 * CLUSTER, 2), (CLUSTER, 1), (CLUSTER, 2)]
    assert status[3] == [(CLUSTER, 0), (CLUSTER, 1), (4 * CLUSTER, 0), (CLUSTER, 1), (CLUSTER, 0)]
    one = backup.ask(Cmd.BLOCK_STATUS, 100, 8 * CLUSTER - 100, flags=CmdFlag.REQ_ONE).status
    assert one == {1: [(CLUSTER - 100, 0)], 2: [(CLUSTER - 100, 2)], 3: [(CLUSTER - 100, 0)]}
    backup.end()
    rig.close()


def test_cluster_state_is_told_also_where_nothing_can_be_read(freeze: Freeze, line: MakeLine) -> None:
    backup = line(freeze(bitmap=bitarray("11011111111")), STRUCTURED, [CLUSTER_STATE])
    backup.ask(Cmd.TRIM, 0, CLUSTER)
    assert backup.ask(Cmd.BLOCK_STATUS, 0, SIZE).status[1] == [
        (CLUSTER, 2),
        (CLUSTER, 0),
        (CLUSTER, 3),
        (SIZE - 3 * CLUSTER, 0),
    ]


@pytest.mark.parametrize(
    ("error", "number", "text"),
    [
        (RequestError(NbdError.EOVERFLOW, "as it is"), NbdError.EOVERFLOW, "as it is"),
        (TempLimitReached(4 * KiB), NbdError.ENOSPC, "temp limit"),
        (ImageError("vda.img", 5, "is odd"), NbdError.EIO, "vda.img at offset 5: is odd"),
        (OSError(13, "Permission denied"), NbdError.EPERM, "READ: Permission denied"),
        (OSError("no number"), NbdError.EIO, "READ: no number"),
        (TimeoutError(110, "took too long"), NbdError.EIO, "READ: took too long"),
    ],
    ids=str,
)
def test_errors_become_numbers_and_sentences(error: Exception, number: NbdError, text: str) -> None:
    answer = answer_to(error, "READ")
    assert answer.error == number
    assert text in answer.text


def test_an_error_that_nobody_expected_is_logged_and_told_as_such(caplog: pytest.LogCaptureFixture) -> None:
    answer = answer_to(ZeroDivisionError("?"), "READ of 5 bytes at 0")
    assert (answer.error, answer.text) == (NbdError.EIO, "READ of 5 bytes at 0: internal error")
    assert "nobody expected" in caplog.text
    caplog.clear()
