"""Access rules: what they say of whom, and mistakes in them."""

from __future__ import annotations

import os
import pwd
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleecing.control.access import AccessRule, make_policy
from fleecing.control.certificate_names import parse_dn, plain_san, plain_sans
from fleecing.control.config import read_config
from fleecing.errors import ConfigError
from fleecing.server.access import Access
from fleecing.server.peer import Certificate, Peer, plain_address

NOTHING, ALL = Access(0), ~Access(0)
SEE, READ = Access.SEE, Access.SEE | Access.READ
WRITE, TRIM = READ | Access.WRITE, READ | Access.TRIM

ANN = Certificate(
    parse_dn("CN=ann,OU=ops+UID=7,O=Example"),
    frozenset({("DNS", "Ann.Example"), ("email", "ann@example.org"), ("IP Address", "0:0:0:0:0:0:0:1\n")}),
)


def rule(allow: str = "read", export: Any = "*", **whom: Any) -> AccessRule:
    return AccessRule(export=export, allow=allow, **whom)  # type: ignore[arg-type]  # it takes what TOML has


def ask(peer: Peer, *rules: AccessRule, export: str = "vda") -> Access:
    return make_policy(rules)(peer, export)


@pytest.mark.parametrize("word, access", [("see", SEE), ("read", READ), ("write", WRITE), ("trim", TRIM), ("all", ALL)])
def test_what_a_word_comes_with(word: str, access: Access) -> None:
    assert ask(Peer(), rule(word)) == access


def test_rules_add_up_in_any_order() -> None:
    rules = [rule("write", "vda"), rule("trim", "vda@*"), rule("see"), rule("all", user=1)]
    for order in (rules, rules[::-1]):
        names = ("vda", "vda@monday", "vdb")
        assert [ask(Peer(uid=2), *order, export=name) for name in names] == [WRITE, TRIM, SEE]
        assert {ask(Peer(uid=1), *order, export=name) for name in names} == {ALL}


def test_what_no_rule_allows_is_not_allowed() -> None:
    assert ask(Peer(uid=0)) == NOTHING
    assert ask(Peer(uid=0), rule("all", user=1)) == NOTHING


@pytest.mark.parametrize(
    "pattern, fits, others",
    [
        ("vda", ["vda"], ["vda@s", "vdaa", "Vda", ""]),
        ("vda@*", ["vda@s", "vda@"], ["vda", "vdb@s", "xvda@s"]),
        ("*", ["vda", "vda@s", "a" * 257, ""], ["a" * 258, "vda\n"]),
        ("vd?", ["vda", "vdb"], ["vd", "vdaa", "vda@s"]),
        ("*@*-daily", ["a@b-daily", "@-daily"], ["a-daily", "a@daily", "a@b-daily-"]),
        ("a.b", ["a.b"], ["axb"]),
        ("a**b*b", ["abb", "abxbb"], ["ab"]),
        (["vda", "vdb@*"], ["vda", "vdb@x"], ["vdb"]),
    ],
)
def test_exports_are_matched_by_name(pattern: Any, fits: list[str], others: list[str]) -> None:
    policy = make_policy([rule(export=pattern)])
    assert [name for name in (*fits, *others) if policy(Peer(), name)] == fits


@given(st.lists(st.sampled_from(["a", "b", "@", "*", "?"]), min_size=1, max_size=8).map("".join), st.text("ab@"))
def test_patterns_are_those_of_the_shell(pattern: str, name: str) -> None:
    assert rule(export=pattern).covers(name) == _glob(pattern, name)


def _glob(pattern: str, name: str) -> bool:
    """The plainest way to say it."""
    if not pattern:
        return not name
    if pattern[0] == "*":
        return any(_glob(pattern[1:], name[at:]) for at in range(len(name) + 1))
    return bool(name) and pattern[0] in ("?", name[0]) and _glob(pattern[1:], name[1:])


def test_a_long_name_takes_no_long_search() -> None:
    """With a search that goes back for each * this would not end."""
    assert ask(Peer(), rule(export="*a" * 100 + "b"), export="a" * 257) == NOTHING


@pytest.mark.parametrize(
    "address, networks, fits",
    [
        ("10.1.2.3", "10.0.0.0/8", True),
        ("11.1.2.3", "10.0.0.0/8", False),
        ("10.1.2.3", "10.1.2.3", True),
        ("fd00::7", ["10.0.0.0/8", "fd00::/8"], True),
        ("fe80::1%eth0", "fe80::/10", True),
        ("::ffff:10.1.2.3", "10.0.0.0/8", True),
        ("10.1.2.3", "::/0", False),
        ("::1", "0.0.0.0/0", False),
    ],
)
def test_a_client_is_known_by_its_address(address: str, networks: Any, fits: bool) -> None:
    assert bool(ask(Peer(address=plain_address(address)), rule(address=networks))) == fits


