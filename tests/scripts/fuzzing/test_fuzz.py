"""The fuzzer for a while, and that it finds, keeps and replays what there is to find."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import strategies as st

from scripts.fuzzing import run as firing
from scripts.fuzzing.damage import apply, apply_json
from scripts.fuzzing.run import fire, replay
from scripts.fuzzing.target import Case, Finding, load, save
from scripts.fuzzing.targets import TARGETS
from tests.peers import describe, run_any
from tests.serving import ROOT


@pytest.mark.timeout(300)
@pytest.mark.parametrize("seed", ["1", "2"])  # new ones are for sittings in which somebody looks at what they hit
def test_ten_seconds_hit_nothing(tmp_path: Path, seed: str) -> None:
    """Inputs that hit are kept in the test's folder, and told with the command that shoots them again."""
    script = str(ROOT / "scripts" / "fuzz")
    result = run_any(script, "--seconds", "9", "--keep", str(tmp_path), "--seed", seed, deadline=280)
    print(result.stderr)
    assert result.returncode == 0, describe(result)
    assert "nothing was hit" in result.stderr
    assert result.stderr.count("no hit") == len(TARGETS)


class Brittle:
    """Fails where the number is large."""

    cases = st.fixed_dictionaries({"number": st.integers(0, 10**6), "bytes": st.binary(max_size=9)})

    def __init__(self, folder: Path) -> None:
        assert folder.is_dir()

    def run(self, case: Case) -> None:
        if case["number"] > 1000:
            raise Finding(f"{case['number']} is too much")

    closed = 0

    def close(self) -> None:
        """Count."""
        type(self).closed += 1


class Swollen(Brittle):
    """Takes all the memory that there is."""

    def run(self, case: Case) -> None:
        bytearray(1 << 40)


class Stuck(Brittle):
    """Never comes back, and says something in the log on the way."""

    def run(self, case: Case) -> None:
        while True:
            pass


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Targets that there is something to find in; what is told."""
    for target in (Brittle, Swollen, Stuck):
        monkeypatch.setitem(TARGETS, target.__name__.lower(), target)
    return []


def test_a_hit_is_made_small_kept_and_can_be_shot_again(planted: list[str], tmp_path: Path) -> None:
    hit = fire("brittle", tmp_path, 3, 5, tmp_path / "kept", planted.append)
    assert hit is not None
    assert hit.case == {"number": 1001, "bytes": b""}
    (path,) = (tmp_path / "kept").iterdir()
    assert load(path) == ("brittle", hit.case)
    again = replay(path, planted.append)
    assert again is not None
    assert "1001 is too much" in str(again)
    assert Brittle.closed == 2
    assert f"./scripts/fuzz {path}" in planted[-2]


def test_memory_without_bound_is_a_hit(planted: list[str], tmp_path: Path) -> None:
    hit = fire("swollen", tmp_path, 3, 5, tmp_path / "kept", planted.append)
    assert hit is not None
    assert isinstance(hit.error, MemoryError)


def test_what_never_ends_is_a_hit(planted: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(firing, "HANG_SECONDS", 0.2)
    monkeypatch.setattr(firing, "SMALLER_SECONDS", 0.5)
    hit = fire("stuck", tmp_path, 3, 5, tmp_path / "kept", planted.append)
    assert hit is not None
    assert isinstance(hit.error, firing.Hang)


def test_inputs_survive_their_files(tmp_path: Path) -> None:
    case = {"a": b"\0\xff", "b": [1, [b"", "text"], {"c": None}], "d": 1.5, "e": True}
    save(tmp_path / "case", "temp", case)
    assert load(tmp_path / "case") == ("temp", case)


def test_damage_is_as_it_is_said() -> None:
    assert apply(b"abcd", [("bit", 1, 0)]) == b"accd"
    assert apply(b"abcd", [("put", 6, b"xyz")]) == b"abxy"
    assert apply(b"abcd", [("cut", 3, 0), ("grow", 2, 9)]) == b"abc\t\t"
    assert (
        apply(bytes(range(256)) * 4, [("copy sector", 1, 0), ("zero sector", 0, 1)])
        == bytes(512) + bytes(range(256)) * 2
    )
    assert apply_json(b'{"a": [1, 2]}', [("set", [0, 1], "x"), ("add", [0], 3)]) == b'{"a": [1, "x"], "more": 3}'
    assert apply_json(b"{", [("set", [0], 1)]) == b"{"
