"""Changed-block tracking: bits that outlive the process, and the log that outlives the power."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fleecing.block.bitfile import HEAD, BitFile
from fleecing.block.bitmap import ones
from fleecing.block.tracking import REGIONS, SMALLEST_REGION, IntentLog, Tracker, recover, region_size
from fleecing.errors import ImageError
from fleecing.events import Event, event_of, fields_of
from fleecing.units import GiB, KiB, TiB

GRAIN = 64 * KiB
SIZE = 100 * GiB + 5


def make(folder: Path, size: int = SIZE) -> Tracker:
    bits = BitFile.create(str(folder / "c.bitmap"), size=size, granularity=GRAIN)
    return Tracker(bits, IntentLog.create(str(folder / "c.intent"), region_size(size, GRAIN)))


def marked(tracker: Tracker) -> list[int]:
    return list(tracker.file.bits.search(1))


def test_bits_and_note_are_there_for_the_next_process(tmp_path: Path) -> None:
    path = str(tmp_path / "bits")
    first = BitFile.create(path, size=SIZE, granularity=GRAIN)
    first.bits[3:5] = 1
    first.note = "broken: because ä"
    second = BitFile.open(path)  # without any close: as after kill -9
    assert list(second.bits.search(1)) == [3, 4]
    assert second.note == "broken: because ä"
    assert (second.size, second.granularity, second.count) == (SIZE, GRAIN, SIZE // GRAIN + 1)
    second.note = ""
    assert BitFile.open(path).note == ""


def test_the_file_has_no_holes_that_a_full_disk_could_make_deadly(tmp_path: Path) -> None:
    path = tmp_path / "bits"
    BitFile.create(str(path), size=SIZE, granularity=GRAIN).close()
    assert path.stat().st_blocks * 512 >= path.stat().st_size


def test_bits_that_are_given_are_the_first_contents(tmp_path: Path) -> None:
    count = SIZE // GRAIN + 1
    file = BitFile.create(str(tmp_path / "bits"), size=SIZE, granularity=GRAIN, bits=ones(count))
    assert file.bits.count() == count
    with pytest.raises(FileExistsError):
        BitFile.create(file.path, size=SIZE, granularity=GRAIN)


@pytest.mark.parametrize("damage", ["magic", "version", "count", "short", "long", "empty"])
def test_damaged_file_is_refused(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "bits"
    BitFile.create(str(path), size=SIZE, granularity=GRAIN).close()
    raw = bytearray(path.read_bytes())
    match damage:
        case "magic":
            raw[0] ^= 1
        case "version":
            raw[11] += 1
        case "count":
            raw[31] ^= 1
        case "short":
            del raw[-1:]
        case "long":
            raw += bytes(HEAD)
        case "empty":
            raw.clear()
    path.write_bytes(raw)
    with pytest.raises(ImageError, match="bits"):
        BitFile.open(str(path))


def test_first_change_in_a_region_waits_for_the_log_and_the_next_do_not(tmp_path: Path) -> None:
    tracker = make(tmp_path)
    assert not tracker.record_now(0, 1)
    assert marked(tracker) == []
    tracker.record(0, 1)
    assert tracker.record_now(5 * GRAIN - 1, 2)
    assert marked(tracker) == [0, 4, 5]
    assert list(tracker.log.read().search(1)) == [0]
    assert not tracker.record_now(SIZE - 1, 1)
    tracker.record(SMALLEST_REGION - 1, 2)  # across a border
    assert list(tracker.log.read().search(1)) == [0, 1]


def test_power_loss_marks_the_regions_in_the_log(tmp_path: Path) -> None:
    tracker = make(tmp_path)
    tracker.record(SMALLEST_REGION, 1)
    tracker.record(SIZE - 1, 1)
    tracker.file.bits.setall(0)  # the bits were never synced
    recover(tracker.file, tracker.log)
    per_region = SMALLEST_REGION // GRAIN
    last = (SIZE - 1) // SMALLEST_REGION * per_region
    assert marked(tracker) == [*range(per_region, 2 * per_region), *range(last, tracker.file.count)]


def test_log_that_is_cut_short_counts_as_full(tmp_path: Path) -> None:
    tracker = make(tmp_path)
    os.truncate(tracker.log.path, 0)
    recover(tracker.file, tracker.log)
    assert tracker.file.bits.count() == tracker.file.count


def test_settling_closes_idle_regions_and_leaves_busy_ones_open(tmp_path: Path) -> None:
    tracker = make(tmp_path)
    tracker.record(0, 1)
    tracker.record(SMALLEST_REGION, 1)
    tracker.settle()
    assert list(tracker.log.read().search(1)) == [0, 1]
    assert tracker.record_now(GRAIN, 1)  # region 0 is at work
    tracker.settle()
    assert list(tracker.log.read().search(1)) == [0]
    assert tracker.record_now(2 * GRAIN, 1)
    assert tracker.record_now(SMALLEST_REGION, 1)  # set already: no promise is needed
    assert not tracker.record_now(SMALLEST_REGION + GRAIN, 1)
    tracker.sync()
    assert not tracker.log.read().any()
    assert not tracker.record_now(3 * GRAIN, 1)


def test_settling_that_fails_forgets_nothing(tmp_path: Path) -> None:
    tracker = make(tmp_path)
    tracker.record(0, 1)
    tracker.settle()

    def fail() -> None:
        raise OSError(5, "Input/output error")

    tracker.file.sync = fail  # type: ignore[method-assign]
    with pytest.raises(OSError, match="Input"):
        tracker.settle()
    assert list(tracker.log.read().search(1)) == [0]
    assert not tracker.record_now(GRAIN, 1)


def test_log_that_cannot_be_written_lets_the_guest_go_on_and_says_so_for_ever(tmp_path: Path) -> None:
    tracker = make(tmp_path)
    tracker.log.close()
    tracker.record(0, 1)
    assert tracker.failed is not None
    assert "could not be written: Bad file descriptor" in tracker.failed
    assert tracker.record_now(5, 1)
    assert BitFile.open(tracker.file.path).note == tracker.failed


@pytest.mark.parametrize("size", [1, GiB, TiB, 64 * TiB, 64 * TiB + 1])
def test_regions_cover_the_disk(size: int) -> None:
    region = region_size(size, GRAIN)
    assert region * REGIONS >= size
    assert region >= SMALLEST_REGION
    assert region & (region - 1) == 0


def test_whoever_gives_up_tells_of_which_checkpoint(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    bits = BitFile.create(str(tmp_path / "c.bitmap"), size=SIZE, granularity=GRAIN)
    intents = IntentLog.create(str(tmp_path / "c.intent"), region_size(SIZE, GRAIN))
    Tracker(bits, intents, disk="vda", checkpoint="monday").give_up("no space")
    (record,) = caplog.records
    assert event_of(record) is Event.CHECKPOINT_INCONSISTENT
    assert fields_of(record) == {"disk": "vda", "checkpoint": "monday", "reason": "no space"}
