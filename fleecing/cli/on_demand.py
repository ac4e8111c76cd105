"""Modules that are imported when they are needed, and why: a command is to take as long as what it does.

All commands together import for half a second: the server's libraries, and what draws on terminals. This is the only
place that imports late; everything else stands at the head of its file.
"""

from __future__ import annotations

import importlib
from typing import Any


def load(place: str) -> Any:
    """What "module:name" in this package names. Types: whatever the caller says it is."""
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(f"fleecing.cli.{module}"), name)
