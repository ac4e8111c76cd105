"""The catalog as one client sees it, and what an export takes from a client that may not do everything."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import pytest

from fleecing.block.extent import ClusterState
from fleecing.nbd import options
from fleecing.nbd.constants import BASE_ALLOCATION, READ_ONCE, Cmd, CmdFlag, Info, NbdError, Opt, Rep, ReplyMode
from fleecing.nbd.constants import TransmissionFlag as Flag
from fleecing.nbd.handshake import ServerHandshake, TlsMode
from fleecing.server.access import Access, ClientCatalog, limited
from fleecing.server.export import Export, active_export, snapshot_export
from fleecing.server.peer import Certificate, Peer
from tests.block.rig import CLUSTER, Rig, pattern
from tests.nbd.talk import FIXED, feed, go, info, meta, replies
from tests.server.listening import Exports
from tests.server.rig import MakeLine

SIZE = 4 * CLUSTER
SEE, READ = Access.SEE, Access.SEE | Access.READ
WRITE, TRIM, ALL = READ | Access.WRITE, READ | Access.TRIM, ~Access(0)
ANN = Certificate((frozenset({("commonName", "ann")}),))


@pytest.fixture
def active(rig: Rig) -> Export:
    return active_export("vda", "active disk, read-write", rig.disk, cluster_size=CLUSTER)


@pytest.fixture
def snapshot(rig: Rig) -> Export:
    return snapshot_export("vda@s", "snapshot", rig.snapshot()[0])


@pytest.fixture
def catalog(active: Export, snapshot: Export) -> Exports:
    return Exports(active, snapshot)


def view(catalog: Exports, allowed: dict[str, Access], client: Peer | None = None) -> ClientCatalog:
    return ClientCatalog(catalog, lambda _, name: allowed.get(name, Access(0)), client or Peer(uid=7), "test")


def answers(catalog: ClientCatalog, *sent: bytes) -> bytes:
    """All that is said to a client behind the greeting, and the error that ends it, if one does."""
    outcome = feed(ServerHandshake(catalog), [options.CLIENT_FLAGS.pack(FIXED) + b"".join(sent)])
    return outcome.sent[options.GREETING.size :] + (outcome.error or "").encode()


STRUCTURED = options.option(Opt.STRUCTURED_REPLY)
WAYS: dict[str, Callable[[str], bytes]] = {
    "info": lambda name: info(Opt.INFO, name, Info.NAME, Info.DESCRIPTION, Info.BLOCK_SIZE),
    "go": go,
    "list contexts": lambda name: meta(Opt.LIST_META_CONTEXT, name),
    "list some": lambda name: meta(Opt.LIST_META_CONTEXT, name, "base:"),
    "set contexts": lambda name: STRUCTURED + meta(Opt.SET_META_CONTEXT, name, BASE_ALLOCATION) + go(name),
    "old": lambda name: options.option(Opt.EXPORT_NAME, name.encode()),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("hidden", ["vda", "vda@s"])
def test_what_is_hidden_answers_as_what_is_not_there(catalog: Exports, way: str, hidden: str) -> None:
    """Byte by byte, for every way to ask."""
    others = {name: ALL for name in catalog.exports if name != hidden}
    there = answers(view(catalog, others), WAYS[way](hidden))
    del catalog.exports[hidden]
    assert there == answers(view(catalog, others), WAYS[way](hidden))
    assert answers(view(catalog, {hidden: ALL}), WAYS[way](hidden)) == there
    word = hidden.encode()
    assert b"there is no export '%b'" % word in there


def test_nobody_looks_for_what_is_hidden(catalog: Exports) -> None:
    """So it takes no other time either."""
    asked: list[str] = []
    catalog.open = asked.append  # type: ignore[method-assign, assignment]
    for name in ("vda", "vdb"):
        for way in WAYS.values():
            answers(view(catalog, {}), way(name))
    assert asked == []


def listed(catalog: ClientCatalog) -> list[tuple[str, str]]:
    found = replies(answers(catalog, options.option(Opt.LIST)))
    return [options.parse_server_item(data) for _, kind, data in found if kind == Rep.SERVER]


def test_a_client_sees_what_it_may_see(catalog: Exports) -> None:
    assert listed(view(catalog, {"vda": ALL, "vda@s": SEE})) == [
        ("vda", "active disk, read-write"),
        ("vda@s", "snapshot"),
    ]
    assert listed(view(catalog, {"vda": TRIM})) == [("vda", "active disk, read-only")]
    assert listed(view(catalog, {})) == []


def test_the_default_is_the_only_disk_that_a_client_sees(rig: Rig, catalog: Exports) -> None:
    def default(allowed: dict[str, Access]) -> str | None:
        found = view(catalog, allowed).find("")
        return None if found is None else found.name

    catalog.exports["vdb"] = active_export("vdb", "", rig.disk, cluster_size=CLUSTER)
    assert default({"vda": SEE, "vda@s": ALL}) == "vda"
    assert default({"vdb": READ, "vda@s": ALL}) == "vdb"
    assert default({"vda": READ, "vdb": READ}) is None
    assert default({"vda@s": ALL, "": ALL}) is None
    assert b"there is no default export" in answers(view(catalog, {"vda": READ, "vdb": READ}), go(""))
    assert b"there is no default export" in answers(view(catalog, {}), go(""))


def test_what_may_only_be_seen_cannot_be_opened(catalog: Exports) -> None:
    seen = view(catalog, {"vda": SEE})
    assert replies(answers(seen, info(Opt.INFO, "vda")))[-1][1] == Rep.ACK
    ((_, kind, text),) = replies(answers(seen, go("vda")))
    assert (kind, text) == (Rep.ERR_POLICY, b"export 'vda' may not be opened by this client")
    assert b"ProtocolError" in answers(seen, options.option(Opt.EXPORT_NAME, b"vda"))


def test_tls_changes_who_the_client_is(catalog: Exports) -> None:
    """With TLS allowed: the list follows the plain identity first, then the certificate's."""

    def policy(client: Peer, name: str) -> Access:
        return ALL if (name == "vda") == (client.certificate is None) else Access(0)

    seen = ClientCatalog(catalog, policy, Peer(), "test")
    handshake = ServerHandshake(seen, tls=TlsMode.ALLOW)
    ask = [options.option(Opt.LIST), go("vda@s"), options.option(Opt.STARTTLS)]
    plain = feed(handshake, [options.CLIENT_FLAGS.pack(FIXED), *ask]).sent[options.GREETING.size :]
    assert [kind for _, kind, _ in replies(plain)] == [Rep.SERVER, Rep.ACK, Rep.ERR_UNKNOWN, Rep.ACK]
    seen.identify(ANN)
    handshake.tls_started()
    secure = replies(feed(handshake, [options.option(Opt.LIST), go("vda"), go("vda@s")]).sent)
    assert [kind for _, kind, _ in secure] == [Rep.SERVER, Rep.ACK, Rep.ERR_UNKNOWN, Rep.INFO, Rep.ACK]
    assert options.parse_server_item(secure[0][2])[0] == "vda@s"
    assert handshake.agreement is not None


