"""`fleecing backup`: increments by itself, one instant over disks, undone when it fails, mended after kill -9."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from fleecing.cli import backup_run, chain_pull
from fleecing.cli.main import main
from tests.images import FULL, MIB, little_space, make_image
from tests.peers import run
from tests.serving import ROOT, Serve, Server

SIZE = 8 * MIB + 333
ENV = {**os.environ, "PYTHONPATH": str(ROOT)}


def words(server: Server, folder: Path, *more: str) -> list[str]:
    control = ["--control", str(server.control_path)]
    return [sys.executable, "-m", "fleecing", "backup", *(more or ("vda",)), str(folder), *control, "--json"]


def backup(
    server: Server, folder: Path, *more: str, expect: int = 0, wrapper: tuple[str, ...] = ()
) -> list[dict[str, object]]:
    result = subprocess.run(
        [*wrapper, *words(server, folder, *more)], env=ENV, capture_output=True, text=True, timeout=60, check=False
    )
    assert result.returncode == expect, (result.returncode, result.stderr)
    assert "Traceback" not in result.stderr
    found: list[dict[str, object]] = json.loads(result.stdout or "[]")
    return found


def points(folder: Path) -> list[str]:
    manifest = folder / "manifest.json"
    return [point["name"] for point in json.loads(manifest.read_text())["points"]] if manifest.exists() else []


def change(server: Server, disk: str = "vda", seed: int = 0) -> None:
    offset = random.Random(seed).randrange(SIZE - 100_000) // 512 * 512
    run("qemu-io", "-f", "raw", "-c", f"write -P {seed % 255 + 1} {offset} 90k", server.uri(disk))


def assert_is(folder: Path, point: str, image: Path) -> None:
    """The image of this moment, by qemu-img alone."""
    run("qemu-img", "compare", "-f", "raw", "-F", "qcow2", str(image), str(folder / f"{point}.qcow2"))


def checkpoints(server: Server) -> set[tuple[str, str]]:
    found = server.control.request("GET", "/v1/checkpoints")["checkpoints"]
    return {(checkpoint["disk"], checkpoint["name"]) for checkpoint in found}


def assert_tidy(server: Server, folder: Path, *disks: str) -> None:
    """No snapshot, one checkpoint a disk, which its last point belongs to; no file that nothing needs."""
    assert server.control.request("GET", "/v1/snapshots")["snapshots"] == []
    assert checkpoints(server) == {(disk, points(folder / disk)[-1]) for disk in disks}
    for disk in disks:
        found = {path.suffix for path in (folder / disk).iterdir()}
        assert found <= {"", ".json", ".qcow2", ".chunks"}
    assert not (folder / ".backup.json").exists()


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "vda.img"
    make_image(path, SIZE)
    return path


@pytest.fixture
def server(serve: Serve, image: Path) -> Server:
    return serve(image)


def test_the_first_is_full_and_the_others_are_what_changed(server: Server, image: Path, tmp_path: Path) -> None:
    folder = tmp_path / "backups"
    (first,) = backup(server, folder)
    assert first["since"] is None and first["reason"] is None
    change(server)
    (second,) = backup(server, folder)
    assert second["since"] == first["point"]
    assert isinstance(second["data"], int) and second["data"] < MIB
    assert_is(folder / "vda", str(second["point"]), image)
    assert_tidy(server, folder, "vda")
    change(server, seed=3)
    backup(server, folder, "vda", "--keep", "2")
    assert len(points(folder / "vda")) == 2
    assert_is(folder / "vda", points(folder / "vda")[-1], image)


def test_several_disks_are_backed_up_together(serve: Serve, image: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.img"
    make_image(other, SIZE, seed=1)
    server = serve({"vda": image, "vdb": other})
    folder = tmp_path / "backups"
    backup(server, folder, "vda", "vdb")
    change(server, "vdb")
    found = backup(server, folder, "vda", "vdb")
    assert found[0]["data"] == 0
    for disk, path in (("vda", image), ("vdb", other)):
        assert_is(folder / disk, points(folder / disk)[-1], path)
    assert_tidy(server, folder, "vda", "vdb")
    run(sys.executable, "-m", "fleecing", "verify", str(folder))


def names(server: Server) -> list[str]:
    return [snapshot["export"] for snapshot in server.control.request("GET", "/v1/snapshots")["snapshots"]]


def test_a_second_disk_that_fails_undoes_the_first(
    serve: Serve, image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its snapshot is gone before its turn comes. Both disks go on from the checkpoint of the backup before."""
    other = tmp_path / "other.img"
    make_image(other, SIZE, seed=1)
    server = serve({"vda": image, "vdb": other})
    folder = tmp_path / "backups"
    disks = ("vda", "vdb")
    backup(server, folder, *disks)
    before = {disk: points(folder / disk) for disk in disks}
    change(server, "vda")
    real = chain_pull.pull_point

    def then_the_other_goes(*args: Any, **more: Any) -> Any:
        report = real(*args, **more)
        for victim in (export for export in names(server) if export.startswith("vdb@")):
            server.delete(victim)
        return report

    with monkeypatch.context() as patched:
        patched.setattr("fleecing.cli.backup_run.pull_point", then_the_other_goes)
        result = CliRunner().invoke(main, words(server, folder, *disks)[3:])
    assert result.exit_code == 1 and result.stderr.splitlines()[-1].startswith("Error: "), result.output
    assert {disk: points(folder / disk) for disk in disks} == before
    assert_tidy(server, folder, *disks)
    found = backup(server, folder, *disks)
    assert [result["since"] for result in found] == [before["vda"][0]] * 2
    for disk, path in (("vda", image), ("vdb", other)):
        assert_is(folder / disk, points(folder / disk)[-1], path)
    assert_tidy(server, folder, *disks)


