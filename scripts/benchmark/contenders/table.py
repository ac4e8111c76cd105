"""Who takes part, and who can here."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path

from scripts.benchmark.contenders import ours, plain, qsd
from scripts.benchmark.house import House
from scripts.benchmark.model import Server, Transport

Serve = Callable[[House, Path, Transport], AbstractContextManager[Server]]

OURS, IMPARTIAL = ours.NAME, ours.IMPARTIAL
QSDS = (qsd.THREADS, qsd.IO_URING)

SERVE: Mapping[str, Serve] = {
    OURS: ours.serve,
    qsd.THREADS: functools.partial(qsd.serve, aio="threads"),
    qsd.IO_URING: functools.partial(qsd.serve, aio="io_uring"),
    plain.NBDKIT: plain.serve_nbdkit,
    plain.NBDKIT_COW: lambda house, image, transport: plain.serve_nbdkit(house, image, transport, "cow"),
    plain.NBD_SERVER: plain.serve_nbd_server,
    IMPARTIAL: ours.serve_impartially,
}

PROGRAMS: Mapping[str, str] = {
    qsd.THREADS: qsd.PROGRAM,
    qsd.IO_URING: qsd.PROGRAM,
    plain.NBDKIT: "nbdkit",
    plain.NBDKIT_COW: "nbdkit",
    plain.NBD_SERVER: "nbd-server",
}


TOOLS: Mapping[str, str] = {"nbdcopy": "nbdcopy", "qemu-img": "qemu-img"}
"""Clients, and their programs: what ours is compared with where the server is the same."""

CONTENDERS = (*SERVE, *TOOLS)
"""All, in the order in which they are shown."""


def why_not(house: House, name: str, transport: Transport) -> str:
    """Why a contender cannot take part, or nothing."""
    program = PROGRAMS.get(name) or TOOLS.get(name)
    if program is not None and shutil.which(program) is None:
        return f"{program} is not installed"
    return ours.lacks(house, transport) if name == OURS else ""