def test_one_line_tells_of_a_client_that_tries_names(catalog: Exports, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "fleecing.server.access"):
        answers(view(catalog, {}, Peer(uid=7, certificate=ANN)), *[go(name) for name in ("vda", "b\n", "c")])
    assert caplog.messages == ["client test (user 7, certificate 'ann') may not see 'vda'"]


@pytest.mark.parametrize(
    "access, flags",
    [
        (ALL, Flag.SEND_TRIM | Flag.SEND_WRITE_ZEROES | Flag.SEND_FAST_ZERO),
        (WRITE, Flag.SEND_WRITE_ZEROES | Flag.SEND_FAST_ZERO),
        (TRIM, Flag.READ_ONLY),
        (READ, Flag.READ_ONLY),
    ],
)
def test_the_flags_of_an_active_disk(active: Export, access: Access, flags: Flag) -> None:
    mask = Flag.SEND_TRIM | Flag.SEND_WRITE_ZEROES | Flag.SEND_FAST_ZERO | Flag.READ_ONLY
    assert limited(active, access).info.flags & mask == flags
    assert limited(active, access).info.flags & ~mask == active.info.flags & ~mask


@pytest.mark.parametrize("access", [READ, WRITE, TRIM, ALL])
def test_the_flags_of_a_snapshot(snapshot: Export, access: Access) -> None:
    """Without TRIM it is read-only as every other; with it, it must not say so (clients would send no TRIM)."""
    told = limited(snapshot, access).info
    may_trim = Access.TRIM in access
    assert told.flags & (Flag.READ_ONLY | Flag.SEND_TRIM) == (Flag.SEND_TRIM if may_trim else Flag.READ_ONLY)
    assert (READ_ONCE in told.contexts) == may_trim


