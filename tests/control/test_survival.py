"""Snapshots after the server's end, whatever it was: gone on with, or broken with a reason."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fleecing.control.identity import NANO
from fleecing.units import KiB, MiB
from tests.images import random_bytes
from tests.peers import run
from tests.raw_client import BLOCK_STATUS, EINVAL, FLUSH, READ, RawClient
from tests.serving import Serve, Server

SIZE = 4 * MiB
CLUSTER = 64 * KiB
OLD = random_bytes(SIZE)

CLEAN: Callable[[Server], None] = Server.stop
KILLED: Callable[[Server], None] = Server.kill
ENDS = pytest.mark.parametrize("end", [CLEAN, KILLED], ids=["stopped", "killed"])


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "vda.img"
    path.write_bytes(OLD)
    return path


def write(server: Server, *ranges: str, export: str = "vda") -> None:
    """Ranges as "OFFSET LENGTH" of qemu-io, filled with the byte 2."""
    run("qemu-io", "-f", "raw", *(word for r in ranges for word in ("-c", f"write -P 2 {r}")), server.uri(export))


def changed(path: Path, **values: Any) -> None:
    """Change fields of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def record(server: Server, name: str = "s") -> Path:
    return server.state_dir / "vda" / "snapshots" / name / "snapshot.json"


def lose_power(server: Server) -> None:
    """Kill it, and let the machine have been started anew since."""
    server.kill()
    changed(server.state_dir / "vda" / "disk.json", boot_id="another")


def refusals(server: Server, export: str) -> set[tuple[int, str]]:
    """(error, text) of a read and a look at the status."""
    with RawClient(server.unix, export, contexts=["base:allocation"]) as client:
        replies = [client.request(command, 0, 0, 4096) for command in (READ, BLOCK_STATUS)]
    return {(reply.error, reply.text) for reply in replies}


def broken(server: Server) -> str:
    """Why vda@s is broken, as everybody is told; the disk is served, and deleting frees all that there is."""
    reason: str = server.show("vda@s")["broken"]
    assert server.show("vda@s")["state"] == "broken"
    assert refusals(server, "vda@s") == {(EINVAL, f"snapshot broken: {reason}")}
    write(server, "0 64k")
    server.kill()
    server.start()
    assert server.show("vda@s")["broken"] == reason
    assert server.delete("vda@s")
    assert list((server.state_dir / "vda" / "snapshots").iterdir()) == []
    server.snapshot(name="s")
    return reason


@ENDS
def test_a_snapshot_goes_on_as_it_was(serve: Serve, image: Path, tmp_path: Path, end: Callable[[Server], None]) -> None:
    server = serve(image)
    uri = server.snapshot(name="s")
    write(server, "0 256k", "1M 4k")
    run("qemu-io", "-f", "raw", "-c", "discard 64k 64k", "-c", "discard 2M 1M", uri)
    before, shown = server.map("vda@s"), server.show("vda@s")
    end(server)
    server.start()
    assert server.map("vda@s") == before
    again = server.show("vda@s")
    assert {k: again[k] for k in ("created", "broken", "on_cbw_error", "cbw_timeout", "export")} == {
        k: shown[k] for k in ("created", "broken", "on_cbw_error", "cbw_timeout", "export")
    }
    assert again["temp"]["path"] == shown["temp"]["path"]
    write(server, "0 2M", "3M 1M")
    with RawClient(server.unix, "vda@s") as client:
        assert client.read(0, CLUSTER) == OLD[:CLUSTER]
        assert client.read(2 * CLUSTER, 2 * MiB - 2 * CLUSTER) == OLD[2 * CLUSTER : 2 * MiB]
        assert client.read(3 * MiB, MiB) == OLD[3 * MiB :]
        for offset in (CLUSTER, 2 * MiB):
            assert client.request(READ, 0, offset, 1).text == f"cluster at offset {offset}: trimmed"
    server.delete("vda@s")


