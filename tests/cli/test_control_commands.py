"""The commands that talk to a running server, as an operator types them."""

from __future__ import annotations

import json
import re
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from fleecing.cli.main import main
from fleecing.nbd.uri import NbdUri
from fleecing.units import KiB, MiB
from tests.peers import Children, run
from tests.serving import ROOT, Serve, Server


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Disks vda and vdb."""
    folder = tmp_path_factory.mktemp("commands")
    images = {name: folder / f"{name}.img" for name in ("vda", "vdb")}
    for image in images.values():
        image.write_bytes(b"\1" * MiB)
    server = Server(folder, images)
    yield server
    server.stop()


@pytest.fixture
def server(running: Server) -> Iterator[Server]:
    """The same for all tests, each time without snapshots."""
    yield running
    for snapshot in running.status()["snapshots"]:
        running.delete(snapshot["export"])


def ask(server: Server, command: str) -> Result:
    return CliRunner().invoke(main, command.split(), env={"FLEECING_CONTROL": str(server.control_path)})


def done(server: Server, command: str) -> str:
    """What a command that succeeds prints on stdout."""
    result = ask(server, command)
    assert result.exit_code == 0, result.stderr
    return result.stdout


def listed(server: Server, command: str) -> Any:
    return json.loads(done(server, command))


def test_create_prints_one_uri_a_disk_and_nothing_else(server: Server) -> None:
    result = ask(server, "snapshot create vdb vda --name s")
    assert result.stdout.splitlines() == [server.uri("vdb@s"), server.uri("vda@s")]
    assert result.stderr == ""
    assert run("nbdinfo", "--size", result.stdout.splitlines()[0]) == f"{MiB}\n"


def test_create_prints_the_tcp_uri_when_asked(server: Server) -> None:
    assert done(server, "snapshot create vda --name s --tcp").strip() == server.uri("vda@s", tcp=True)


def test_create_takes_its_options_to_the_server(server: Server) -> None:
    options = "--temp-limit 1M --on-cbw-error break-guest-write --cbw-timeout 7.5"
    (made,) = listed(server, f"snapshot create vda --name s {options} --json")
    assert (made["temp"]["limit"], made["on_cbw_error"], made["cbw_timeout"]) == (MiB, "break-guest-write", 7.5)
    assert listed(server, "snapshot show vda@s --json") == made


def test_a_read_once_snapshot_says_what_it_is(server: Server) -> None:
    uri = done(server, "snapshot create vda --name s --read-once --read-once-grace 64K").strip()
    done(server, "snapshot create vda --name t --read-once")
    assert [s["read_once_grace"] for s in listed(server, "snapshot list --json")] == [64 * KiB, 32 * MiB]
    lines = done(server, "snapshot list").splitlines()
    assert all(line.endswith("  ready, read once") for line in lines[1:])
    assert re.search(r"^read once +yes, grace 64 KiB$", done(server, "snapshot show vda@s"), re.MULTILINE)
    assert "UTC, to be read once" in run("nbdinfo", "--list", server.uri(""))
    run("nbdcopy", uri, "null:")
    assert listed(server, "snapshot show vda@s --json")["clusters"]["trimmed"] == MiB // (64 * KiB) - 1


def test_create_makes_a_name_of_the_time(server: Server) -> None:
    uris = [done(server, "snapshot create vda").strip() for _ in range(2)]
    assert all(re.fullmatch(r"vda@\d{8}-\d{6}(-\d+)?", NbdUri.parse(uri).export) for uri in uris)
    assert uris[0] != uris[1]


def test_create_without_tcp_listener_refuses_tcp_and_makes_nothing(children: Children, tmp_path: Path) -> None:
    (tmp_path / "vda.img").write_bytes(bytes(MiB))
    control = tmp_path / "c.sock"
    command = [sys.executable, "-m", "fleecing", "serve", str(tmp_path / "vda.img"), "--control", str(control)]
    places = ["--unix", str(tmp_path / "n.sock"), "--state-dir", str(tmp_path / "state")]
    children.start(*command, *places, env={"PYTHONPATH": str(ROOT)}).wait_for_line("^Ready")
    runner = CliRunner()
    result = runner.invoke(main, ["snapshot", "create", "vda", "--tcp", "--control", str(control)])
    assert result.exit_code == 1
    assert "the server has no TCP listener" in result.stderr
    assert runner.invoke(main, ["snapshot", "list", "--control", str(control), "--json"]).stdout == "[]\n"


@pytest.mark.parametrize(
    "command, sentence",
    [
        ("snapshot create vdc", "there is no disk 'vdc': this server has vda, vdb"),
        ("snapshot create vda vdc", "there is no disk 'vdc'"),
        ("snapshot create vda --name taken", "disk 'vda' has a snapshot 'taken' already"),
        ("snapshot create vda --temp-limit 64K", "temp limit of 65536 bytes is too small"),
        ("snapshot show vda@no", "disk 'vda' has no snapshot 'no'"),
        ("snapshot delete vdc@no", "there is no disk 'vdc'"),
        ("map vda@no", "disk 'vda' has no snapshot 'no'"),
    ],
)
def test_a_refusal_is_one_sentence_with_exit_code_1(server: Server, command: str, sentence: str) -> None:
    server.snapshot(name="taken")
    result = ask(server, command)
    assert (result.exit_code, result.stdout) == (1, "")
    assert sentence in result.stderr
    assert result.stderr.count("\n") == 1
    assert [s["export"] for s in server.status()["snapshots"]] == ["vda@taken"]


def test_without_a_server_the_way_out_is_told(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["status", "--control", str(tmp_path / "no.sock")])
    assert (result.exit_code, result.stdout) == (1, "")
    assert "start one with `fleecing serve`, or name its socket with --control" in result.stderr


def test_list_has_one_line_a_snapshot(server: Server) -> None:
    result = ask(server, "snapshot list")
    assert (result.stdout, result.exit_code) == ("", 0)
    assert "There is no snapshot" in result.stderr
    server.freeze("vda", "vdb", name="s")
    lines = done(server, "snapshot list").splitlines()
    assert [line.split()[0] for line in lines] == ["SNAPSHOT", "vda@s", "vdb@s"]
    assert all(line.endswith(("STATE", "ready")) for line in lines)
    assert listed(server, "snapshot list --json") == server.status()["snapshots"]


def test_a_broken_snapshot_has_its_reason_in_list_and_show(server: Server) -> None:
    server.snapshot(name="s", temp_limit=512 * KiB)
    run("qemu-io", "-f", "raw", "-c", "write -P 2 0 1M", server.uri())
    reason = "copy before a guest write failed: temp limit of 524288 bytes reached"
    assert f"broken: {reason}" in done(server, "snapshot list")
    assert re.search(f"^broken +{reason}$", done(server, "snapshot show vda@s"), re.MULTILINE)
    assert reason in ask(server, "map vda@s").stderr


def test_show_tells_uris_and_temp(server: Server) -> None:
    uri = server.snapshot(name="s")
    shown = done(server, "snapshot show vda@s")
    assert uri in shown
    assert str(server.temp("vda@s")) in shown
    assert "untouched      16 clusters, 1 MiB" in shown


def test_delete_takes_several_and_tells_what_was_not_there(server: Server) -> None:
    server.freeze("vda", "vdb", name="s")
    result = ask(server, "snapshot delete vda@s vdb@s vdb@no")
    assert (result.exit_code, result.stdout) == (0, "")
    assert result.stderr.splitlines() == [
        "vda@s: deleted",
        "vdb@s: deleted",
        "vdb@no: not there, nothing to delete",
    ]
    assert listed(server, "snapshot delete vda@s --json") == [{"disk": "vda", "name": "s", "deleted": False}]


def test_disk_list_names_disks_and_uris(server: Server) -> None:
    assert server.uri("vdb") in done(server, "disk list").splitlines()[2]
    assert [disk["name"] for disk in listed(server, "disk list --json")] == ["vda", "vdb"]


def test_status_shows_disks_snapshots_and_clients(server: Server, libnbd: Any) -> None:
    client = libnbd.NBD()
    client.connect_uri(server.snapshot(name="s"))
    screen = done(server, "status")
    assert re.search(r"^vda +1 MiB", screen, re.MULTILINE)
    assert re.search(r"^vda@s .* 1 +ready$", screen, re.MULTILINE)
    assert re.search(r"^unix.* vda@s ", screen, re.MULTILINE)
    assert listed(server, "status --json")["pid"] == server.child.pid
    client.shutdown()


def test_status_goes_on_until_it_is_interrupted(server: Server, children: Children) -> None:
    command = ("-m", "fleecing", "status", "--watch", "--interval", "0.1", "--json", "--control")
    watch = children.start(sys.executable, "-u", *command, str(server.control_path), env={"PYTHONPATH": str(ROOT)})
    while watch.stdout.count("\n") < 2:
        assert watch.returncode is None, watch.stderr
    watch.signal(signal.SIGINT)
    assert watch.wait() == 0
    assert json.loads(watch.stdout.splitlines()[1])["pid"] == server.child.pid


def test_map_draws_a_sign_for_each_cluster_and_a_legend(server: Server) -> None:
    uri = server.snapshot(name="s")
    run("qemu-io", "-f", "raw", "-c", "write -P 2 64k 128k", server.uri())
    run("qemu-io", "-f", "raw", "-c", "discard 0 64k", "-c", "discard 960k 64k", uri)
    lines = done(server, "map vda@s").splitlines()
    assert lines[0] == "vda@s: 1 MiB, clusters of 64 KiB, each sign is 64 KiB"
    assert lines[1] == "-##............-"
    assert re.search(r"^# +128 KiB +copied", "\n".join(lines), re.MULTILINE)
    assert listed(server, "map vda@s --json") == {
        "disk": "vda",
        "name": "s",
        "size": MiB,
        "cluster_size": 64 * KiB,
        "runs": [
            {"offset": 0, "length": 64 * KiB, "state": "trimmed"},
            {"offset": 64 * KiB, "length": 128 * KiB, "state": "copied"},
            {"offset": 192 * KiB, "length": 768 * KiB, "state": "untouched"},
            {"offset": 960 * KiB, "length": 64 * KiB, "state": "trimmed"},
        ],
    }


@pytest.mark.parametrize("columns", [40, 80, 200])
def test_map_keeps_to_the_width_of_the_terminal(serve: Serve, tmp_path: Path, columns: int) -> None:
    image = tmp_path / "big.img"
    image.touch()
    with image.open("r+b") as file:
        file.truncate(1024 * MiB)
    server = serve(image)
    server.snapshot(name="s")
    environment = {"FLEECING_CONTROL": str(server.control_path), "COLUMNS": str(columns)}
    result = CliRunner().invoke(main, ["map", "vda@s"], env=environment)
    rows = [line for line in result.stdout.splitlines() if set(line) == {"."}]
    assert max(map(len, rows)) <= columns
    assert 10 <= len(rows) <= 16
