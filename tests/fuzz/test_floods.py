"""Clients who ask for much, read nothing, or come in crowds: fixed memory, and everybody else goes on."""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from fleecing.nbd import options
from fleecing.nbd.constants import IHAVEOPT, SHARED_MEMORY, ClientFlag, Cmd, CmdFlag, NbdError, Opt, ReplyMode
from fleecing.nbd.handshake import MAX_CONSUMED
from fleecing.server.client_memory import MEMORIES
from fleecing.server.export import MAXIMUM_PAYLOAD
from fleecing.server.outbox import LARGEST_PIECE
from fleecing.units import KiB, MiB
from tests.block.rig import in_thread
from tests.fuzz.field import MEMORY, Field, Witness
from tests.server.wire import Wire

SIZE = 80 * MiB
FLAGS = options.CLIENT_FLAGS.pack(ClientFlag.C_FIXED_NEWSTYLE | ClientFlag.C_NO_ZEROES)
BUDGET = 4 * MAXIMUM_PAYLOAD
"""What long READs with simple replies may take together."""


@pytest.fixture(scope="module")
def field(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Field]:
    made = Field(tmp_path_factory.mktemp("field"), SIZE)
    yield made
    made.stop()


def send_until_stuck(wire: Wire, stream: bytes) -> None:
    """As much as the server takes from one who reads nothing."""
    wire.sock.settimeout(0.3)
    with pytest.raises(TimeoutError):
        while True:
            wire.sock.sendall(stream)


@pytest.mark.parametrize(
    ("command", "payload"),
    [(Cmd.READ, b""), (Cmd.FLUSH, b""), (Cmd.WRITE, b"x" * 64), (Cmd.TRIM, b""), (Cmd.BLOCK_STATUS, b""), (99, b"")],
)
def test_a_client_that_reads_nothing_is_not_served_for_ever(field: Field, command: int, payload: bytes) -> None:
    """Each of its requests may have an answer; what it does not take piles up nowhere."""
    wire = field.enter("vda", ReplyMode.STRUCTURED, ["base:allocation"])
    flags = CmdFlag.FUA if payload else 0
    stream = b"".join(wire.request(command, 0, 64 * KiB, payload=payload, flags=flags) for _ in range(5000))
    with Witness(field):
        send_until_stuck(wire, stream)
    assert field.peak < MEMORY
    wire.sock.close()


def test_long_payloads_that_are_refused_are_held_by_nobody(field: Field) -> None:

    def send() -> None:
        wire = field.enter("vda", ReplyMode.STRUCTURED)
        assert wire.ask(Cmd.WRITE, SIZE, payload=bytes(MAXIMUM_PAYLOAD)).error == NbdError.ENOSPC
        assert wire.ask(Cmd.READ, 0, 10).error == 0
        wire.sock.close()

    with Witness(field):
        for running in [in_thread(send) for _ in range(4)]:
            running.wait()
    assert field.peak < MEMORY


def test_long_option_data_is_held_by_nobody(field: Field) -> None:
    header = options.OPTION.pack(IHAVEOPT, Opt.LIST_META_CONTEXT, MAX_CONSUMED)

    def send() -> None:
        with field.dial() as sock:
            sock.sendall(FLAGS + header + bytes(MAX_CONSUMED - 1))

    with Witness(field):
        for running in [in_thread(send) for _ in range(6)]:
            running.wait()
    assert field.peak < MEMORY


def test_long_simple_reads_that_nobody_takes_have_a_fixed_share_of_memory(field: Field) -> None:
    wires = [field.enter("vda@s", ReplyMode.SIMPLE) for _ in range(12)]
    for wire in wires:
        wire.send(wire.request(Cmd.READ, 0, MAXIMUM_PAYLOAD))
    with Witness(field):
        guest = field.enter("vda@s", ReplyMode.SIMPLE)
        assert not any(guest.ask(Cmd.READ, 0, LARGEST_PIECE).data)
        guest.sock.close()
    for wire in wires:
        wire.sock.close()
    other = field.enter("vda@s", ReplyMode.SIMPLE)
    assert not any(other.ask(Cmd.READ, 0, MAXIMUM_PAYLOAD).data)
    other.sock.close()
    assert field.peak < MEMORY + BUDGET


