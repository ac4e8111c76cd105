"""Guests are frozen around the instant and thawed whatever happens: agents that misbehave, commands that fail."""

from __future__ import annotations

import contextlib
import glob
import json
import signal
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from fleecing.client.dial import connect
from fleecing.control import hook_command
from fleecing.control.config import make_settings
from fleecing.control.guest_agent import MAX_LINE, GuestAgent, HookError
from fleecing.control.hook_command import HookCommand
from fleecing.control.manager import Manager
from fleecing.control.models import SnapshotRequest
from fleecing.errors import ConfigError, ControlError
from fleecing.nbd.uri import NbdUri
from fleecing.units import MiB
from tests.control.fake_agent import FakeAgent
from tests.peers import Children
from tests.serving import ROOT, Serve, Server

FREEZE, THAW, STATUS, SYNC = (
    "guest-fsfreeze-freeze",
    "guest-fsfreeze-thaw",
    "guest-fsfreeze-status",
    "guest-sync-delimited",
)
ONCE = [SYNC, STATUS, FREEZE, THAW]


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[FakeAgent]:
    with FakeAgent(tmp_path / "agent") as agent:
        yield agent


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "vda.img"
    path.write_bytes(bytes(MiB))
    return path


class House:
    """A manager in this process, with disks of guests."""

    def __init__(self, folder: Path, guests: dict[str, dict[str, Any]], disks: dict[str, str | None]) -> None:
        self.state = folder / "state"
        values: dict[str, Any] = {"state-dir": str(self.state), "guest": guests, "disk": {}}
        for name, guest in disks.items():
            path = folder / f"{name}.img"
            path.write_bytes(bytes(MiB))
            values["disk"][name] = {"path": str(path)} | ({} if guest is None else {"guest": guest})
        self.manager = Manager(make_settings(values, "test"), drain_seconds=0.1)

    def freeze(self, *disks: str, name: str = "s") -> None:
        self.manager.create(SnapshotRequest(disks=list(disks or ["vda"]), name=name, quiesce=True))

    def refused(self, *disks: str) -> str:
        """Why it is not made; nothing is left of it then."""
        with pytest.raises(ControlError) as caught:
            self.freeze(*disks)
        assert self.manager.snapshots() == []
        assert not list(self.state.glob("*/snapshots/*"))
        return str(caught.value)

    @property
    def records(self) -> list[str]:
        """Guests that are not known to be thawed."""
        return glob.glob(str(self.state / ".frozen-*"))

    def end(self) -> None:
        self.manager.guests.close()
        self.manager.close()


@pytest.fixture
def house(tmp_path: Path, agent: FakeAgent) -> Iterator[House]:
    """Disks vda and vdb of a guest that has an agent, and vdc of nobody."""
    yield from open_house(tmp_path, agent, 60)


@pytest.fixture
def impatient(tmp_path: Path, agent: FakeAgent) -> Iterator[House]:
    """The same, for an agent that does not answer in time."""
    yield from open_house(tmp_path, agent, 1.5)


def open_house(folder: Path, agent: FakeAgent, seconds: float) -> Iterator[House]:
    web = {"agent": str(agent.path), "hook-seconds": seconds}
    house = House(folder, {"web": web}, {"vda": "web", "vdb": "web", "vdc": None})
    yield house
    for event in (*agent.hold.values(), *agent.hold_answer.values()):
        event.set()
    house.end()
    assert not agent.frozen
    assert house.records == []


# The instant.


def test_what_the_guest_flushes_is_in_the_snapshot_and_what_it_writes_after_it_is_not(
    serve: Serve, agent: FakeAgent, image: Path
) -> None:
    """The guest writes the number 1 when it is frozen, 2 when it is thawed."""
    server = serve(image, "--guest-agent", str(agent.path))

    def write(number: int) -> None:
        with connect(NbdUri.parse(server.uri())) as guest:
            guest.write(0, bytes([number]) * 512)

    agent.on = {FREEZE: lambda: write(1), THAW: lambda: write(2)}
    uri = server.snapshot(name="s", quiesce=True)
    assert agent.commands == ONCE
    assert not agent.frozen
    with connect(NbdUri.parse(uri)) as reader, connect(NbdUri.parse(server.uri())) as guest:
        assert (bytes(reader.read(0, 1)), bytes(guest.read(0, 1))) == (b"\1", b"\2")
    assert server.show("vda@s")["quiesced"]
    server.child.wait_for_line("guest vda is frozen, 2 file systems, which took ")
    server.child.wait_for_line("guest vda is thawed, it was frozen for ")
    assert not server.freeze("vda", name="t")[0]["quiesced"]
    assert agent.commands == ONCE


def test_a_guest_with_several_disks_is_frozen_once(house: House, agent: FakeAgent) -> None:
    house.freeze("vda", "vdb")
    assert agent.commands == ONCE
    assert [s.export.name for s in house.manager.snapshots()] == ["vda@s", "vdb@s"]


