"""Where things lie by default, and folders that are made."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fleecing.control.paths import default_control_path, default_state_dir, default_unix_path, make_folder
from fleecing.errors import ConfigError

ROOT = os.geteuid() == 0


def test_the_environment_names_the_control_socket() -> None:
    assert default_control_path({"FLEECING_CONTROL": "/x/c"}) == "/x/c"


def test_sockets_lie_in_the_runtime_folder() -> None:
    folder = "/run/fleecing" if ROOT else "/xdg/fleecing"
    environ = {"XDG_RUNTIME_DIR": "/xdg"}
    assert default_control_path(environ) == f"{folder}/control.sock"
    assert default_unix_path(environ) == f"{folder}/nbd.sock"


def test_state_lies_in_the_state_folder() -> None:
    assert default_state_dir({"XDG_STATE_HOME": "/xdg"}) == ("/var/lib/fleecing" if ROOT else "/xdg/fleecing")


def test_a_folder_is_made_for_its_owner_only_and_can_be_made_again(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b"
    make_folder(str(path), "state folder")
    make_folder(str(path), "state folder")
    assert path.stat().st_mode & 0o777 == 0o700
    assert list(path.iterdir()) == []


def test_a_file_in_the_way_of_a_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "f").touch()
    for path in (tmp_path / "f", tmp_path / "f" / "g"):
        with pytest.raises(ConfigError, match=f"temp folder {path} is no folder"):
            make_folder(str(path), "temp folder")


@pytest.mark.parametrize("path", ["/proc/fleecing", "/proc/1"])
def test_a_folder_that_takes_no_files_is_refused(path: str) -> None:
    with pytest.raises(ConfigError, match=f"state folder {path} (is not writable|cannot be made)"):
        make_folder(path, "state folder")
