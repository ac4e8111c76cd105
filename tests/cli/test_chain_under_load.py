"""Thirty increments of a disk that is written all the time: each restores the very instant, by us and by qemu-img."""

from __future__ import annotations

import random
import threading
from pathlib import Path

from click.testing import CliRunner

from fleecing.cli.control_client import ControlClient
from fleecing.cli.main import main
from fleecing.client.dial import connect
from fleecing.nbd.uri import NbdUri
from tests.crash.forked import ForkedServer
from tests.images import MIB, make_image
from tests.peers import run

SIZE = 4 * MIB + 4321
POINTS = 31


class Guest(threading.Thread):
    """Writes one thing after the other, and knows which of them were acknowledged."""

    def __init__(self, uri: NbdUri) -> None:
        super().__init__()
        self.log: list[tuple[int, bytes]] = []
        self.acknowledged = 0
        self.ended = threading.Event()
        self._uri = uri
        self._chance = random.Random(30)

    def run(self) -> None:
        with connect(self._uri) as connection:
            while not self.ended.wait(0.001):
                length = self._chance.choice((1, 512, 4096, 70_000))
                offset = self._chance.randrange(SIZE - length)
                is_zero = self._chance.random() < 0.2
                data = bytes(length) if is_zero else self._chance.randbytes(length)
                self.log.append((offset, data))
                if is_zero:
                    connection.write_zeroes(offset, length)
                else:
                    connection.write(offset, data)
                self.acknowledged += 1


def fleecing(*words: object) -> None:
    result = CliRunner().invoke(main, [str(word) for word in words])
    assert result.exit_code == 0, result.output


def test_thirty_increments_under_load_restore_every_point_exactly(tmp_path: Path) -> None:
    image, folder = tmp_path / "vda.img", tmp_path / "backups"
    state = bytearray(make_image(image, SIZE))
    server = ForkedServer(tmp_path, image)
    server.wait_ready()
    control = ControlClient(str(server.control))
    guest = Guest(NbdUri(export="vda", socket=str(server.unix)))
    guest.start()
    instants: list[tuple[int, int]] = []
    try:
        for number in range(POINTS):
            request = {"disks": ["vda"], "name": "s", "checkpoint": f"p{number}"}
            if number:
                request["since"] = f"p{number - 1}"
            before = guest.acknowledged
            control.request("POST", "/v1/snapshots", request)
            instants.append((before, len(guest.log)))
            fleecing("pull", "vda@s", folder, "--chain", "--compress", "zstd", "--control", server.control)
            control.request("DELETE", "/v1/snapshots/vda@s")
    finally:
        guest.ended.set()
        guest.join()
        server.stop()
    done = 0

    def go_on(until: int) -> None:
        nonlocal done
        for offset, data in guest.log[done:until]:
            state[offset : offset + len(data)] = data
        done = max(done, until)

    for number, (earliest, latest) in enumerate(instants):
        raw, theirs = tmp_path / f"{number}.raw", tmp_path / f"{number}.theirs"
        fleecing("restore", folder, raw, "--at", f"p{number}")
        run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", str(folder / f"p{number}.qcow2"), str(theirs))
        restored = raw.read_bytes()
        assert theirs.read_bytes()[:SIZE] == restored
        go_on(earliest)
        while restored != state:
            assert done < latest, f"p{number} is the disk of no moment between its request and the answer"
            go_on(done + 1)
        raw.unlink()
        theirs.unlink()
    assert guest.acknowledged > POINTS
