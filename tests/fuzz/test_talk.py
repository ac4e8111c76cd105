"""Options and requests at random over real sockets: each gets its answer, and the stream stays in step."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fleecing.nbd.constants import ReplyMode
from tests.fuzz.field import MEMORY, Field, Witness
from tests.fuzz.talk import SIZE, Asked, ask, asked, cuts, flags, known, shake_hands


@pytest.fixture(scope="module")
def field(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Field]:
    made = Field(tmp_path_factory.mktemp("field"), SIZE)
    with Witness(made):
        yield made
    peak = made.peak
    made.stop()
    assert peak < MEMORY, f"the server had {peak >> 20} MiB"


@settings(max_examples=150)
@given(flags=flags, said=st.lists(known, max_size=10), sizes=cuts)
def test_any_handshake_is_answered_or_dropped(field: Field, flags: bytes, said: list[bytes], sizes: list[int]) -> None:
    shake_hands(field, flags, said, sizes)


@settings(max_examples=150)
@given(
    mode=st.sampled_from(ReplyMode),
    export=st.sampled_from(["vda", "vda@s"]),
    wanted=st.lists(asked, min_size=1, max_size=20),
    sizes=cuts,
)
def test_any_request_is_answered_once(
    field: Field, mode: ReplyMode, export: str, wanted: list[Asked], sizes: list[int]
) -> None:
    ask(field, mode, export, wanted, sizes)