def test_several_guests_are_frozen_at_the_same_time(tmp_path: Path, agent: FakeAgent) -> None:
    with FakeAgent(tmp_path / "other") as other:
        seen = []
        agent.on = {THAW: lambda: seen.append(other.frozen)}
        other.on = {THAW: lambda: seen.append(agent.frozen)}
        guests = {"a": {"agent": str(agent.path)}, "b": {"agent": str(other.path)}}
        house = House(tmp_path, guests, {"vda": "a", "vdb": "b"})
        house.freeze("vda", "vdb")
        assert seen == [True, False]  # the last one frozen is the first one thawed
        house.end()


def test_a_disk_of_no_guest_cannot_be_quiesced(house: House, agent: FakeAgent) -> None:
    assert house.refused("vda", "vdc").startswith("disk 'vdc' has no guest that could be frozen")
    assert agent.commands == []


def test_what_others_left_in_the_port_is_not_taken_for_an_answer(tmp_path: Path) -> None:
    stale = b'{"return": 7}\n\xff{"return": 1}\n\xffrubbish\n{"return": '
    with FakeAgent(tmp_path / "agent", stale=stale) as agent:
        house = House(tmp_path, {"web": {"agent": str(agent.path)}}, {"vda": "web"})
        house.freeze()
        assert agent.commands == ONCE
        house.end()


# Whatever fails.


def test_an_agent_that_refuses_is_quoted(house: House, agent: FakeAgent) -> None:
    agent.errors[FREEZE] = "failed to freeze /"
    assert house.refused() == (
        "snapshot 's' was not made: guest 'web' cannot be frozen: its agent refused guest-fsfreeze-freeze: "
        "failed to freeze /"
    )
    assert house.records == []


def test_a_guest_that_somebody_else_has_frozen_is_left_to_him(house: House, agent: FakeAgent) -> None:
    agent.frozen = True
    assert "somebody else has frozen it already" in house.refused()
    assert agent.commands == [SYNC, STATUS]
    assert agent.frozen
    agent.frozen = False


def test_a_guest_without_an_agent_is_not_waited_for_for_ever(impatient: House, agent: FakeAgent) -> None:
    agent.mute = True
    assert f"its agent does not answer on {agent.path} within 1.5 s" in impatient.refused()
    assert impatient.records == []
    agent.mute = False
    impatient.freeze()


def test_a_socket_that_is_not_there_is_named(tmp_path: Path) -> None:
    house = House(tmp_path, {"web": {"agent": str(tmp_path / "nowhere")}}, {"vda": "web"})
    assert f"its agent cannot be reached on {tmp_path}/nowhere: No such file or directory" in house.refused()
    house.end()


def test_a_guest_that_freezes_too_late_is_thawed_then(impatient: House, agent: FakeAgent) -> None:
    agent.hold[FREEZE] = threading.Event()
    assert "its agent gave no answer to guest-fsfreeze-freeze within 1.5 s" in impatient.refused()
    assert len(impatient.records) == 1
    assert "it is not thawed yet from the last time" in impatient.refused()
    agent.hold[FREEZE].set()
    agent.wait_for(lambda agent: THAW in agent.commands and not agent.frozen)
    impatient.manager.guests.close()
    assert impatient.records == []


def test_a_thaw_that_is_not_confirmed_costs_the_snapshot_and_goes_on(impatient: House, agent: FakeAgent) -> None:
    agent.hold[THAW] = threading.Event()
    assert "guest 'web' is not thawed yet: its agent gave no answer to guest-fsfreeze-thaw" in impatient.refused()
    assert agent.frozen
    agent.hold[THAW].set()
    agent.wait_for(lambda agent: not agent.frozen)


def test_a_guest_that_was_thawed_by_somebody_else_was_not_frozen_all_the_time(house: House, agent: FakeAgent) -> None:
    def thaw_behind_its_back() -> None:
        agent.frozen = False

    agent.on[FREEZE] = thaw_behind_its_back
    assert "may not have been frozen: somebody else thawed it before the snapshot was there" in house.refused()


def test_an_agent_that_reports_at_the_thaw_that_the_freeze_was_over_is_believed(house: House, agent: FakeAgent) -> None:
    """As Windows does after 10 s."""

    def thaw_by_itself() -> None:
        agent.frozen = False

    agent.on[FREEZE] = thaw_by_itself
    agent.errors[THAW] = "timeout when try to receive Frozen event"
    assert "may not have been frozen: its agent refused guest-fsfreeze-thaw: timeout" in house.refused()