@ENDS
def test_temp_files_elsewhere_and_several_disks_go_on(
    serve: Serve, image: Path, tmp_path: Path, end: Callable[[Server], None]
) -> None:
    other = tmp_path / "vdb.img"
    other.write_bytes(OLD[::-1])
    server = serve({"vda": image, "vdb": other}, "--temp-dir", str(tmp_path / "temp"))
    server.freeze("vda", "vdb", name="s", temp_limit=3 * MiB)
    write(server, "0 1M")
    end(server)
    server.start("--temp-dir", str(tmp_path / "temp2"))
    write(server, "0 1M", export="vdb")
    for export, contents in (("vda@s", OLD), ("vdb@s", OLD[::-1])):
        with RawClient(server.unix, export) as client:
            assert client.read(0, SIZE) == contents
        assert server.show(export)["temp"]["limit"] == 3 * MiB
        assert server.temp(export).parent == tmp_path / "temp"
        server.delete(export)
    assert list((tmp_path / "temp").iterdir()) == []


def test_restart_after_restart_changes_nothing(serve: Serve, image: Path) -> None:
    server = serve(image)
    server.snapshot(name="a")
    for number, end in enumerate([CLEAN, KILLED, CLEAN, KILLED]):
        write(server, f"{number * 256}k 64k")
        end(server)
        server.start()
    with RawClient(server.unix, "vda@a") as client:
        assert client.read(0, SIZE) == OLD


@ENDS
def test_a_snapshot_that_broke_stays_broken_with_its_reason(
    serve: Serve, image: Path, end: Callable[[Server], None]
) -> None:
    server = serve(image)
    server.snapshot(name="s", temp_limit=512 * KiB)
    write(server, "0 2M")
    end(server)
    server.start()
    assert broken(server) == "copy before a guest write failed: temp limit of 524288 bytes reached"


def test_without_power_a_snapshot_is_broken_with_that_reason(serve: Serve, image: Path) -> None:
    server = serve(image)
    server.snapshot(name="s")
    write(server, "0 64k")
    lose_power(server)
    server.start()
    assert broken(server) == "the machine lost power or was reset while this snapshot was not durable"


def test_without_power_a_durable_snapshot_goes_on(serve: Serve, image: Path) -> None:
    server = serve(image)
    server.snapshot(name="s", durable=True)
    write(server, "0 1M")
    run("qemu-io", "-f", "raw", "-c", "discard 64k 64k", server.uri("vda@s"))
    for end in (lose_power, KILLED, CLEAN, lose_power):
        end(server)
        server.start()
        write(server, "1M 64k", "0 64k")
        with RawClient(server.unix, "vda@s") as client:
            assert client.read(0, CLUSTER) == OLD[:CLUSTER]
            assert client.request(READ, 0, CLUSTER, 1).text == f"cluster at offset {CLUSTER}: trimmed"
            assert client.read(2 * CLUSTER, SIZE - 2 * CLUSTER) == OLD[2 * CLUSTER :]
    assert server.show("vda@s")["durable"] is True


def test_after_a_clean_stop_the_machine_may_be_started_anew(serve: Serve, image: Path) -> None:
    server = serve(image)
    server.snapshot(name="s")
    write(server, "0 64k")
    server.stop()
    changed(server.state_dir / "vda" / "disk.json", boot_id="another", device=4711)
    server.start()
    write(server, "0 1M")
    with RawClient(server.unix, "vda@s") as client:
        assert client.read(0, SIZE) == OLD


def test_an_image_that_was_moved_after_a_clean_stop_is_the_same(serve: Serve, image: Path, tmp_path: Path) -> None:
    server = serve({"vda": image})
    server.snapshot(name="s")
    write(server, "0 64k")
    server.stop()
    run("cp", "-p", str(image), str(tmp_path / "moved.img"))
    image.unlink()
    config = Path(server.unix).with_name("fleecing.toml")
    config.write_text(config.read_text().replace(str(image), str(tmp_path / "moved.img")))
    server.start()
    write(server, "0 1M")
    with RawClient(server.unix, "vda@s") as client:
        assert client.read(0, SIZE) == OLD


