"""Names in certificates, as an operator writes them: subjects (RFC 4514) and subject alternative names."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable
from typing import Final

from fleecing.server.peer import Attribute, DistinguishedName

_SHORT: Final = {
    "CN": "commonName",
    "C": "countryName",
    "DC": "domainComponent",
    "GN": "givenName",
    "L": "localityName",
    "O": "organizationName",
    "OU": "organizationalUnitName",
    "SN": "surname",
    "ST": "stateOrProvinceName",
    "STREET": "streetAddress",
    "T": "title",
    "UID": "userId",
}
"""RFC 4514, section 3, and what OpenSSL writes besides; the right side is what the certificate is told by."""

_LONG: Final = frozenset(_SHORT.values()) | {"emailAddress", "serialNumber", "dnQualifier", "pseudonym", "initials"}
_OID = re.compile(r"\d+(\.\d+)+")
_HEX = re.compile("[0-9A-Fa-f]{2}")

_KINDS: Final = {"DNS": "DNS", "email": "email", "URI": "URI", "IP": "IP Address", "IP Address": "IP Address"}


def parse_dn(text: str) -> DistinguishedName:
    """A subject as "CN=backup,OU=ops,O=Example": the most special part first. Raises ValueError."""
    parts: list[frozenset[Attribute]] = []
    attributes: list[Attribute] = []
    at = 0
    while True:
        attribute, at = _attribute(text, at)
        attributes.append(attribute)
        separator = text[at : at + 1]
        at += 1
        if separator != "+":
            parts.append(frozenset(attributes))
            attributes = []
        if not separator:
            return tuple(reversed(parts))


def _attribute(text: str, at: int) -> tuple[Attribute, int]:
    """TYPE=VALUE from `at` on, and where it ends: at a separator or at the end of the text."""
    kind, equals, _ = text[at:].partition("=")
    word = kind.strip()
    long = _SHORT.get(word.upper(), word)
    if not equals or not (long in _LONG or _OID.fullmatch(long)):
        raise ValueError(
            f"'{text[:140]}' is no subject of a certificate: write it as CN=backup,O=Example, in the order that "
            "`openssl x509 -noout -subject -nameopt RFC2253` prints"
        )
    value, end = _value(text, at + len(kind) + 1)
    return (long, value), end


def _value(text: str, at: int) -> tuple[str, int]:
    """The value from `at` on without its escapes (section 2.4), and where it ends."""
    raw = bytearray()
    kept = 0  # bytes that are no blanks at the end
    while at < len(text) and text[at] not in ",+":
        if text[at] == "\\":
            if _HEX.fullmatch(code := text[at + 1 : at + 3]):
                raw += bytes.fromhex(code)
                at += 3
            else:
                raw += text[at + 1 : at + 2].encode()
                at += 2
            kept = len(raw)
            continue
        if raw or text[at] != " ":
            raw += text[at].encode()
            kept = len(raw) if text[at] != " " else kept
        at += 1
    try:
        return bytes(raw[:kept]).decode(), at
    except UnicodeDecodeError:
        raise ValueError(f"'{text[:140]}' has an escape that is no UTF-8") from None


def check_san(text: str) -> str:
    """The same text if it is TYPE:NAME. Raises ValueError."""
    plain_san(text)
    return text


def plain_san(text: str) -> Attribute:
    """A subject alternative name as "DNS:backup.example", "email:", "URI:" or "IP:". Raises ValueError."""
    kind, colon, value = text.partition(":")
    if not (colon and value and kind in _KINDS):
        raise ValueError(
            f"'{text[:140]}' is no subject alternative name: write its kind, too, as in DNS:backup.example, "
            "email:ann@example.org, URI:spiffe://example/backup or IP:10.0.0.7"
        )
    return _plain(_KINDS[kind], value)


def plain_sans(names: Iterable[Attribute]) -> set[Attribute]:
    """Those of a certificate in the same form. What has none of these kinds is left out."""
    return {_plain(kind, value) for kind, value in names if kind in _KINDS}


def _plain(kind: str, value: str) -> Attribute:
    """Names of hosts have no case, and addresses are written in several ways."""
    if kind == "DNS":
        return kind, value.lower()
    if kind == "IP Address":
        try:
            return kind, str(ipaddress.ip_address(value.strip()))
        except ValueError:
            return kind, value
    return kind, value
