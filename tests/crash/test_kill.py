"""kill -9 at any moment: the next server has every acknowledged write, every snapshot and every changed block.

FLEECING_KILLS sets how often servers are killed, all in all; the default is what CI has time for.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest

from fleecing.cli.control_client import ControlClient
from fleecing.errors import FleecingError
from fleecing.units import KiB
from tests.block.rig import Running
from tests.crash.forked import ForkedServer
from tests.crash.ledger import SECTOR, Instant, Ledger, Snapshot, stamp, stamps
from tests.raw_client import EINVAL, READ, TRIM, WRITE, WRITE_ZEROES, RawClient

SIZE = 512 * KiB
CLUSTER = 4 * KiB
SECTORS = SIZE // SECTOR
PER_CLUSTER = CLUSTER // SECTOR
KILLS = int(os.environ.get("FLEECING_KILLS", "210"))
SERVERS = 3
"""Side by side, so that both processors have something to do."""


class WrongAnswer(Exception):
    """The server gave an answer that it must not give, whether it dies in the next moment or not."""


def must(holds: object, what: object) -> None:
    if not holds:
        raise WrongAnswer(what)


DIED = (OSError, AssertionError, FleecingError)
"""What a client gets when the server dies; whatever else was wrong is seen after the restart."""


class Story:
    """One disk and the servers that serve it, one after the other."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder = folder
        self.image = folder / "i"
        with self.image.open("wb") as image:
            image.truncate(SIZE)
        self.random = Random(seed)
        self.ledger = Ledger(SECTORS)
        self.count = 0
        self.kills = 0
        self.seen = {"snapshots": 0, "checkpoints": 0, "broken": 0, "trimmed": 0}
        self.server: ForkedServer
        self.control = ControlClient(str(folder / "c"), timeout=20)

    def start(self) -> ForkedServer:
        return ForkedServer(self.folder, self.image, "--cluster-size", str(CLUSTER))

    def turn(self) -> None:
        """A server starts, is compared with the ledger, works, and is killed."""
        self.server = self.start()
        if self.random.random() < 0.15:  # killed while it starts
            time.sleep(self.random.uniform(0, 0.15))
            self.server.kill()
            self.kills += 1
            self.server = self.start()
        self.server.wait_ready()
        self.check()
        seeds = [self.random.random() for _ in range(5)]
        busy = [
            Running(lambda: self.until_death(lambda: self.guest(Random(seeds[0]), 0, SECTORS // 2))),
            Running(lambda: self.until_death(lambda: self.guest(Random(seeds[1]), SECTORS // 2, SECTORS))),
            Running(lambda: self.until_death(lambda: self.operator(Random(seeds[2])))),
            Running(lambda: self.until_death(lambda: self.backup(Random(seeds[3])))),
        ]
        time.sleep(self.random.uniform(0, 0.25))
        self.over = True
        self.server.kill()
        self.kills += 1
        for one in busy:
            one.wait()

    def until_death(self, work: Callable[[], None]) -> None:
        """Work, until the server dies. An answer that is wrong while it lives fails the test."""
        try:
            work()
        except DIED as e:
            if self.server.process.is_alive() and not self.over:
                raise
            self.last_error = e

    # Those who work.

    def guest(self, random: Random, first: int, end: int) -> None:
        with RawClient(self.server.unix, "vda") as client:
            while not self.over:
                at = random.randrange(first, end)
                count = min(random.choice([1, 1, 3, 8, 40]), end - at)
                kind = random.choice([WRITE, WRITE, WRITE, TRIM, WRITE_ZEROES])
                number = self.ledger.new_number() if kind == WRITE else 0
                with self.ledger.write(at, count, number):
                    payload = stamp(number) * count if kind == WRITE else b""
                    reply = client.request(kind, 0, at * SECTOR, count * SECTOR, payload)
                    must(not reply.error, reply)

    def operator(self, random: Random) -> None:
        ledger = self.ledger
        while not self.over:
            live = [s for s in ledger.snapshots.values() if s.exists]
            points = [c for c in ledger.checkpoints.values() if c.exists]
            if len(live) < 3 and random.random() < 0.8:
                self.freeze(random, with_checkpoint=len(points) < 4)
            elif live and random.random() < 0.7:
                name = random.choice(live).name
                with ledger.delete(name):
                    self.control.request("DELETE", f"/v1/snapshots/vda@{name}")
            elif points:
                name = random.choice(points).name
                with ledger.delete_checkpoint(name):
                    self.control.request("DELETE", f"/v1/checkpoints/vda@{name}")

    def freeze(self, random: Random, *, with_checkpoint: bool) -> None:
        self.count += 1
        name = f"s{self.count}"
        checkpoint = f"c{self.count}" if with_checkpoint and random.random() < 0.6 else None
        limit = 40 * CLUSTER if random.random() < 0.15 else None
        body = {"disks": ["vda"], "name": name, "checkpoint": checkpoint, "temp_limit": limit}
        if random.random() < 0.4:
            body["durable"] = True
        with self.ledger.freeze(name, checkpoint, may_break=limit is not None):
            self.control.request("POST", "/v1/snapshots", body)

    def backup(self, random: Random) -> None:
        while not self.over:
            live = [s for s in list(self.ledger.snapshots.values()) if s.exists]
            if not live:
                time.sleep(0.005)
                continue
            snapshot = random.choice(live)
            try:
                self.read_and_trim(random, snapshot)
            except DIED:
                if not snapshot.deleting:
                    raise

    def read_and_trim(self, random: Random, snapshot: Snapshot) -> None:
        with RawClient(self.server.unix, f"vda@{snapshot.name}") as client:
            for _ in range(8):
                cluster = random.randrange(SIZE // CLUSTER)
                count = min(random.choice([1, 2, 16]), SIZE // CLUSTER - cluster)
                if random.random() < 0.5:
                    self.check_range(client, snapshot, cluster, count)
                    continue
                clusters = set(range(cluster, cluster + count))
                snapshot.maybe |= clusters
                reply = client.request(TRIM, 0, cluster * CLUSTER, count * CLUSTER)
                if not reply.error:
                    snapshot.trimmed |= clusters
                else:
                    must(snapshot.may_break or snapshot.deleting, reply)

    # Comparing.

    def check(self) -> None:
        """Everything that the server has, after a start."""
        ledger = self.ledger
        with RawClient(self.server.unix, "vda") as client:
            ledger.restart(client.read(0, SIZE))
        self.check_existence()
        for snapshot in ledger.snapshots.values():
            self.seen["snapshots"] += 1
            shown = self.control.request("GET", f"/v1/snapshots/vda@{snapshot.name}")
            if shown["broken"] is not None:
                assert snapshot.may_break, shown["broken"]
                assert "temp limit" in shown["broken"], shown["broken"]
                self.seen["broken"] += 1
                continue
            with RawClient(self.server.unix, f"vda@{snapshot.name}") as client:
                for cluster in range(0, SIZE // CLUSTER, 32):
                    self.check_range(client, snapshot, cluster, 32)
        for checkpoint in ledger.checkpoints.values():
            self.check_changes(checkpoint.name, checkpoint.instant)

    def check_existence(self) -> None:
        """What was answered is there, what was deleted is not, what was under way is one of both."""
        ledger = self.ledger
        there = {s["name"] for s in self.control.request("GET", "/v1/snapshots")["snapshots"]}
        assert there <= ledger.snapshots.keys(), "a snapshot came back"
        for snapshot in list(ledger.snapshots.values()):
            assert snapshot.name in there or not snapshot.exists, f"{snapshot.name} is gone"
            snapshot.exists = snapshot.name in there
            snapshot.deleting = False
            if not snapshot.exists:
                del ledger.snapshots[snapshot.name]
        points = {c["name"]: c for c in self.control.request("GET", "/v1/checkpoints")["checkpoints"]}
        assert points.keys() <= ledger.checkpoints.keys(), "a checkpoint came back"
        for checkpoint in list(ledger.checkpoints.values()):
            assert checkpoint.name in points or not checkpoint.exists, f"{checkpoint.name} is gone"
            checkpoint.exists = checkpoint.name in points
            if not checkpoint.exists:
                del ledger.checkpoints[checkpoint.name]
            else:
                assert points[checkpoint.name]["state"] == "active", points

    def check_range(self, client: RawClient, snapshot: Snapshot, cluster: int, count: int) -> None:
        """Clusters are what they were at the instant, or trimmed."""
        trimmed = set(range(cluster, cluster + count)) & snapshot.trimmed
        reply = client.request(READ, 0, cluster * CLUSTER, count * CLUSTER)
        if reply.error:
            if snapshot.deleting or (snapshot.may_break and "broken" in reply.text):
                return
            must(reply.error == EINVAL and "trimmed" in reply.text, reply)
            if count > 1:
                for one in range(cluster, cluster + count):
                    self.check_range(client, snapshot, one, 1)
            else:
                must(cluster in snapshot.maybe, f"{snapshot.name}: cluster {cluster} was never trimmed")
                self.seen["trimmed"] += 1
            return
        must(not trimmed, f"{snapshot.name}: trimmed clusters {trimmed} can be read")
        data = b"".join(piece for _, piece in sorted(reply.data))
        may = snapshot.instant.may
        with self.ledger.lock:
            for sector, number in enumerate(stamps(data), cluster * PER_CLUSTER):
                must(number in may[sector], f"{snapshot.name}: sector {sector} is of {number}, not of {may[sector]}")
                may[sector] = {number}  # and so it stays

    def check_changes(self, name: str, instant: Instant) -> None:
        """Every sector that is not as it was at the instant is reported as changed."""
        self.seen["checkpoints"] += 1
        changed: set[int] = set()
        for extent in self.control.request("GET", f"/v1/checkpoints/vda@{name}/extents")["extents"]:
            first = extent["offset"] // SECTOR
            changed.update(range(first, first + -(-extent["length"] // SECTOR)))
        for sector, number in enumerate(self.ledger.has):
            assert number in instant.may[sector] or sector in changed, f"{name}: the change of sector {sector} is lost"

    over = False
    last_error: Exception | None = None


@pytest.mark.timeout(max(240, KILLS))
def test_nothing_that_was_answered_is_lost() -> None:
    seed = Random().randrange(1 << 32)
    print(f"seed {seed}")
    root = Path(tempfile.mkdtemp(prefix="kill"))  # short: sockets are in it
    stop = threading.Event()
    stories = []
    for number in range(SERVERS):
        (root / str(number)).mkdir()
        stories.append(Story(root / str(number), seed + number))

    def tell(story: Story) -> None:
        try:
            while sum(s.kills for s in stories) < KILLS and not stop.is_set():
                story.over = False
                story.turn()
        except BaseException:
            stop.set()
            print(story.server.log)
            raise
        finally:
            story.server.kill()

    telling = [Running(lambda story=story: tell(story)) for story in stories]  # type: ignore[misc]
    for one in telling:
        one.over.wait()
    for one in telling:
        one.wait()
    seen = {what: sum(story.seen[what] for story in stories) for what in stories[0].seen}
    print(f"{sum(s.kills for s in stories)} kills, {seen}")
    assert all(seen.values()), "the load did not do all that it was to do"
    shutil.rmtree(root)
