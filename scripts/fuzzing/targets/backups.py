"""Folders of backups, damaged: what can be restored is right, and whatever is not is told by verify and by restore."""

from __future__ import annotations

import shutil
from pathlib import Path

from click.testing import CliRunner, Result
from hypothesis import strategies as st

from fleecing.cli.main import main
from scripts.fuzzing.damage import edits, json_edits, spoil
from scripts.fuzzing.target import Case, Finding
from tests.images import random_bytes
from tests.raw_client import WRITE, RawClient
from tests.serving import Server

SIZE = 5 * 65536 + 777


class Backups:
    """A chain of a full point and two increments, in three kinds of compression."""

    def __init__(self, folder: Path) -> None:
        self._base, self._work, self._out = folder / "base", folder / "w", folder / "out.raw"
        self._expected: dict[str, bytes] = {}
        self._make(folder)
        files = sorted(path.name for path in self._base.iterdir())
        one = st.fixed_dictionaries(
            {
                "file": st.sampled_from([*files, "manifest.json"]),
                "gone": st.sampled_from([False] * 9 + [True]),
                "edits": st.just([]) | edits,
                "json": st.just([]) | json_edits,
            }
        )
        self.cases = st.fixed_dictionaries({"files": st.lists(one, min_size=1, max_size=2), "prune": st.booleans()})

    def _make(self, folder: Path) -> None:
        image = folder / "vda.img"
        image.write_bytes(random_bytes(SIZE // 2) + bytes(SIZE - SIZE // 2))
        server = Server(folder / "server", image)
        try:
            for number, compression in enumerate(["zstd", "none", "deflate"]):
                since = {"since": f"p{number - 1}"} if number else {}
                server.freeze("vda", name=f"s{number}", checkpoint=f"p{number}", **since)
                self._expected[f"p{number}"] = image.read_bytes()
                words = ["pull", f"vda@s{number}", str(self._base), "--chain", "--compress", compression]
                result = _fleecing(*words, "--control", str(server.control_path))
                if result.exit_code:
                    raise Finding(f"the base could not be made: {result.output}")
                with RawClient(server.unix, "vda") as guest:
                    data = random_bytes(60000, seed=number + 1)
                    guest.request(WRITE, 0, number * 65536 + 5000, 0, data)
                server.delete(f"vda@s{number}")
        finally:
            server.kill()

    def run(self, case: Case) -> None:
        shutil.rmtree(self._work, ignore_errors=True)
        shutil.copytree(self._base, self._work)
        spared = {path.name: path.read_bytes() for path in self._work.iterdir()}
        for file in case["files"]:
            path = self._work / file["file"]
            if path.exists():
                spoil(path, file)
        same_manifest = self._bytes("manifest.json") == spared["manifest.json"]
        _fleecing("points", str(self._work), "--json")
        sound = _fleecing("verify", str(self._work)).exit_code == 0
        for point in self._expected:
            self._restore(point, must=sound and same_manifest, exactly=same_manifest)
        if case["prune"]:
            pruned = _fleecing("prune", str(self._work), "--keep", "1").exit_code == 0
            self._restore("p2", must=pruned and same_manifest, exactly=same_manifest)

    def _bytes(self, name: str) -> bytes:
        try:
            return (self._work / name).read_bytes()
        except FileNotFoundError:
            return b""

    def _restore(self, point: str, *, must: bool, exactly: bool) -> None:
        result = _fleecing("restore", str(self._work), str(self._out), "--at", point)
        if result.exit_code:
            if must:
                raise Finding(f"verify found nothing, and restore does: {result.output}")
            if self._out.exists():
                raise Finding("a restore that failed left a file")
            return
        found = self._out.read_bytes()
        self._out.unlink()
        allowed = [self._expected[point]] if exactly else list(self._expected.values())
        if found not in allowed:
            raise Finding(f"{point} restores wrong, {len(found)} bytes, and says nothing")

    def close(self) -> None:
        """There is nothing to end."""


def _fleecing(*words: str) -> Result:
    result = CliRunner().invoke(main, list(words))
    if result.exit_code not in (0, 1) or (result.exception and not isinstance(result.exception, SystemExit)):
        raise Finding(f"{words} ended with {result.exit_code}: {result.exception!r}") from result.exception
    return result
