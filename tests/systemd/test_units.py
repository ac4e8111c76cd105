"""The units, as systemd's own tools judge them. Nothing is started and nothing outside the test's folder is changed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.peers import run, run_any
from tests.serving import ROOT

SERVICES = ("fleecing.service", "fleecing@vda.service", "fleecing-backup@vda.service")


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """The folder of the installed units."""
    run("bash", str(ROOT / "systemd/install"), "--root", str(tmp_path), "/bin/true")
    return tmp_path / "etc/systemd/system"


def test_every_unit_is_right(installed: Path) -> None:
    names = {path.name for path in installed.iterdir()}
    assert {"fleecing.service", "fleecing.socket", "fleecing-control.socket", "fleecing@.service"} <= names
    units = [str(installed / name.replace("@.", "@vda.")) for name in sorted(names)]
    result = run_any("systemd-analyze", "verify", "--man=no", *units)
    ours = [line for line in result.stderr.splitlines() if "fleecing" in line]
    assert (result.returncode, ours) == (0, []), result.stderr


@pytest.mark.parametrize("name", SERVICES)
def test_the_service_is_little_exposed(installed: Path, name: str) -> None:
    report = run("systemd-analyze", "security", "--offline=true", "--no-pager", str(installed / name))
    found = re.search(r"Overall exposure level for .*: ([\d.]+)", report)
    assert found is not None, report
    assert float(found[1]) < 2.0, report


def test_the_program_is_named_by_its_path(installed: Path) -> None:
    for path in installed.glob("*.service"):
        assert re.findall(r"^ExecStart=(\S+)", path.read_text(), re.MULTILINE) == ["/bin/true"]


def test_a_program_that_is_none_is_refused(tmp_path: Path) -> None:
    refused = run_any("bash", str(ROOT / "systemd/install"), "--root", str(tmp_path), "fleecing")
    assert refused.returncode == 1
    assert "no program with an absolute path" in refused.stderr
    assert list(tmp_path.iterdir()) == []


def test_user_and_folders_are_declared(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "etc/passwd").touch()
    (tmp_path / "etc/group").touch()
    run("systemd-sysusers", f"--root={tmp_path}", str(tmp_path / "etc/sysusers.d/fleecing.conf"))
    assert "fleecing:" in (tmp_path / "etc/passwd").read_text()
    # Lines that make folders and nothing that removes or cleans
    entries = (tmp_path / "etc/tmpfiles.d/fleecing.conf").read_text().splitlines()
    assert {line.split()[0] for line in entries if not line.startswith("#")} == {"d"}
    assert all(line.split()[-1] == "-" for line in entries if not line.startswith("#"))
