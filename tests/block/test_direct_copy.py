"""Clusters that the system copies from file to file: what it does in part, or not at all, is done here."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fleecing.block import hostfile
from fleecing.block.copy_before_write import OnCbwError
from fleecing.block.extent import ClusterState
from fleecing.block.hostfile import HostFile
from tests.block.rig import CLUSTER, FaultyTemp, Rig, pattern, write_together

MakeRig = Callable[..., Rig]

OLD = pattern(12 * CLUSTER) + bytes(2 * CLUSTER) + pattern(2 * CLUSTER + 500, 7)
WRITES = [(cluster * CLUSTER + 5, bytes([cluster + 1]) * 100) for cluster in (9, 2, 3, 12, 0, 13, 14)]


class Sendfile:
    """The module `os`, with a `sendfile` of one's own."""

    def __init__(self, sendfile: Callable[[int, int, int, int], int]) -> None:
        self.calls = 0
        self._sendfile = sendfile

    def sendfile(self, out: int, fd: int, offset: int, count: int) -> int:
        self.calls += 1
        return self._sendfile(out, fd, offset, count)

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)


def failing(code: int) -> Callable[[int, int, int, int], int]:
    def sendfile(out: int, fd: int, offset: int, count: int) -> int:
        raise OSError(code, os.strerror(code))

    return sendfile


def half_then(then: Callable[[int, int, int, int], int]) -> Callable[[int, int, int, int], int]:
    """Copies the half of what it is asked for first, then goes on as told."""

    def sendfile(out: int, fd: int, offset: int, count: int) -> int:
        return os.sendfile(out, fd, offset, count // 2) if count >= CLUSTER else then(out, fd, offset, count)

    return sendfile


def nothing(out: int, fd: int, offset: int, count: int) -> int:
    return 0


def change_all(rig: Rig) -> bytes:
    """The writes together and one alone; what the disk has then."""
    assert write_together(rig.disk, WRITES) == [None] * len(WRITES)
    rig.disk.write(6 * CLUSTER + 70, b"alone")
    now = bytearray(OLD)
    for offset, data in [*WRITES, (6 * CLUSTER + 70, b"alone")]:
        now[offset : offset + len(data)] = data
    return bytes(now)


def check(temp: FaultyTemp) -> None:
    subprocess.run(["qemu-img", "check", "-q", "-f", "qcow2", temp.path], check=True)


@pytest.mark.parametrize(
    "sendfile, takes",
    [
        (os.sendfile, True),
        (half_then(os.sendfile), True),
        (half_then(nothing), True),
        (half_then(failing(errno.EIO)), True),
        (failing(errno.ENOSPC), True),
        (failing(errno.EINVAL), False),
        (failing(errno.ENOSYS), False),
        (half_then(failing(errno.EOPNOTSUPP)), False),
    ],
)
def test_frozen_bytes_are_right_whatever_sendfile_does(
    make_rig: MakeRig,
    monkeypatch: pytest.MonkeyPatch,
    sendfile: Callable[[int, int, int, int], int],
    takes: bool,
) -> None:
    rig = make_rig(OLD)
    snapshot, temp = rig.snapshot()
    system = Sendfile(sendfile)
    monkeypatch.setattr(hostfile, "os", system)
    now = change_all(rig)
    assert system.calls
    assert temp.takes_copies is takes
    assert snapshot.read(0, len(OLD)) == OLD
    assert rig.disk.read(0, len(OLD)) == now
    assert snapshot.counts()[ClusterState.COPIED] == len(WRITES) + 1
    check(temp)
    before = temp.allocated()
    snapshot.discard(0, len(OLD))
    assert temp.allocated() <= before - 6 * CLUSTER  # zeroes took none
    check(temp)


def test_zeroes_and_the_short_tail_are_not_copied_so(make_rig: MakeRig, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = make_rig(OLD)
    snapshot, temp = rig.snapshot()
    system = Sendfile(os.sendfile)
    monkeypatch.setattr(hostfile, "os", system)
    rig.disk.write(12 * CLUSTER, b"x")
    rig.disk.write(len(OLD) - 1, b"x")
    assert system.calls == 0
    assert snapshot.read(0, len(OLD)) == OLD
    check(temp)


@pytest.mark.parametrize("together", [True, False])
def test_what_is_trimmed_during_the_copy_is_not_linked(make_rig: MakeRig, together: bool) -> None:
    rig = make_rig(OLD)
    snapshot, temp = rig.snapshot()
    used = snapshot.temp_used()
    rig.file.after_read = lambda: snapshot.discard(3 * CLUSTER, CLUSTER)
    if together:
        assert write_together(rig.disk, [(3 * CLUSTER, b"x"), (5 * CLUSTER, b"y")]) == [None] * 2
    else:
        rig.disk.write(3 * CLUSTER, b"x")
    assert snapshot.counts()[ClusterState.TRIMMED] == 1
    assert snapshot.counts()[ClusterState.COPIED] == int(together)
    assert snapshot.temp_used() - used <= 2 * CLUSTER  # an L2 table, and the other one
    check(temp)


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("broken", [True, False])
def test_what_cannot_be_linked_gives_its_space_back(make_rig: MakeRig, together: bool, broken: bool) -> None:
    """The snapshot breaks during the copy, or temp does not take the copy's entry."""
    rig = make_rig(OLD)
    snapshot, temp = rig.snapshot(on_cbw_error=OnCbwError.BREAK_GUEST_WRITE)
    rig.disk.write(0, b"x")  # makes the table
    used = snapshot.temp_used()

    def fail() -> None:
        if broken:
            snapshot.clusters.break_("its disk is gone")
        else:
            temp.fail = OSError(errno.ENOSPC, "No space left on device")

    rig.file.after_read = fail
    writes = [(3 * CLUSTER, b"x"), (5 * CLUSTER, b"y")] if together else [(3 * CLUSTER, b"x")]
    outcomes = write_together(rig.disk, writes)
    assert all((outcome is None) is broken for outcome in outcomes)
    assert snapshot.clusters.counts()[ClusterState.COPIED] == 1
    assert snapshot.temp_used() == used
    temp.fail = None
    check(temp)


def test_temp_that_is_full_breaks_the_snapshot_and_not_the_guest(make_rig: MakeRig) -> None:
    rig = make_rig(OLD)
    snapshot, _ = rig.snapshot(limit=8 * CLUSTER)
    now = change_all(rig)
    assert snapshot.broken
    assert rig.disk.read(0, len(OLD)) == now


def test_copies_of_several_threads_do_not_meet_at_the_descriptor(tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(OLD)
    source, target = HostFile.open(str(tmp_path / "image")), HostFile.create(str(tmp_path / "temp"))
    seen = []

    def sendfile(out: int, fd: int, offset: int, count: int) -> int:
        seen.append(source.copy_to(0, CLUSTER, target, 5 * CLUSTER))  # another's, meanwhile
        return os.sendfile(out, fd, offset, count)

    system = Sendfile(sendfile)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hostfile, "os", system)
        assert source.copy_to(CLUSTER, CLUSTER, target, 2 * CLUSTER)
    assert seen == [False]
    assert (tmp_path / "temp").read_bytes() == bytes(2 * CLUSTER) + OLD[CLUSTER : 2 * CLUSTER]
    source.close()
    target.close()
    assert not source.copy_to(0, CLUSTER, target, 0)
