"""The power goes at any moment: what is left on disk is recovered to exactly what it must be, or says why it is not.

FLEECING_CRASHES sets how many stories of two or three lives are told; the default is what CI has time for.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.block.qcow2.tools import check
from tests.block.rig import pattern
from tests.crash.life import Life, first_life
from tests.crash.recorder import SECTOR, WAYS

SIZE = 96 * 1024 + 700
SECTORS = SIZE // SECTOR
EXAMPLES = int(os.environ.get("FLEECING_CRASHES", "25"))
STATES = 6
"""Crashes looked at for each life."""

ranges = st.tuples(st.integers(0, SIZE - 1), st.sampled_from([1, 511, 512, 4096, 10000, 40000])).map(
    lambda r: (r[0], min(r[1], SIZE - r[0]))
)
fills = st.integers(1, 255).map(lambda n: bytes([n]))


@st.composite
def parts(draw: st.DrawFn) -> list[tuple[int, int, bytes]]:
    """Ranges that share no sector: one of any kind, or several of whole sectors."""
    if draw(st.booleans()):
        return [(*draw(ranges), draw(fills))]
    cuts = sorted(draw(st.sets(st.integers(0, SECTORS), min_size=4, max_size=9)))
    return [(a * SECTOR, (b - a) * SECTOR, draw(fills)) for a, b in zip(cuts[::2], cuts[1::2], strict=False)]


steps = st.one_of(
    st.tuples(st.sampled_from(["write", "write", "write", "zeroes", "discard"]), parts()),
    st.tuples(
        st.just("freeze"),
        st.fixed_dictionaries(
            {
                "cluster": st.sampled_from([512, 512, 4096]),
                "durable": st.sampled_from([True, True, True, False]),
                "checkpoint": st.booleans(),
            }
        ),
    ),
    st.tuples(st.just("trim"), st.tuples(st.integers(0, 9), st.lists(ranges, min_size=1, max_size=3))),
    st.tuples(st.sampled_from(["flush", "settle"]), st.none()),
    st.tuples(st.sampled_from(["delete", "fail"]), st.integers(0, 9)),
)
crashes = st.tuples(st.floats(0, 1), st.sampled_from([*WAYS, "kill"]), st.integers(0, 1 << 30))


def play(life: Life, script: list[tuple[str, object]]) -> None:
    for kind, detail in script:
        names = [name for name, snapshot in sorted(life.snapshots.items()) if not snapshot.broken]
        match kind, detail:
            case "freeze", dict() as options if len(names) < 3:
                life.freeze(**options)
            case "trim", (int() as which, list() as where) if names:
                life.trim(names[which % len(names)], where)
            case "flush", _:
                life.flush()
            case "settle", _:
                life.settle()
            case "delete", int() as which if names:
                life.delete(names[which % len(names)])
            case "fail", int() as which if names:
                life.fail_copies(names[which % len(names)])
            case (("write" | "zeroes" | "discard"), list() as where):
                life.change(kind, where)


def some_moment(life: Life, end: int, share: float, kind: int) -> int:
    """Of the life: any, one near its end, where most is at stake, or one while something is synced."""
    if kind % 3 == 0:
        return round(end * share)
    if kind % 3 == 1:
        return round(end * (1 - share**3))
    syncs = sorted(begun for history in life.recorder.files.values() for begun, _ in history.syncs)
    return syncs[round(share * (len(syncs) - 1))]


def look_at(life: Life) -> None:
    """Recover, and see that all is right; also when the guest goes on and overwrites everything."""
    with life.recorder.recording():  # which spares the disk the syncs
        life.boot()
        life.check()
        life.change("write", [(0, SIZE, b"\xa5")])
        life.check()
        life.close()


@given(
    scripts=st.lists(st.lists(steps, min_size=4, max_size=14), min_size=2, max_size=3),
    looks=st.lists(crashes, min_size=STATES, max_size=STATES),
)
@settings(max_examples=EXAMPLES)
def test_everything_is_exact_or_says_why_it_is_not(
    scripts: list[list[tuple[str, object]]], looks: list[tuple[float, str, int]]
) -> None:
    root = Path(tempfile.mkdtemp())
    try:
        life = first_life(root / "0", pattern(SIZE))
        freeze = ("freeze", {"cluster": 512, "durable": True, "checkpoint": True})
        for number, script in enumerate(scripts):
            with life.recorder.recording():
                life.boot()
                life.check()
                play(life, [freeze, *script] if not number else script)
                end = life.recorder.mark()
                life.close()
            for i, (share, way, seed) in enumerate(looks):
                moment = some_moment(life, end, share, i)
                look_at(life.crash(moment, way, seed, root / f"{number}-{i}"))
            share, way, seed = looks[number]
            way = "kill" if seed % 2 else way
            life = life.crash(some_moment(life, end, share, seed % 3), way, seed + 1, root / str(number + 1))
    finally:
        shutil.rmtree(root)


def test_image_that_was_recovered_has_no_fault_that_qemu_img_finds(tmp_path: Path) -> None:
    life = first_life(tmp_path / "0", pattern(SIZE))
    with life.recorder.recording():
        life.boot()
        life.freeze(cluster=512, durable=True, checkpoint=False)
        for at in range(0, SIZE - 9000, 9000):
            life.change("write", [(at, 5000, b"x")])
        name = next(iter(life.snapshots))
        life.trim(name, [(20000, 30000)])
        life.change("write", [(0, SIZE, b"y")])
    end = life.recorder.mark()
    for seed in range(12):
        moment = end * (seed + 1) // 12
        after = life.crash(moment, WAYS[seed % len(WAYS)], seed, tmp_path / f"c{seed}")
        after.boot()
        after.check()
        for snapshot in after.snapshots.values():
            assert check(snapshot.temp) == {}
        after.close()
    life.close()
