"""A minute of the soak; in a file of its own, which is one of the first (tests/conftest.py)."""

from __future__ import annotations

import tempfile

import pytest

from tests.peers import describe, run_any
from tests.serving import ROOT


@pytest.mark.timeout(300)
def test_a_minute_leaves_all_data_right_and_nothing_behind() -> None:
    with tempfile.TemporaryDirectory(prefix="soak") as folder:  # short: sockets are in it
        script = str(ROOT / "scripts" / "soak")
        result = run_any(script, "--minutes", "1", "--every", "1", "--scratch", folder, deadline=280)
    print(result.stderr)
    assert result.returncode == 0, describe(result)
    assert "all data right" in result.stderr