def written(image: Path) -> None:
    with image.open("r+b") as file:
        file.write(b"x")


def replaced(image: Path) -> None:
    run("cp", "-p", str(image), f"{image}.copy")
    os.replace(f"{image}.copy", image)


def grown(image: Path) -> None:
    os.truncate(image, SIZE + CLUSTER)


@pytest.mark.parametrize(
    "meanwhile, reason",
    [
        (written, "the image was written by something else while it was not served"),
        (replaced, "another file was put in the place of the image"),
        (grown, f"from {SIZE} to {SIZE + CLUSTER} bytes"),
    ],
)
@ENDS
def test_an_image_that_is_not_the_same_breaks_the_snapshots(
    serve: Serve, image: Path, meanwhile: Callable[[Path], None], reason: str, end: Callable[[Server], None]
) -> None:
    server = serve(image)
    server.snapshot(name="s")
    end(server)
    meanwhile(image)
    if meanwhile is written and end is KILLED:
        later = image.stat().st_mtime_ns + 10 * NANO
        os.utime(image, ns=(later, later))
        reason = "the image was written by something else after the server that had it had died"
    server.start()
    assert reason in broken(server)


def test_writes_just_before_a_kill_are_the_servers_own(serve: Serve, image: Path) -> None:
    server = serve(image)
    server.snapshot(name="s")
    write(server, "0 64k")
    alive = server.state_dir / "vda" / "alive"
    server.kill()
    earlier = alive.stat().st_mtime_ns - 2 * NANO
    os.utime(alive, ns=(earlier, earlier))
    server.start()
    assert server.show("vda@s")["state"] == "ready"


def newer(folder: Path) -> None:
    changed(folder / "snapshot.json", version=2, something="new")


def garbage(folder: Path) -> None:
    (folder / "snapshot.json").write_text("{")


def nested(folder: Path) -> None:
    (folder / "snapshot.json").write_text("[" * 100_000)


def incomplete(folder: Path) -> None:
    changed(folder / "snapshot.json", cluster_size="big")


def without_temp(folder: Path) -> None:
    (folder / "temp.qcow2").rename(folder.parent.parent / "elsewhere.qcow2")


def cut_temp(folder: Path) -> None:
    os.truncate(folder / "temp.qcow2", 70000)


def without_bits(folder: Path) -> None:
    (folder / "trimmed.bits").unlink()


def of_another_snapshot(folder: Path) -> None:
    changed(folder / "snapshot.json", name="t")


@pytest.mark.parametrize(
    "damage, reason",
    [
        (newer, "snapshot.json: has version 2, and this release knows 1 only"),
        (garbage, "snapshot.json: is damaged"),
        (nested, "snapshot.json: is damaged"),
        (incomplete, "snapshot.json: is damaged at 'cluster_size'"),
        (without_temp, "temp.qcow2: No such file"),
        (cut_temp, "temp.qcow2"),
        (without_bits, "trimmed.bits"),
        (of_another_snapshot, "is of vda@t"),
    ],
)
@ENDS
def test_files_that_make_no_sense_break_the_snapshot(
    serve: Serve, image: Path, damage: Callable[[Path], None], reason: str, end: Callable[[Server], None]
) -> None:
    server = serve(image)
    server.snapshot(name="s")
    server.snapshot(name="good")
    write(server, "0 64k")
    end(server)
    damage(record(server).parent)
    server.start()
    assert server.show("vda@good")["state"] == "ready"
    assert reason in server.show("vda@s")["broken"]
    server.delete("vda@good")
    broken(server)


def forgotten_trim(folder: Path) -> None:
    with (folder / "trimmed.bits").open("r+b") as file:
        file.seek(4096)
        file.write(bytes(512))


def forgotten_break(folder: Path) -> None:
    with (folder / "trimmed.bits").open("r+b") as file:
        file.seek(600)
        file.write(b"x")


