"""The journal: what it claims after a kill at any byte, after another boot, and for another pull."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from fleecing.block.hostfile import HostFile
from fleecing.errors import ImageError
from fleecing.pull import journal as journal_module
from fleecing.pull.journal import Journal
from fleecing.pull.plan import Piece

PIECES = [Piece(0, 4096, False), Piece(8192, 4096, True), Piece(4096, 4096, False)]
CHECK = b"c" * 32


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "disk.journal"


def begun(path: Path) -> Journal:
    journal = Journal(str(path))
    journal.begin({"size": 12288})
    return journal


def assert_goes_on_with_the_first_piece(path: Path) -> None:
    again = Journal.resume(str(path))
    assert list(again.kept) == [0]
    again.keep(PIECES[2])
    again.close()
    once_more = Journal.resume(str(path))
    assert sorted(once_more.kept) == [0, 4096]
    once_more.close()


def test_it_tells_the_next_run_what_was_kept_and_what_was_trimmed(path: Path) -> None:
    journal = begun(path)
    for piece in PIECES:
        journal.keep(piece, CHECK)
    journal.trim(PIECES[0])
    journal.close()
    again = Journal.resume(str(path))
    again.begin({"size": 12288})
    assert again.ranges() == [(0, 12288)]
    assert {piece.offset for piece in again.untrimmed()} == {4096, 8192}
    assert all(piece.is_kept for piece in again.untrimmed())
    assert again.kept[0].check == CHECK
    again.remove()
    assert not path.exists()


def test_a_kill_at_any_byte_leaves_whole_records(path: Path) -> None:
    journal = begun(path)
    for piece in PIECES:
        journal.keep(piece)
    journal.close()
    data = path.read_bytes()
    head = data.index(b"\n") + 1
    counts = set()
    for cut in range(head, len(data) + 1):
        path.write_bytes(data[:cut])
        again = Journal.resume(str(path))
        counts.add(len(again.kept))
        again.keep(Piece(1 << 20, 4096, False))
        again.close()
        again = Journal.resume(str(path))
        assert 1 << 20 in again.kept
        again.close()
    assert counts == {0, 1, 2, 3}


def test_after_another_boot_only_what_was_durable_is_believed(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = begun(path)
    journal.keep(PIECES[0])
    position = journal.position
    journal.keep(PIECES[1])
    journal.durable(position)
    journal.close()
    monkeypatch.setattr(journal_module, "_boot_id", lambda: b"another boot".ljust(32))
    assert_goes_on_with_the_first_piece(path)
    monkeypatch.setattr(journal_module, "_boot_id", lambda: b"a third one".ljust(32))
    third = Journal.resume(str(path))
    assert sorted(third.kept) == [0]
    third.close()


def test_what_the_disk_did_not_take_is_not_believed(path: Path) -> None:
    journal = begun(path)
    journal.keep(PIECES[0])
    journal.durable(journal.position)
    journal.keep(PIECES[1])
    journal.lose()
    assert journal.is_of_use and journal.was_lost
    journal.close()
    assert_goes_on_with_the_first_piece(path)


def test_without_anything_durable_a_loss_leaves_nothing_of_use(path: Path) -> None:
    journal = begun(path)
    journal.keep(PIECES[0])
    journal.lose()
    assert not journal.is_of_use
    journal.close()
    assert not path.exists()


def test_one_that_this_run_has_not_begun_with_stays(path: Path) -> None:
    """The server was not there."""
    begun(path).close()
    journal = begun(path)
    journal.is_of_use = True
    journal.close()
    Journal.resume(str(path)).close()
    assert path.exists()


def test_one_behind_a_symbolic_link_is_this_one(path: Path, tmp_path: Path) -> None:
    journal = begun(path)
    journal.keep(PIECES[0])
    journal.close()
    link = tmp_path / "link"
    link.symlink_to(path)
    again = Journal.resume(str(link))
    assert list(again.kept) == [0]
    again.close()


def test_another_pull_is_refused(path: Path) -> None:
    journal = begun(path)
    journal.keep(PIECES[0])
    journal.close()
    with pytest.raises(ImageError, match="belongs to another pull: its size is 12288, not 4096"):
        Journal.resume(str(path)).begin({"size": 4096})


@pytest.mark.parametrize(
    "data", [b"", b"text", b"{}\n", b"[]\n", b"[" * 3000 + b"\n", b'{"fleecing-pull-journal": 99}\n']
)
def test_what_is_no_journal_is_refused(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    with pytest.raises(ImageError, match="is no journal"):
        Journal.resume(str(path))


def test_one_run_has_it_at_a_time(path: Path) -> None:
    first = begun(path)
    with pytest.raises(ImageError, match="in use: another pull is at work"):
        Journal.resume(str(path))
    with pytest.raises(ImageError, match="in use"):
        Journal.discard(str(path))
    with pytest.raises(FileExistsError):
        begun(path)
    first.keep(PIECES[0])
    first.close()
    second = Journal.resume(str(path))
    assert list(second.kept) == [0]
    second.remove(durably=True)
    assert not path.exists()


def test_one_that_another_run_removed_meanwhile_is_not_written_to(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between its opening and its lock."""
    real = HostFile.hold_alone

    def hold_alone(file: HostFile) -> bool:
        path.unlink()
        return real(file)

    begun(path).keep(PIECES[0])
    monkeypatch.setattr(HostFile, "hold_alone", hold_alone)
    for use in (Journal.resume, Journal.discard, lambda text: begun(Path(text))):
        with pytest.raises(ImageError, match="in use"):
            use(str(path))
        assert not path.exists()
        path.touch()
        if use is Journal.discard:
            path.unlink()


def test_without_such_locks_it_goes_on(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.fcntl", no_locks)
    begun(path).remove()
    assert not path.exists()


def test_one_that_is_of_no_use_is_not_left_behind(path: Path) -> None:
    begun(path).close()
    assert not path.exists()
