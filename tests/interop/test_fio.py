"""fio against the server: a load whose every block carries its checksum."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.images import MIB, make_image
from tests.peers import Child, Children, run, run_any
from tests.serving import Serve

SIZE = 32 * MIB


def fio(uri: str, *options: str) -> list[str]:
    """The command for one job over a whole disk."""
    return [
        *("fio", "--name=guest", "--ioengine=nbd", f"--uri={uri}", f"--size={SIZE}", "--iodepth=16"),
        *("--verify=crc32c", "--verify_fatal=1", "--verify_state_save=0", *options),
    ]


def ended_well(load: Child) -> None:
    assert load.wait() == 0, load.stdout + load.stderr


@pytest.mark.parametrize(
    "mix",
    [
        ["--rw=randwrite", "--bs=4k", "--fsync=50"],
        ["--rw=randwrite", "--bssplit=512/20:4k/50:7680/10:64k/20"],
        ["--rw=randrw", "--bs=16k", "--fsync=20"],
    ],
    ids=["4k", "mixed sizes", "reads and writes"],
)
def test_all_that_was_written_is_there_while_snapshots_come_and_go(
    serve: Serve, tmp_path: Path, children: Children, mix: list[str]
) -> None:
    old = make_image(tmp_path / "disk.raw", SIZE)
    server = serve(tmp_path / "disk.raw")
    first = server.snapshot(name="first")
    load = children.start(*fio(server.uri(), f"--io_size={3 * SIZE}", "--verify_backlog=256", *mix))
    turns = 0
    while turns < 2 or load.returncode is None:
        uri = server.snapshot(name=f"s{turns}")
        run("nbdcopy", uri, str(tmp_path / "one.raw"))
        if turns:
            server.delete(f"vda@s{turns - 1}")
        run("nbdcopy", uri, str(tmp_path / "two.raw"))
        assert (tmp_path / "one.raw").read_bytes() == (tmp_path / "two.raw").read_bytes()
        turns += 1
    ended_well(load)
    run("nbdcopy", first, str(tmp_path / "first.raw"))
    assert (tmp_path / "first.raw").read_bytes() == old
    assert server.show("vda@first")["state"] == "ready"


def test_what_was_written_before_the_snapshot_is_verified_on_it(serve: Serve, tmp_path: Path) -> None:
    make_image(tmp_path / "disk.raw", SIZE)
    server = serve(tmp_path / "disk.raw")
    run(*fio(server.uri(), "--rw=write", "--bs=64k", "--do_verify=0"))
    frozen = server.snapshot()
    run(*fio(server.uri(), "--rw=randwrite", "--bs=4k", "--do_verify=0", "--verify_pattern=7", "--verify=pattern"))
    run(*fio(frozen, "--rw=read", "--bs=64k"))
    result = run_any(*fio(server.uri(), "--rw=read", "--bs=64k"))
    assert result.returncode != 0
    assert "verify" in result.stderr + result.stdout


def test_four_jobs_on_four_connections_do_not_disturb_each_other(
    serve: Serve, tmp_path: Path, children: Children
) -> None:
    make_image(tmp_path / "disk.raw", 4 * SIZE)
    server = serve(tmp_path / "disk.raw")
    server.snapshot(name="s")
    load = children.start(
        *fio(server.uri(), "--rw=randwrite", "--bs=4k", "--io_size=8m", "--numjobs=4", f"--offset_increment={SIZE}"),
        *("--thread", "--group_reporting"),
    )
    ended_well(load)
    assert server.show("vda@s")["state"] == "ready"


def test_trims_and_writes_are_mixed(serve: Serve, tmp_path: Path, children: Children) -> None:
    old = make_image(tmp_path / "disk.raw", SIZE)
    server = serve(tmp_path / "disk.raw")
    frozen = server.snapshot()
    load = children.start(
        *("fio", "--name=guest", "--ioengine=nbd", f"--uri={server.uri()}", f"--size={SIZE}", "--iodepth=16"),
        *("--rw=randtrimwrite", "--bs=16k", "--io_size=16m"),
    )
    ended_well(load)
    run("nbdcopy", frozen, str(tmp_path / "frozen.raw"))
    assert (tmp_path / "frozen.raw").read_bytes() == old
