"""Snapshots of several disks are of one instant: what a guest wrote in an order is never frozen against it."""

from __future__ import annotations

import threading
from pathlib import Path

from fleecing.nbd.constants import ReplyMode
from tests.images import KIB, make_image
from tests.raw_client import FUA, WRITE, RawClient
from tests.serving import Serve

DISKS = ["vda", "vdb", "vdc"]


def counter(client: RawClient) -> int:
    """The number at the start of a disk."""
    return int.from_bytes(client.read(0, 8), "big")


def test_no_disk_is_ahead_of_the_one_that_was_written_before_it(serve: Serve, tmp_path: Path) -> None:
    images = {name: tmp_path / f"{name}.raw" for name in DISKS}
    for image in images.values():
        make_image(image, 64 * KIB + 1)
        with image.open("r+b") as file:
            file.write(bytes(8))
    server = serve(images)
    enough = threading.Event()
    written = threading.Event()

    def guest() -> None:
        """One number at a time, to one disk after the other."""
        clients = [RawClient(server.unix, name, ReplyMode.SIMPLE) for name in DISKS]
        number = 0
        while not enough.is_set():
            number += 1
            for client in clients:
                assert client.request(WRITE, FUA * (number % 2), 0, 0, number.to_bytes(8, "big")).error == 0
            written.set()
        for client in clients:
            client.close()

    thread = threading.Thread(target=guest)
    thread.start()
    try:
        assert written.wait(20)
        seen = []
        for turn in range(20):
            made = server.freeze(*DISKS, name=f"s{turn}")
            numbers = []
            for snapshot in made:
                with RawClient(server.unix, snapshot["export"]) as client:
                    numbers.append(counter(client))
            first, second, third = numbers
            assert first >= second >= third >= first - 1, numbers
            seen.append(first)
            for snapshot in made:
                server.delete(snapshot["export"])
    finally:
        enough.set()
        thread.join()
    assert seen[-1] > seen[0]
