"""The figures of a real server at work, against what real clients did."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.images import FULL, KIB, MIB, little_space, make_image, make_sparse, random_bytes
from tests.peers import Children, run, run_any
from tests.raw_client import READ, RawClient
from tests.scrape import Figures, scrape, when_all_left
from tests.serving import Serve

CLUSTER = 64 * KIB
SIZE = 8 * MIB
FLEECING = (sys.executable, "-m", "fleecing")
Kinds = dict[str, tuple[int, int, int]]


@pytest.fixture
def image(tmp_path: Path) -> Path:
    make_image(tmp_path / "vda.img", SIZE)
    return tmp_path / "vda.img"


def qemu_io(uri: str, *commands: str) -> None:
    run("qemu-io", "-f", "raw", *(word for command in commands for word in ("-c", command)), uri)


def clusters(figures: Figures, snapshot: str) -> dict[str, int]:
    """By state; only those that there are."""
    found = figures.all("fleecing_snapshot_clusters", disk="vda", snapshot=snapshot)
    return {state: int(count) for (state,), count in found.items() if count}


def test_requests_of_a_guest_are_counted_exactly(serve: Serve, image: Path, libnbd: Any) -> None:
    server = serve(image)
    guest = libnbd.NBD()
    guest.add_meta_context("base:allocation")
    guest.set_strict_mode(0)
    guest.connect_uri(server.uri())
    guest.pwrite(b"x" * 4096, 0)
    guest.pwrite(b"y" * 3 * MIB, MIB, libnbd.CMD_FLAG_FUA)
    guest.pread(100, 7)
    guest.pread(5 * MIB, 0)
    guest.zero(CLUSTER, 0)
    guest.trim(2 * CLUSTER, MIB, libnbd.CMD_FLAG_FUA)
    guest.flush()
    guest.cache(CLUSTER, 0)
    guest.block_status(SIZE, 0, lambda *_: 0)
    for call, arguments in ((guest.pread, (10, SIZE)), (guest.pwrite, (b"x" * 10, SIZE)), (guest.trim, (10, SIZE))):
        with pytest.raises(libnbd.Error):
            call(*arguments)
    expected: Kinds = {
        "read": (3, 1, 5 * MIB + 100),
        "write": (3, 1, 3 * MIB + 4096),
        "write_zeroes": (1, 0, CLUSTER),
        "trim": (2, 1, 2 * CLUSTER),
        "flush": (1, 0, 0),
        "cache": (1, 0, 0),
        "block_status": (1, 0, 0),
    }
    now = scrape(server)
    assert now.kinds("active") == expected
    assert now.kinds("snapshot") == {}
    assert now.get("fleecing_clients", export="vda") == 1
    guest.shutdown()
    later = when_all_left(server)
    assert later.kinds("active") == expected
    assert later.timed("active") == {kind: requests for kind, (requests, _, _) in expected.items()}
    assert later.get("fleecing_clients", export="vda") == 0
    assert later.get("fleecing_connections_total", disk="vda", role="active") == 1


def test_histograms_are_as_prometheus_wants_them(serve: Serve, image: Path) -> None:
    server = serve(image)
    qemu_io(server.uri(), "write 0 1M", "read 0 4k", "flush")
    figures = when_all_left(server)
    buckets = figures.all("fleecing_request_seconds_bucket", disk="vda", role="active", kind="write")
    bounds = sorted((float(bound), count) for (bound,), count in buckets.items())
    counts = [count for _, count in bounds]
    assert counts == sorted(counts)
    assert counts[-1] == figures.get("fleecing_request_seconds_count", disk="vda", role="active", kind="write") == 1
    assert [bound for bound, _ in bounds[:4]] == [5e-6, 1e-5, 2.5e-5, 5e-5]
    seconds = figures.get("fleecing_request_seconds_sum", disk="vda", role="active", kind="write")
    assert seconds is not None
    for bound, count in bounds:
        assert (seconds <= bound) == (count == 1)


def test_copies_and_clusters_are_those_that_the_guest_made_necessary(serve: Serve, tmp_path: Path) -> None:
    make_sparse(tmp_path / "vda.img", SIZE + 100, {0: random_bytes(4 * MIB), SIZE: b"tail" * 25})
    server = serve(tmp_path / "vda.img")
    server.snapshot(name="one")
    qemu_io(server.uri(), "write 0 128k", "write 64k 4k", "write 4M 192k", f"write {SIZE} 100")
    backup = server.snapshot(name="two")
    qemu_io(server.uri(), "write 64k 128k")
    qemu_io(backup, "read 1M 4k", "discard 3M 1M")
    now = when_all_left(server)
    assert clusters(now, "one") == {"untouched": 122, "copied": 7}
    assert clusters(now, "two") == {"untouched": 111, "copied": 2, "trimmed": 16}
    assert now.get("fleecing_copied_clusters_total", disk="vda") == 9
    assert now.get("fleecing_copied_bytes_total", disk="vda", contents="data") == 5 * CLUSTER + 100
    assert now.get("fleecing_copied_bytes_total", disk="vda", contents="zeroes") == 3 * CLUSTER
    assert now.get("fleecing_copy_seconds_count", disk="vda") == 5
    assert now.get("fleecing_copy_errors_total", disk="vda") == 0
    kinds = now.kinds("snapshot")
    assert kinds.pop("flush")[0] >= 0  # qemu-io flushes when it closes
    assert kinds == {"read": (1, 0, 4096), "trim": (1, 0, MIB)}
    for name in ("one", "two"):
        temp = server.show(f"vda@{name}")["temp"]
        for key in ("used", "peak"):
            assert now.get(f"fleecing_snapshot_temp_{key}_bytes", disk="vda", snapshot=name) == temp[key]
        assert now.get("fleecing_snapshot_temp_limit_bytes", disk="vda", snapshot=name) is None


def test_series_of_a_snapshot_end_with_it_and_sums_go_on(serve: Serve, image: Path) -> None:
    server = serve(image)
    uri = server.snapshot(name="s", temp_limit="4M")
    qemu_io(server.uri(), "write 0 1M")
    run("nbdcopy", uri, "null:")
    before = when_all_left(server)
    assert before.get("fleecing_snapshot_temp_limit_bytes", disk="vda", snapshot="s") == 4 * MIB
    assert before.kinds("snapshot")["read"][2] == SIZE
    server.delete("vda@s")
    after = scrape(server)
    assert 'snapshot="s"' not in after.text
    assert "vda@s" not in after.text
    assert after.kinds("snapshot") == before.kinds("snapshot")
    for name in ("fleecing_copied_clusters_total", "fleecing_copy_seconds_count"):
        assert after.get(name, disk="vda") == before.get(name, disk="vda") != 0


def test_what_fio_did_over_four_connections_is_exact_and_no_counter_ever_goes_back(
    serve: Serve, image: Path, tmp_path: Path, children: Children
) -> None:
    """Scraped all the while, as snapshots come and go and a backup reads them."""
    server = serve(image)
    load = children.start(
        *("fio", "--name=load", "--ioengine=nbd", f"--uri={server.uri()}", "--rw=randrw", "--bs=4k", "--iodepth=16"),
        *(f"--size={SIZE}", "--numjobs=4", "--thread", "--group_reporting", "--norandommap", "--number_ios=3000"),
        *("--rate_iops=3000,3000", "--output-format=json", f"--output={tmp_path / 'fio.json'}"),
    )
    last: dict[Any, float] = {}
    turns = 0
    while turns < 2 or load.returncode is None:
        uri = server.snapshot(name="s")
        now = dict(scrape(server).counters())
        run("nbdcopy", uri, "null:")
        server.delete("vda@s")
        turns += 1
        for key, value in now.items():
            if ("snapshot", "s") not in key[1]:
                assert value >= last.get(key, 0), key
        last = now
    assert load.wait() == 0
    text = (tmp_path / "fio.json").read_text()
    (job,) = json.loads(text[text.index("{") :])["jobs"]
    figures = when_all_left(server)
    kinds = figures.kinds("active")
    for side in ("read", "write"):
        assert kinds[side] == (job[side]["total_ios"], 0, job[side]["io_bytes"])
        assert figures.timed("active")[side] == job[side]["total_ios"]
    assert figures.kinds("snapshot")["read"][2] == turns * SIZE


def test_a_client_that_is_killed_leaves_no_error_and_all_that_it_did(serve: Serve, image: Path) -> None:
    server = serve(image)
    client = RawClient(server.unix, "vda")
    assert client.read(0, 4096)
    before = scrape(server).kinds("active")
    client.send(READ, 0, 0, SIZE)
    client.close()
    after = when_all_left(server).kinds("active")
    assert before == {"read": (1, 0, 4096)}
    requests, errors, moved = after["read"]
    assert (errors, moved) == (0, 4096 + (requests - 1) * SIZE)


def test_a_restart_begins_at_nought_and_finds_what_is_broken(serve: Serve, image: Path) -> None:
    server = serve(image)
    for name in ("fine", "lost"):
        server.snapshot(name=name)
    qemu_io(server.uri(), "write 0 1M")
    folder = server.temp("vda@lost").parent
    server.stop()
    (folder / "trimmed.bits").unlink()
    server.start()
    figures = scrape(server)
    assert figures.kinds("active") == {}
    assert figures.get("fleecing_copied_clusters_total", disk="vda") == 0
    assert broken(figures) == {"revival": 1}
    assert figures.get("fleecing_snapshot_broken", disk="vda", snapshot="lost") == 1
    assert figures.get("fleecing_snapshot_broken", disk="vda", snapshot="fine") == 0
    assert clusters(figures, "fine") == {"untouched": 112, "copied": 16}


def broken(figures: Figures) -> dict[str, int]:
    """Snapshots that broke, by reason."""
    found = figures.all("fleecing_snapshots_broken_total", disk="vda")
    assert set(found) == {
        (reason,)
        for reason in ("temp-limit", "temp-full", "temp-error", "timeout", "revival", "image-changed", "other")
    }
    return {reason: int(count) for (reason,), count in found.items() if count}


def test_an_image_that_was_written_meanwhile_is_the_reason(serve: Serve, image: Path) -> None:
    server = serve(image)
    server.snapshot(name="s", checkpoint="c")
    assert scrape(server).all("fleecing_checkpoints", disk="vda") == {
        ("active",): 1, ("inconsistent",): 0, ("pending",): 0, ("deleting",): 0
    }  # fmt: skip
    server.stop()
    os.utime(image)
    server.start()
    figures = scrape(server)
    assert broken(figures) == {"image-changed": 1}
    assert figures.get("fleecing_checkpoints", disk="vda", state="inconsistent") == 1
    assert figures.get("fleecing_checkpoints", disk="vda", state="active") == 0


@pytest.mark.parametrize("how", ["temp limit", *FULL])
def test_temp_without_space_is_the_reason(serve: Serve, image: Path, tmp_path: Path, how: str) -> None:
    if how == "temp limit":
        server = serve(image)
        server.snapshot(name="s", temp_limit="1M")
        qemu_io(server.uri(), "write 0 8M")
        assert broken(scrape(server)) == {"temp-limit": 1}
        return
    with little_space(how, tmp_path / "temp", SIZE) as (folder, wrapper):
        server = serve(image, "--temp-dir", str(folder), wrapper=wrapper)
        server.snapshot(name="s")
        qemu_io(server.uri(), "write 0 8M")
        figures = scrape(server)
        server.stop()
    assert broken(figures) == {"temp-full": 1}
    assert figures.get("fleecing_copy_errors_total", disk="vda") == 1
    if how == "full file system":
        assert figures.get("fleecing_temp_size_bytes", disk="vda") == SIZE


def test_jobs_are_counted_by_how_they_ended(serve: Serve, image: Path, tmp_path: Path) -> None:
    server = serve(image)
    push = ("push", "--control", str(server.control_path))
    run(*FLEECING, *push, "vda", str(tmp_path / "copy.img"))
    assert run_any(*FLEECING, *push, "vda", "nbd+unix:///x?socket=/nowhere").returncode == 1
    figures = scrape(server)
    assert figures.all("fleecing_jobs_total") == {("done",): 1, ("failed",): 1, ("cancelled",): 0}
    assert figures.get("fleecing_jobs_running") == 0


def test_the_server_as_a_whole(serve: Serve, image: Path) -> None:
    server = serve(image, "--limit", "clients=2", "--limit", "read-memory=128M")
    figures = scrape(server)
    assert figures.get("fleecing_read_memory_limit_bytes") == 128 * MIB
    assert figures.get("fleecing_read_memory_used_bytes") == 0
    assert figures.get("fleecing_requests_in_flight") == 0
    assert figures.get("fleecing_build_info", version=server.status()["version"]) == 1
    threads = figures.get("fleecing_threads")
    assert threads is not None
    with RawClient(server.unix, "vda") as one, RawClient(server.unix, "vda") as two:
        assert one.read(0, 10) and two.read(0, 10)
        with pytest.raises((AssertionError, OSError)):  # hung up on while it reads, or while it writes
            RawClient(server.unix, "vda")
        figures = scrape(server)
        assert figures.get("fleecing_clients_turned_away_total") == 1
        assert figures.get("fleecing_clients", export="vda") == 2
        now = figures.get("fleecing_threads")
        assert now is not None
        assert now >= threads + 2
    lag = figures.get("fleecing_event_loop_lag_seconds_count")
    while figures.get("fleecing_event_loop_lag_seconds_count") == lag:  # twice a second
        figures = scrape(server)
    assert figures.get("process_resident_memory_bytes") is not None


def test_over_tcp_there_are_the_figures_and_nothing_else(serve: Serve, image: Path) -> None:
    server = serve(image, "--metrics", "127.0.0.1:0")
    port = server.child.wait_for_line(r"metrics on http://127\.0\.0\.1:(\d+)/metrics").group(1)
    base = f"http://127.0.0.1:{port}"
    answer = run("curl", "--silent", "--include", f"{base}/metrics")
    assert re.search(r"(?i)^content-type: text/plain; version=0\.0\.4", answer, re.MULTILINE)
    assert 'fleecing_clients{export="vda"} 0.0' in answer
    for path, options in (
        ("/v1/status", ()),
        ("/v1/snapshots", ("--data", '{"disks": ["vda"]}')),
        ("/", ()),
        ("/metrics", ("-X", "POST")),
        ("/metrics", ("-X", "DELETE")),
    ):
        result = run_any("curl", "--silent", "--write-out", "%{http_code}", *options, base + path)
        assert result.stdout[-3:] in ("404", "405"), path
    assert server.status()["snapshots"] == []


@pytest.mark.parametrize(
    "address, sentence",
    [
        ("0.0.0.0:9847", "metrics on 0.0.0.0:9847 are open to the network"),
        ("127.0.0.1", "'127.0.0.1' has no port"),
        ("nonsense:x", "'nonsense:x' has no port"),
    ],
)
def test_an_address_that_cannot_be_is_refused(image: Path, tmp_path: Path, address: str, sentence: str) -> None:
    folders = ("--state-dir", str(tmp_path / "state"), "--control", str(tmp_path / "c.sock"))
    result = run_any(*FLEECING, "serve", str(image), "--metrics", address, *folders)
    assert result.returncode in (1, 2)
    assert sentence in result.stderr


def test_the_guests_latency_is_told_to_people(serve: Serve, image: Path) -> None:
    server = serve(image)
    server.snapshot(name="s")
    assert server.show("vda@s")["guest_latency"] == {"requests": 0, "p50": None, "p99": None, "kinds": {}}
    with RawClient(server.unix, "vda") as guest:
        for n in range(20):
            guest.read(n * 4096, 4096)
    when_all_left(server)
    (disk,) = server.status()["disks"]
    latency = disk["guest_latency"]
    assert (latency["requests"], list(latency["kinds"])) == (20, ["read"])
    assert 0 < latency["p50"] <= latency["p99"]
    assert server.show("vda@s")["guest_latency"] == latency
    control = ("--control", str(server.control_path))
    table = run(*FLEECING, "status", *control)
    assert re.search(r"^DISK +SIZE +CLUSTER +CLIENTS +P50 +P99", table, re.MULTILINE)
    assert re.search(r"^vda +8 MiB +64 KiB +0 +[\d.]+ (us|ms|s) +[\d.]+ (us|ms|s)", table, re.MULTILINE)
    shown = run(*FLEECING, "snapshot", "show", "vda@s", *control)
    line = r"^guest latency +p50 [\d.]+ \w+, p99 [\d.]+ \w+, 20 requests in the last minute$"
    assert re.search(line, shown, re.MULTILINE)
