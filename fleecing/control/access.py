"""Access rules: which client may do what with which export.

[[access]]                              # any number of them; with the first one, what no rule allows is not allowed
export = "vda@*"                        # or several: ["vda", "vda@*"]; * is any text, ? any character
allow = ["read", "trim"]                # see, read, write, trim, all
                                        # whom: all that is given must fit, of a list one; nothing given: everybody
address = ["10.0.0.0/8", "fd00::/8"]    # a TCP client
user = "backup"                         # a client of a Unix socket, by name or number
group = "backup"                        # the same by its process's groups
cn = "backup"                           # a client's certificate: a common name of its subject,
dn = "CN=backup,O=Example"              # its whole subject, as `openssl x509 -subject -nameopt RFC2253` prints it,
san = "DNS:backup.example"              # or a subject alternative name: DNS, email, URI or IP

A client may do what all rules that fit it allow together; the order means nothing, and no rule takes anything away.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Sequence
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from fleecing.control.accounts import Group, User, group_id, user_id
from fleecing.control.certificate_names import check_san, parse_dn, plain_san, plain_sans
from fleecing.server.access import Access, Policy
from fleecing.server.peer import Peer

LONGEST_EXPORT = 2 * 128 + 1
"""Characters of the longest export name; a longer one that a client asks for fits no rule."""

_SEE, _READ = Access.SEE, Access.SEE | Access.READ
_WORDS = {"see": _SEE, "read": _READ, "write": _READ | Access.WRITE, "trim": _READ | Access.TRIM, "all": ~Access(0)}


def _listed(value: object) -> object:
    return [value] if isinstance(value, str | int) else value


def _check_pattern(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9._@*?-]{1,300}", text):
        raise ValueError(f"'{text[:140]}' names no export: write one as vda, vda@monday, vda@* or *")
    return text


def _check_network(text: str) -> str:
    try:
        ipaddress.ip_network(text)
    except ValueError as e:
        raise ValueError(f"'{text[:60]}' is no range of addresses, as in 10.0.0.0/8 or fd00::/8: {e}") from None
    return text


def _check_dn(text: str) -> str:
    parse_dn(text)
    return text


Text = Annotated[str, Field(strict=True, min_length=1)]
_List = BeforeValidator(_listed)
_SOME = Field(min_length=1)


class AccessRule(BaseModel):
    """One rule: for whom, which exports, and what they may do with them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    export: Annotated[tuple[Annotated[Text, AfterValidator(_check_pattern)], ...], _List, _SOME]
    allow: Annotated[tuple[Literal["see", "read", "write", "trim", "all"], ...], _List, _SOME]
    address: Annotated[tuple[Annotated[Text, AfterValidator(_check_network)], ...], _List, _SOME] | None = None
    user: Annotated[tuple[User, ...], _List, _SOME] | None = None
    group: Annotated[tuple[Group, ...], _List, _SOME] | None = None
    cn: Annotated[tuple[Text, ...], _List, _SOME] | None = None
    dn: Annotated[tuple[Annotated[Text, AfterValidator(_check_dn)], ...], _List, _SOME] | None = None
    san: Annotated[tuple[Annotated[Text, AfterValidator(check_san)], ...], _List, _SOME] | None = None

    @model_validator(mode="after")
    def _somebody_can_fit(self) -> Self:
        if self.address is not None and self.is_local:
            raise ValueError("a TCP client has an address, one of a Unix socket user and group: make two rules")
        return self

    @property
    def is_local(self) -> bool:
        """Whether it is for clients of Unix sockets only."""
        return self.user is not None or self.group is not None

    @property
    def needs_certificate(self) -> bool:
        return not (self.cn is None and self.dn is None and self.san is None)

    @property
    def access(self) -> Access:
        """All that it allows."""
        allowed = Access(0)
        for word in self.allow:
            allowed |= _WORDS[word]
        return allowed

    def covers(self, export: str) -> bool:
        """Whether it says anything of the export of this name."""
        return any(re.fullmatch(_as_regex(pattern), export) for pattern in self.export)

    def is_for_everybody(self) -> bool:
        """Whether it leaves nobody out who gets in over TCP or over a Unix socket."""
        anywhere = self.address is None or any(ipaddress.ip_network(network).prefixlen == 0 for network in self.address)
        return anywhere and not self.is_local and not self.needs_certificate


def make_policy(rules: Sequence[AccessRule]) -> Policy:
    """The rules as the server asks them. Users and groups are looked up now."""
    compiled = [(_exports(rule), rule.access, _tests(rule)) for rule in rules]

    def policy(peer: Peer, export: str) -> Access:
        allowed = Access(0)
        if len(export) <= LONGEST_EXPORT:
            for exports, access, tests in compiled:
                if exports.fullmatch(export) and all(test(peer) for test in tests):
                    allowed |= access
        return allowed

    return policy


def _exports(rule: AccessRule) -> re.Pattern[str]:
    return re.compile("|".join(f"(?:{_as_regex(pattern)})" for pattern in rule.export))


def _as_regex(pattern: str) -> str:
    """* crosses the @ as well. Atomic groups: however many * there are, a client's name takes no long search."""
    first, *others = re.sub(r"\*+", "*", pattern).split("*")
    pieces = [re.escape(piece).replace(r"\?", ".") for piece in (first, *others)]
    if not others:
        return pieces[0]
    middle = "".join(f"(?>.*?{piece})" for piece in pieces[1:-1])
    return f"{pieces[0]}{middle}.*{pieces[-1]}"


def _tests(rule: AccessRule) -> list[Callable[[Peer], bool]]:
    """One for each kind of thing that the rule names; the client must pass all."""
    tests: list[Callable[[Peer], bool]] = []
    if rule.address is not None:
        networks = [ipaddress.ip_network(network) for network in rule.address]
        tests.append(lambda peer: peer.address is not None and any(peer.address in network for network in networks))
    if rule.user is not None:
        users = frozenset(map(user_id, rule.user))
        tests.append(lambda peer: peer.uid in users)
    if rule.group is not None:
        groups = frozenset(map(group_id, rule.group))
        tests.append(lambda peer: not groups.isdisjoint(peer.groups))
    if rule.cn is not None:
        common = frozenset(("commonName", name) for name in rule.cn)
        tests.append(
            lambda peer: (
                peer.certificate is not None and any(not common.isdisjoint(part) for part in peer.certificate.subject)
            )
        )
    if rule.dn is not None:
        subjects = frozenset(map(parse_dn, rule.dn))
        tests.append(lambda peer: peer.certificate is not None and peer.certificate.subject in subjects)
    if rule.san is not None:
        names = frozenset(map(plain_san, rule.san))
        tests.append(
            lambda peer: peer.certificate is not None and not names.isdisjoint(plain_sans(peer.certificate.names))
        )
    return tests