def test_a_creation_that_fails_at_the_instant_thaws(house: House, agent: FakeAgent) -> None:
    gate = house.manager.disks["vda"].node.gate
    write = object()
    gate.enter(write)  # a guest's write that does not end
    assert "writes of the guest took longer than 0.1 s" in house.refused()
    gate.leave(write)
    assert agent.commands == ONCE
    assert not agent.frozen


def test_a_creation_that_fails_before_it_does_not_freeze(house: House, agent: FakeAgent) -> None:
    (house.state / "vda" / "snapshots" / "s").mkdir()
    with pytest.raises(ControlError, match="something of that name in the way"):
        house.freeze()
    assert agent.commands == []


def test_an_endless_answer_is_none(tmp_path: Path) -> None:
    with FakeAgent(tmp_path / "agent", stale=b"") as fake:
        fake.errors[STATUS] = "x" * (2 * MAX_LINE)
        agent = GuestAgent(str(fake.path), 60)
        agent.connect()
        with pytest.raises(HookError, match="more than an answer can have"):
            agent.is_frozen()
        agent.close()


# The end of the server, and of who asked.


def create(children: Children, server: Server) -> Any:
    command = ["snapshot", "create", "vda", "--name", "s", "--quiesce", "--control", str(server.control_path)]
    return children.start(sys.executable, "-m", "fleecing", *command, env={"PYTHONPATH": str(ROOT)})


def test_a_client_that_dies_leaves_no_guest_frozen(
    children: Children, serve: Serve, agent: FakeAgent, image: Path
) -> None:
    server = serve(image, "--guest-agent", str(agent.path), "--hook-seconds", "60")
    agent.hold_answer[FREEZE] = threading.Event()
    client = create(children, server)
    agent.wait_for(lambda agent: agent.frozen)
    client.kill()
    agent.hold_answer[FREEZE].set()
    agent.wait_for(lambda agent: not agent.frozen)
    server.child.wait_for_line("snapshot vda@s created")


@pytest.mark.parametrize("holding", ["hold", "hold_answer"])
def test_a_server_that_is_stopped_thaws_first(
    children: Children, serve: Serve, agent: FakeAgent, image: Path, holding: str
) -> None:
    """While the agent has not frozen yet, and while it has and does not say so."""
    server = serve(image, "--guest-agent", str(agent.path), "--hook-seconds", "1")
    freezing = getattr(agent, holding)[FREEZE] = threading.Event()
    client = create(children, server)
    agent.wait_for(lambda agent: agent.frozen if holding == "hold_answer" else FREEZE in agent.commands)
    server.child.signal(signal.SIGTERM)
    server.child.wait_for_line("guest vda is NOT thawed|stopping")
    with ThreadPoolExecutor() as pool:
        stopping = pool.submit(server.stop)
        assert client.wait() == 1
        freezing.set()
        stopping.result()
    assert "cannot be frozen" in client.stderr
    assert not agent.frozen
    assert agent.commands[-1] == THAW
    assert not list(server.state_dir.glob(".frozen-*"))


def test_what_a_killed_server_left_frozen_the_next_one_thaws(
    children: Children, serve: Serve, agent: FakeAgent, image: Path, tmp_path: Path
) -> None:
    server = serve(
        image,
        "--guest-agent",
        str(agent.path),
        "--hook-seconds",
        "1",
        "--after",
        f"echo $FLEECING_GUEST >>{tmp_path}/after",
    )
    agent.hold_answer[FREEZE] = threading.Event()
    create(children, server)
    agent.wait_for(lambda agent: agent.frozen)
    server.kill()
    agent.hold_answer.pop(FREEZE).set()
    assert len(list(server.state_dir.glob(".frozen-*"))) == 1
    server.start()
    agent.wait_for(lambda agent: not agent.frozen)
    server.child.wait_for_line("guest vda is NOT thawed: an earlier server ended while it was frozen")
    server.child.wait_for_line("guest vda is thawed$")
    assert server.status()["snapshots"] == []
    server.stop()
    assert (tmp_path / "after").read_text() == "vda\n"
    assert not list(server.state_dir.glob(".frozen-*"))


# Commands.


def commands(tmp_path: Path, before: str, after: str, **more: Any) -> House:
    return House(tmp_path, {"web": {"before": before, "after": after, **more}}, {"vda": "web", "vdb": "web"})


def test_commands_run_around_the_agent_and_know_what_for(tmp_path: Path, agent: FakeAgent) -> None:
    log = tmp_path / "log"

    def note(what: str) -> None:
        with log.open("a") as file:
            file.write(f"{what}\n")

    agent.on = {FREEZE: lambda: note("freeze"), THAW: lambda: note("thaw")}
    words = f'"$FLEECING_GUEST $FLEECING_DISKS $FLEECING_SNAPSHOT" >>{log}'
    house = commands(tmp_path, f"echo before {words}", f"echo after {words}", agent=str(agent.path))
    house.freeze("vda", "vdb")
    assert log.read_text().splitlines() == ["before web vda vdb s", "freeze", "thaw", "after web vda vdb s"]
    house.end()


