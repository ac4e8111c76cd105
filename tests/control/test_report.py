"""What the API tells."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from fleecing.block.snapshot_access import SnapshotAccess
from fleecing.control.addresses import Addresses, paste_lines
from fleecing.control.config import make_settings
from fleecing.control.jobs import Jobs
from fleecing.control.lag import LoopLag
from fleecing.control.manager import Manager
from fleecing.control.metrics import Metrics
from fleecing.control.models import SnapshotRequest
from fleecing.control.report import Reporter
from fleecing.errors import ControlError
from fleecing.server.listener import NbdServer
from fleecing.units import KiB, MiB

CLUSTER = 64 * KiB
SIZE = 2 * MiB + 1
LIMIT = 3 * MiB // 2
ADDRESSES = Addresses((("0.0.0.0", 10809), ("::", 7)), ("/run/a b/nbd.sock",), "/run/c.sock")


@pytest.fixture
def reporter(tmp_path: Path) -> Iterator[Reporter]:
    """One disk with one snapshot."""
    (tmp_path / "vda.img").write_bytes(b"\1" * SIZE)
    disk = {"vda": {"path": str(tmp_path / "vda.img")}}
    manager = Manager(make_settings({"disk": disk, "state-dir": str(tmp_path / "state")}, "test"))
    manager.create(SnapshotRequest(disks=["vda"], name="s", temp_limit=LIMIT))
    yield Reporter(manager, NbdServer(manager), ADDRESSES)
    manager.close()


def metrics(reporter: Reporter) -> bytes:
    """The text for Prometheus."""
    folder = Path(reporter.disks()[0].path).parent
    return Metrics(reporter, Jobs(reporter.manager, str(folder / "state")), LoopLag()).text()


def test_clusters_are_counted_by_state(reporter: Reporter) -> None:
    reporter.manager.disks["vda"].node.write(0, b"\2" * (3 * CLUSTER))
    reporter.manager.snapshot("vda", "s").node.discard(SIZE - 1, 1)
    info = reporter.snapshot("vda", "s")
    assert info.clusters.model_dump() == {"untouched": 29, "copied": 3, "trimmed": 1, "not_in_bitmap": 0}
    assert info.copied_total == 3
    assert info.temp.limit == LIMIT
    assert 3 * CLUSTER < info.temp.used <= info.temp.peak <= LIMIT


def test_a_map_in_pages_is_the_whole_map(reporter: Reporter) -> None:
    for cluster in range(0, 30, 2):
        reporter.manager.disks["vda"].node.write(cluster * CLUSTER, b"\2")
    whole = reporter.map_page("vda", "s", 0, 100)
    assert whole.next is None
    assert [(run.offset, run.length, run.state) for run in whole.runs[:2]] == [
        (0, CLUSTER, "copied"),
        (CLUSTER, CLUSTER, "untouched"),
    ]
    assert sum(run.length for run in whole.runs) == SIZE
    assert reporter.map_page("vda", "s", 5 * CLUSTER + 7, 100).runs == whole.runs[5:]


def test_pages_follow_each_other_without_a_gap(reporter: Reporter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fleecing.control.report.MAP_WINDOW", 3)
    reporter.manager.disks["vda"].node.write(4 * CLUSTER, b"\2")
    covered = 0
    offset: int | None = 0
    while offset is not None:
        page = reporter.map_page("vda", "s", offset, 1)
        assert page.runs[0].offset == covered
        covered += sum(run.length for run in page.runs)
        offset = page.next
    assert covered == SIZE


@pytest.mark.parametrize("offset", [SIZE, -1])
def test_a_map_from_outside_is_refused(reporter: Reporter, offset: int) -> None:
    with pytest.raises(ControlError, match=f"offset {offset} is outside"):
        reporter.map_page("vda", "s", offset, 1)


def test_a_broken_snapshot_says_why(reporter: Reporter) -> None:
    reporter.manager.disks["vda"].node.write(0, b"\2" * SIZE)
    info = reporter.snapshots()[0]
    assert info.state == "broken"
    assert info.broken == "copy before a guest write failed: temp limit of 1572864 bytes reached"
    with pytest.raises(ControlError, match="temp limit of 1572864 bytes reached"):
        reporter.map_page("vda", "s", 0, 1)
    assert b'fleecing_snapshot_broken{disk="vda",snapshot="s"} 1.0' in metrics(reporter)


def test_metrics_are_told_while_a_copy_hangs_with_the_lock_of_a_snapshot(reporter: Reporter) -> None:
    node = reporter.manager.snapshot("vda", "s").node
    assert isinstance(node, SnapshotAccess)
    with node.clusters.lock:
        assert b'fleecing_snapshot_broken{disk="vda",snapshot="s"} 0.0' in metrics(reporter)


def test_an_image_that_shrinks_is_a_disks_problem(reporter: Reporter, tmp_path: Path) -> None:
    assert reporter.disks()[0].problem is None
    with (tmp_path / "vda.img").open("r+b") as image:
        image.truncate(5)
    assert f"has shrunk from {SIZE} to 5 bytes" in str(reporter.disks()[0].problem)


def test_a_temp_folder_that_has_gone_is_a_disks_problem(reporter: Reporter) -> None:
    folder = Path(reporter.disks()[0].temp_folder)
    folder.rename(folder.with_name("elsewhere"))
    assert "No such file" in str(reporter.disks()[0].problem)
    folder.with_name("elsewhere").rename(folder)


def test_metrics_are_the_figures_of_the_report(reporter: Reporter) -> None:
    text = metrics(reporter).decode()
    for line in (
        'fleecing_disk_size_bytes{disk="vda"} 2.097153e+06',
        'fleecing_clients{export="vda"} 0.0',
        'fleecing_clients{export="vda@s"} 0.0',
        'fleecing_snapshot_clusters{disk="vda",snapshot="s",state="untouched"} 33.0',
        'fleecing_snapshot_temp_limit_bytes{disk="vda",snapshot="s"} 1.572864e+06',
        'fleecing_snapshot_broken{disk="vda",snapshot="s"} 0.0',
    ):
        assert line in text


def test_uris_lead_with_the_unix_socket_and_name_a_host_that_works() -> None:
    assert ADDRESSES.uris("vda@s") == [
        "nbd+unix:///vda@s?socket=/run/a%20b/nbd.sock",
        "nbd://127.0.0.1/vda@s",
        "nbd://[::1]:7/vda@s",
    ]
    assert ADDRESSES.listeners() == ["tcp:0.0.0.0:10809", "tcp:[::]:7", "unix:/run/a b/nbd.sock"]


def test_lines_to_paste_are_quoted_for_the_shell() -> None:
    lines = list(paste_lines(["vda", "vdb"], ADDRESSES, "fleecing"))
    assert lines[:5] == [
        "Disk vda:",
        "  QEMU       -drive 'file=nbd+unix:///vda?socket=/run/a%20b/nbd.sock,file.reconnect-delay=30,format=raw,if=virtio,discard=unmap'",
        "  kernel     nbd-client -unix '/run/a b/nbd.sock' /dev/nbd0 -name vda",
        "  kernel     nbd-client 127.0.0.1 10809 /dev/nbd0 -name vda",
        "  snapshot   fleecing snapshot create vda --control /run/c.sock",
    ]
    assert "/dev/nbd1 -name vdb" in lines[7]


def test_without_a_unix_socket_the_lines_name_the_port() -> None:
    lines = list(paste_lines(["vda"], Addresses((("::1", 5),), (), "/c"), "fleecing"))
    assert lines[1:3] == [
        "  QEMU       -drive 'file=nbd://[::1]:5/vda,file.reconnect-delay=30,format=raw,if=virtio,discard=unmap'",
        "  kernel     nbd-client ::1 5 /dev/nbd0 -name vda",
    ]


def test_where_tls_is_required_uris_and_lines_say_so() -> None:
    place = ("localhost", 5)
    addresses = Addresses((place,), (), "/c", tls_tcp=frozenset({place}), tls_dir="/t")
    assert addresses.uris("vda") == ["nbds://localhost:5/vda"]
    lines = list(paste_lines(["vda"], addresses, "fleecing"))
    assert "-object tls-creds-x509,id=tls,endpoint=client,dir=/t -drive file.driver=nbd," in lines[1]
    assert "file.server.port=5,file.export=vda,file.tls-creds=tls," in lines[1]
    assert lines[2] == "  kernel     nbd-client localhost 5 /dev/nbd0 -name vda -cacertfile /t/ca-cert.pem"


def test_a_comma_in_a_path_does_not_end_qemus_option() -> None:
    (line,) = [line for line in paste_lines(["vda"], Addresses((), ("/a,b",), "/c"), "f") if "QEMU" in line]
    assert "socket=/a,,b,file." in line