def test_a_thousand_idle_and_two_hundred_active_clients_at_once(tmp_path: Path) -> None:
    """Half of the idle ones are in the handshake; every active one has requests in flight all the time."""
    field = Field(tmp_path, SIZE, "--limit", "clients=1300", "--limit", "handshake-seconds=600")
    idle = [field.dial() for _ in range(500)]
    idle += [field.enter("vda@s", ReplyMode.STRUCTURED).sock for _ in range(500)]
    active = [field.enter("vda", ReplyMode.STRUCTURED) for _ in range(200)]
    share = SIZE // len(active)
    with Witness(field):
        for turn in range(2):
            for number, wire in enumerate(active):
                at = number * share + turn * 8 * KiB
                wire.send(wire.request(Cmd.WRITE, at, payload=bytes([number + 1]) * 4 * KiB, cookie=0))
                wire.send(*[wire.request(Cmd.READ, at, 8 * KiB, cookie=cookie) for cookie in range(1, 5)])
                assert len(field.server.status()["clients"]) >= 700  # those in the handshake have none of an export yet
            for number, wire in enumerate(active):
                replies = wire.replies(5)
                assert not any(reply.error for reply in replies.values())
                last = wire.ask(Cmd.READ, number * share + turn * 8 * KiB, 8 * KiB)
                assert last.data == bytes([number + 1]) * 4 * KiB + bytes(4 * KiB)
        frozen = field.enter("vda@s", ReplyMode.STRUCTURED)
        assert not any(frozen.ask(Cmd.READ, 0, MiB).data)
        for sock in [*idle, *[wire.sock for wire in [*active, frozen]]]:
            sock.close()
    assert field.peak < MEMORY + 700 * 2 * MiB
    field.stop()


@pytest.mark.parametrize(("soft", "hard"), [(300, 300), (300, 4096)])
def test_more_clients_than_descriptors_leave_the_operator_and_the_guest_alone(
    tmp_path: Path, soft: int, hard: int
) -> None:
    field = Field(tmp_path, SIZE, wrapper=("prlimit", f"--nofile={soft}:{hard}"))
    guest = field.enter("vda", ReplyMode.SIMPLE)
    with Witness(field, newcomers=False):
        crowd = [field.dial() for _ in range(1200)]
        assert guest.ask(Cmd.WRITE, 0, payload=b"x").error == 0
        field.server.freeze("vda", name="in-the-crowd")
        assert field.server.delete("vda@in-the-crowd")
        turned_away = field.dial()
        assert turned_away.recv(1) == b""
        for sock in [*crowd, turned_away]:
            sock.close()
    guest.sock.close()
    field.stop()


def test_a_crowd_that_shares_memory_leaves_the_operator_descriptors(tmp_path: Path) -> None:
    """Each memory takes a descriptor of the server's: so there are so many and no more, and the rest do without."""
    field = Field(tmp_path, SIZE, wrapper=("prlimit", "--nofile=1024:1024"))
    with Witness(field, newcomers=False):
        crowd = [field.enter("vda", ReplyMode.EXTENDED, [SHARED_MEMORY]) for _ in range(600)]
        answers = []
        for wire in crowd:
            memory = os.memfd_create("crowd", os.MFD_ALLOW_SEALING)
            os.posix_fallocate(memory, 0, MiB)
            fcntl.fcntl(memory, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
            socket.send_fds(wire.sock, [wire.shared_read(0, 0, 0)], [memory])
            os.close(memory)
            answers.append(wire.reply().error)
        assert answers == [0] * MEMORIES + [NbdError.EINVAL] * (600 - MEMORIES)
        field.server.freeze("vda", name="in-the-crowd")
        assert field.server.delete("vda@in-the-crowd")
        for wire in crowd:
            wire.sock.close()
    field.stop()