def forgotten_copy(folder: Path) -> None:
    """The entry of the first cluster in the first L2 table is zero: the image is as sound as before."""
    with (folder / "temp.qcow2").open("r+b") as file:
        (table,) = struct.unpack_from(">Q", file.read(48), 40)
        file.seek(table)
        (entry,) = struct.unpack(">Q", file.read(8))
        file.seek(entry & 0x00FFFFFFFFFFFE00)
        file.write(bytes(8))


def copy_elsewhere(folder: Path) -> None:
    """An older state of the file, as a restored backup of the host would have it."""
    os.replace(folder / "older.qcow2", folder / "temp.qcow2")


@pytest.mark.parametrize("damage", [forgotten_trim, forgotten_break, forgotten_copy, copy_elsewhere])
def test_damage_after_a_clean_stop_that_makes_sense_is_found(
    serve: Serve, image: Path, damage: Callable[[Path], None]
) -> None:
    """Each of these files could have been left by a server; only not by the last one."""
    server = serve(image)
    server.snapshot(name="s")
    folder = record(server).parent
    server.stop()
    shutil.copy(folder / "temp.qcow2", folder / "older.qcow2")
    server.start()
    write(server, "0 256k", "1M 64k")
    run("qemu-io", "-f", "raw", "-d", "unmap", "-c", "discard 64k 64k", server.uri("vda@s"))
    server.stop()
    damage(folder)
    (folder / "older.qcow2").unlink(missing_ok=True)
    server.start()
    assert "its files are not as the last server left them" in broken(server)


def test_a_seal_that_was_broken_by_the_next_server_is_not_asked_for_again(serve: Serve, image: Path) -> None:
    server = serve(image)
    server.snapshot(name="s")
    server.stop()
    server.start()
    write(server, "0 256k")
    server.kill()
    server.start()
    assert server.show("vda@s")["state"] == "ready"
    with RawClient(server.unix, "vda@s") as client:
        assert client.read(0, SIZE) == OLD


def test_an_increment_that_forgot_what_belongs_to_it_is_found(serve: Serve, image: Path) -> None:
    server = serve(image)
    server.snapshot(name="full", checkpoint="c")
    write(server, "0 64k", "1M 64k")
    server.snapshot(name="s", since="c", checkpoint="d")
    write(server, "2M 64k")
    server.stop()
    with (record(server).with_name("scope.bits")).open("r+b") as file:
        file.seek(4096)
        file.write(b"\xff")
    with (server.state_dir / "vda" / "checkpoints" / "c.bitmap").open("r+b") as file:
        file.seek(4096)
        file.write(b"\0")
    server.start()
    assert "its files are not as the last server left them" in server.show("vda@s")["broken"]
    states = {c["name"]: (c["state"], c["inconsistent"] or "") for c in server.checkpoints()}
    assert states["c"][0] == "inconsistent"
    assert "c.bitmap: is not as the last server left it" in states["c"][1]
    assert states["d"] == ("active", "")
    assert server.show("vda@full")["state"] == "ready"


def test_temp_that_comes_back_later_is_not_believed(serve: Serve, image: Path) -> None:
    server = serve(image)
    server.snapshot(name="s")
    write(server, "0 64k")
    server.stop()
    temp = record(server).with_name("temp.qcow2")
    temp.rename(temp.with_name("away"))
    server.start()
    write(server, "1M 64k")
    server.stop()
    temp.with_name("away").rename(temp)
    server.start()
    assert "temp.qcow2" in broken(server)


def test_a_missing_record_of_the_image_breaks_the_snapshots(serve: Serve, image: Path) -> None:
    server = serve(image)
    server.snapshot(name="s")
    server.stop()
    (server.state_dir / "vda" / "disk.json").unlink()
    server.start()
    assert "disk.json is missing" in broken(server)


