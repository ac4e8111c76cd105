"""Whose requests are logged one by one, at DEBUG: those of all exports, or of the chosen ones.

The switch is the level of this module's logger. So where nobody is looked at, a batch of requests pays the one question
`log.isEnabledFor(DEBUG)`, whatever exports there are.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable

from fleecing.errors import RequestError
from fleecing.nbd.constants import NbdError

log = logging.getLogger(__name__)

_chosen: frozenset[str] = frozenset()


def choose(exports: Iterable[str]) -> None:
    """Log the requests of these exports, whether they exist yet or not, and no others unless all are logged."""
    global _chosen  # noqa: PLW0603 - as the level of a logger it belongs to the process
    _chosen = frozenset(exports)
    log.setLevel(logging.DEBUG if _chosen else logging.NOTSET)


def chosen() -> frozenset[str]:
    """The exports that `choose` named last."""
    return _chosen


def wanted(export: str) -> bool:
    """Whether requests of this export are logged; to be asked where `log` is enabled for DEBUG."""
    assert log.parent is not None
    return export in _chosen or log.parent.isEnabledFor(logging.DEBUG)


def log_refusal(export: str, cookie: int, error: RequestError) -> None:
    """The answer to a request that failed, where requests of this export are logged."""
    if log.isEnabledFor(logging.DEBUG) and wanted(export):
        log.debug("! %s: cookie %#x %s: %s", export, cookie, NbdError(error.error).name, error.text)
