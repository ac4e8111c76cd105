"""The numbers of the NBD protocol, under the headings and by the names of its document (doc/proto.md).

[X] marks what the branch extension-ext-header adds, [R] what extension-resize adds, [F] what Fleecing adds
(docs/read-once.md). Enumerations are what logs and errors print; on the hot path take their plain integers once
(`int(...)`), since operations on IntFlag are slow.
"""

from __future__ import annotations

from enum import Enum, IntEnum, IntFlag
from typing import Final

# "Newstyle negotiation", "Fixed newstyle negotiation": 64 bits each
NBDMAGIC: Final = 0x4E42444D41474943
IHAVEOPT: Final = 0x49484156454F5054
OPTION_REPLY_MAGIC: Final = 0x0003E889045565A9

# "Oldstyle negotiation": obsolete; known only to tell its servers apart
OLDSTYLE_MAGIC: Final = 0x00420281861253

# "Transmission": 32 bits each
REQUEST_MAGIC: Final = 0x25609513
SIMPLE_REPLY_MAGIC: Final = 0x67446698
STRUCTURED_REPLY_MAGIC: Final = 0x668E33EF
EXTENDED_REQUEST_MAGIC: Final = 0x21E41C71  # [X]
EXTENDED_REPLY_MAGIC: Final = 0x6E8A278C  # [X]

# "Conventions", "Size constraints"; all in bytes
DEFAULT_PORT: Final = 10809
MAX_STRING: Final = 4096
"""The longest name, description, query or error text, in bytes: "MUST be no longer than 4096 bytes"."""
DEFAULT_MINIMUM_BLOCK: Final = 1
DEFAULT_PREFERRED_BLOCK: Final = 4096
DEFAULT_MAXIMUM_PAYLOAD: Final = 1 << 25
"""What both sides may rely on when no block sizes were told (32 MiB)."""
MAX_MINIMUM_BLOCK: Final = 1 << 16
UNLIMITED_PAYLOAD: Final = 0xFFFFFFFF
MAX_EXPORT_SIZE: Final = (1 << 63) - 1
"""Sizes travel as u64; no file is longer than this."""
MAX_STATUS_EXTENTS: Final = 1 << 20
"""The longest answer: "a server SHOULD NOT send more than 2^20 status descriptors in a single chunk"."""

# "Option reply types", "Structured reply types": the bits that set errors apart
REP_FLAG_ERROR: Final = 1 << 31
REPLY_TYPE_ERROR_BIT: Final = 1 << 15
ZERO_PADDING: Final = 124
"""Zero bytes behind the answer to NBD_OPT_EXPORT_NAME unless NO_ZEROES was agreed."""


class HandshakeFlag(IntFlag):
    """Section "Handshake flags": the server's, 16 bits."""

    FIXED_NEWSTYLE = 1 << 0
    NO_ZEROES = 1 << 1


class ClientFlag(IntFlag):
    """Section "Client flags": the answer to the handshake flags, 32 bits."""

    C_FIXED_NEWSTYLE = 1 << 0
    C_NO_ZEROES = 1 << 1


class Opt(IntEnum):
    """Section "Option types"."""

    EXPORT_NAME = 1
    ABORT = 2
    LIST = 3
    PEEK_EXPORT = 4
    STARTTLS = 5
    INFO = 6
    GO = 7
    STRUCTURED_REPLY = 8
    LIST_META_CONTEXT = 9
    SET_META_CONTEXT = 10
    EXTENDED_HEADERS = 11  # [X]


