"""The table of patterns on our server and on the reference, with the same expectations.

The guest's side is driven by qemu-io, the frozen view is read by libnbd, and the temp image by qemu-img.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.fleecing.scenario import KIB, MIB, Scenario, Step
from tests.fleecing.shapes import Frozen, Shape, ours, reference
from tests.images import padded
from tests.peers import run, run_any

CASES = [
    *(
        pytest.param(ours, cluster, size, id=f"ours-{cluster // KIB}K-{size}")
        for cluster in (4 * KIB, 64 * KIB, 2 * MIB)
        for size in (8 * MIB, 8 * MIB + 12345, 8 * MIB + 1)
    ),
    # QEMU rounds a file up to 512 bytes.
    *(
        pytest.param(reference, cluster, size, id=f"reference-{cluster // KIB}K-{size}")
        for cluster in (64 * KIB, 2 * MIB)
        for size in (8 * MIB, 8 * MIB + 512)
    ),
]
SHAPES = pytest.mark.parametrize("shape, cluster, size", CASES)


def qemu_io(uri: str, commands: Iterable[str], *options: str) -> None:
    """Run commands in one qemu-io; each must succeed, and each pattern be there."""
    words = [word for command in commands for word in ("-c", command)]
    output = run("qemu-io", "-f", "raw", "-d", "unmap", *options, *words, uri)
    assert "Pattern verification failed" not in output


def prepare(image: Path, scenario: Scenario) -> bytearray:
    """The image as it is at the instant of the snapshot; its contents."""
    contents = bytearray(scenario.size)
    with image.open("wb") as file:
        file.truncate(scenario.size)
        for step in scenario.patterns():
            step.apply(contents)
            file.seek(step.offset)
            file.write(bytes([step.value]) * step.length)
    return contents


def change(graph: Frozen, steps: Iterable[Step], contents: bytearray) -> None:
    """The guest's changes, in its disk and in the model."""
    steps = list(steps)
    qemu_io(graph.active, [step.qemu_io() for step in steps])
    for step in steps:
        step.apply(contents)


@contextmanager
def connected(libnbd: ModuleType, uri: str) -> Iterator[Any]:
    """A libnbd handle, hung up at the end: nbdkit does not stop before."""
    handle = libnbd.NBD()
    handle.connect_uri(uri)
    try:
        yield handle
    finally:
        handle.shutdown()


def check_frozen(libnbd: ModuleType, graph: Frozen, scenario: Scenario, old: bytes, gone: set[int]) -> None:
    """All that was not trimmed reads as it was; all that was reads as EINVAL."""
    with connected(libnbd, graph.frozen) as handle:
        for offset, length, readable in scenario.runs(gone):
            if readable:
                assert handle.pread(length, offset) == old[offset : offset + length], (offset, length)
                continue
            for position, count in ((offset, 1), (offset + length - 1, 1), (offset, length)):
                with pytest.raises(libnbd.Error, match="Invalid argument"):
                    handle.pread(count, position)


def check_temp(graph: Frozen, scenario: Scenario, old: bytes, gone: set[int], folder: Path) -> None:
    """qemu-img has nothing to say of temp, and reads in it all that was not trimmed as it was."""
    run("qemu-img", "check", "-U", str(graph.temp))
    run("qemu-img", "convert", "-U", "-O", "raw", str(graph.temp), str(folder / "temp.raw"))
    found = (folder / "temp.raw").read_bytes()
    assert len(found) == len(padded(old))
    for offset, length, readable in scenario.runs(gone):
        if readable:
            assert found[offset : offset + length] == old[offset : offset + length], (offset, length)


@SHAPES
def test_the_snapshot_keeps_the_old_bytes_and_the_disk_gets_the_new_ones(
    libnbd: ModuleType, tmp_path: Path, shape: Shape, cluster: int, size: int
) -> None:
    scenario, image = Scenario(size, cluster), tmp_path / "disk.raw"
    now = prepare(image, scenario)
    old = bytes(now)
    with shape(tmp_path, image, cluster) as graph:
        check_frozen(libnbd, graph, scenario, old, set())
        for step in scenario.overwrites():
            change(graph, [step], now)
            qemu_io(graph.frozen, [f"read -P {p.value} {p.offset} {p.length}" for p in scenario.patterns()], "-r")
        check_frozen(libnbd, graph, scenario, old, set())
        qemu_io(graph.active, [f"read -P {step.value} {step.offset} 1" for step in list(scenario.overwrites())[-2:]])
        if graph.server is not None:
            check_temp(graph, scenario, old, set(), tmp_path)
    if graph.server is None:
        check_temp(graph, scenario, old, set(), tmp_path)
    assert image.read_bytes() == now


@SHAPES
def test_what_is_trimmed_is_gone_and_the_rest_stays(
    libnbd: ModuleType, tmp_path: Path, shape: Shape, cluster: int, size: int
) -> None:
    scenario, image = Scenario(size, cluster), tmp_path / "disk.raw"
    now = prepare(image, scenario)
    old = bytes(now)
    trims = scenario.trims(aligned=shape is reference)
    gone = scenario.unreadable(trims)
    assert gone
    with shape(tmp_path, image, cluster) as graph:
        change(graph, list(scenario.overwrites())[:6], now)
        with connected(libnbd, graph.trim) as handle:
            for offset, length in trims:
                handle.trim(length, offset)
        check_frozen(libnbd, graph, scenario, old, gone)
        change(graph, scenario.rewrite(), now)
        check_frozen(libnbd, graph, scenario, old, gone)
        if graph.server is not None:
            counts = graph.server.show("vda@s")["clusters"]
            assert (counts["trimmed"], counts["untouched"]) == (len(gone), 0)
            check_temp(graph, scenario, old, gone, tmp_path)
    if graph.server is None:
        check_temp(graph, scenario, old, gone, tmp_path)
    assert image.read_bytes() == now


@pytest.mark.parametrize("shape", [ours, reference])
def test_writes_to_the_frozen_view_are_refused(tmp_path: Path, shape: Shape) -> None:
    scenario, image = Scenario(4 * MIB, 64 * KIB), tmp_path / "disk.raw"
    old = bytes(prepare(image, scenario))
    with shape(tmp_path, image, scenario.cluster) as graph:
        for command in ("write 0 64k", "write -z 0 64k"):
            assert run_any("qemu-io", "-f", "raw", "-c", command, graph.trim).returncode == 1
        run("nbdcopy", graph.frozen, str(tmp_path / "pulled.raw"))
    assert (tmp_path / "pulled.raw").read_bytes() == old == image.read_bytes()


@pytest.mark.parametrize("shape", [ours, reference])
def test_identical_data_is_copied_and_a_second_write_is_not(tmp_path: Path, shape: Shape) -> None:
    """A copy is made once for each cluster, whatever is written; reads of the guest copy nothing."""
    scenario, image = Scenario(4 * MIB, 64 * KIB), tmp_path / "disk.raw"
    prepare(image, scenario)
    with shape(tmp_path, image, scenario.cluster) as graph:
        qemu_io(graph.active, ["read 0 4M", "write -P 0x5d 0 64k", "write -P 1 0 64k", "write -P 2 100 64k"])
        if graph.server is not None:
            assert graph.server.map("vda@s")[0] == (0, 128 * KIB, "copied")
            assert graph.server.show("vda@s")["copied_total"] == 2
        qemu_io(graph.frozen, ["read -P 0x5d 0 64k", "read -P 0 64k 64k"], "-r")