CHANGES: Sequence[tuple[Cmd, bytes]] = [(Cmd.WRITE, b"x" * 4096), (Cmd.WRITE_ZEROES, b""), (Cmd.TRIM, b"")]


@pytest.mark.parametrize("access", [READ, TRIM, WRITE])
def test_an_active_disk_takes_no_more_than_is_allowed(
    rig: Rig, active: Export, line: MakeLine, mode: ReplyMode, access: Access
) -> None:
    client = line(limited(active, access), mode)
    for command, payload in CHANGES:
        allowed = Access.WRITE in access and command is not Cmd.TRIM
        got = client.ask(command, 0, 4096, payload=payload).error
        assert got == (0 if allowed else NbdError.EPERM), command
    if Access.WRITE not in access:
        # A payload that is larger than the buffer, and one with FUA
        assert client.ask(Cmd.WRITE, 0, payload=b"x" * (2 << 20)).error == NbdError.EPERM
        assert client.ask(Cmd.WRITE, 0, payload=b"x", flags=CmdFlag.FUA).error == NbdError.EPERM
        assert rig.path.read_bytes() == pattern(SIZE)
    assert client.ask(Cmd.READ, CLUSTER, 4096).data == pattern(SIZE)[CLUSTER : CLUSTER + 4096]
    assert client.ask(Cmd.FLUSH).error == 0


def test_a_snapshot_takes_no_trim_where_it_is_not_allowed(snapshot: Export, line: MakeLine, mode: ReplyMode) -> None:
    client = line(limited(snapshot, WRITE), mode)
    for command, payload in CHANGES:
        assert client.ask(command, 0, CLUSTER, payload=payload[:CLUSTER]).error == NbdError.EPERM
    assert client.ask(Cmd.READ, 0, SIZE).data == pattern(SIZE)


def test_read_once_is_a_trim(snapshot: Export, line: MakeLine) -> None:
    """Who may not trim is not offered the context, and without it the flag is refused."""
    for access, error in ((READ, NbdError.EINVAL), (TRIM, 0)):
        export = limited(snapshot, access)
        client = line(export, ReplyMode.STRUCTURED, [READ_ONCE])
        assert client.ask(Cmd.READ, 0, CLUSTER, flags=CmdFlag.READ_ONCE).error == error
        again = client.ask(Cmd.READ, 0, CLUSTER)
        assert (again.error, "trimmed" in again.text) == ((NbdError.EINVAL, True) if access is TRIM else (0, False))


@pytest.mark.parametrize("access", [READ, TRIM])
def test_reading_a_read_once_export_is_a_trim(rig: Rig, line: MakeLine, mode: ReplyMode, access: Access) -> None:
    """Who may read it and not trim it gives nothing up."""
    frozen = rig.snapshot()[0]
    export = limited(snapshot_export("vda@s", "", frozen, read_once_grace=0), access)
    client = line(export, mode)
    assert client.ask(Cmd.READ, 0, CLUSTER).data == pattern(SIZE)[:CLUSTER]
    assert client.ask(Cmd.READ, CLUSTER, 1).error == 0  # by now what the first one gave up is trimmed
    assert client.ask(Cmd.READ, 0, CLUSTER).error == (NbdError.EINVAL if access is TRIM else 0)
    assert frozen.counts()[ClusterState.TRIMMED] == (1 if access is TRIM else 0)
