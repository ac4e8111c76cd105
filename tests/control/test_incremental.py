"""Incremental snapshots, read by the real clients."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fleecing.errors import ControlError
from fleecing.nbd.constants import ReplyMode
from fleecing.units import GiB, KiB, MiB
from tests.images import random_bytes
from tests.peers import run, run_any
from tests.raw_client import BLOCK_STATUS, EINVAL, READ, TRIM, RawClient
from tests.serving import Serve, Server

CLUSTER = 64 * KiB
SIZE = 8 * MiB + 700
OLD = random_bytes(SIZE)
BASE, DEPTH, STATE = "base:allocation", "qemu:allocation-depth", "fleecing:cluster-state"
Extents = list[tuple[int, int, int]]


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "vda.img"
    path.write_bytes(OLD)
    return path


@pytest.fixture
def server(serve: Serve, image: Path) -> Server:
    """With the checkpoint `old`, clusters 1, 2 and the tail changed since."""
    made = serve(image)
    made.snapshot(name="base", checkpoint="old")
    made.delete("vda@base")
    write(made, "64k 70000", f"{SIZE - 1} 1")
    return made


def write(server: Server, *ranges: str) -> None:
    """Ranges as "OFFSET LENGTH" of qemu-io, filled with the byte 2."""
    run("qemu-io", "-f", "raw", *(word for r in ranges for word in ("-c", f"write -P 2 {r}")), server.uri())


def extents(uri: str, context: str) -> Extents:
    """(offset, length, status) of a whole export as nbdinfo shows it."""
    found = json.loads(run("nbdinfo", "--json", f"--map={context}", uri))
    return [(extent["offset"], extent["length"], extent["type"]) for extent in found]


def contexts(uri: str) -> list[str]:
    (export,) = json.loads(run("nbdinfo", "--json", uri))["exports"]
    found: list[str] = export["contexts"]
    return found


DIRTY = [
    (0, CLUSTER, 0),
    (CLUSTER, 2 * CLUSTER, 1),
    (3 * CLUSTER, 8 * MiB - 3 * CLUSTER, 0),
    (8 * MiB, 700, 1),
]


def test_an_incremental_export_offers_exactly_one_dirty_bitmap(server: Server, libnbd: Any) -> None:
    uri = server.snapshot(name="i", since="old")
    named: list[str] = []
    client = libnbd.NBD()
    client.set_opt_mode(True)
    client.connect_uri(uri)
    client.add_meta_context("qemu:dirty-bitmap:")
    assert client.opt_list_meta_context(named.append) == 1
    assert named == ["qemu:dirty-bitmap:old"]
    client.opt_abort()
    assert "qemu:dirty-bitmap:mine" in contexts(server.snapshot(name="j", since="old", bitmap_name="mine"))
    assert not any("dirty" in name for name in contexts(server.snapshot(name="f")))


def test_nbdinfo_and_qemu_img_see_what_changed(server: Server) -> None:
    uri = server.snapshot(name="i", since="old")
    assert extents(uri, "qemu:dirty-bitmap:old") == DIRTY
    options = f"driver=nbd,server.type=unix,server.path={server.unix},export=vda@i,x-dirty-bitmap=qemu:dirty-bitmap:old"
    shown = json.loads(run("qemu-img", "map", "--output=json", "--image-opts", options))
    # QEMU shows bit 1 as "not data"; it rounds the size up to its sector.
    clean = [(entry["start"], entry["length"]) for entry in shown if entry["data"]]
    assert clean == [(start, length) for start, length, dirty in DIRTY if not dirty]


def test_only_what_changed_can_be_read(server: Server) -> None:
    server.snapshot(name="i", since="old")
    write(server, "0 1M")
    assert server.map("vda@i")[0] == (0, CLUSTER, "not_in_bitmap")
    changed = bytearray(OLD)
    changed[CLUSTER : CLUSTER + 70000] = b"\2" * 70000
    with RawClient(server.unix, "vda@i", contexts=[BASE]) as client:
        assert client.read(CLUSTER, 2 * CLUSTER) == changed[CLUSTER : 3 * CLUSTER]
        assert client.read(8 * MiB, 700) == OLD[8 * MiB : -1] + b"\2"
        for command in (READ, BLOCK_STATUS):
            reply = client.request(command, 0, 0, CLUSTER)
            assert (reply.error, reply.text) == (EINVAL, "cluster at offset 0: not in bitmap")


@pytest.mark.parametrize("mode", [ReplyMode.STRUCTURED, ReplyMode.EXTENDED])
def test_with_the_bitmap_the_whole_disk_can_be_walked(server: Server, mode: ReplyMode) -> None:
    server.snapshot(name="i", since="old")
    write(server, "64k 64k")
    wanted = [BASE, DEPTH, STATE, "qemu:dirty-bitmap:old"]
    with RawClient(server.unix, "vda@i", mode, contexts=wanted) as client:
        reply = client.request(BLOCK_STATUS, 0, 0, SIZE)
        found = {name: reply.extents[client.contexts[name]] for name in wanted}
        assert found["qemu:dirty-bitmap:old"] == [(length, dirty) for _, length, dirty in DIRTY]
        assert found[BASE] == [(SIZE, 0)]
        assert found[DEPTH] == [(CLUSTER, 2), (CLUSTER, 1), (SIZE - 2 * CLUSTER, 2)]
        assert [state for _, state in found[STATE]] == [3, 1, 0, 3, 0]
        assert client.request(TRIM, 0, CLUSTER, CLUSTER).error == 0
        assert client.request(BLOCK_STATUS, 0, 0, SIZE).text == f"cluster at offset {CLUSTER}: trimmed"
        reply = client.request(BLOCK_STATUS, 0, 3 * CLUSTER, CLUSTER)
        assert reply.extents[client.contexts[BASE]] == [(CLUSTER, 0)]


def test_a_full_snapshot_may_offer_the_bitmap(server: Server) -> None:
    uri = server.snapshot(name="f", bitmap="old", bitmap_name="backup-vda")
    assert [name for name in contexts(uri) if "dirty" in name] == ["qemu:dirty-bitmap:backup-vda"]
    for _ in range(2):
        assert extents(uri, "qemu:dirty-bitmap:backup-vda") == DIRTY
        with RawClient(server.unix, "vda@f") as client:
            assert client.read(0, CLUSTER) == OLD[:CLUSTER]
        write(server, "0 8M")
        server.kill()
        server.start()


def test_an_incremental_snapshot_outlives_a_kill(server: Server) -> None:
    uri = server.snapshot(name="i", since="old", bitmap_name="b")
    write(server, "64k 64k")
    before, info = server.map("vda@i"), server.show("vda@i")
    server.kill()
    server.start()
    assert server.map("vda@i") == before
    assert extents(uri, "qemu:dirty-bitmap:b") == DIRTY
    again = server.show("vda@i")
    for key in ("mode", "since", "bitmap", "reason", "checkpoint"):
        assert again[key] == info[key]
    assert (again["mode"], again["since"]) == ("incremental", "old")


def test_freeze_and_rotation_are_one_step_over_all_disks(serve: Serve, image: Path, tmp_path: Path) -> None:
    other = tmp_path / "vdb.img"
    other.write_bytes(OLD)
    server = serve({"vda": image, "vdb": other})
    server.freeze("vda", "vdb", name="a", checkpoint="one")
    write(server, "0 4k")
    made = server.freeze("vda", "vdb", name="b", checkpoint="two", since="one")
    assert [(s["mode"], s["since"], s["checkpoint"]) for s in made] == [("incremental", "one", "two")] * 2
    assert extents(server.uri("vda@b"), "qemu:dirty-bitmap:one")[0] == (0, CLUSTER, 1)
    assert extents(server.uri("vdb@b"), "qemu:dirty-bitmap:one") == [(0, SIZE, 0)]
    write(server, "128k 4k")
    assert server.changed("vda@two") == [(2 * CLUSTER, CLUSTER)]
    assert server.changed("vda@one") == [(0, CLUSTER), (2 * CLUSTER, CLUSTER)]
    assert server.changed("vdb@one") == []


def test_or_full_falls_back_disk_by_disk_and_says_why(serve: Serve, image: Path, tmp_path: Path) -> None:
    other = tmp_path / "vdb.img"
    other.write_bytes(OLD)
    server = serve({"vda": image, "vdb": other})
    server.freeze("vda", name="a", checkpoint="one")
    with pytest.raises(ControlError, match=r"disk 'vdb' has no checkpoint 'one'; take a full one, or .* --or-full"):
        server.freeze("vda", "vdb", name="b", since="one", checkpoint="two")
    assert [s["export"] for s in server.status()["snapshots"]] == ["vda@a"]
    assert [c["name"] for c in server.checkpoints()] == ["one"]
    made = server.freeze("vda", "vdb", name="b", since="one", checkpoint="two", or_full=True)
    assert [(s["mode"], s["reason"], s["bitmap"]) for s in made] == [
        ("incremental", None, "one"),
        ("full", "disk 'vdb' has no checkpoint 'one'", None),
    ]
    with RawClient(server.unix, "vdb@b") as client:
        assert client.read(0, SIZE) == OLD


def test_an_image_that_was_written_meanwhile_takes_a_full_one(server: Server, image: Path) -> None:
    server.stop()
    with image.open("r+b") as file:
        file.write(b"x")
    server.start()
    (checkpoint,) = server.checkpoints()
    assert checkpoint["state"] == "inconsistent"
    assert checkpoint["changed"] is None
    with pytest.raises(ControlError, match="is inconsistent: the image was written by something else"):
        server.freeze("vda", name="i", since="old")
    (made,) = server.freeze("vda", name="i", since="old", or_full=True, checkpoint="new")
    assert made["mode"] == "full"
    assert "the image was written by something else" in made["reason"]
    write(server, "0 1")
    assert server.changed("vda@new") == [(0, CLUSTER)]
    assert server.delete_checkpoint("vda@old")
    server.freeze("vda", name="j", since="new")


def backup(server: Server, export: str, into: bytearray, context: str) -> None:
    """Copy what is dirty, as a client does that knows only NBD."""
    with RawClient(server.unix, export, ReplyMode.EXTENDED, contexts=[context]) as client:
        position = 0
        for length, dirty in client.request(BLOCK_STATUS, 0, 0, SIZE).extents[client.contexts[context]]:
            if dirty:
                into[position : position + length] = client.read(position, length)
            position += length


@pytest.mark.parametrize("end", [None, Server.stop, Server.kill])
def test_a_chain_of_increments_is_the_snapshot_each_time(server: Server, libnbd: Any, end: Any) -> None:
    chance = random.Random(11)
    copies: dict[str, bytearray] = {}
    server.freeze("vda", name="s0", checkpoint="c0")
    with RawClient(server.unix, "vda@s0") as client:
        copies["c0"] = bytearray(client.read(0, SIZE))
    server.delete("vda@s0")
    for number in range(1, 31):
        guest = libnbd.NBD()
        guest.connect_uri(server.uri())
        for _ in range(5):
            length = chance.choice([1, 512, 4096, 200000])
            guest.pwrite(chance.randbytes(length), chance.randrange(SIZE - length))
        guest.shutdown()
        if end is not None and number % 7 == 0:
            end(server)
            server.start()
        since = chance.choice(list(copies))
        server.freeze("vda", name="i", since=since, checkpoint=f"c{number}")
        server.freeze("vda", name="f")  # nobody has written since
        copy = bytearray(copies[since])
        backup(server, "vda@i", copy, f"qemu:dirty-bitmap:{since}")
        with RawClient(server.unix, "vda@f") as client:
            assert copy == client.read(0, SIZE), f"{number} since {since}"
        for name in ("i", "f"):
            server.delete(f"vda@{name}")
        copies[f"c{number}"] = copy
        if len(copies) > 4:
            gone = chance.choice(list(copies))
            server.delete_checkpoint(f"vda@{gone}")
            del copies[gone]


def test_qemu_img_builds_the_same_chain_of_overlays(server: Server, tmp_path: Path) -> None:
    """A full qcow2, then one overlay an increment, filled by qemu-io with what is dirty; read through the last one."""
    server.freeze("vda", name="s0", checkpoint="c0")
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", server.uri("vda@s0"), str(tmp_path / "0.qcow2"))
    for number in range(1, 5):
        write(server, f"{number * 128}k 70k", f"{number}M 1")
        server.freeze("vda", name=f"s{number}", since=f"c{number - 1}", checkpoint=f"c{number}")
        server.freeze("vda", name=f"f{number}")
        overlay = tmp_path / f"{number}.qcow2"
        backing = ["-b", str(tmp_path / f"{number - 1}.qcow2"), "-F", "qcow2"]
        run("qemu-img", "create", "-f", "qcow2", *backing, str(overlay))
        uri = server.uri(f"vda@s{number}")
        for offset, length, dirty in extents(uri, f"qemu:dirty-bitmap:c{number - 1}"):
            if dirty:
                piece = tmp_path / "piece"
                with RawClient(server.unix, f"vda@s{number}") as client:
                    piece.write_bytes(client.read(offset, length))
                run("qemu-io", "-f", "qcow2", "-c", f"write -s {piece} {offset} {length}", str(overlay))
        full = server.uri(f"vda@f{number}")
        run("qemu-img", "compare", "-f", "raw", "-F", "qcow2", full, str(overlay))


class Walk:
    """virtnbdbackup's walk over a disk (its extent handler), re-stated.

    One context is taken, the others are thrown away, and the next request begins where this context's extents end.
    """

    def __init__(self, libnbd: Any, uri: str, context: str) -> None:
        self.context = context
        self.handle = libnbd.NBD()
        self.handle.add_meta_context(BASE)
        self.handle.add_meta_context(context)
        self.handle.connect_uri(uri)

    def extents(self) -> Iterator[tuple[int, int, int]]:
        size = self.handle.get_size()
        most = 4 * GiB - 1 - (self.handle.get_block_size(0) or 512) + 1
        offset = 0
        while offset < size:
            found: list[int] = []

            def take(context: str, _: int, entries: list[int], __: Any, found: list[int] = found) -> None:
                if context == self.context:
                    found.extend(entries)

            self.handle.block_status(min(size - offset, most), offset, take)
            assert found
            for length, status in zip(found[::2], found[1::2], strict=True):
                assert status in (0, 1)
                yield offset, length, status
                offset += length


@pytest.mark.parametrize("kind", ["since", "bitmap"])
def test_virtnbdbackups_walk_finds_all_that_changed(server: Server, libnbd: Any, kind: str) -> None:
    options: dict[str, Any] = {kind: "old"}
    uri = server.snapshot(name="i", bitmap_name="backup-vda", **options)
    write(server, "0 8M")
    walk = Walk(libnbd, uri, "qemu:dirty-bitmap:backup-vda")
    found = list(walk.extents())
    assert found == DIRTY
    now = bytearray(OLD)
    now[CLUSTER : CLUSTER + 70000] = b"\2" * 70000
    now[SIZE - 1] = 2
    for offset, length, dirty in found:
        if dirty:
            assert walk.handle.pread(length, offset) == now[offset : offset + length]


def test_a_walk_over_a_disk_of_many_gib_covers_all_of_it(serve: Serve, tmp_path: Path, libnbd: Any) -> None:
    image = tmp_path / "big.img"
    image.touch()
    with image.open("r+b") as file:
        file.truncate(13 * GiB + 1)
    server = serve(image)
    server.freeze("vda", name="s", checkpoint="c")
    write(server, "5G 4k", f"{13 * GiB} 1")
    uri = server.snapshot(name="i", since="c")
    walk = list(Walk(libnbd, uri, "qemu:dirty-bitmap:c").extents())
    assert sum(length for _, length, _ in walk) == 13 * GiB + 1
    assert [(offset, length) for offset, length, dirty in walk if dirty] == [(5 * GiB, CLUSTER), (13 * GiB, 1)]


def test_nbdcopy_refuses_an_increment_rather_than_copy_half_of_it(server: Server, tmp_path: Path) -> None:
    """nbdcopy asks for base:allocation alone: what is not in the bitmap is an error, never zeroes."""
    uri = server.snapshot(name="i", since="old")
    assert run_any("nbdcopy", uri, str(tmp_path / "copy")).returncode != 0


def test_a_snapshot_that_broke_tells_it_through_the_bitmap_too(server: Server) -> None:
    server.snapshot(name="i", since="old", temp_limit=512 * KiB)
    write(server, "0 1")
    server.kill()
    (server.state_dir / "vda" / "snapshots" / "i" / "scope.bits").unlink()
    server.start()
    with RawClient(server.unix, "vda@i", contexts=[BASE, "qemu:dirty-bitmap:old"]) as client:
        reply = client.request(BLOCK_STATUS, 0, 0, SIZE)
        assert (reply.error, reply.text) == (EINVAL, f"snapshot broken: {server.show('vda@i')['broken']}")
    assert "scope.bits" in server.show("vda@i")["broken"]
