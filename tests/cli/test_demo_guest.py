"""The demo's model: what the disk holds, what a snapshot of it must hold, and which copies cannot be snapshots."""

from __future__ import annotations

from pathlib import Path

import pytest

from fleecing.cli.demo_contents import SECTOR, Contents, differing_sectors, new_versions, version_of
from fleecing.cli.demo_guest import NOT_YET, Journal, Write, Writer, one_instant, touched_clusters
from fleecing.client.dial import connect
from fleecing.errors import ProtocolError
from fleecing.nbd.uri import NbdUri
from tests.client.servers import nbdkit

MIB = 1 << 20


@pytest.mark.parametrize("size", [MIB, 3 * MIB + 1, 5 * MIB + SECTOR, 4 * MIB - 1])
def test_the_image_is_what_the_model_says(tmp_path: Path, size: int) -> None:
    contents = Contents(size, seed=4)
    contents.make(str(tmp_path / "image"))
    data = (tmp_path / "image").read_bytes()
    assert data == b"".join(piece for _, piece in contents.pieces(new_versions(contents.sectors)))
    assert len(data) == size


def test_a_disk_has_data_and_holes(tmp_path: Path) -> None:
    contents = Contents(64 * MIB, seed=4)
    contents.make(str(tmp_path / "image"))
    used = (tmp_path / "image").stat().st_blocks * 512
    assert 32 * MIB < used < 60 * MIB


def test_no_two_sectors_and_no_two_versions_are_alike() -> None:
    contents = Contents(4 * MIB, seed=4)
    seen = {contents.written(sector, 1, version) for sector in range(0, 8192, 7) for version in (1, 2, 77)}
    assert len(seen) == 3 * len(range(0, 8192, 7))
    assert {version_of(contents.written(5, 1, version)) for version in (1, 2, 77)} == {1, 2, 77}


def test_the_incomplete_last_sector_is_cut() -> None:
    contents = Contents(MIB + 10, seed=4)
    assert len(contents.written(2047, 2, 3)) == SECTOR + 10
    assert version_of(contents.written(2048, 1, 3)) == 0


def test_differing_sectors_are_found() -> None:
    assert differing_sectors(b"a" * 1100, b"a" * 1100) == []
    assert differing_sectors(b"a" * 1100, b"a" * 600 + b"b" + b"a" * 499) == [1]
    assert differing_sectors(b"a" * 1100, b"a" * 1024) == [2]


def journal(*writes: Write) -> Journal:
    """Of a writer of the sectors 100 to 199, whose base is version 3 in all."""
    base = new_versions(100)
    for index in range(100):
        base[index] = 3
    return Journal(100, base, list(writes))


def test_the_cut_is_the_last_write_that_the_copy_shows() -> None:
    contents = Contents(MIB, seed=4)
    both = journal(Write(4, 110, 5, 0, 1), Write(5, 112, 5, 2, 3))
    for cut in (0, 4, 5):
        frozen = both.frozen(cut)
        assert both.cut(lambda sector, frozen=frozen: contents.written(sector, 1, frozen[sector - 100])) == cut  # type: ignore[misc]


def test_a_frozen_part_has_the_base_and_the_journal_up_to_the_cut() -> None:
    versions = journal(Write(4, 110, 5, 0, 1), Write(5, 112, 5, 2, 3)).frozen(4)
    assert list(versions) == [3] * 10 + [4] * 5 + [3] * 85
    versions = journal(Write(4, 110, 5, 0, 1), Write(5, 112, 5, 2, 3)).frozen(5)
    assert list(versions) == [3] * 10 + [4, 4, 5, 5, 5, 5, 5] + [3] * 83


@pytest.mark.parametrize(
    "cuts, possible",
    [
        ((0, 0), True),
        ((4, 4), True),
        ((0, 4), True),  # the first one's write was in flight when the second one's was sent
        ((4, 0), True),
        ((5, 0), False),  # has a write that was sent at 30, lacks one that was answered at 20
        ((0, 5), False),  # the same the other way round
        ((5, 4), True),
    ],
)
def test_one_instant_must_fit_all_writers(cuts: tuple[int, int], possible: bool) -> None:
    journals = [
        journal(Write(4, 110, 1, 0, 25), Write(5, 110, 1, 30, 40)),
        journal(Write(4, 110, 1, 5, 20), Write(5, 110, 1, 28, NOT_YET)),
    ]
    assert one_instant(journals, cuts) is possible


def test_a_writer_knows_what_it_has_written(tmp_path: Path) -> None:
    contents = Contents(MIB, seed=4)
    contents.make(str(tmp_path / "image"))
    with nbdkit(tmp_path, "file", str(tmp_path / "image")) as uri:
        writer = Writer(uri, contents, 0, 2048, cluster=65536, seed="x")
        writer.start()
        writer.wait_until_it_writes()
        writer.begin_journal()
        kept = writer.end_journal()
        writer.stop()
        writer.join()
        with connect(uri) as connection:
            found = connection.read(0, MIB)
    assert writer.error is None
    assert writer.writes > 0
    assert found == contents.data(0, writer.versions)
    assert touched_clusters([writer], [kept], [0], 65536) <= 16


def test_a_journal_has_every_write_from_its_beginning_to_its_end() -> None:
    """Whatever was in flight at either end is in it, so that a snapshot in between may show it."""
    contents = Contents(MIB, seed=4)
    writer = Writer(NbdUri(), contents, 0, 2048, cluster=65536, seed="x")

    def write() -> Write:
        one = writer._begin()
        writer._answered(one, one.count * SECTOR)
        return one

    write()
    early = writer._begin()
    writer.begin_journal()
    assert list(writer.versions).count(2) == 0
    writer._answered(early, 1)
    inside = write()
    late = writer._begin()
    kept = writer.end_journal()
    assert kept.writes == [early, inside, late]
    assert late.answered == NOT_YET
    writer._answered(late, 1)
    assert late.answered < NOT_YET
    assert writer.touched == set()
    behind = write()
    assert behind.first * SECTOR // 65536 in writer.touched
    assert max(kept.base) == 1


def test_a_writer_that_fails_says_why(tmp_path: Path) -> None:
    writer = Writer(NbdUri(socket=str(tmp_path / "nothing")), Contents(MIB, 1), 0, 2048, cluster=65536, seed="x")
    writer.start()
    writer.wait_until_it_writes()
    writer.join()
    assert isinstance(writer.error, OSError)
    assert not isinstance(writer.error, ProtocolError)