def test_a_client_is_known_by_its_user_and_groups() -> None:
    peer = Peer(uid=1000, groups=frozenset({100, 36}))
    me = pwd.getpwuid(os.getuid()).pw_name
    assert ask(peer, rule(user=1000)) == ask(peer, rule(user=[5, "1000"])) == READ
    assert ask(Peer(uid=os.getuid()), rule(user=me)) == READ
    assert ask(peer, rule(group=36)) == ask(peer, rule(group=[1, 100])) == ask(peer, rule(group=36, user=1000)) == READ
    assert ask(peer, rule(group=36, user=1001)) == ask(peer, rule(group=37, user=1000)) == NOTHING
    assert ask(Peer(address=ip_address("127.0.0.1")), rule(user=0)) == NOTHING
    assert ask(Peer(), rule(user=0)) == ask(Peer(), rule(group=0)) == NOTHING


@pytest.mark.parametrize(
    "whom, fits",
    [
        ({"cn": "ann"}, True),
        ({"cn": ["bob", "ann"]}, True),
        ({"cn": "Ann"}, False),
        ({"cn": "ops"}, False),
        ({"dn": "CN=ann,OU=ops+UID=7,O=Example"}, True),
        ({"dn": "cn=ann, uid=7 + ou=ops, o=Example"}, True),
        ({"dn": "O=Example,OU=ops+UID=7,CN=ann"}, False),
        ({"dn": "CN=ann,O=Example"}, False),
        ({"san": "DNS:ann.example"}, True),
        ({"san": "email:ann.example"}, False),
        ({"san": "IP:::1"}, True),
        ({"san": "DNS:*.example"}, False),
        ({"cn": "ann", "san": "email:ann@example.org"}, True),
        ({"cn": "ann", "san": "email:bob@example.org"}, False),
    ],
)
def test_a_client_is_known_by_its_certificate(whom: dict[str, Any], fits: bool) -> None:
    assert bool(ask(Peer(certificate=ANN), rule(**whom))) == fits
    assert not ask(Peer(uid=0), rule(**whom))
    assert not ask(Peer(certificate=Certificate()), rule(**whom))


def test_a_name_with_commas_is_not_taken_for_several() -> None:
    """A client whose authority lets it choose its common name must not choose somebody else's subject."""
    forged = Certificate(parse_dn(r"CN=ann\,O=Example"))
    assert forged.subject == (frozenset({("commonName", "ann,O=Example")}),)
    assert not ask(Peer(certificate=forged), rule(dn="CN=ann,O=Example"))


@pytest.mark.parametrize(
    "text, value", [(r"a\, b\+c", "a, b+c"), (r"J\C3\B6rg", "Jörg"), ("Jörg", "Jörg"), (r"  x \  ", "x  "), ("", "")]
)
def test_values_are_unescaped(text: str, value: str) -> None:
    assert parse_dn(f"CN={text}") == (frozenset({("commonName", value)}),)


def test_names_of_other_kinds_are_left_out() -> None:
    assert plain_sans({("DNS", "A"), ("Registered ID", "1.2.3")}) == {("DNS", "a")}
    assert plain_san("IP Address:FE80::1") == ("IP Address", "fe80::1")


@pytest.mark.parametrize(
    "text, sentence",
    [
        ("export = 'vda'", "access.0.allow: is missing"),
        ("allow = 'read'", "access.0.export: is missing"),
        ("export = ''\nallow = 'read'", "access.0.export.0"),
        ("export = []\nallow = 'read'", "access.0.export: there must be at least one"),
        ("export = 'a/b'\nallow = 'read'", "'a/b' names no export"),
        ("export = '*'\nallow = 'reed'", "access.0.allow.0: Input should be 'see', 'read', 'write', 'trim' or 'all'"),
        ("export = '*'\nallow = 'read'\nuid = 7", "access.0.uid: is no known setting"),
        ("export = '*'\nallow = 'read'\nuser = 'no-such-user'", "there is no user 'no-such-user' on this machine"),
        ("export = '*'\nallow = 'read'\nuser = []", "access.0.user: there must be at least one"),
        ("export = '*'\nallow = 'read'\naddress = '10.0.0.1/8'", "'10.0.0.1/8' is no range of addresses"),
        ("export = '*'\nallow = 'read'\naddress = '::1'\nuser = 0", "access.0: a TCP client has an address"),
        ("export = '*'\nallow = 'read'\ncn = 'a'", "are of verified certificates: give tls-verify-client = true"),
        ("export = '*'\nallow = 'read'\ndn = 'ann'", "'ann' is no subject of a certificate"),
        ("export = '*'\nallow = 'read'\ndn = 'CN=ann,XX=y'", "is no subject of a certificate"),
        ("export = '*'\nallow = 'read'\nsan = 'ann.example'", "'ann.example' is no subject alternative name"),
    ],
)
def test_a_mistake_is_named_with_its_place(tmp_path: Path, text: str, sentence: str) -> None:
    path = tmp_path / "f.toml"
    path.write_text(f"[[access]]\n{text}\n[disk.vda]\npath = 'x'\n")
    with pytest.raises(ConfigError) as caught:
        read_config(str(path))
    assert sentence in str(caught.value)


def test_no_rules_at_all_are_something_else_than_none(tmp_path: Path) -> None:
    path = tmp_path / "f.toml"
    path.write_text("[disk.vda]\npath = 'x'\n")
    assert read_config(str(path)).access is None
    path.write_text("access = []\n[disk.vda]\npath = 'x'\n")
    assert read_config(str(path)).access == ()
