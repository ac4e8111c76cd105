"""`fleecing push`: byte-exact, cancelled, failed and killed without a trace, and never over a served image."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from fleecing.cli.control_client import ControlClient
from fleecing.cli.main import main
from tests.client.servers import nbdkit
from tests.crash.forked import ForkedServer
from tests.images import IS_ROOT, MIB, loop_device, make_image, make_sparse, random_bytes
from tests.peers import run

SIZE = 8 * MIB + 777


class Pushing:
    """A server, and commands to it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.image = folder / "vda.img"
        make_sparse(self.image, SIZE, {0: random_bytes(3 * MIB), SIZE - 70_000: random_bytes(70_000, 1)})
        self.start()

    def start(self) -> None:
        self.server = ForkedServer(self.folder, self.image)
        self.server.wait_ready()
        self.control = ControlClient(str(self.server.control))

    def __call__(self, *words: object, expect: int = 0) -> Result:
        result = CliRunner().invoke(main, [*map(str, words), "--control", str(self.server.control)])
        assert result.exit_code == expect, result.output
        return result

    def snapshots(self) -> list[str]:
        return [s["export"] for s in self.control.request("GET", "/v1/snapshots")["snapshots"]]

    def assert_no_trace(self) -> None:
        assert self.snapshots() == []
        assert not list((self.folder / "state").rglob(".job-*"))
        assert not list(self.folder.glob("copy*"))


@pytest.fixture
def pushing(tmp_path: Path) -> Iterator[Pushing]:
    found = Pushing(tmp_path)
    yield found
    found.server.stop()


@pytest.mark.parametrize("name, compress", [("copy.img", "none"), ("copy.qcow2", "none"), ("copy.qcow2", "zstd")])
def test_a_disk_is_pushed_and_its_snapshot_is_gone(pushing: Pushing, name: str, compress: str) -> None:
    copy = pushing.folder / name
    pushing("push", "vda", copy, "--compress", compress)
    form = "qcow2" if name.endswith("qcow2") else "raw"
    run("qemu-img", "compare", "-f", "raw", "-F", form, str(pushing.image), str(copy))
    copy.unlink()
    pushing.assert_no_trace()
    (job,) = json.loads(pushing("job", "list", "--json").stdout)
    assert job["state"] == "done" and job["done"] == job["total"] == SIZE
    assert job["data"] < 4 * MIB


def test_a_snapshot_is_pushed_trimmed_and_stays(pushing: Pushing) -> None:
    before = pushing.image.read_bytes()
    pushing.control.request("POST", "/v1/snapshots", {"disks": ["vda"], "name": "s"})
    uri = f"nbd+unix:///vda?socket={pushing.server.unix}"
    run("qemu-io", "-f", "raw", "-c", "write -P 7 1M 2M", uri)
    pushing("push", "vda@s", pushing.folder / "copy")
    assert (pushing.folder / "copy").read_bytes() == before
    counts = pushing.control.request("GET", "/v1/snapshots/vda@s")["clusters"]
    assert counts["untouched"] == counts["copied"] == 0
    assert "trimmed" in pushing("push", "vda@s", pushing.folder / "copy2", expect=1).stderr
    changes = {"disks": ["vda"], "name": "full", "checkpoint": "c"}, {"disks": ["vda"], "name": "inc", "since": "c"}
    for request in changes:
        pushing.control.request("POST", "/v1/snapshots", request)
    assert "changes only" in pushing("push", "vda@inc", pushing.folder / "copy2", expect=1).stderr
    assert not list(pushing.folder.glob("copy2*"))


def test_an_export_is_pushed_over(pushing: Pushing, tmp_path: Path) -> None:
    there, folder = tmp_path / "there.img", tmp_path / "to"
    folder.mkdir()
    make_image(there, SIZE + 5)
    with nbdkit(folder, "file", str(there)) as uri:
        pushing("push", "vda", str(uri))
    assert there.read_bytes()[:SIZE] == pushing.image.read_bytes()


