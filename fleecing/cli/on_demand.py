"""Modules that are imported when they are needed, and why: a command is to take as long as what it does.

All commands together import for half a second: the server's libraries, and what draws on terminals. This is the only
place that imports late; everything else stands at the head of its file.
"""

from __future__ import annotations

import gc
import importlib
from typing import Any


def load(place: str) -> Any:
    """What "module:name" in this package names. Types: whatever the caller says it is.

    Modules stay until the end: the garbage collector looks at them neither while they come nor ever after, the last
    time at the end included. That was 16 ms of the 94 in which `pull` started and ended.
    """
    module, _, name = place.partition(":")
    collects = gc.isenabled()
    gc.disable()
    try:
        return getattr(importlib.import_module(f"fleecing.cli.{module}"), name)
    finally:
        gc.freeze()
        if collects:
            gc.enable()
