"""What a client may have of the server, and all of them together."""

from __future__ import annotations

from dataclasses import dataclass

from fleecing.server.export import MAXIMUM_PAYLOAD
from fleecing.units import KiB, MiB

LEAST_IN_FLIGHT = MiB
"""Bytes: a request's payload that may be under way in other threads, or it would wait for ever."""

LEAST_READ_MEMORY = MAXIMUM_PAYLOAD
"""Bytes: the largest READ, for the same reason."""

LEAST_OPTION = 8 * KiB
"""Bytes: the longest name with whatever a client of today asks about it."""

LEAST_NAME = 257
"""Bytes: the longest name that an export of ours may have."""


@dataclass(frozen=True)
class Limits:
    """Times in seconds, memory in bytes."""

    handshake_seconds: float = 10.0
    """For the whole handshake."""
    clients: int = 1024
    """At a time, in the handshake and after it; the next is turned away."""
    clients_per_address: int = 0
    """The same of those that come from one IP address, 0 = no limit. Unix sockets have no address."""
    requests_in_flight: int = 64
    """Of a client, that may be under way in other threads; then its connection waits."""
    bytes_in_flight: int = 16 * MiB
    """Payload of these; at least LEAST_IN_FLIGHT."""
    all_requests_in_flight: int = 4096
    """The same of all clients together; a client alone gets half of it (`shares`)."""
    all_bytes_in_flight: int = 256 * MiB
    """Payload of these; at least LEAST_IN_FLIGHT."""
    option_bytes: int = 256 * KiB
    """Data of an option in the handshake; at least LEAST_OPTION. A longer one is refused."""
    name_bytes: int = 4096
    """The name of an export that is asked for; LEAST_NAME to MAX_STRING."""
    read_memory: int = 4 * MAXIMUM_PAYLOAD
    """For long READs with simple replies, of all clients together; at least LEAST_READ_MEMORY."""
    send_seconds: float = 60.0
    """A client that takes nothing of what is sent to it for so long is dropped, 0 = never."""
    keepalive_seconds: float = 120.0
    """A TCP client whose host does not answer for so long is dropped, 0 = when the system thinks so."""
