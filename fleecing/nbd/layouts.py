"""Every message of the protocol as a `construct` layout: the readable truth, byte by byte.

The code cuts and makes messages with `struct` (options.py, transmission.py), because much of it runs once per request
and because strangers' input must cost little. These layouts say the same in the words of the document; the tests build
and parse with both and compare, so neither can drift. Lengths that the document calls a MUST are checked by the parse.
"""

from __future__ import annotations

from typing import Final

from construct import (
    Bytes,
    Check,
    Const,
    GreedyBytes,
    GreedyRange,
    If,
    Int16ub,
    Int32ub,
    Int64ub,
    Prefixed,
    PrefixedArray,
    Rebuild,
    Struct,
    Switch,
    Terminated,
    len_,
    this,
)

from fleecing.nbd import constants as c

# "Newstyle negotiation"

GREETING: Final = Struct(
    "magic" / Const(c.NBDMAGIC, Int64ub),
    "option_magic" / Const(c.IHAVEOPT, Int64ub),
    "handshake_flags" / Int16ub,
)
CLIENT_FLAGS: Final = Struct("client_flags" / Int32ub)
OPTION: Final = Struct(
    "magic" / Const(c.IHAVEOPT, Int64ub),
    "option" / Int32ub,
    "data" / Prefixed(Int32ub, GreedyBytes),
)
EXPORT_NAME_ANSWER: Final = Struct(
    "size" / Int64ub,
    "transmission_flags" / Int16ub,
)
EXPORT_NAME_ANSWER_WITH_ZEROES: Final = Struct(
    "size" / Int64ub,
    "transmission_flags" / Int16ub,
    Const(bytes(c.ZERO_PADDING)),
)

# "Fixed newstyle negotiation"

OPTION_REPLY: Final = Struct(
    "magic" / Const(c.OPTION_REPLY_MAGIC, Int64ub),
    "option" / Int32ub,
    "reply" / Int32ub,
    "data" / Prefixed(Int32ub, GreedyBytes),
)

# "Option types": the data of options

STRING: Final = Prefixed(Int32ub, GreedyBytes)
"""A string with its length in front; UTF-8, no NUL, at most 4096 bytes."""

INFO_REQUEST: Final = Struct(
    "name" / STRING,
    "items" / PrefixedArray(Int16ub, Int16ub),
    Terminated,
)
META_QUERY: Final = Struct(
    "name" / STRING,
    "queries" / PrefixedArray(Int32ub, STRING),
    Terminated,
)

# "Option reply types": the data of replies

SERVER_ITEM: Final = Struct(
    "name" / STRING,
    "description" / GreedyBytes,
)
META_CONTEXT_ITEM: Final = Struct(
    "id" / Int32ub,
    "name" / GreedyBytes,
)
INFO_ITEM: Final = Struct(
    "type" / Int16ub,
    "item"
    / Switch(
        this.type,
        {
            int(c.Info.EXPORT): Struct("size" / Int64ub, "transmission_flags" / Int16ub, Terminated),
            int(c.Info.BLOCK_SIZE): Struct(
                "minimum" / Int32ub, "preferred" / Int32ub, "maximum_payload" / Int32ub, Terminated
            ),
        },
        default=GreedyBytes,
    ),
)

# "Request message"; the extended one is [X]

REQUEST: Final = Struct(
    "magic" / Const(c.REQUEST_MAGIC, Int32ub),
    "flags" / Int16ub,
    "type" / Int16ub,
    "cookie" / Int64ub,
    "offset" / Int64ub,
    "length" / Int32ub,
    "payload" / If(this.type == int(c.Cmd.WRITE), Bytes(this.length)),
)
EXTENDED_REQUEST: Final = Struct(
    "magic" / Const(c.EXTENDED_REQUEST_MAGIC, Int32ub),
    "flags" / Int16ub,
    "type" / Int16ub,
    "cookie" / Int64ub,
    "offset" / Int64ub,
    "length" / Int64ub,
    "payload" / If(this.flags & int(c.CmdFlag.PAYLOAD_LEN), Bytes(this.length)),
)
STATUS_PAYLOAD: Final = Struct(
    "effect_length" / Int64ub,
    "ids" / GreedyRange(Int32ub),
    Terminated,
)
SHARED_READ: Final = Struct(
    "effect_length" / Int64ub,
    "position" / Int64ub,
    Terminated,
)
"""[F] docs/shared-memory.md"""

# "Simple reply message"

SIMPLE_REPLY: Final = Struct(
    "magic" / Const(c.SIMPLE_REPLY_MAGIC, Int32ub),
    "error" / Int32ub,
    "cookie" / Int64ub,
)
"""The data of a READ follows, as long as the request said."""

# "Structured reply types": the payloads of chunks

ERROR: Final = Struct(
    "error" / Int32ub,
    Check(this.error != 0),
    "text" / Prefixed(Int16ub, GreedyBytes),
    Terminated,
)
ERROR_OFFSET: Final = Struct(
    "error" / Int32ub,
    Check(this.error != 0),
    "text" / Prefixed(Int16ub, GreedyBytes),
    "offset" / Int64ub,
    Terminated,
)
OFFSET_DATA: Final = Struct(
    "offset" / Int64ub,
    "data" / GreedyBytes,
    Check(len_(this.data) > 0),
)
OFFSET_HOLE: Final = Struct(
    "offset" / Int64ub,
    "size" / Int32ub,
    Check(this.size != 0),
    Terminated,
)
BLOCK_STATUS: Final = Struct(
    "id" / Int32ub,
    "extents" / GreedyRange(Struct("length" / Int32ub, "status" / Int32ub)),
    Check(len_(this.extents) > 0),
    Terminated,
)
BLOCK_STATUS_EXT: Final = Struct(
    "id" / Int32ub,
    "count" / Rebuild(Int32ub, len_(this.extents)),
    "extents" / GreedyRange(Struct("length" / Int64ub, "status" / Int64ub)),
    Check(len_(this.extents) > 0),
    Check(this.count == len_(this.extents)),
    Terminated,
)
NONE: Final = Struct(Terminated)

_PAYLOADS: Final = {
    int(c.ReplyType.NONE): NONE,
    int(c.ReplyType.OFFSET_DATA): OFFSET_DATA,
    int(c.ReplyType.OFFSET_HOLE): OFFSET_HOLE,
    int(c.ReplyType.BLOCK_STATUS): BLOCK_STATUS,
    int(c.ReplyType.BLOCK_STATUS_EXT): BLOCK_STATUS_EXT,
    int(c.ReplyType.ERROR): ERROR,
    int(c.ReplyType.ERROR_OFFSET): ERROR_OFFSET,
}

# "Structured reply chunk message"; the extended one is [X]

CHUNK: Final = Struct(
    "magic" / Const(c.STRUCTURED_REPLY_MAGIC, Int32ub),
    "flags" / Int16ub,
    "type" / Int16ub,
    "cookie" / Int64ub,
    "payload" / Prefixed(Int32ub, Switch(this.type, _PAYLOADS)),
)
EXTENDED_CHUNK: Final = Struct(
    "magic" / Const(c.EXTENDED_REPLY_MAGIC, Int32ub),
    "flags" / Int16ub,
    "type" / Int16ub,
    "cookie" / Int64ub,
    "offset" / Int64ub,
    "payload" / Prefixed(Int64ub, Switch(this.type, _PAYLOADS)),
)
