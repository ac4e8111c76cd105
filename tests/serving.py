"""The real server, a process with an operator's options, driven through its control socket.

    server = serve(image)                           # the fixture `serve`; the disk is "vda", on Unix and TCP
    uri = server.snapshot(name="monday")            # nbd+unix:///vda@monday?socket=...
    run("nbdcopy", uri, str(backup))
    assert server.show("vda@monday")["state"] == "ready"
    server.delete("vda@monday")

Every server ends with the test: SIGTERM, exit code 0, and nothing in its log that nobody expected.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from fleecing.cli.control_client import ControlClient
from fleecing.nbd.uri import NbdUri
from tests.peers import DEADLINE, Child

ROOT = Path(__file__).resolve().parent.parent

_UNEXPECTED = re.compile(r"Traceback|nobody expected|Exception in thread|never awaited")


class Server:
    """A running `fleecing serve`. `images` is one path (disk "vda"), or several by the names of their disks.

    FOLDER gets the sockets, the state and the log; one server a folder. `options` go to the command line as they are.
    `wrapper` is a program that runs the server, for instance prlimit; `config` is what its configuration holds besides
    several disks, and can be changed (`configure`). `start` it again after `stop` or `kill`.

    `forked`: by tests/forking.py, which has no wrapper; otherwise by the interpreter, as an operator starts it.
    """

    def __init__(
        self,
        folder: Path,
        images: Path | Mapping[str, Path],
        *options: str,
        wrapper: Sequence[str] = (),
        config: str = "",
        forked: bool = False,
    ) -> None:
        folder.mkdir(exist_ok=True)
        self.unix = folder / "nbd.sock"
        self.control_path = folder / "control.sock"
        self.state_dir = folder / "state"
        disks = {"vda": images} if isinstance(images, Path) else images
        self._config, self._disks = folder / "fleecing.toml", disks
        self.configure(config)
        what = [str(images), "--name", "vda"] if isinstance(images, Path) else ["--config", str(self._config)]
        places = ["--unix", str(self.unix), "--listen", "127.0.0.1:0", "--control", str(self.control_path)]
        places += ["--state-dir", str(self.state_dir)]
        self._folder = folder
        start = ["fleecing"] if forked else [*wrapper, sys.executable, "-m", "fleecing"]
        self._command = [*start, "serve", *what, *places, *options]
        self._forked = forked
        self._starts = 0
        self.control = ControlClient(str(self.control_path), timeout=DEADLINE)
        self.start()

    def start(self, *options: str) -> None:
        """Start it, again or for the first time; returns when it serves. `options` are for this time only."""
        self._starts += 1
        name = "fleecing" if self._starts == 1 else f"fleecing-{self._starts}"
        command = [*self._command, *options]
        self.child = Child(command, self._folder, name=name, env={"PYTHONPATH": str(ROOT)}, forked=self._forked)
        self._stopped = False
        try:
            self.port = int(self.child.wait_for_line(r"NBD on tcp:127\.0\.0\.1:(\d+)").group(1))
            self.child.wait_for_line("^Ready")
        except BaseException:
            self.kill()
            raise

    def configure(self, text: str) -> None:
        """Write the configuration; a server that runs is not told."""
        disks = "".join(f'[disk.{name}]\npath = "{image}"\n' for name, image in self._disks.items())
        self._config.write_text(f"{text}\n{disks}")

    @property
    def log(self) -> str:
        """What it has said until now."""
        return self.child.stderr

    def uri(self, export: str = "vda", *, tcp: bool = False) -> str:
        """The NBD URI of an export over the Unix socket, or over TCP."""
        if tcp:
            return str(NbdUri(export=export, host="127.0.0.1", port=self.port))
        return str(NbdUri(export=export, socket=str(self.unix)))

    def snapshot(self, disk: str = "vda", name: str | None = None, *, tcp: bool = False, **request: Any) -> str:
        """Freeze one disk; the snapshot's NBD URI. `request`: what SnapshotRequest takes."""
        return self.uri(self.freeze(disk, name=name, **request)[0]["export"], tcp=tcp)

    def freeze(self, *disks: str, name: str | None = None, **request: Any) -> list[dict[str, Any]]:
        """Freeze disks at one instant; what the API tells of each snapshot."""
        made: list[dict[str, Any]] = self.control.request(
            "POST", "/v1/snapshots", {"disks": disks, "name": name, **request}
        )["snapshots"]
        return made

    def delete(self, export: str) -> bool:
        """Delete DISK@SNAPSHOT; False where there was none."""
        deleted: bool = self.control.request("DELETE", f"/v1/snapshots/{export}")["deleted"]
        return deleted

    def show(self, export: str) -> dict[str, Any]:
        """What the API tells of DISK@SNAPSHOT."""
        info: dict[str, Any] = self.control.request("GET", f"/v1/snapshots/{export}")
        return info

    def map(self, export: str) -> list[tuple[int, int, str]]:
        """(offset, length, state) of the runs of DISK@SNAPSHOT's clusters."""
        runs = self.control.request("GET", f"/v1/snapshots/{export}/map")["runs"]
        return [(run["offset"], run["length"], run["state"]) for run in runs]

    def checkpoints(self, disk: str = "vda") -> list[dict[str, Any]]:
        """What the API tells of the checkpoints of a disk."""
        found: list[dict[str, Any]] = self.control.request("GET", f"/v1/checkpoints?disk={disk}")["checkpoints"]
        return found

    def changed(self, checkpoint: str) -> list[tuple[int, int]]:
        """(offset, length) of what changed since DISK@CHECKPOINT."""
        extents = self.control.request("GET", f"/v1/checkpoints/{checkpoint}/extents")["extents"]
        return [(extent["offset"], extent["length"]) for extent in extents]

    def delete_checkpoint(self, checkpoint: str) -> bool:
        """Delete DISK@CHECKPOINT; False where there was none."""
        deleted: bool = self.control.request("DELETE", f"/v1/checkpoints/{checkpoint}")["deleted"]
        return deleted

    def status(self) -> dict[str, Any]:
        """All that the API tells of the server."""
        answer: dict[str, Any] = self.control.request("GET", "/v1/status")
        return answer

    def temp(self, export: str) -> Path:
        """The temp qcow2 of DISK@SNAPSHOT."""
        return Path(self.show(export)["temp"]["path"])

    def stop(self) -> None:
        """SIGTERM. The test fails where the server does not end with 0 or had an error that nobody expected."""
        if self._stopped:
            return
        self._stopped = True
        code = self.child.stop()
        print(f"---- {self.child.name} (pid {self.child.pid}) ended with {code} and said:\n{self.log}")
        if code != 0 or _UNEXPECTED.search(self.log):
            pytest.fail(f"the server ended with exit code {code} and said:\n{self.log}")

    def kill(self) -> None:
        """End it as a crash would; then nothing is asserted of its end."""
        self._stopped = True
        self.child.kill()


Serve = Callable[..., Server]
"""What the fixture `serve` gives: takes what Server takes after the folder."""
