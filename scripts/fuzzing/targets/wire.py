"""What strangers say to a real server: each is answered or dropped, and those beside them notice nothing."""

from __future__ import annotations

from pathlib import Path

from hypothesis import strategies as st

from fleecing.nbd.constants import ReplyMode
from scripts.fuzzing.damage import apply, edits
from scripts.fuzzing.target import Case, Finding
from tests.fuzz import talk
from tests.fuzz.field import MEMORY, Field, Witness
from tests.fuzz.record import RECORDINGS

_STREAMS = {path.stem: path.read_bytes() for path in sorted(RECORDINGS.glob("*.bin"))}


class _Battle:
    """A server, and the witnesses."""

    def __init__(self, folder: Path) -> None:
        self.field = Field(folder, talk.SIZE)
        self._witness = Witness(self.field)
        self._witness.__enter__()

    def close(self) -> None:
        """The server is well, and so are the others."""
        try:
            self.field.check()
            self._witness.__exit__()
        finally:
            self.field.server.kill()

    def look(self) -> None:
        """After each shot."""
        if self.field.peak > MEMORY:
            raise Finding(f"the server has {self.field.peak >> 20} MiB")
        self._witness.check()
        self.field.check()


class Handshake(_Battle):
    """Options at random, and what real clients say, damaged."""

    cases = st.one_of(
        st.fixed_dictionaries(
            {"flags": talk.flags, "said": st.lists(talk.known, max_size=10), "sizes": talk.cuts},
        ),
        st.fixed_dictionaries({"recording": st.sampled_from(sorted(_STREAMS)), "edits": edits}),
    )

    def run(self, case: Case) -> None:
        if "recording" in case:
            stream = apply(_STREAMS[case["recording"]], case["edits"])
            answer = self.field.say(stream)
            if answer and not answer.startswith(b"NBDMAGIC"):
                raise Finding(f"the server greets with {answer[:20]!r}")
        else:
            talk.shake_hands(self.field, case["flags"], case["said"], case["sizes"])
        self.look()


class Transmission(_Battle):
    """Requests at random in the transmission phase."""

    cases = st.fixed_dictionaries(
        {
            "mode": st.sampled_from([mode.name for mode in ReplyMode]),
            "export": st.sampled_from(["vda", "vda@s"]),
            "asked": st.lists(talk.asked.map(talk.as_list), min_size=1, max_size=20),
            "sizes": talk.cuts,
        }
    )

    def run(self, case: Case) -> None:
        wanted = [talk.Asked(*words) for words in case["asked"]]
        talk.ask(self.field, ReplyMode[case["mode"]], case["export"], wanted, case["sizes"])
        self.look()
