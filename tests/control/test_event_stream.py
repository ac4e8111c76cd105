"""The events of a running server, listened to by curl as anybody would; and listeners that are not good at it."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from fleecing.control.event_stream import EventRing, EventStream
from fleecing.control.sockets import bind_unix
from fleecing.events import Event, tell
from tests.images import MIB, make_image
from tests.peers import DEADLINE, Child, Children, run
from tests.serving import Serve, Server

log = logging.getLogger("fleecing.test")


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "vda.img"
    make_image(path, 4 * MIB)
    return path


def listen(children: Children, server: Server, *options: str) -> Child:
    """curl, with what it receives on its stderr, whose lines can be waited for."""
    form = ["-s", "-N", "-o", "/dev/stderr", "--unix-socket", str(server.control_path)]
    curl = children.start("curl", *form, *options, "http://localhost/v1/events")
    curl.wait_for_line("^: events of fleecing$")
    return curl


def told(curl: Child) -> list[dict[str, Any]]:
    """What has come until now, with the fields of the stream."""
    found = []
    for block in curl.stderr.split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.splitlines() if not line.startswith(":"))
        if "data" in fields:
            found.append({"id": fields.get("id"), **json.loads(fields["data"])})
            assert found[-1]["event"] == fields["event"]
    return found


def test_the_life_of_snapshots_clients_and_jobs_is_told(
    children: Children, serve: Serve, image: Path, tmp_path: Path
) -> None:
    server = serve(image)
    curl = listen(children, server)
    server.snapshot(name="s", checkpoint="c", temp_limit="1M")
    run("qemu-io", "-f", "raw", "-c", "write 0 640k", "-c", "write 1M 3M", server.uri())
    curl.wait_for_line('"event": "client-left"')
    server.delete("vda@s")
    server.delete_checkpoint("vda@c")
    server.control.request("POST", "/v1/jobs", {"source": "vda", "target": str(tmp_path / "pushed")})
    curl.wait_for_line('"event": "job-ended"')
    server.stop()
    assert curl.wait() == 0  # the stream has ended well
    events = told(curl)
    names = [event["event"] for event in events]
    job = names.index("job-started")
    assert names[:2] == ["snapshot-created", "checkpoint-created"]
    assert set(names[2:job]) == {
        "snapshot-created",  # that of the push
        "client-came",
        "temp-pressure",
        "snapshot-broken",
        "client-left",
        "snapshot-deleted",
        "checkpoint-deleted",
    }
    assert names[-1] == "server-stopping"
    by_name = {event["event"]: event for event in events[:job]}
    assert by_name["temp-pressure"]["limit"] == MIB
    assert by_name["temp-pressure"]["used"] >= MIB * 8 // 10
    assert (
        by_name["snapshot-broken"]["reason"] == f"copy before a guest write failed: temp limit of {MIB} bytes reached"
    )
    assert (by_name["snapshot-broken"]["disk"], by_name["snapshot-broken"]["snapshot"]) == ("vda", "s")
    assert by_name["client-left"]["bytes_written"] > 3 * MIB
    assert by_name["checkpoint-created"]["checkpoint"] == "c"
    ended = next(event for event in events if event["event"] == "job-ended")
    assert (ended["state"], ended["target"]) == ("done", str(tmp_path / "pushed"))


def test_an_image_that_changes_behind_the_servers_back_is_told_once(
    children: Children, serve: Serve, image: Path
) -> None:
    server = serve(image)
    curl = listen(children, server)
    with image.open("r+b") as file:
        file.truncate(5 * MIB)
        curl.wait_for_line('"event": "image-problem"')
        file.truncate(4 * MIB)
        curl.wait_for_line('"event": "image-ok"')
    problem, ok = told(curl)
    assert (problem["disk"], problem["path"], problem["level"]) == ("vda", str(image), "error")
    assert "has grown" in problem["reason"]
    assert ok["event"] == "image-ok"


def test_a_listener_goes_on_behind_the_last_event_that_it_saw(children: Children, serve: Serve, image: Path) -> None:
    server = serve(image)
    first = listen(children, server)
    for name in ("a", "b", "c"):
        server.snapshot(name=name)
    first.wait_for_line("vda@c")
    a, b, c = told(first)
    second = listen(children, server, "-H", f"Last-Event-ID: {a['id']}")
    second.wait_for_line("vda@c")
    assert told(second) == [b, c]
    run_id, _, number = c["id"].rpartition("-")
    for unknown in ("elsewhere-2", f"{run_id}-{int(number) + 1}", "", "x"):
        other = listen(
            children, server, "-H", f"Last-Event-ID;{unknown}" if not unknown else f"Last-Event-ID: {unknown}"
        )
        other.wait_for_line("vda@c")
        lost, *kept = told(other)
        assert (lost["event"], lost["id"], lost["last_event_id"]) == ("events-lost", None, unknown)
        assert kept[-3:] == [a, b, c]
        assert kept[0]["event"] == "disk-opened"


def test_the_stream_is_described(serve: Serve, image: Path) -> None:
    described = serve(image).control.request("GET", "/openapi.json")["paths"]["/v1/events"]["get"]
    assert list(described["responses"]["200"]["content"]) == ["text/event-stream"]
    assert [(p["name"], p["in"]) for p in described["parameters"]] == [("Last-Event-ID", "header")]


# Listeners that are slow, many, or gone: with a small ring, in this process.


@pytest.fixture(autouse=True)
def _all_told(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    with caplog.at_level(logging.INFO, "fleecing.test"):
        yield


@asynccontextmanager
async def serving(path: Path, *, kept: int = 4, **options: float) -> AsyncIterator[tuple[EventRing, asyncio.Event]]:
    """The ring, and what is set when a listener has been let go."""
    ring = EventRing(asyncio.get_running_loop(), kept)
    log.addHandler(ring)
    stream = EventStream(ring, **options)
    ended = asyncio.Event()

    async def serve(request: web.Request) -> web.StreamResponse:
        try:
            return await stream.serve(request)
        finally:
            ended.set()

    app = web.Application()
    app.router.add_get("/v1/events", serve)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.SockSite(runner, bind_unix(str(path))).start()
    try:
        yield ring, ended
    finally:
        log.removeHandler(ring)
        ring.close()
        await runner.cleanup()


async def connect(path: Path, headers: str = "") -> socket.socket:
    """A listener that has asked, and reads when it wants to."""
    sock = socket.socket(socket.AF_UNIX)
    sock.setblocking(False)
    loop = asyncio.get_running_loop()
    await loop.sock_connect(sock, str(path))
    await loop.sock_sendall(sock, f"GET /v1/events HTTP/1.1\r\nHost: x\r\n{headers}\r\n".encode())
    return sock


async def until(sock: socket.socket, text: bytes) -> bytes:
    """What comes up to this text, or to the end."""
    found = b""
    async with asyncio.timeout(DEADLINE):
        while text not in found:
            more = await asyncio.get_running_loop().sock_recv(sock, 1 << 16)
            if not more:
                break
            found += more
    return found


def happen(text: str) -> None:
    tell(log, logging.INFO, Event.DISK_OPENED, text)


def test_who_reads_slower_than_events_come_is_dropped_and_nobody_else_is(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(tmp_path / "s") as (ring, ended), asyncio.timeout(DEADLINE):
            slow, quick = await connect(tmp_path / "s"), await connect(tmp_path / "s")
            await until(slow, b"events of fleecing")
            await until(quick, b"events of fleecing")
            for number in range(12):
                happen(f"{number}, {'x' * 500_000}")
                assert f"{number}, xxx".encode() in await until(quick, b"\n\n")
            assert len(ring.kept()) == 4
            assert b"11, xxx" not in await until(slow, b"never")
            await ended.wait()
            happen("still there")
            assert b"still there" in await until(quick, b"\n\n")
            slow.close()
            quick.close()

    asyncio.run(scenario())


def test_who_takes_nothing_for_long_is_dropped_though_little_happens(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(tmp_path / "s", send_seconds=0.2) as (_, ended), asyncio.timeout(DEADLINE):
            slow = await connect(tmp_path / "s")
            await until(slow, b"events of fleecing")
            happen("x" * 5_000_000)
            await ended.wait()
            slow.close()

    asyncio.run(scenario())


def test_a_silent_stream_gives_signs_of_life_and_notices_who_has_gone(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(tmp_path / "s", alive_seconds=0.01) as (_, ended), asyncio.timeout(DEADLINE):
            listener = await connect(tmp_path / "s")
            assert b": alive\n\n" in await until(listener, b": alive")
            listener.close()
            await ended.wait()

    asyncio.run(scenario())


def test_the_end_of_the_server_ends_the_stream_behind_its_last_event(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(tmp_path / "s") as (ring, _):
            listener = await connect(tmp_path / "s")
            await until(listener, b"events of fleecing")
            happen("the last one")
            ring.close()
            rest = await until(listener, b"0\r\n\r\n")
            assert b"the last one" in rest
            assert rest.endswith(b"0\r\n\r\n")
            listener.close()

    asyncio.run(scenario())
