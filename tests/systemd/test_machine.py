"""A real systemd runs the service: installed, started, reloaded, restarted, killed, hung, stopped; a timer fires.

What is left out here for its time, the template, is in by_hand.py.
"""

from __future__ import annotations

import pytest

from tests.systemd.machine import INSTALL, PROGRAM, SIZE, Machine

SOON = """
set -e
cd /etc/systemd/system
mkdir -p fleecing.service.d fleecing-backup@vda.timer.d
echo '[Service]
WatchdogSec=15' >fleecing.service.d/watchdog.conf
echo '[Timer]
OnActiveSec=1s
RandomizedDelaySec=0
AccuracySec=1s' >fleecing-backup@vda.timer.d/soon.conf
systemctl daemon-reload
"""
"""Nobody waits a minute for the watchdog, or a day for the timer."""


@pytest.mark.timeout(900)
def test_the_life_of_the_service(machine: Machine) -> None:
    machine.do(INSTALL + SOON)
    machine.do("systemctl enable --quiet --now fleecing.service")
    status = machine.do("systemctl status fleecing.service")
    assert "active (running)" in status
    assert 'Status: "1 disks, 0 clients, 0 snapshots"' in status
    assert machine.do(SIZE) == "16777216\n"
    assert machine.do("stat -c '%U %a' /run/fleecing/nbd.sock /var/lib/fleecing") == "fleecing 600\nfleecing 700\n"

    machine.do("systemctl enable --quiet --now fleecing-backup@vda.timer")
    backup = "fleecing-backup@vda.service"
    machine.wait_for_journal("Finished\\|Failed", backup)
    assert machine.show("Result", backup) == "success"
    assert machine.show("TriggeredBy", backup) == "fleecing-backup@vda.timer"
    assert ", full, 1 MiB of data, /var/backups/fleecing/vda/" in machine.journal(backup)

    first = machine.show("MainPID")
    machine.do("systemctl reload fleecing.service")
    machine.wait_for_journal("access rules read again")
    assert (machine.show("MainPID"), machine.show("ActiveState")) == (first, "active")

    machine.connect_after("systemctl restart --no-block fleecing.service")
    assert (machine.show("NRestarts"), machine.show("Result")) == ("0", "success")
    machine.connect_after("kill -9 PID")
    assert machine.show("NRestarts") == "1"
    assert "status=9/KILL" in machine.journal()
    machine.do(f"kill -STOP {machine.show('MainPID')}")  # as a loop that hangs
    assert machine.do(f"{PROGRAM} verify /var/backups/fleecing").count(": ok\n") == 1  # meanwhile
    machine.wait_for_journal("Watchdog timeout")
    machine.wait_for_journal("restart counter is at 2")

    machine.do("systemctl stop fleecing.socket fleecing-control.socket fleecing.service")
    assert (machine.show("ActiveState"), machine.show("Result")) == ("inactive", "success")
    assert "stopped" in machine.journal()
    assert machine.do("systemctl --failed --plain --no-legend") == ""
