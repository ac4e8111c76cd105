"""The journal: what it claims after a kill at any byte, after another boot, and for another pull."""

from __future__ import annotations

from pathlib import Path

import pytest

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
    again = Journal.resume(str(path))
    assert list(again.kept) == [0]
    again.keep(PIECES[2])
    again.close()
    once_more = Journal.resume(str(path))
    assert sorted(once_more.kept) == [0, 4096]
    monkeypatch.setattr(journal_module, "_boot_id", lambda: b"a third one".ljust(32))
    assert sorted(Journal.resume(str(path)).kept) == [0]


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


def test_one_that_is_of_no_use_is_not_left_behind(path: Path) -> None:
    begun(path).close()
    assert not path.exists()
