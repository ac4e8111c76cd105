"""What real clients say, with every byte changed, cut off, doubled or left out."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from random import Random

import pytest

from tests.block.rig import in_thread
from tests.fuzz.field import MEMORY, Field, Witness
from tests.fuzz.record import RECORDINGS, SIZE

STREAMS = {path.stem: path.read_bytes() for path in sorted(RECORDINGS.glob("*.bin"))}
THREADS = 2


@pytest.fixture(scope="module")
def field(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Field]:
    made = Field(tmp_path_factory.mktemp("field"), SIZE)
    yield made
    peak = made.peak
    made.stop()
    assert peak < MEMORY, f"the server had {peak >> 20} MiB"


def places(stream: bytes) -> list[int]:
    """Every byte; of a long run of payload a few only."""
    dull = [at for at in range(64, len(stream)) if stream[at - 32 : at + 1] == stream[at - 33 : at]]
    spared = set(dull) - set(Random(len(stream)).sample(dull, len(dull) // 100))
    return [at for at in range(len(stream)) if at not in spared][:900]


def damaged(stream: bytes) -> Iterator[bytes]:
    """One byte is another, or none, or two, or the last."""
    random = Random(len(stream))
    for at in places(stream):
        old = stream[at]
        new = random.choice(sorted({0, 1, 0xFF, 0x80, old ^ 1, old ^ 0x80, (old + 1) & 0xFF} - {old}))
        yield stream[:at] + bytes([new]) + stream[at + 1 :]
        match at % 3:
            case 0:
                yield stream[:at]
            case 1:
                yield stream[:at] + stream[at + 1 :]
            case 2:
                yield stream[:at] + bytes([random.randrange(256)]) + stream[at:]


def test_there_are_recordings() -> None:
    assert len(STREAMS) >= 10


@pytest.mark.parametrize("name", STREAMS)
def test_the_server_survives_every_damaged_byte(field: Field, name: str) -> None:
    streams = list(damaged(STREAMS[name]))

    def shoot(number: int) -> None:
        for stream in streams[number::THREADS]:
            assert len(field.say(stream)) >= 18  # the greeting at least

    with Witness(field):
        for running in [in_thread(partial(shoot, number)) for number in range(THREADS)]:
            running.wait()
    assert len(field.say(STREAMS[name])) > 100  # it is spoken to as before
    field.check()
