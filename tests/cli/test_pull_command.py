"""`fleecing pull` as a user runs it: targets, failures, kill -9 and --resume."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.client.servers import nbdkit
from tests.images import FULL, MIB, little_space, make_image, make_sparse, random_bytes
from tests.peers import run
from tests.serving import ROOT, Serve, Server

SIZE = 24 * MIB + 1000
ENV = {**os.environ, "PYTHONPATH": str(ROOT)}


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "vda.img"
    make_sparse(path, SIZE, {0: random_bytes(7 * MIB), 12 * MIB: b"text " * MIB, SIZE - 1: b"e"})
    return path


@pytest.fixture
def server(serve: Serve, image: Path) -> Server:
    return serve(image)


def command(server: Server | None, *words: str) -> list[str]:
    control = [] if server is None else ["--control", str(server.control_path)]
    return [sys.executable, "-m", "fleecing", "pull", *words, *control]


def pull(
    server: Server | None, *words: str, expect: int = 0, wrapper: tuple[str, ...] = ()
) -> subprocess.CompletedProcess[str]:
    result = subprocess.run(
        [*wrapper, *command(server, *words)], env=ENV, capture_output=True, text=True, timeout=60, check=False
    )
    assert result.returncode == expect, result.stderr
    assert "Traceback" not in result.stderr
    return result


def assert_same(image: Path, copy: Path) -> None:
    form = "qcow2" if copy.suffix == ".qcow2" else "raw"
    if form == "qcow2":
        run("qemu-img", "check", "-f", "qcow2", str(copy))
    run("qemu-img", "compare", "-f", "raw", "-F", form, str(image), str(copy))


@pytest.mark.parametrize(
    "words", [["copy.img"], ["copy.qcow2"], ["copy.qcow2", "--compress", "zstd"], ["copy", "--no-check"]]
)
def test_a_snapshot_by_its_name_is_copied_and_trimmed(
    server: Server, image: Path, tmp_path: Path, words: list[str]
) -> None:
    server.snapshot(name="s")
    result = pull(server, "vda@s", str(tmp_path / words[0]), *words[1:])
    assert_same(image, tmp_path / words[0])
    assert "Pulled 12 MiB of data" in result.stderr and not result.stdout
    assert server.show("vda@s")["clusters"]["untouched"] == 0
    assert not list(tmp_path.glob("copy*.part")) + list(tmp_path.glob("copy*.journal"))


def test_a_snapshot_that_is_not_trimmed_can_be_pulled_again(server: Server, image: Path, tmp_path: Path) -> None:
    uri = server.snapshot(name="s", tcp=True)
    for name in ("one", "two"):
        pull(None, uri, str(tmp_path / name), "--no-trim")
        assert (tmp_path / name).read_bytes() == image.read_bytes()
    assert server.show("vda@s")["clusters"]["trimmed"] == 0


def test_stdout_gets_the_disk_and_nothing_else(server: Server, image: Path) -> None:
    server.snapshot(name="s")
    result = subprocess.run(
        command(server, "vda@s", "-", "--json"), env=ENV, capture_output=True, timeout=60, check=True
    )
    assert result.stdout == image.read_bytes()
    assert json.loads(result.stderr.splitlines()[-1])["event"] == "done"


def test_another_export_is_written_over(server: Server, image: Path, tmp_path: Path, serve: Serve) -> None:
    there = tmp_path / "there.img"
    make_image(there, 30 * MIB)
    other = serve(there)
    server.snapshot(name="s")
    pull(server, "vda@s", other.uri())
    other.stop()
    assert there.read_bytes()[:SIZE] == image.read_bytes()


def test_an_existing_file_is_written_over_only_when_told_so(server: Server, image: Path, tmp_path: Path) -> None:
    old = tmp_path / "old.img"
    make_image(old, SIZE)
    server.snapshot(name="s")
    assert "is there already" in pull(server, "vda@s", str(old), expect=1).stderr
    pull(server, "vda@s", str(old), "--existing")
    assert old.read_bytes() == image.read_bytes()


def test_json_tells_progress_and_the_end(server: Server, tmp_path: Path) -> None:
    server.snapshot(name="s")
    lines = [json.loads(line) for line in pull(server, "vda@s", str(tmp_path / "copy"), "--json").stdout.splitlines()]
    assert [line["event"] for line in lines[-2:]] == ["progress", "done"]
    assert lines[-2]["done"] == lines[-2]["total"] == SIZE
    assert lines[-2]["temp"] > 0
    assert lines[-1]["trimmed"] == SIZE
    failed = pull(server, "vda@s", str(tmp_path / "copy2"), "--json", expect=1)
    assert "trimmed" in json.loads(failed.stdout.splitlines()[-1])["error"]


@pytest.mark.parametrize("words", [[], ["--connections", "2", "--depth", "3"]], ids=["measured", "told"])
def test_a_server_far_away_gets_more_requests_unless_told_how_many(tmp_path: Path, words: list[str]) -> None:
    far, copy = tmp_path / "far.img", tmp_path / "copy"
    far.write_bytes(random_bytes(64 * MIB))
    with nbdkit(tmp_path, "-r", "--filter=delay", "file", str(far), "rdelay=30ms") as uri:
        done = json.loads(pull(None, str(uri), str(copy), "--json", *words).stdout.splitlines()[-1])
    assert_same(far, copy)
    if words:
        assert (done["connections"], done["requests"]) == (2, 6)
    else:
        assert done["requests"] >= 8 * done["connections"]


def test_only_what_changed_of_an_increment_is_copied(server: Server, image: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    server.snapshot(name="full", checkpoint="c1")
    pull(server, "vda@full", str(copy))
    run("qemu-io", "-f", "raw", "-c", "write -P 7 1M 300k", "-c", "write -z 3M 1M", server.uri())
    server.snapshot(name="inc", since="c1")
    result = pull(server, "vda@inc", str(copy), "--existing", "--json")
    assert json.loads(result.stdout.splitlines()[-1])["clean"] > SIZE - 2 * MIB
    assert copy.read_bytes() == image.read_bytes()
    server.snapshot(name="inc2", since="c1")
    assert "whole disks only" in pull(server, "vda@inc2", "-", expect=1).stderr


# Cut off


class Killed:
    """A pull that is killed as soon as its journal has so many records."""

    def __init__(self, words: list[str], journal: Path, records: int) -> None:
        self.process = subprocess.Popen(words, env=ENV, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        assert self.process.stderr is not None
        while self.process.poll() is None:
            if journal.exists() and journal.stat().st_size > 400 + 60 * records:
                self.process.send_signal(signal.SIGKILL)
                break
        self.process.stderr.close()
        self.code = self.process.wait()


@pytest.mark.parametrize(
    "name, compress, records",
    [("copy.img", "none", 0), ("copy.img", "none", 7), ("copy.qcow2", "none", 11), ("copy.qcow2", "zstd", 17)],
)
def test_a_pull_that_was_killed_goes_on(
    server: Server, image: Path, tmp_path: Path, name: str, compress: str, records: int
) -> None:
    """The snapshot is trimmed behind the read head, so nothing could be read twice."""
    server.snapshot(name="s")
    copy = tmp_path / name
    words = ["vda@s", str(copy), "--compress", compress]
    slow = command(server, *words, "--bandwidth", "12M", "--connections", "2")
    killed = Killed(slow, Path(f"{copy}.journal"), records)
    assert killed.code == -signal.SIGKILL
    assert not copy.exists()
    assert "--resume" in pull(server, *words, expect=1).stderr
    Killed([*slow, "--resume"], Path(f"{copy}.journal"), records + 6)
    if not copy.exists():
        report = json.loads(pull(server, *words, "--resume", "--json").stdout.splitlines()[-1])
        assert report["resumed"] + report["data"] + report["zeroes"] == SIZE
        assert report["resumed"] > 0
    assert_same(image, copy)
    assert sorted(p.name for p in tmp_path.glob("copy*")) == [name]
    assert server.show("vda@s")["clusters"]["untouched"] == 0


def test_resume_starts_where_there_was_nothing(server: Server, image: Path, tmp_path: Path) -> None:
    server.snapshot(name="s")
    pull(server, "vda@s", str(tmp_path / "copy"), "--resume")
    assert (tmp_path / "copy").read_bytes() == image.read_bytes()


def test_a_pull_killed_between_the_name_and_its_journal_is_through(server: Server, tmp_path: Path) -> None:
    server.snapshot(name="s")
    copy = tmp_path / "copy"
    journal = Path(f"{copy}.journal")
    killed = Killed(command(server, "vda@s", str(copy), "--bandwidth", "12M"), journal, 4)
    assert killed.code == -signal.SIGKILL
    old = journal.read_bytes()
    pull(server, "vda@s", str(copy), "--resume")
    journal.write_bytes(old)
    assert "finished by the earlier run" in pull(server, "vda@s", str(copy), "--resume").stderr
    assert sorted(p.name for p in tmp_path.glob("copy*")) == ["copy"]
    for data, why in (
        (b"anything", "no journal of a pull"),
        (old.replace(b'"vda@s"', b'"vda@t"'), "its export is 'vda@t', not 'vda@s'"),
        (old.replace(b'"raw"', b'"qcow2"'), "its format is 'qcow2', not 'raw'"),
        (old.replace(b'"size": ', b'"size": 1'), f"is a disk of {SIZE} bytes, its journal is of one of 1{SIZE}"),
    ):
        journal.write_bytes(data)
        assert why in pull(server, "vda@s", str(copy), "--resume", expect=1).stderr
        assert journal.read_bytes() == data


def test_what_was_changed_behind_its_back_is_not_believed(server: Server, image: Path, tmp_path: Path) -> None:
    server.snapshot(name="s")
    copy = tmp_path / "copy"
    words = ["vda@s", str(copy), "--no-trim"]
    killed = Killed(command(server, *words, "--bandwidth", "6M"), Path(f"{copy}.journal"), 4)
    assert killed.code == -signal.SIGKILL
    with open(f"{copy}.part", "r+b") as part:
        part.write(b"damage")
    pull(server, *words, "--resume")
    assert copy.read_bytes() == image.read_bytes()


# Failures: a sentence, exit code 1, nothing that looks whole


@pytest.fixture
def small(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Path, list[str]]]:
    with little_space(request.param, tmp_path / "small", 5 * MIB) as found:
        yield found


@pytest.mark.parametrize("small", FULL, indirect=True)
@pytest.mark.parametrize("name", ["copy.img", "copy.qcow2"])
def test_a_full_target_is_told_and_can_be_gone_on_with(
    server: Server, image: Path, tmp_path: Path, small: tuple[Path, list[str]], name: str
) -> None:
    folder, wrapper = small
    server.snapshot(name="s")
    copy = folder / name
    result = pull(server, "vda@s", str(copy), expect=1, wrapper=tuple(wrapper))
    assert f"{copy}.part: " in result.stderr or f"{copy}.journal: " in result.stderr
    assert not copy.exists()
    part, journal = Path(f"{copy}.part"), Path(f"{copy}.journal")
    assert part.exists() == journal.exists()
    if not part.exists():
        return  # there was not even room for what would tell of it
    larger = tmp_path / "larger"
    larger.mkdir()
    for file in (part, journal):
        shutil.copy(file, larger)
    report = json.loads(pull(server, "vda@s", str(larger / name), "--resume", "--json").stdout.splitlines()[-1])
    assert report["resumed"] > 0
    assert_same(image, larger / name)


@pytest.mark.parametrize("target", ["{}/missing/copy", "/dev/full/copy", "/proc/copy"])
def test_a_target_that_cannot_be_made_is_told(server: Server, tmp_path: Path, target: str) -> None:
    server.snapshot(name="s")
    result = pull(server, "vda@s", target.format(tmp_path), expect=1)
    assert result.stderr.startswith("Error: ") and len(result.stderr.splitlines()) == 1
    assert server.show("vda@s")["clusters"]["trimmed"] == 0


def test_a_snapshot_that_is_not_there_is_told_and_leaves_nothing(server: Server, tmp_path: Path) -> None:
    result = pull(server, "vda@nowhere", str(tmp_path / "copy"), expect=1)
    assert "has no snapshot 'nowhere'" in result.stderr
    result = pull(None, server.uri("vda@nowhere"), str(tmp_path / "copy"), expect=1)
    assert "nowhere" in result.stderr
    assert not list(tmp_path.glob("copy*"))


def test_a_sparse_disk_takes_time_by_its_data(serve: Serve, tmp_path: Path) -> None:
    """1 TiB with 64 MiB of data, to qcow2; that it ends within the test's time is the point."""
    path = tmp_path / "vda.img"
    with path.open("wb") as file:
        file.truncate(1 << 40)
        for at in range(64):
            file.seek(at * (1 << 34))
            file.write(random_bytes(MIB, at))
    server = serve(path)
    server.snapshot(name="s")
    copy = tmp_path / "copy.qcow2"
    report = json.loads(pull(server, "vda@s", str(copy), "--json").stdout.splitlines()[-1])
    assert report["data"] == 64 * MIB
    assert copy.stat().st_size < 80 * MIB
    run("qemu-img", "check", "-f", "qcow2", str(copy))
    run("qemu-img", "compare", "-f", "raw", "-F", "qcow2", str(path), str(copy))
