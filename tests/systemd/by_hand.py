"""What takes too long for every run, in the machine with systemd: the template.

.venv/bin/python -m pytest tests/systemd/by_hand.py
"""

from __future__ import annotations

import pytest

from tests.systemd.machine import INSTALL, Machine


@pytest.mark.timeout(900)
def test_a_server_of_the_template(machine: Machine) -> None:
    machine.do(INSTALL)
    machine.do("systemctl enable --quiet --now fleecing.service fleecing@vdb.service")
    assert machine.do("nbdinfo --size 'nbd+unix:///vdb?socket=/run/fleecing/vdb/nbd.sock'") == "8388608\n"
    assert machine.do("systemctl --failed --plain --no-legend") == ""
