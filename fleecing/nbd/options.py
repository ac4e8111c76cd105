"""Option haggling: its messages, cut and made for both sides (NBD document, "Option types", "Option reply types").

`parse_*` take a whole payload and raise OptionError(ERR_INVALID) where lengths do not add up or a string is none.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from struct import Struct
from typing import Final

from fleecing.errors import FleecingError
from fleecing.nbd.constants import IHAVEOPT, MAX_STRING, OPTION_REPLY_MAGIC, Info, Opt, Rep, TransmissionFlag
from fleecing.nbd.transmission import wire_text

GREETING: Final = Struct(">QQH")
"""NBDMAGIC, IHAVEOPT, handshake flags."""
CLIENT_FLAGS: Final = Struct(">I")
OPTION: Final = Struct(">QII")
"""IHAVEOPT, option, length of the data."""
OPTION_REPLY: Final = Struct(">QIII")
"""magic, option, reply type, length of the data."""
EXPORT_NAME_ANSWER: Final = Struct(">QH")
"""size in bytes, transmission flags; zero padding may follow."""
INFO_EXPORT: Final = Struct(">HQH")
"""info type, size in bytes, transmission flags."""
INFO_BLOCK_SIZE: Final = Struct(">HIII")
"""info type, minimum block, preferred block, maximum payload: bytes."""
_U32: Final = Struct(">I")
_U16: Final = Struct(">H")


class OptionError(FleecingError):
    """An option is refused with this reply and sentence; the haggling goes on."""

    def __init__(self, reply: Rep, text: str) -> None:
        super().__init__(f"{reply.name}: {text}")
        self.reply = reply
        self.text = text


@dataclass(frozen=True)
class BlockSizes:
    """Section "Size constraints", in bytes."""

    minimum: int
    preferred: int
    maximum_payload: int


# What a client sends


def option(number: int, data: bytes = b"") -> bytes:
    """An option with its data."""
    return OPTION.pack(IHAVEOPT, number, len(data)) + data


def info_request(name: str, items: Sequence[int]) -> bytes:
    """The data of INFO and GO."""
    return b"".join((_prefixed(name), _U16.pack(len(items)), *map(_U16.pack, items)))


def parse_info_request(data: bytes) -> tuple[str, tuple[int, ...]]:
    """The (export name, information items wanted) of INFO and GO. Items may be unknown."""
    name, at = _cut_string(data, 0, "export name")
    if len(data) - at < _U16.size:
        raise OptionError(Rep.ERR_INVALID, "the data ends before the number of information items")
    (count,) = _U16.unpack_from(data, at)
    at += _U16.size
    if len(data) - at != count * _U16.size:
        raise OptionError(Rep.ERR_INVALID, f"{len(data) - at} bytes follow where {count} information items are 2 each")
    return name, tuple(item for (item,) in _U16.iter_unpack(data[at:]))


def meta_query(name: str, queries: Sequence[str]) -> bytes:
    """The data of LIST_META_CONTEXT and SET_META_CONTEXT."""
    return b"".join((_prefixed(name), _U32.pack(len(queries)), *map(_prefixed, queries)))


def parse_meta_query(data: bytes) -> tuple[str, tuple[str, ...]]:
    """The (export name, queries) of LIST_META_CONTEXT and SET_META_CONTEXT."""
    name, at = _cut_string(data, 0, "export name")
    if len(data) - at < _U32.size:
        raise OptionError(Rep.ERR_INVALID, "the data ends before the number of queries")
    (count,) = _U32.unpack_from(data, at)
    at += _U32.size
    if count > (len(data) - at) // _U32.size:
        raise OptionError(Rep.ERR_INVALID, f"{count} queries do not fit into the {len(data) - at} bytes that follow")
    queries = []
    for _ in range(count):
        query, at = _cut_string(data, at, "query")
        queries.append(query)
    if at != len(data):
        raise OptionError(Rep.ERR_INVALID, f"{len(data) - at} bytes follow the last query")
    return name, tuple(queries)


def matching_contexts(available: Iterable[str], queries: Collection[str]) -> tuple[str, ...]:
    """What LIST_META_CONTEXT answers: "If zero queries are sent, then the server MUST return all".

    A query that ends in a colon stands for all that begins with it: "base:" MUST, "qemu:" and "qemu:dirty-bitmap:"
    as QEMU documents them.
    """
    wildcards = tuple(query for query in queries if query.endswith(":"))
    exact = frozenset(queries)
    return tuple(name for name in available if not queries or name in exact or name.startswith(wildcards))


def selected_contexts(available: Iterable[str], queries: Collection[str]) -> tuple[str, ...]:
    """What SET_META_CONTEXT selects, in the order of the queries; whatever matches nothing is ignored."""
    known = frozenset(available)
    return tuple(query for query in dict.fromkeys(queries) if query in known)


# What a server sends


def option_reply(number: int, reply: Rep, data: bytes = b"") -> bytes:
    """A reply to the option `number`, which is echoed whether it is known or not."""
    return OPTION_REPLY.pack(OPTION_REPLY_MAGIC, number, reply, len(data)) + data


def error_option_reply(number: int, error: OptionError) -> bytes:
    """The refusal with its sentence: "All error replies MAY have some data set"."""
    return option_reply(number, error.reply, wire_text(error.text))


def server_item(name: str, description: str) -> bytes:
    """The data of REP_SERVER."""
    return _prefixed(name) + wire_text(description)


def parse_server_item(data: bytes) -> tuple[str, str]:
    """The (name, description) of REP_SERVER."""
    name, at = _cut_string(data, 0, "export name")
    return name, string(data[at:], "description")


def meta_context_item(number: int, name: str) -> bytes:
    """The data of REP_META_CONTEXT."""
    return _U32.pack(number) + name.encode()


def parse_meta_context_item(data: bytes) -> tuple[int, str]:
    """The (id, name) of REP_META_CONTEXT."""
    if len(data) < _U32.size:
        raise OptionError(Rep.ERR_INVALID, "the data ends before the context id")
    (number,) = _U32.unpack_from(data)
    return number, string(data[_U32.size :], "context name")


def info_export(size: int, flags: int) -> bytes:
    """The data of REP_INFO for Info.EXPORT."""
    return INFO_EXPORT.pack(Info.EXPORT, size, flags)


def info_block_size(sizes: BlockSizes) -> bytes:
    """The data of REP_INFO for Info.BLOCK_SIZE."""
    return INFO_BLOCK_SIZE.pack(Info.BLOCK_SIZE, sizes.minimum, sizes.preferred, sizes.maximum_payload)


def info_string(item: Info, text: str) -> bytes:
    """The data of REP_INFO for Info.NAME and Info.DESCRIPTION."""
    return _U16.pack(item) + wire_text(text)


def info_type(data: bytes) -> int:
    """Which item a REP_INFO carries."""
    if len(data) < _U16.size:
        raise OptionError(Rep.ERR_INVALID, "the data ends before the type of the information item")
    (item,) = _U16.unpack_from(data)
    return int(item)


def parse_info_export(data: bytes) -> tuple[int, TransmissionFlag]:
    """The (size in bytes, transmission flags)."""
    _expect_length(data, INFO_EXPORT.size, "INFO_EXPORT")
    _, size, flags = INFO_EXPORT.unpack(data)
    return size, TransmissionFlag(flags)


def parse_info_block_size(data: bytes) -> BlockSizes:
    """The sizes as told, not yet judged."""
    _expect_length(data, INFO_BLOCK_SIZE.size, "INFO_BLOCK_SIZE")
    return BlockSizes(*INFO_BLOCK_SIZE.unpack(data)[1:])


def parse_info_string(data: bytes) -> str:
    """The text of Info.NAME and Info.DESCRIPTION."""
    return string(data[_U16.size :], "information item")


# Strings


def string(raw: bytes, what: str) -> str:
    """Section "Conventions": UTF-8, "MUST NOT contain NUL characters", "MUST be no longer than 4096 bytes"."""
    if len(raw) > MAX_STRING:
        raise OptionError(Rep.ERR_INVALID, f"the {what} of {len(raw)} bytes is above the limit of {MAX_STRING}")
    if b"\0" in raw:
        raise OptionError(Rep.ERR_INVALID, f"the {what} contains a NUL character")
    try:
        return raw.decode()
    except UnicodeDecodeError:
        raise OptionError(Rep.ERR_INVALID, f"the {what} is not UTF-8") from None


def option_name(number: int) -> str:
    """The option for logs and errors."""
    return Opt(number).name if number in _KNOWN_OPTIONS else f"option {number}"


_KNOWN_OPTIONS: Final = frozenset(int(number) for number in Opt)


def _prefixed(text: str) -> bytes:
    raw = text.encode()
    return _U32.pack(len(raw)) + raw


def _cut_string(data: bytes, at: int, what: str) -> tuple[str, int]:
    """The string whose u32 length is at `at`, and where it ends."""
    start = at + _U32.size
    if start > len(data):
        raise OptionError(Rep.ERR_INVALID, f"the data ends before the length of the {what}")
    (length,) = _U32.unpack_from(data, at)
    if length > len(data) - start:
        raise OptionError(Rep.ERR_INVALID, f"the {what} of {length} bytes is longer than the {len(data) - start} left")
    return string(data[start : start + length], what), start + length


def _expect_length(data: bytes, length: int, what: str) -> None:
    if len(data) != length:
        raise OptionError(Rep.ERR_INVALID, f"{what} of {len(data)} bytes instead of {length}")
