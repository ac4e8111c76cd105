"""`fleecing checkpoint`, and what `snapshot create` says of increments."""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path
from typing import Any

import pytest
from bitarray import bitarray
from click.testing import CliRunner, Result

from fleecing.cli.main import main
from fleecing.units import KiB, MiB
from tests.peers import run
from tests.serving import Serve, Server

CLUSTER = 64 * KiB
SIZE = MiB + 5


@pytest.fixture
def server(serve: Serve, tmp_path: Path) -> Server:
    """Disks vda and vdb; vda has the checkpoint `monday`, clusters 1, 2 and the tail changed since."""
    images = {name: tmp_path / f"{name}.img" for name in ("vda", "vdb")}
    for image in images.values():
        image.write_bytes(b"\1" * SIZE)
    made = serve(images)
    ask(made, "snapshot create vda --name s --checkpoint monday")
    run("qemu-io", "-f", "raw", "-c", "write -P 2 64k 70000", "-c", f"write -P 2 {SIZE - 1} 1", made.uri())
    return made


def ask(server: Server, command: str) -> Result:
    return CliRunner().invoke(main, command.split(), env={"FLEECING_CONTROL": str(server.control_path)})


def done(server: Server, command: str) -> str:
    """What a command that succeeds prints on stdout."""
    result = ask(server, command)
    assert result.exit_code == 0, result.stderr
    return result.stdout


def listed(server: Server, command: str) -> Any:
    return json.loads(done(server, command))


def test_list_tells_age_and_changed_bytes(server: Server) -> None:
    lines = done(server, "checkpoint list").splitlines()
    assert lines[0].split() == ["DISK", "CHECKPOINT", "CREATED", "AGE", "CHANGED", "STATE"]
    assert re.match(r"vda +monday +\S+ \S+ +\d+ (s|min) +128 KiB +active$", lines[1])
    (info,) = listed(server, "checkpoint list vda --json")
    assert (info["changed"], info["recording"], info["granularity"]) == (2 * CLUSTER + 5, True, CLUSTER)
    assert listed(server, "checkpoint list --json") == [info]
    empty = ask(server, "checkpoint list vdb")
    assert (empty.stdout, empty.exit_code) == ("", 0)
    assert "There is no checkpoint" in empty.stderr


def test_list_tells_why_one_is_inconsistent(server: Server, tmp_path: Path) -> None:
    server.stop()
    with (tmp_path / "vda.img").open("r+b") as image:
        image.write(b"x")
    server.start()
    assert re.search(r" \?  +inconsistent: the image was written by something else", done(server, "checkpoint list"))


def test_delete_says_what_was_not_there(server: Server) -> None:
    for said in ("deleted", "not there, nothing to delete"):
        result = ask(server, "checkpoint delete vda monday")
        assert (result.exit_code, result.stdout) == (0, "")
        assert result.stderr == f"checkpoint monday of vda: {said}\n"
    assert listed(server, "checkpoint delete vda monday --json")["deleted"] is False


def test_export_writes_bits_with_the_documented_header(server: Server, tmp_path: Path) -> None:
    out = tmp_path / "out.bits"
    assert done(server, f"checkpoint export vda monday {out}") == ""
    raw = out.read_bytes()
    assert struct.unpack_from(">8sIIQQ", raw) == (b"FLEEBITS", 1, CLUSTER, SIZE, 17)
    bits = bitarray(endian="little")
    bits.frombytes(raw[4096:])
    assert (len(bits), list(bits.search(1))) == (24, [1, 2, 16])
    assert (
        CliRunner()
        .invoke(main, ["checkpoint", "export", "vda", "monday", "-", "--control", str(server.control_path)])
        .stdout_bytes
        == raw
    )
    assert sorted(path.name for path in tmp_path.glob("out*")) == ["out.bits"]
    done(server, "checkpoint export vda monday /dev/null")
    assert Path("/dev/null").is_char_device()


def test_export_as_json_has_the_extents(server: Server) -> None:
    assert listed(server, "checkpoint export vda monday --json") == {
        "disk": "vda",
        "name": "monday",
        "size": SIZE,
        "granularity": CLUSTER,
        "extents": [{"offset": CLUSTER, "length": 2 * CLUSTER}, {"offset": MiB, "length": 5}],
    }


def test_create_since_prints_the_uri_and_show_tells_the_mode(server: Server) -> None:
    result = ask(server, "snapshot create vda --name i --since monday --checkpoint tuesday --bitmap-name b")
    assert (result.stdout, result.stderr) == (server.uri("vda@i") + "\n", "")
    shown = done(server, "snapshot show vda@i")
    for line in ("mode +incremental, changes since monday", "checkpoint +tuesday", "dirty bitmap +b", "durable +no"):
        assert re.search(f"^{line}$", shown, re.MULTILINE), line
    assert [c["name"] for c in server.checkpoints()] == ["monday", "tuesday"]


def test_a_fall_back_to_full_is_told_beside_the_uri(server: Server) -> None:
    refused = ask(server, "snapshot create vda vdb --since monday --name i")
    assert (refused.exit_code, refused.stdout) == (1, "")
    assert "disk 'vdb' has no checkpoint 'monday'; take a full one, or allow for it with --or-full" in refused.stderr
    result = ask(server, "snapshot create vda vdb --since monday --name i --or-full")
    assert result.stdout.split() == [server.uri("vda@i"), server.uri("vdb@i")]
    assert result.stderr == "vdb@i: full, not incremental: disk 'vdb' has no checkpoint 'monday'\n"
    made = listed(server, "snapshot create vdb --since monday --or-full --name j --json")
    assert [(s["mode"], s["reason"]) for s in made] == [("full", "disk 'vdb' has no checkpoint 'monday'")]
    assert "reason" in done(server, "snapshot show vdb@j")


@pytest.mark.parametrize(
    "command, sentence",
    [
        ("snapshot create vda --since a --bitmap a", "--since and --bitmap do not go together"),
        ("snapshot create vda --or-full", "--or-full goes with --since only"),
        ("snapshot create vda --bitmap-name b", "--bitmap-name goes with --since or --bitmap only"),
        ("checkpoint export vda monday", "Give the file OUT, or --json"),
        ("checkpoint export vda monday out --json", "Give the file OUT, or --json"),
        ("checkpoint delete vda a/b", "'a/b' is no name"),
    ],
)
def test_misuse_ends_with_2_before_any_server_is_asked(command: str, sentence: str) -> None:
    result = CliRunner().invoke(main, [*command.split(), "--control", "/nowhere"])
    assert result.exit_code == 2
    assert sentence in result.stderr


@pytest.mark.parametrize(
    "command, sentence",
    [
        ("checkpoint export vda no /dev/null", "disk 'vda' has no checkpoint 'no'"),
        ("checkpoint export vda no --json", "disk 'vda' has no checkpoint 'no'"),
        ("checkpoint list vdc", "there is no disk 'vdc'"),
        ("checkpoint delete vdc a", "there is no disk 'vdc'"),
        ("snapshot create vda --checkpoint monday", "disk 'vda' has a checkpoint 'monday' already"),
        ("checkpoint export vda monday /nowhere/out", "/nowhere/out.part: No such file"),
    ],
)
def test_a_refusal_is_one_sentence_with_exit_code_1(server: Server, command: str, sentence: str) -> None:
    result = ask(server, command)
    assert (result.exit_code, result.stdout) == (1, "")
    assert sentence in result.stderr
    assert result.stderr.count("\n") == 1
