"""All targets by name, in the order in which they are shot at."""

from __future__ import annotations

from scripts.fuzzing.target import Opener
from scripts.fuzzing.targets.backups import Backups
from scripts.fuzzing.targets.client import Client
from scripts.fuzzing.targets.control import Control
from scripts.fuzzing.targets.state import State
from scripts.fuzzing.targets.temp import Temp
from scripts.fuzzing.targets.wire import Handshake, Transmission
from scripts.fuzzing.targets.words import CommandLine, Configuration

TARGETS: dict[str, Opener] = {
    "handshake": Handshake,
    "transmission": Transmission,
    "client": Client,
    "temp": Temp,
    "state": State,
    "backups": Backups,
    "control": Control,
    "config": Configuration,
    "cli": CommandLine,
}
