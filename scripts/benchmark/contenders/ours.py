"""Fleecing itself, as an operator starts it; and with a rule less, as nobody does."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from fleecing.cli.control_client import ControlClient
from scripts.benchmark.contenders.tls import certificates, with_certificates
from scripts.benchmark.house import House
from scripts.benchmark.model import Offer, Transport
from scripts.benchmark.process import Process, run

NAME, IMPARTIAL = "ours", "impartial"

COMMAND = [sys.executable, "-P", "-m", "fleecing"]
TREE = {"PYTHONPATH": str(Path(__file__).parents[3])}
"""The version measured is the one beside these scripts, whatever is installed."""

_IMPARTIAL = [sys.executable, "-P", "-m", "scripts.benchmark.contenders.impartial"]


def lacks(house: House, transport: Transport) -> str:
    """Why it cannot serve over this transport, or nothing."""
    if transport is Transport.TLS and "--tls-dir" not in run([*COMMAND, "serve", "--help"], house.log, env=TREE):
        return "this version has no TLS"
    return ""


class Ours:
    """A running server, and its control API."""

    def __init__(self, child: Process, control: str, *, impartial: bool = False) -> None:
        self.child = child
        self.impartial = impartial
        self._control = ControlClient(control)
        self.uri = str(self._control.request("GET", "/v1/disks")["disks"][0]["uris"][0])

    @contextmanager
    def snapshot(self, *, read_once: bool = False) -> Iterator[Offer]:
        body = {"disks": ["vda"], "name": f"s{time.monotonic_ns()}", "read_once": read_once}
        start = time.monotonic()
        made = self._control.request("POST", "/v1/snapshots", body)
        seconds = time.monotonic() - start
        info = made["snapshots"][0]
        try:
            yield Offer(self, self.uri, info["uris"][0], info["temp"]["path"], seconds)
        finally:
            self._control.request("DELETE", f"/v1/snapshots/vda@{info['name']}")

    def add_checkpoint(self, name: str, since: str | None = None) -> float:
        """Make a checkpoint, with a snapshot that is gone again; the seconds that both took, as one step."""
        start = time.monotonic()
        body = {"disks": ["vda"], "name": name, "checkpoint": name, "since": since}
        self._control.request("POST", "/v1/snapshots", body)
        seconds = time.monotonic() - start
        self._control.request("DELETE", f"/v1/snapshots/vda@{name}")
        return seconds

    def drop_checkpoint(self, name: str) -> None:
        """Forget it."""
        self._control.request("DELETE", f"/v1/checkpoints/vda@{name}")


@contextmanager
def serve(house: House, image: Path, transport: Transport, program: Sequence[str] = tuple(COMMAND)) -> Iterator[Ours]:
    """Start it on this image."""
    control, folder = house.path("ctl"), house.path("state")
    listen = ["--unix", house.path("sock")] if transport is Transport.UNIX else ["--listen", "127.0.0.1:0"]
    if transport is Transport.TLS:
        listen += ["--tls", "require", "--tls-dir", certificates(house)]
    command = [*program, "serve", image, "--name", "vda", "--control", control, "--state-dir", folder, *listen]
    with Process(command, house.log, env=TREE) as child:
        child.wait_line("^Ready")
        server = Ours(child, str(control), impartial=program == _IMPARTIAL)
        if transport is Transport.TLS:
            server.uri = with_certificates(house, server.uri)
        yield server


def serve_impartially(house: House, image: Path, transport: Transport) -> AbstractContextManager[Ours]:
    """The same, and the guest does not go first."""
    return serve(house, image, transport, _IMPARTIAL)
