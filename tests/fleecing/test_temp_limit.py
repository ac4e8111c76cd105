"""A snapshot's temp limit is changed while it is in use, and somebody is told before it is reached."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from click.testing import CliRunner

from fleecing.cli.main import main
from fleecing.errors import ControlError
from tests.images import KIB, MIB, make_image, random_bytes
from tests.peers import run
from tests.raw_client import TRIM, RawClient
from tests.serving import Serve, Server

SIZE = 4 * MIB
OLD = random_bytes(SIZE)
CLUSTER = 64 * KIB
LIMIT = 2 * MIB
WARNING = "snapshot vda@s: temp is nearly full"


@pytest.fixture
def server(serve: Serve, tmp_path: Path) -> Server:
    """With a snapshot whose temp cannot take all of the disk."""
    make_image(tmp_path / "disk.raw", SIZE)
    server: Server = serve(tmp_path / "disk.raw")
    server.snapshot(name="s", temp_limit=LIMIT)
    return server


def overwrite(server: Server, start: int, end: int) -> None:
    """Write to the disk from `start` to `end` bytes, so that as much is copied."""
    run("qemu-io", "-f", "raw", "-c", f"write -P 7 {start} {end - start}", server.uri())


def set_limit(server: Server, limit: int | str | None) -> dict[str, object]:
    answer: dict[str, object] = server.control.request("PATCH", "/v1/snapshots/vda@s", {"temp_limit": limit})["temp"]
    return answer


def frozen(server: Server) -> bytes:
    with RawClient(server.unix, "vda@s") as client:
        return client.read(0, SIZE)


def test_a_snapshot_near_its_limit_is_grown_and_takes_what_would_have_broken_it(server: Server) -> None:
    overwrite(server, 0, LIMIT - 8 * CLUSTER)
    command = ["snapshot", "set", "vda@s", "--temp-limit", "8M", "--control", str(server.control_path)]
    result = CliRunner().invoke(main, command)
    assert (result.exit_code, result.stdout) == (0, "")
    assert "vda@s: temp limit 8 MiB, 1." in result.stderr
    overwrite(server, 0, SIZE)
    assert server.show("vda@s")["state"] == "ready"
    assert frozen(server) == OLD
    run("qemu-img", "check", "-U", str(server.temp("vda@s")))


@pytest.mark.parametrize("end", [Server.stop, Server.kill], ids=["stopped", "killed"])
def test_the_next_server_has_the_new_limit(server: Server, end: object) -> None:
    set_limit(server, "3M")
    assert callable(end)
    end(server)
    server.start()
    assert server.show("vda@s")["temp"]["limit"] == 3 * MIB
    overwrite(server, 0, LIMIT + 4 * CLUSTER)
    assert server.show("vda@s")["state"] == "ready"
    overwrite(server, 0, SIZE)
    assert "temp limit of 3145728 bytes reached" in server.show("vda@s")["broken"]


def test_no_limit_and_a_smaller_one_are_limits_too(server: Server) -> None:
    assert set_limit(server, None)["limit"] is None
    overwrite(server, 0, SIZE)
    assert frozen(server) == OLD
    with RawClient(server.unix, "vda@s") as client:
        assert client.request(TRIM, 0, 0, SIZE - CLUSTER).error == 0
    assert set_limit(server, MIB)["limit"] == MIB


def test_a_limit_below_what_is_used_is_refused_and_changes_nothing(server: Server) -> None:
    overwrite(server, 0, MIB)
    used = server.show("vda@s")["temp"]["used"]
    with pytest.raises(ControlError) as caught:
        set_limit(server, MIB)
    assert str(caught.value) == (
        f"snapshot 'vda@s' keeps its temp limit: a temp limit of 1048576 bytes is below the {used} bytes "
        "that are in use; TRIM frees some"
    )
    record = json.loads((server.state_dir / "vda/snapshots/s/snapshot.json").read_text())
    assert record["temp_limit"] == server.show("vda@s")["temp"]["limit"] == LIMIT
    assert set_limit(server, used)["limit"] == used
    assert frozen(server) == OLD


@pytest.mark.parametrize("body", [{}, {"temp_limit": 0}, {"temp_limit": "much"}, {"temp_limit": 1, "name": "x"}])
def test_a_mistake_in_the_call_is_refused(server: Server, body: dict[str, object]) -> None:
    with pytest.raises(ControlError) as caught:
        server.control.request("PATCH", "/v1/snapshots/vda@s", body)
    assert caught.value.status == 400


def test_a_broken_snapshot_and_one_that_is_not_there_have_no_limit_to_change(server: Server) -> None:
    overwrite(server, 0, SIZE)
    with pytest.raises(ControlError, match=r"snapshot 'vda@s' is broken, no temp space helps: .* reached; delete it"):
        set_limit(server, "8M")
    server.delete("vda@s")
    with pytest.raises(ControlError, match="disk 'vda' has no snapshot 's'"):
        set_limit(server, "8M")


def test_a_limit_that_cannot_be_kept_is_not_taken(server: Server) -> None:
    record = server.state_dir / "vda/snapshots/s/snapshot.json"
    (record.parent / "snapshot.json.new").mkdir()
    for limit in ("8M", "1536K"):
        with pytest.raises(ControlError, match="keeps its temp limit: its state folder takes no file"):
            set_limit(server, limit)
    assert server.show("vda@s")["temp"]["limit"] == LIMIT
    (record.parent / "snapshot.json.new").rmdir()
    overwrite(server, 0, SIZE)
    assert "temp limit of 2097152 bytes reached" in server.show("vda@s")["broken"]


def told(server: Server) -> int:
    """How often the warning was logged, by now."""
    number = len(server.log)
    server.snapshot(name=f"marker{number}")
    server.child.wait_for_line(f"snapshot vda@marker{number} created")
    server.delete(f"vda@marker{number}")
    return server.log.count(WARNING)


def test_it_is_told_once_each_time_that_80_percent_are_in_use(server: Server) -> None:
    overwrite(server, 0, 18 * CLUSTER)
    assert told(server) == 0
    for cluster in range(18, 26):
        overwrite(server, cluster * CLUSTER, (cluster + 1) * CLUSTER)
    server.child.wait_for_line(f"{WARNING}, 1.6 MiB of its limit of 2 MiB are in use; `fleecing snapshot set vda@s")
    assert told(server) == 1
    with RawClient(server.unix, "vda@s") as client:
        assert client.request(TRIM, 0, 0, MIB).error == 0
    overwrite(server, 26 * CLUSTER, 42 * CLUSTER)
    assert told(server) == 2
    set_limit(server, "8M")
    overwrite(server, 42 * CLUSTER, SIZE)
    assert told(server) == 2
    used = server.show("vda@s")["temp"]["used"]
    assert isinstance(used, int)
    set_limit(server, used)
    assert told(server) == 3


def test_the_folder_with_the_most_free_space_takes_the_next_temp_file(serve: Serve, tmp_path: Path) -> None:
    make_image(tmp_path / "disk.raw", SIZE)
    folders = [Path("/dev/shm") / f"fleecing-{os.getpid()}", tmp_path / "temp"]
    server = serve(tmp_path / "disk.raw", *(word for folder in folders for word in ("--temp-dir", str(folder))))
    try:
        free = {folder: os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize for folder in folders}
        best = max(folders, key=free.__getitem__)
        assert abs(free[folders[0]] - free[folders[1]]) > 64 * MIB, "both have the same space: nothing to choose"
        assert server.status()["disks"][0]["temp_folder"] == str(best)
        server.snapshot(name="s")
        assert server.temp("vda@s").parent == best
        overwrite(server, 0, MIB)
        assert frozen(server) == OLD
        server.delete("vda@s")
        assert list(best.iterdir()) == []
    finally:
        server.stop()
        folders[0].rmdir()


def test_the_watermark_can_be_chosen(serve: Serve, tmp_path: Path) -> None:
    make_image(tmp_path / "disk.raw", SIZE)
    server: Server = serve(tmp_path / "disk.raw", "--temp-watermark", "40")
    uri = server.snapshot(name="s", temp_limit=LIMIT)
    overwrite(server, 0, LIMIT // 2)
    server.child.wait_for_line(WARNING)
    run("qemu-io", "-f", "raw", "-c", f"discard 0 {SIZE}", uri)
    server.stop()
    assert server.log.count(WARNING) == 1
    server.start("--temp-watermark", "100")
    server.delete("vda@s")
    server.snapshot(name="s", temp_limit=LIMIT)
    overwrite(server, 0, LIMIT // 2)
    server.stop()
    assert WARNING not in server.log