def test_after_is_run_though_before_failed_and_its_words_are_told(tmp_path: Path) -> None:
    house = commands(tmp_path, "echo no such database >&2; exit 3", f"echo after >>{tmp_path}/log")
    assert house.refused() == (
        "snapshot 's' was not made: guest 'web' cannot be frozen: the command 'echo no such database >&2; exit 3' "
        "failed with exit code 3: no such database"
    )
    assert (tmp_path / "log").read_text() == "after\n"
    assert house.records == []
    house.end()


def test_a_command_that_hangs_is_killed_with_all_that_it_started(tmp_path: Path) -> None:
    house = commands(
        tmp_path, f"sh -c 'echo $$ >{tmp_path}/pid; exec sleep 1000' & wait", "true", **{"hook-seconds": 3.0}
    )
    assert "took more than 3 s: killed" in house.refused()
    state = Path("/proc", (tmp_path / "pid").read_text().strip(), "stat")
    # The kill was sent, but a busy machine lets it die later. Where nobody reaps it, it stays as a zombie.
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        while state.read_text().rpartition(")")[2].split()[0] not in "ZX":
            time.sleep(0.01)
    house.end()


def test_a_command_that_does_not_end_though_killed_is_waited_for_no_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel may have it wait for a disk that hangs, where no signal gets to it."""
    monkeypatch.setattr(HookCommand, "abort", lambda _: None)
    monkeypatch.setattr(hook_command, "KILL_SECONDS", 0.1)
    command = HookCommand("exec sleep 1000", {}, 0.1)
    with pytest.raises(HookError, match=r"^the command 'exec sleep 1000', process \d+, was killed and does not end$"):
        command.wait()
    monkeypatch.undo()
    command.abort()
    assert command._end() == -signal.SIGKILL


def test_a_command_that_leaves_something_running_has_ended(tmp_path: Path) -> None:
    """As a client of a database does that holds a lock until `after`."""
    before = f"sleep 1000 & echo $! >{tmp_path}/pid"
    house = commands(tmp_path, before, f"kill $(cat {tmp_path}/pid)")
    house.freeze()
    house.end()


def test_after_is_run_until_it_works(tmp_path: Path) -> None:
    after = f"test -e {tmp_path}/ready && echo >>{tmp_path}/thawed"
    house = commands(tmp_path, "true", after)
    assert "not thawed yet: the command" in house.refused()
    (tmp_path / "ready").touch()
    house.end()  # waits for it
    assert (tmp_path / "thawed").exists()
    assert house.records == []


def test_where_no_thread_can_go_on_with_one_guest_the_others_are_thawed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    guests = {
        "a": {"before": "true", "after": f"echo >>{tmp_path}/thawed"},
        "b": {"before": "true", "after": "false"},  # frozen last, thawed first
    }
    house = House(tmp_path, guests, {"vda": "a", "vdb": "b"})

    def no_thread(guest: object, problem: Exception) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(house.manager.guests, "go_on", no_thread)
    assert house.refused("vda", "vdb").endswith("can't start new thread: restart the server")
    assert (tmp_path / "thawed").exists()
    assert len(house.records) == 1
    house.manager.guests.close(0.1)


def test_what_is_never_thawed_is_left_to_the_next_server(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    house = commands(tmp_path, "true", "false")
    house.refused()
    house.manager.guests.close(0.1)
    assert "guests that are not thawed, and left to the next server: web" in caplog.messages
    (record,) = house.records
    assert json.loads(Path(record).read_text())["after"] == "false"
    house.end()


# Configuration.


@pytest.mark.parametrize(
    "guest, sentence",
    [
        ({}, "guest.web: there is nothing to freeze it with"),
        ({"agent": "x" * 200}, "guest.web.agent: "),
        ({"before": "true", "hook-seconds": 0}, "guest.web.hook-seconds: Input should be greater than 0"),
        ({"before": ""}, "guest.web.before: "),
    ],
)
def test_a_guest_that_makes_no_sense_is_refused(guest: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make_settings({"guest": {"web": guest}, "disk": {"vda": {"path": "/x"}}}, "test")
    assert sentence in str(caught.value)


def test_a_disk_of_an_unknown_guest_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"disk 'vda' is of guest 'web', and there is no \[guest.web\]"):
        make_settings({"disk": {"vda": {"path": "/x", "guest": "web"}}}, "test")


def test_nobody_names_commands_over_the_control_socket(serve: Serve, image: Path) -> None:
    server = serve(image)
    for body in ({"before": "true"}, {"hooks": {"after": "true"}}, {"guest": {"agent": "/x"}}):
        with pytest.raises(ControlError, match="is no known setting"):
            server.control.request("POST", "/v1/snapshots", {"disks": ["vda"], **body})