if IS_ROOT:  # whoever is not cannot have a loop device

    def test_a_block_device_is_pushed_over(pushing: Pushing) -> None:
        backing = pushing.folder / "backing"
        old = random_bytes(SIZE + 10_000, 5)
        backing.write_bytes(old[: len(old) // 512 * 512])
        with loop_device(backing) as device:
            pushing("push", "vda", device)
            assert (
                "the format qcow2 is for new files"
                in pushing("push", "vda", device, "--format", "qcow2", expect=1).stderr
            )
        data = backing.read_bytes()
        assert data[:SIZE] == pushing.image.read_bytes()
        assert data[SIZE:] == old[SIZE : len(data)]
        pushing.assert_no_trace()

    def test_a_device_that_is_too_small_is_refused_and_left_alone(pushing: Pushing) -> None:
        backing = pushing.folder / "backing"
        backing.write_bytes(b"x" * MIB)
        with loop_device(backing) as device:
            assert f"{device}: has {MIB} bytes, {SIZE} are needed" in pushing("push", "vda", device, expect=1).stderr
        assert backing.read_bytes() == b"x" * MIB
        pushing.assert_no_trace()

    def test_a_loop_device_of_a_served_image_is_never_the_target(pushing: Pushing) -> None:
        before = pushing.image.read_bytes()
        with loop_device(pushing.image) as device:
            assert "is the image of disk 'vda'" in pushing("push", "vda", device, expect=1).stderr
        assert pushing.image.read_bytes() == before
        pushing.assert_no_trace()


def test_a_push_that_is_cancelled_leaves_nothing(pushing: Pushing) -> None:
    number = pushing("push", "vda", pushing.folder / "copy", "--bandwidth", "1M", "--no-wait").stdout.strip()
    assert json.loads(pushing("job", "show", number, "--json").stdout)["state"] == "running"
    assert json.loads(pushing("job", "cancel", number, "--json").stdout)["state"] == "cancelled"
    pushing.assert_no_trace()
    assert "there is no job 77" in pushing("job", "cancel", "77", expect=1).stderr


def test_the_bandwidth_of_a_push_is_changed_while_it_runs(pushing: Pushing) -> None:
    copy = pushing.folder / "copy"
    number = pushing("push", "vda", copy, "--bandwidth", "1", "--no-wait").stdout.strip()
    assert pushing.control.request("GET", f"/v1/jobs/{number}")["bandwidth"] == 1  # so it would take weeks
    assert "limit 2 B/s" in pushing("job", "set", number, "--bandwidth", "2").stdout
    assert json.loads(pushing("job", "set", number, "--bandwidth", "none", "--json").stdout)["bandwidth"] is None
    while (job := pushing.control.request("GET", f"/v1/jobs/{number}"))["state"] == "running":
        pass
    assert (job["state"], copy.read_bytes()) == ("done", pushing.image.read_bytes())
    result = pushing("job", "set", number, "--bandwidth", "1M", expect=1)
    assert result.stderr == f"Error: job {number} has ended (done): nothing of it can be changed\n"


def test_a_push_that_fails_leaves_nothing(pushing: Pushing) -> None:
    for target, problem in (("/proc/copy", "/proc/copy"), (pushing.image, "is there already")):
        assert problem in pushing("push", "vda", target, expect=1).stderr
    pushing.assert_no_trace()


def test_a_served_image_is_never_the_target(pushing: Pushing) -> None:
    link = pushing.folder / "link"
    link.symlink_to(pushing.image)
    before = pushing.image.read_bytes()
    pushing("push", "vda", link, expect=1)
    assert pushing.image.read_bytes() == before
    pushing.assert_no_trace()


def test_a_server_that_is_killed_or_stopped_undoes_its_pushes(pushing: Pushing) -> None:
    for end in (pushing.server.kill, pushing.server.stop):
        pushing("push", "vda", pushing.folder / "copy", "--bandwidth", "1M", "--no-wait")
        assert len(pushing.snapshots()) == 1
        pushing.server.kill() if end.__name__ == "kill" else pushing.server.stop()
        pushing.start()
        pushing.assert_no_trace()