def test_a_server_that_dies_when_the_backup_is_safe_costs_nothing(
    server: Server, image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "backups"
    backup(server, folder)
    change(server)
    real = backup_run.Backup._end

    def dies(self: backup_run.Backup, record: Any) -> None:
        server.kill()
        real(self, record)

    with monkeypatch.context() as patched:
        patched.setattr(backup_run.Backup, "_end", dies)
        result = CliRunner().invoke(main, words(server, folder)[3:])
    assert result.exit_code == 1
    assert "is safe; what is left to be tidied" in result.stderr and "no server answers" in result.stderr
    server.start()
    change(server, seed=5)
    (last,) = backup(server, folder)
    assert last["since"] == points(folder / "vda")[1]
    assert len(points(folder / "vda")) == 3
    assert_is(folder / "vda", str(last["point"]), image)
    assert_tidy(server, folder, "vda")


@pytest.mark.parametrize("damage", ["gone", "cut", "without checksums"])
def test_no_increment_is_put_on_damaged_ground(server: Server, image: Path, tmp_path: Path, damage: str) -> None:
    """Each night's backup would look well, and nothing could be restored."""
    folder = tmp_path / "backups"
    (first,) = backup(server, folder)
    backup(server, folder)
    file = folder / "vda" / f"{first['point']}.qcow2"
    if damage == "cut":
        os.truncate(file, 3 * MIB)
    else:
        file.with_suffix(".qcow2" if damage == "gone" else ".chunks").unlink()
    (third,) = backup(server, folder, expect=3)
    assert third["since"] is None and f"is damaged: {folder}/vda/{first['point']}" in str(third["reason"])
    assert_tidy(server, folder, "vda")
    (fourth,) = backup(server, folder)
    assert fourth["since"] == third["point"]
    assert_is(folder / "vda", str(fourth["point"]), image)


def test_a_lost_checkpoint_makes_a_full_backup_and_exit_code_3(server: Server, image: Path, tmp_path: Path) -> None:
    folder = tmp_path / "backups"
    (first,) = backup(server, folder)
    server.control.request("DELETE", f"/v1/checkpoints/vda@{first['point']}")
    (second,) = backup(server, folder, expect=3)
    assert second["since"] is None and str(first["point"]) in str(second["reason"])
    assert_is(folder / "vda", str(second["point"]), image)
    assert_tidy(server, folder, "vda")
    backup(server, folder, "vda", "--full")
    assert_tidy(server, folder, "vda")


@pytest.mark.parametrize("how", FULL)
def test_a_full_folder_undoes_everything(server: Server, tmp_path: Path, how: str) -> None:
    with little_space(how, tmp_path / "small", 3 * MIB) as (folder, wrapper):
        backup(server, folder / "b", "vda", expect=1, wrapper=tuple(wrapper))
        assert points(folder / "b" / "vda") == []
        assert checkpoints(server) == set()
        assert server.control.request("GET", "/v1/snapshots")["snapshots"] == []
        assert not list((folder / "b").rglob("*.qcow2*"))


def test_a_disk_that_is_not_there_is_told(server: Server, tmp_path: Path) -> None:
    backup(server, tmp_path / "backups", "vda", "vdx", expect=1)
    assert checkpoints(server) == set()
    server.kill()
    backup(server, tmp_path / "backups", "vda", expect=1)
    assert not (tmp_path / "backups").exists()


@pytest.mark.parametrize("seed", range(4))
def test_a_backup_killed_at_any_moment_is_mended_by_the_next(
    server: Server, image: Path, tmp_path: Path, seed: int
) -> None:
    folder = tmp_path / "backups"
    backup(server, folder)
    change(server, seed=seed)
    process = subprocess.Popen(
        words(server, folder, "vda", "--full"), env=ENV, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    files = (
        (folder / ".backup.json").exists,
        lambda: any((folder / "vda").glob("*.journal")),
        lambda: len(points(folder / "vda")) > 1,
        lambda: '"safe": true' in read(folder / ".backup.json"),
    )
    while process.poll() is None and not files[seed]():
        pass
    process.send_signal(signal.SIGKILL)
    process.wait()
    run(sys.executable, "-m", "fleecing", "verify", str(folder))
    change(server, seed=seed + 9)
    (last,) = backup(server, folder)
    assert last["since"] is not None
    assert_tidy(server, folder, "vda")
    assert_is(folder / "vda", str(last["point"]), image)
    run(sys.executable, "-m", "fleecing", "verify", str(folder))


def read(path: Path) -> str:
    try:
        return path.read_text()
    except FileNotFoundError:
        return ""


def test_a_server_killed_during_a_backup_and_started_again(server: Server, image: Path, tmp_path: Path) -> None:
    """The snapshot and the checkpoints outlive it: the same run goes on, or the next one mends it."""
    folder = tmp_path / "backups"
    backup(server, folder)
    change(server, seed=1)
    process = subprocess.Popen(
        words(server, folder, "vda", "--full", "--bandwidth", "2M"),
        env=ENV,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    while process.poll() is None and not any((folder / "vda").glob("*.journal")):
        pass
    server.kill()
    server = Server(server.unix.parent, image)
    try:
        process.communicate(timeout=60)
        assert process.returncode == 0
        change(server, seed=2)
        (last,) = backup(server, folder)
        assert last["since"] is not None
        assert_is(folder / "vda", str(last["point"]), image)
        assert_tidy(server, folder, "vda")
    finally:
        server.stop()
