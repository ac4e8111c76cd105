"""Options and requests at random, sent to a real server, and what their answers must be like."""

from __future__ import annotations

import socket
from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st

from fleecing.nbd import options
from fleecing.nbd.constants import (
    BASE_ALLOCATION,
    OPTION_REPLY_MAGIC,
    REP_FLAG_ERROR,
    Cmd,
    CmdFlag,
    Info,
    NbdError,
    Opt,
    Rep,
    ReplyMode,
)
from fleecing.nbd.transmission import STATUS_PAYLOAD
from fleecing.server.meta_context import ALLOCATION_DEPTH, CLUSTER_STATE
from fleecing.units import KiB, MiB
from tests.block.rig import in_thread
from tests.fuzz.field import Field

SIZE = 3 * MiB + 5
CONTEXTS = [BASE_ALLOCATION, ALLOCATION_DEPTH, CLUSTER_STATE]


def send_cut(sock: socket.socket, stream: bytes, sizes: list[int]) -> None:
    """The stream in pieces of these sizes, and the rest."""
    at = 0
    for size in sizes:
        sock.sendall(stream[at : at + size])
        at += size
    sock.sendall(stream[at:])


cuts = st.lists(st.integers(1, 3000), max_size=6)

# The handshake

names = st.sampled_from(["vda", "vda@s", "", "nosuch", "vda@", "@", "v" * 5000, "\0", "other@w"])
contexts = st.lists(st.sampled_from([*CONTEXTS, "base:", "qemu:", "x-a:b", "", ":", "q" * 5000]), max_size=5)
flags = st.sampled_from([0, 1, 2, 3, 3, 3, 4, 0xFFFFFFFF]).map(options.CLIENT_FLAGS.pack)
known = st.one_of(
    st.builds(
        lambda number, name, items: options.option(number, options.info_request(name, items)),
        st.sampled_from([Opt.INFO, Opt.GO]),
        names,
        st.lists(st.sampled_from([*Info, 99]), max_size=6),
    ),
    st.builds(
        lambda number, name, queries: options.option(number, options.meta_query(name, queries)),
        st.sampled_from([Opt.LIST_META_CONTEXT, Opt.SET_META_CONTEXT]),
        names,
        contexts,
    ),
    st.builds(options.option, st.sampled_from([Opt.LIST, Opt.STRUCTURED_REPLY, Opt.EXTENDED_HEADERS, Opt.STARTTLS])),
    st.builds(lambda name: options.option(Opt.EXPORT_NAME, name.encode()), names),
    st.builds(options.option, st.integers(0, 2**32 - 1) | st.sampled_from(Opt), st.binary(max_size=200)),
    st.binary(max_size=100),
)


def shake_hands(field: Field, flags: bytes, said: list[bytes], sizes: list[int]) -> None:
    """Say it all; what the server answers must be a handshake as far as it goes."""
    with field.dial() as sock:
        sender = in_thread(lambda: send_cut(sock, flags + b"".join(said), sizes))
        sender.over.wait()
        answer = bytearray()
        try:
            sock.shutdown(socket.SHUT_WR)
            while data := sock.recv(1 << 16):
                answer += data
        except OSError:
            pass  # dropped while it was still speaking
    greeting = options.GREETING.size
    assert not answer or answer.startswith(b"NBDMAGICIHAVEOPT")
    check_option_replies(bytes(answer[greeting:]))


def check_option_replies(answer: bytes) -> None:
    """Whole messages with the right magic, up to where the transmission phase begins."""
    while len(answer) >= options.OPTION_REPLY.size:
        magic, number, reply, length = options.OPTION_REPLY.unpack_from(answer)
        if magic != OPTION_REPLY_MAGIC:  # the bare answer to EXPORT_NAME, or what follows the handshake
            return
        assert reply in set(Rep)
        data, answer = answer[20 : 20 + length], answer[20 + length :]
        if reply & REP_FLAG_ERROR:
            data.decode()
        if (number, reply) == (Opt.GO, Rep.ACK):
            return


# The transmission phase


@dataclass(frozen=True)
class Asked:
    """A request of any kind; `payload` is sent where the mode has one for it."""

    command: int
    flags: int
    offset: int
    length: int
    payload: bytes


u64 = st.integers(0, 2**64 - 1)
offsets = st.integers(0, SIZE) | st.sampled_from([0, SIZE - 1, SIZE, SIZE + 1, 2**63, 2**64 - 1]) | u64
lengths = st.integers(0, 300 * KiB) | st.sampled_from([0, 1, SIZE, SIZE + 1, MiB, 1 << 26, 2**32 - 1])
payloads = st.one_of(
    st.builds(lambda byte, count: bytes([byte]) * count, st.integers(0, 255), st.integers(0, 5000)),
    st.sampled_from([MiB - 32, MiB - 28, MiB, MiB + 1, 2 * MiB]).map(bytes),
    st.builds(
        lambda length, ids: STATUS_PAYLOAD.pack(length) + b"".join(number.to_bytes(4, "big") for number in ids),
        lengths,
        st.lists(st.integers(0, 4), max_size=4),
    ),
)
asked = st.builds(
    Asked,
    st.sampled_from([command for command in Cmd if command is not Cmd.DISC]) | st.integers(8, 2**16 - 1),
    st.sampled_from([0, 0, 0, *[1 << bit for bit in range(16)]]) | st.integers(0, 2**16 - 1),
    offsets,
    lengths,
    payloads,
)


def as_list(one: Asked) -> list[Any]:
    """For a file."""
    return [one.command, one.flags, one.offset, one.length, one.payload]


def ask(field: Field, mode: ReplyMode, export: str, wanted: list[Asked], sizes: list[int]) -> None:
    """Send the requests; each must be answered, once, and the connection end when it is told to."""
    wire = field.enter(export, mode, [] if mode is ReplyMode.SIMPLE else CONTEXTS[: 2 if export == "vda" else 3])
    requests = []
    for cookie, one in enumerate(wanted):
        extended = mode is ReplyMode.EXTENDED
        flags = one.flags & ~CmdFlag.PAYLOAD_LEN if extended else one.flags
        has_payload = one.payload and (extended or one.command == Cmd.WRITE)
        length = 0 if not extended and one.command == Cmd.WRITE else one.length
        payload = one.payload if has_payload else b""
        requests.append(wire.request(one.command, one.offset, length, payload=payload, flags=flags, cookie=cookie))
    sender = in_thread(lambda: send_cut(wire.sock, b"".join(requests), sizes))
    replies = wire.replies(len(wanted))
    sender.wait()
    for cookie, reply in replies.items():
        check_reply(export, wanted[cookie], reply.command, reply.error, reply.data)
    wire.send(wire.request(Cmd.DISC))
    assert wire.ended()
    wire.sock.close()


def check_reply(export: str, one: Asked, command: int, error: int, data: bytearray) -> None:
    """A snapshot stays what it was, a hole; what is refused is refused for a reason of the document."""
    if command == Cmd.READ and export == "vda@s":
        assert not any(data)
    if error:
        assert error in (NbdError.EINVAL, NbdError.EPERM, NbdError.ENOSPC, NbdError.EOVERFLOW)
    else:
        assert command <= Cmd.BLOCK_STATUS
        assert export == "vda" or command not in (Cmd.WRITE, Cmd.WRITE_ZEROES)
        if command != Cmd.FLUSH and one.length and not one.payload:
            assert one.offset + one.length <= SIZE
