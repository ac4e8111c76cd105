"""Programs that run as another user of this machine, and a folder that all users can enter."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.peers import require

STRANGER = 61234
"""A user, and a group, that this machine has no name for."""


def as_user(uid: int, *groups: int) -> list[str]:
    """What goes in front of a command to run it as that user; its group is the first of `groups`, else its number.

    The test fails where it does not run as root: a second user cannot be had then.
    """
    if os.geteuid() != 0:
        pytest.fail("a second user is needed here: run the tests as root, as ./scripts/test does in CI", pytrace=False)
    others = [f"--groups={','.join(map(str, groups[1:]))}"] if groups[1:] else ["--clear-groups"]
    return [require("setpriv"), f"--reuid={uid}", f"--regid={(groups or (uid,))[0]}", *others, "--"]


@contextmanager
def open_folder() -> Iterator[Path]:
    """A folder that every user may enter; those of pytest are closed."""
    path = Path(tempfile.mkdtemp(prefix="fleecing-", dir="/tmp"))
    path.chmod(0o755)
    try:
        yield path
    finally:
        shutil.rmtree(path)


def mode_of(paths: Iterable[Path]) -> list[str]:
    """Their permissions, as ls shows them in digits."""
    return [f"{path.stat().st_mode & 0o7777:04o}" for path in paths]