class Rep(IntEnum):
    """Section "Option reply types"."""

    ACK = 1
    SERVER = 2
    INFO = 3
    META_CONTEXT = 4
    ERR_UNSUP = REP_FLAG_ERROR + 1
    ERR_POLICY = REP_FLAG_ERROR + 2
    ERR_INVALID = REP_FLAG_ERROR + 3
    ERR_PLATFORM = REP_FLAG_ERROR + 4
    ERR_TLS_REQD = REP_FLAG_ERROR + 5
    ERR_UNKNOWN = REP_FLAG_ERROR + 6
    ERR_SHUTDOWN = REP_FLAG_ERROR + 7
    ERR_BLOCK_SIZE_REQD = REP_FLAG_ERROR + 8
    ERR_TOO_BIG = REP_FLAG_ERROR + 9
    ERR_EXT_HEADER_REQD = REP_FLAG_ERROR + 10  # [X]


class Info(IntEnum):
    """Section "Option reply types", NBD_REP_INFO: what an information item tells."""

    EXPORT = 0
    NAME = 1
    DESCRIPTION = 2
    BLOCK_SIZE = 3


class TransmissionFlag(IntFlag):
    """Section "Transmission flags": what an export can do, 16 bits."""

    HAS_FLAGS = 1 << 0
    READ_ONLY = 1 << 1
    SEND_FLUSH = 1 << 2
    SEND_FUA = 1 << 3
    ROTATIONAL = 1 << 4
    SEND_TRIM = 1 << 5
    SEND_WRITE_ZEROES = 1 << 6
    SEND_DF = 1 << 7
    CAN_MULTI_CONN = 1 << 8
    SEND_RESIZE = 1 << 9  # [R]
    SEND_CACHE = 1 << 10
    SEND_FAST_ZERO = 1 << 11
    BLOCK_STATUS_PAYLOAD = 1 << 12  # [X]


class Cmd(IntEnum):
    """Section "Request types"."""

    READ = 0
    WRITE = 1
    DISC = 2
    FLUSH = 3
    TRIM = 4
    CACHE = 5
    WRITE_ZEROES = 6
    BLOCK_STATUS = 7


def command_name(number: int) -> str:
    """The command's name; of one that nobody knows, its number."""
    return Cmd(number).name if number <= max(Cmd) else f"command {number}"


class CmdFlag(IntFlag):
    """Section "Command flags", 16 bits."""

    FUA = 1 << 0
    NO_HOLE = 1 << 1
    DF = 1 << 2
    REQ_ONE = 1 << 3
    FAST_ZERO = 1 << 4
    PAYLOAD_LEN = 1 << 5  # [X]
    READ_ONCE = 1 << 15  # [F]


class ReplyFlag(IntFlag):
    """Section "Structured reply flags", 16 bits."""

    DONE = 1 << 0


class ReplyType(IntEnum):
    """Section "Structured reply types"."""

    NONE = 0
    OFFSET_DATA = 1
    OFFSET_HOLE = 2
    BLOCK_STATUS = 5
    BLOCK_STATUS_EXT = 6  # [X]
    ERROR = REPLY_TYPE_ERROR_BIT + 1
    ERROR_OFFSET = REPLY_TYPE_ERROR_BIT + 2


class NbdError(IntEnum):
    """Section "Error values": the only ones that may be on the wire, whatever the host's errno is."""

    EPERM = 1
    EIO = 5
    ENOMEM = 12
    EINVAL = 22
    ENOSPC = 28
    EOVERFLOW = 75
    ENOTSUP = 95
    ESHUTDOWN = 108


class ReplyMode(Enum):
    """Which replies (and, when EXTENDED, which requests) the two sides agreed on."""

    SIMPLE = "simple"
    STRUCTURED = "structured"
    EXTENDED = "extended"


class AllocationStatus(IntFlag):
    """Section "Metadata querying", base:allocation: what a block status extent of that context says."""

    HOLE = 1 << 0
    ZERO = 1 << 1


BASE_ALLOCATION: Final = "base:allocation"
READ_ONCE: Final = "fleecing:read-once"  # [F]
"""Who selects this context may set CmdFlag.READ_ONCE: the bytes are given up when the reply has left."""
SHARED_MEMORY: Final = "fleecing:shared-memory"  # [F]
"""Who selects this context may have READs answered in memory of its own, that it has shared with the server."""
