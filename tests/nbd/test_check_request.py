"""Which requests are served, and what the others are told."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleecing.errors import RequestError
from fleecing.nbd.constants import Cmd, CmdFlag, NbdError, ReplyMode, TransmissionFlag
from fleecing.nbd.transmission import RequestLimits, _check_one_by_one, check_request

SIZE = (1 << 30) + 77
MAXIMUM = 1 << 26
T = TransmissionFlag
ALL = (
    T.HAS_FLAGS | T.SEND_FLUSH | T.SEND_FUA | T.SEND_TRIM | T.SEND_WRITE_ZEROES | T.SEND_DF | T.SEND_CACHE
    | T.SEND_FAST_ZERO | T.CAN_MULTI_CONN
)  # fmt: skip
DISK = RequestLimits(size=SIZE, flags=ALL, mode=ReplyMode.STRUCTURED, maximum_payload=MAXIMUM, contexts=True)
EXTENDED = replace(DISK, mode=ReplyMode.EXTENDED, flags=ALL | T.BLOCK_STATUS_PAYLOAD)
SIMPLE = replace(DISK, mode=ReplyMode.SIMPLE, flags=ALL & ~T.SEND_DF, contexts=False)
SNAPSHOT = replace(DISK, flags=T.HAS_FLAGS | T.READ_ONLY | T.SEND_TRIM | T.SEND_FLUSH | T.SEND_DF)
READ_ONLY = replace(SNAPSHOT, flags=T.HAS_FLAGS | T.READ_ONLY)
SILENT = replace(DISK, flags=T.HAS_FLAGS | T.SEND_TRIM, writable=False)
"""Read-only without telling the client."""

FUA, NO_HOLE, DF = CmdFlag.FUA, CmdFlag.NO_HOLE, CmdFlag.DF
REQ_ONE, FAST_ZERO, PAYLOAD_LEN = CmdFlag.REQ_ONE, CmdFlag.FAST_ZERO, CmdFlag.PAYLOAD_LEN
RANGED = [Cmd.READ, Cmd.WRITE, Cmd.TRIM, Cmd.CACHE, Cmd.WRITE_ZEROES, Cmd.BLOCK_STATUS]


Check = Callable[[RequestLimits, int, int, int, int], None]


def accepted(
    limits: RequestLimits,
    command: int,
    flags: int = 0,
    offset: int = 0,
    length: int = 4096,
    *,
    check: Check = check_request,
) -> bool:
    try:
        check(limits, command, flags, offset, length)
    except RequestError:
        return False
    return True


def refusal(
    limits: RequestLimits, command: int, flags: int = 0, offset: int = 0, length: int = 4096
) -> tuple[NbdError, str]:
    with pytest.raises(RequestError) as caught:
        check_request(limits, command, flags, offset, length)
    return NbdError(caught.value.error), caught.value.text


# Commands


@pytest.mark.parametrize("command", Cmd)
def test_every_command_is_served_where_it_is_advertised(command: Cmd) -> None:
    assert accepted(DISK, command)


@pytest.mark.parametrize("command", [8, 9, 0x7FFF, 0xFFFF])
def test_unknown_command_is_einval(command: int) -> None:
    assert refusal(DISK, command) == (NbdError.EINVAL, f"unknown command {command}")


@pytest.mark.parametrize(
    "command, flag",
    [
        (Cmd.FLUSH, T.SEND_FLUSH),
        (Cmd.TRIM, T.SEND_TRIM),
        (Cmd.WRITE_ZEROES, T.SEND_WRITE_ZEROES),
    ],
)
def test_command_that_is_not_advertised_is_einval(command: Cmd, flag: TransmissionFlag) -> None:
    error, text = refusal(replace(DISK, flags=ALL & ~flag), command)
    assert error is NbdError.EINVAL and str(flag.name) in text


def test_cache_is_served_even_where_it_is_not_advertised() -> None:
    assert accepted(replace(DISK, flags=ALL & ~T.SEND_CACHE), Cmd.CACHE)


def test_block_status_without_contexts_is_einval() -> None:
    assert refusal(SIMPLE, Cmd.BLOCK_STATUS)[0] is NbdError.EINVAL
    assert refusal(replace(DISK, contexts=False), Cmd.BLOCK_STATUS)[0] is NbdError.EINVAL


# Read-only


@pytest.mark.parametrize("limits", [SNAPSHOT, READ_ONLY, SILENT])
@pytest.mark.parametrize("command", [Cmd.WRITE, Cmd.WRITE_ZEROES])
@pytest.mark.parametrize("flags", [0, FUA, FAST_ZERO])
def test_writing_to_a_read_only_export_is_eperm(limits: RequestLimits, command: Cmd, flags: int) -> None:
    assert refusal(limits, command, flags)[0] is NbdError.EPERM


def test_a_snapshot_takes_trim_and_another_read_only_export_does_not() -> None:
    assert accepted(SNAPSHOT, Cmd.TRIM)
    assert accepted(SILENT, Cmd.TRIM)
    assert refusal(READ_ONLY, Cmd.TRIM)[0] is NbdError.EPERM


@pytest.mark.parametrize("command", [Cmd.READ, Cmd.FLUSH, Cmd.CACHE, Cmd.BLOCK_STATUS])
def test_a_snapshot_serves_what_changes_nothing(command: Cmd) -> None:
    assert accepted(SNAPSHOT, command)


# Flags


@pytest.mark.parametrize("limits", [DISK, SIMPLE])
def test_each_flag_goes_with_its_commands_alone(limits: RequestLimits) -> None:
    takers = {
        FUA: set(Cmd),
        NO_HOLE: {Cmd.WRITE_ZEROES},
        DF: {Cmd.READ} if limits is DISK else set(),
        REQ_ONE: {Cmd.BLOCK_STATUS},
        FAST_ZERO: {Cmd.WRITE_ZEROES},
        PAYLOAD_LEN: set(),
    }
    for flag, commands in takers.items():
        for command in set(Cmd) - {Cmd.DISC} - (set() if limits.contexts else {Cmd.BLOCK_STATUS}):
            assert accepted(limits, command, flag) == (command in commands), (flag, command)


@pytest.mark.parametrize("bit", range(6, 15))
def test_unknown_flag_is_einval_and_named(bit: int) -> None:
    for command in set(Cmd) - {Cmd.DISC}:
        error, text = refusal(DISK, command, 1 << bit)
        assert error is NbdError.EINVAL and hex(1 << bit) in text


def test_flags_may_be_combined() -> None:
    assert accepted(DISK, Cmd.WRITE_ZEROES, FUA | NO_HOLE | FAST_ZERO)
    assert accepted(DISK, Cmd.READ, FUA | DF)
    assert accepted(EXTENDED, Cmd.BLOCK_STATUS, FUA | REQ_ONE | PAYLOAD_LEN)


def test_fua_is_einval_where_it_is_not_advertised() -> None:
    assert refusal(SNAPSHOT, Cmd.READ, FUA)[0] is NbdError.EINVAL


def test_fast_zero_is_einval_where_it_is_not_advertised() -> None:
    limits = replace(DISK, flags=ALL & ~T.SEND_FAST_ZERO)
    assert refusal(limits, Cmd.WRITE_ZEROES, FAST_ZERO)[0] is NbdError.EINVAL
    assert accepted(limits, Cmd.WRITE_ZEROES, NO_HOLE)


def test_extended_write_must_say_that_it_has_a_payload() -> None:
    assert accepted(EXTENDED, Cmd.WRITE, PAYLOAD_LEN)
    error, text = refusal(EXTENDED, Cmd.WRITE)
    assert error is NbdError.EINVAL and "PAYLOAD_LEN" in text


@pytest.mark.parametrize("command", [Cmd.READ, Cmd.TRIM, Cmd.CACHE, Cmd.WRITE_ZEROES, Cmd.FLUSH])
def test_payload_on_a_command_that_takes_none_is_einval(command: Cmd) -> None:
    assert refusal(EXTENDED, command, PAYLOAD_LEN)[0] is NbdError.EINVAL


def test_block_status_takes_a_payload_where_that_is_advertised() -> None:
    assert accepted(EXTENDED, Cmd.BLOCK_STATUS, PAYLOAD_LEN)
    assert refusal(replace(EXTENDED, flags=ALL), Cmd.BLOCK_STATUS, PAYLOAD_LEN)[0] is NbdError.EINVAL


def test_read_takes_a_payload_where_memory_is_shared() -> None:
    shared = replace(EXTENDED, shared_memory=True)
    assert accepted(shared, Cmd.READ, PAYLOAD_LEN | DF)
    for command in (Cmd.TRIM, Cmd.CACHE, Cmd.WRITE_ZEROES, Cmd.FLUSH):
        assert refusal(shared, command, PAYLOAD_LEN)[0] is NbdError.EINVAL
    assert refusal(replace(DISK, shared_memory=True), Cmd.READ, PAYLOAD_LEN)[0] is NbdError.EINVAL


# Ranges


@pytest.mark.parametrize("command", RANGED)
def test_the_last_byte_is_inside_and_the_next_is_not(command: Cmd) -> None:
    assert accepted(DISK, command, 0, SIZE - 1, 1)
    beyond = NbdError.ENOSPC if command in (Cmd.WRITE, Cmd.WRITE_ZEROES) else NbdError.EINVAL
    for offset, length in ((SIZE, 1), (SIZE - 1, 2), (2**64 - 1, 1), (2**64 - 4096, 4096), (SIZE + 1, 0)):
        if length or command is not Cmd.BLOCK_STATUS:
            error, text = refusal(DISK, command, 0, offset, length)
            assert error is beyond and str(SIZE) in text


@pytest.mark.parametrize("command", [Cmd.READ, Cmd.WRITE])
def test_payload_above_the_maximum_is_einval(command: Cmd) -> None:
    assert accepted(DISK, command, 0, 0, MAXIMUM)
    error, text = refusal(DISK, command, 0, 0, MAXIMUM + 1)
    assert error is NbdError.EINVAL and str(MAXIMUM) in text


@pytest.mark.parametrize("command", [Cmd.TRIM, Cmd.CACHE, Cmd.WRITE_ZEROES, Cmd.BLOCK_STATUS])
def test_commands_without_payload_may_cover_the_whole_export(command: Cmd) -> None:
    assert accepted(DISK, command, 0, 0, SIZE)


@pytest.mark.parametrize("command", set(Cmd) - {Cmd.BLOCK_STATUS})
def test_length_0_is_served(command: Cmd) -> None:
    assert accepted(DISK, command, 0, 0, 0)
    assert accepted(DISK, command, 0, SIZE, 0)


def test_block_status_of_length_0_is_einval() -> None:
    assert refusal(DISK, Cmd.BLOCK_STATUS, 0, 0, 0)[0] is NbdError.EINVAL


@pytest.mark.parametrize("command", [Cmd.FLUSH, Cmd.DISC])
def test_reserved_offset_and_length_are_tolerated(command: Cmd) -> None:
    assert accepted(DISK, command, 0, 2**64 - 1, 2**32 - 1)


@pytest.mark.parametrize("flags", [0, 0xFFFF])
def test_disc_is_never_refused(flags: int) -> None:
    assert accepted(READ_ONLY, Cmd.DISC, flags)


@pytest.mark.parametrize("offset, length", [(1, 512), (512, 1), (513, 511)])
def test_misaligned_requests_are_einval_where_blocks_are_larger(offset: int, length: int) -> None:
    blocks = replace(DISK, minimum_block=512)
    assert accepted(blocks, Cmd.WRITE, 0, 1024, 512)
    error, text = refusal(blocks, Cmd.WRITE, 0, offset, length)
    assert error is NbdError.EINVAL and "512" in text
    assert accepted(DISK, Cmd.WRITE, 0, offset, length)


# The fast path


@given(
    limits=st.sampled_from([DISK, EXTENDED, SIMPLE, SNAPSHOT, READ_ONLY, SILENT, replace(DISK, minimum_block=4096)]),
    command=st.integers(0, 9),
    flags=st.sampled_from([0, 0, *CmdFlag, 0x40, FUA | NO_HOLE, PAYLOAD_LEN | FUA]),
    offset=st.sampled_from([0, 1, 4096, SIZE - 4096, SIZE - 1, SIZE, 2**64 - 1]) | st.integers(0, 2**64 - 1),
    length=st.sampled_from([0, 1, 4096, MAXIMUM, MAXIMUM + 1, SIZE, 2**64 - 1]) | st.integers(0, 2**64 - 1),
)
def test_the_fast_path_accepts_what_the_long_way_accepts(
    limits: RequestLimits, command: int, flags: int, offset: int, length: int
) -> None:
    by_the_long_way = accepted(limits, command, flags, offset, length, check=_check_one_by_one)
    assert accepted(limits, command, flags, offset, length) == by_the_long_way