def test_a_creation_that_was_not_finished_is_undone_on_all_disks(serve: Serve, image: Path, tmp_path: Path) -> None:
    other = tmp_path / "vdb.img"
    other.write_bytes(OLD)
    server = serve({"vda": image, "vdb": other})
    server.freeze("vda", "vdb", name="s")
    server.freeze("vda", name="whole")
    server.kill()
    unfinished = {"version": 1, "disks": ["vda", "vdb", "foreign"], "snapshot": "s", "checkpoint": None}
    (server.state_dir / ".creation-1.json").write_text(json.dumps(unfinished))
    server.start()
    assert [s["export"] for s in server.status()["snapshots"]] == ["vda@whole"]
    assert json.loads((server.state_dir / ".creation-1.json").read_text())["disks"] == ["foreign"]
    server.freeze("vda", "vdb", name="s")
    server.kill()
    server.start()
    assert len(server.status()["snapshots"]) == 3


@pytest.mark.parametrize("step", ["without record", "marked deleted"])
def test_a_deletion_that_was_not_finished_ends_at_the_start(serve: Serve, image: Path, step: str) -> None:
    server = serve(image)
    server.snapshot(name="s")
    write(server, "0 64k")
    server.kill()
    if step == "without record":
        record(server).unlink()
    else:
        with record(server).with_name("trimmed.bits").open("r+b") as bits:
            bits.seek(512)
            bits.write(b"deleted\0")
    server.start()
    assert server.status()["snapshots"] == []
    assert list(record(server).parent.parent.iterdir()) == []
    assert "leftover of an earlier run: snapshot vda@s" in server.log


def test_a_client_that_comes_back_goes_on_reading(serve: Serve, image: Path, tmp_path: Path) -> None:
    server = serve(image)
    uri = server.snapshot(name="s")
    run("nbdcopy", uri, str(tmp_path / "before"))
    write(server, "0 1M")
    server.kill()
    server.start()
    run("nbdcopy", uri, str(tmp_path / "after"))
    assert (tmp_path / "before").read_bytes() == (tmp_path / "after").read_bytes() == OLD


@ENDS
def test_a_read_once_snapshot_forgets_only_what_was_sent(
    serve: Serve, image: Path, end: Callable[[Server], None]
) -> None:
    """The next server trims nothing that it has not sent itself, and no byte is trimmed that was not sent at all."""
    server = serve(image)
    server.snapshot(name="s", read_once=True, read_once_grace=2 * CLUSTER)
    with RawClient(server.unix, "vda@s") as client:
        for n in range(4):
            assert client.read(n * CLUSTER, CLUSTER) == OLD[n * CLUSTER : (n + 1) * CLUSTER]
        assert client.read(4 * CLUSTER, CLUSTER - 1) == OLD[4 * CLUSTER : 5 * CLUSTER - 1]
        assert client.request(READ, 0, CLUSTER, 1).text == f"cluster at offset {CLUSTER}: trimmed"
    assert json.loads(record(server).read_text())["read_once_grace"] == 2 * CLUSTER
    end(server)
    server.start()
    shown = server.show("vda@s")
    assert (shown["read_once"], shown["read_once_grace"]) == (True, 2 * CLUSTER)
    write(server, "0 4M")
    with RawClient(server.unix, "vda@s") as client:
        assert client.read(5 * CLUSTER - 1, 1) == OLD[5 * CLUSTER - 1 : 5 * CLUSTER]
        for n in (5, 6, 7):
            assert client.read(n * CLUSTER, CLUSTER) == OLD[n * CLUSTER : (n + 1) * CLUSTER]
        assert client.request(READ, 0, 5 * CLUSTER, 1).text == f"cluster at offset {5 * CLUSTER}: trimmed"
        for n in (2, 3, 4):  # in the window, and partly sent, when the first server ended
            assert client.read(n * CLUSTER, CLUSTER) == OLD[n * CLUSTER : (n + 1) * CLUSTER]
        client.request(FLUSH, 0, 0, 0)  # what was sent before its reply is trimmed
    assert server.map("vda@s") == [
        (0, 3 * CLUSTER, "trimmed"), (3 * CLUSTER, 2 * CLUSTER, "copied"), (5 * CLUSTER, 3 * CLUSTER, "trimmed"),
        (8 * CLUSTER, SIZE - 8 * CLUSTER, "copied")]  # fmt: skip
