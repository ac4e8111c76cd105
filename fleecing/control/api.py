"""The control API: HTTP/1.1 and JSON on a Unix socket.

Handlers run in the loop's thread. Whatever may wait for the disk, the guest or a reader goes to a worker thread.
A client that hangs up does not stop what it asked for.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
from collections.abc import Sequence

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware
from pydantic import BaseModel, ValidationError

from fleecing.control.config import explain
from fleecing.control.event_stream import EventStream
from fleecing.control.jobs import Jobs
from fleecing.control.logs import Logs
from fleecing.control.metrics import Metrics
from fleecing.control.metrics_site import answer
from fleecing.control.models import (
    CheckpointList,
    Deleted,
    DiskList,
    ExtentPage,
    JobChange,
    JobInfo,
    JobList,
    LogChange,
    LogInfo,
    MapPage,
    PushRequest,
    SnapshotChange,
    SnapshotInfo,
    SnapshotList,
    SnapshotRequest,
    Status,
)
from fleecing.control.openapi import Parameter, Route, document
from fleecing.control.report import Reporter
from fleecing.errors import ControlError, FleecingError
from fleecing.server.peer import Peer, peer_of

log = logging.getLogger(__name__)

MAX_BODY = 1 << 20
"""Bytes of the longest request body."""

MAX_MAP_RUNS = 100_000
"""Runs that one answer of a map holds, about: some MiB of JSON."""

_SNAPSHOT = "/v1/snapshots/{disk}@{name}"
_JOB = "/v1/jobs/{id}"
_CHECKPOINT = "/v1/checkpoints/{disk}@{name}"
_PAGE_QUERY = (
    Parameter("offset", "bytes; where to start, 0 if not given"),
    Parameter("limit", f"about how many runs to answer, at most {MAX_MAP_RUNS}"),
)


def make_app(
    reporter: Reporter,
    jobs: Jobs,
    events: EventStream,
    logs: Logs,
    metrics: Metrics,
    *,
    group: int | None = None,
) -> web.Application:
    """The application that serves this reporter's manager to root, to the server's own user, and to a `group`."""
    app = web.Application(middlewares=[_errors_as_json, _only_for(group)], client_max_size=MAX_BODY)
    api = _Api(reporter, jobs, events, logs, metrics)
    for route in api.routes:
        pattern = route.path.replace("{disk}@{name}", "{disk:[^/@]+}@{name:[^/]+}")
        app.router.add_route(route.method, pattern, route.handler)
    return app


class _Api:
    def __init__(self, reporter: Reporter, jobs: Jobs, events: EventStream, logs: Logs, metrics: Metrics) -> None:
        self._jobs = jobs
        self._events = events
        self._logs = logs
        self._reporter = reporter
        self._manager = reporter.manager
        self._metrics = metrics
        self.routes: Sequence[Route] = (
            Route("GET", "/v1/status", self.status, "The server at this moment", Status),
            Route("GET", "/v1/disks", self.disks, "All disks", DiskList),
            Route("GET", "/v1/snapshots", self.snapshots, "All snapshots", SnapshotList),
            Route(
                "POST",
                "/v1/snapshots",
                self.create,
                "Freeze one or several disks at the same instant",
                SnapshotList,
                body=SnapshotRequest,
                status=201,
                problems=(400, 404, 409, 503, 507),
            ),
            Route("GET", _SNAPSHOT, self.show, "One snapshot", SnapshotInfo, problems=(404,)),
            Route(
                "PATCH",
                _SNAPSHOT,
                self.change,
                "Change the temp limit of a snapshot, now and for later servers",
                SnapshotInfo,
                body=SnapshotChange,
                problems=(400, 404, 409),
            ),
            Route(
                "DELETE",
                _SNAPSHOT,
                self.delete,
                "Make an end of a snapshot; answers when its temp space is free, and can be repeated",
                Deleted,
                problems=(404, 503),
            ),
            Route(
                "GET",
                f"{_SNAPSHOT}/map",
                self.map,
                "Runs of cluster states, in pages",
                MapPage,
                query=_PAGE_QUERY,
                problems=(400, 404, 409),
            ),
            Route(
                "GET",
                "/v1/checkpoints",
                self.checkpoints,
                "All checkpoints, or those of one disk",
                CheckpointList,
                query=(Parameter("disk", "only those of this disk", text=True),),
                problems=(404,),
            ),
            Route(
                "DELETE",
                _CHECKPOINT,
                self.delete_checkpoint,
                "Forget a checkpoint; no other one loses a change, and it can be repeated",
                Deleted,
                problems=(404, 503),
            ),
            Route(
                "GET",
                f"{_CHECKPOINT}/extents",
                self.extents,
                "What changed since a checkpoint, in pages",
                ExtentPage,
                query=_PAGE_QUERY,
                problems=(400, 404, 409),
            ),
            Route(
                "GET",
                f"{_CHECKPOINT}/bitmap",
                self.bitmap,
                "What changed since a checkpoint, as a bit file",
                None,
                problems=(404, 409),
                content_type="application/octet-stream",
            ),
            *self._job_routes(),
            *self._log_routes(),
            Route("GET", "/metrics", self.metrics, "Figures for Prometheus", None, content_type="text/plain"),
            Route("GET", "/openapi.json", self.openapi, "This document", None),
        )

    def _job_routes(self) -> Sequence[Route]:
        return (
            Route("GET", "/v1/jobs", self.jobs, "All pushes since the start, the last ended ones", JobList),
            Route(
                "POST",
                "/v1/jobs",
                self.push,
                "Copy a snapshot, or a disk as it is now, to a target",
                JobInfo,
                body=PushRequest,
                status=201,
                problems=(400, 404, 409, 503, 507),
            ),
            Route("GET", _JOB, self.show_job, "One push", JobInfo, problems=(400, 404)),
            Route(
                "PATCH",
                _JOB,
                self.change_job,
                "Change the bandwidth of a push that runs",
                JobInfo,
                body=JobChange,
                problems=(400, 404, 409),
            ),
            Route("DELETE", _JOB, self.cancel_job, "Stop a push; answers when it ended", JobInfo, problems=(400, 404)),
        )

    def _log_routes(self) -> Sequence[Route]:
        return (
            Route(
                "GET",
                "/v1/events",
                self._events.serve,
                "What happens, told as it happens: server-sent events, until the listener hangs up",
                None,
                query=(Parameter("Last-Event-ID", "go on behind this event", text=True, place="header"),),
                problems=(503,),
                content_type="text/event-stream",
            ),
            Route("GET", "/v1/log", self.log, "What is logged, and how", LogInfo),
            Route(
                "PATCH",
                "/v1/log",
                self.change_log,
                "Log more or less, until the server ends",
                LogInfo,
                body=LogChange,
                problems=(400,),
            ),
        )

    async def log(self, request: web.Request) -> web.Response:
        logs = self._logs
        return _answer(LogInfo(format=logs.format, level=logs.level, debug_exports=logs.debug_exports))

    async def change_log(self, request: web.Request) -> web.Response:
        try:
            wanted = LogChange.model_validate_json(await request.read())
        except ValidationError as e:
            raise ControlError(400, explain(e)) from None
        self._logs.change(wanted.level, wanted.debug_exports)
        self._logs.tell()
        return await self.log(request)

    async def jobs(self, request: web.Request) -> web.Response:
        return _answer(JobList(jobs=self._jobs.infos()))

    async def push(self, request: web.Request) -> web.Response:
        try:
            wanted = PushRequest.model_validate_json(await request.read())
        except ValidationError as e:
            raise ControlError(400, explain(e)) from None
        return _answer(await asyncio.to_thread(self._jobs.start, wanted), status=201)

    async def show_job(self, request: web.Request) -> web.Response:
        return _answer(self._jobs.get(request.match_info["id"]).info())

    async def change_job(self, request: web.Request) -> web.Response:
        job = self._jobs.get(request.match_info["id"])
        try:
            wanted = JobChange.model_validate_json(await request.read())
        except ValidationError as e:
            raise ControlError(400, explain(e)) from None
        return _answer(job.change(wanted))

    async def cancel_job(self, request: web.Request) -> web.Response:
        job = self._jobs.get(request.match_info["id"])
        await asyncio.to_thread(job.cancel)
        return _answer(job.info())

    async def status(self, request: web.Request) -> web.Response:
        return _answer(await asyncio.to_thread(self._reporter.status))

    async def disks(self, request: web.Request) -> web.Response:
        return _answer(DiskList(disks=await asyncio.to_thread(self._reporter.disks)))

    async def snapshots(self, request: web.Request) -> web.Response:
        return _answer(SnapshotList(snapshots=await asyncio.to_thread(self._reporter.snapshots)))

    async def create(self, request: web.Request) -> web.Response:
        try:
            wanted = SnapshotRequest.model_validate_json(await request.read())
        except ValidationError as e:
            raise ControlError(400, explain(e)) from None
        made = await asyncio.to_thread(self._manager.create, wanted)
        answer = SnapshotList(snapshots=await asyncio.to_thread(self._reporter.snapshots, made))
        return _answer(answer, status=201)

    async def show(self, request: web.Request) -> web.Response:
        return _answer(await asyncio.to_thread(self._reporter.snapshot, *_which(request)))

    async def change(self, request: web.Request) -> web.Response:
        disk, name = _which(request)
        try:
            wanted = SnapshotChange.model_validate_json(await request.read())
        except ValidationError as e:
            raise ControlError(400, explain(e)) from None
        await asyncio.to_thread(self._manager.set_temp_limit, disk, name, wanted.temp_limit)
        return _answer(await asyncio.to_thread(self._reporter.snapshot, disk, name))

    async def delete(self, request: web.Request) -> web.Response:
        disk, name = _which(request)
        deleted = await asyncio.to_thread(self._manager.delete, disk, name)
        return _answer(Deleted(disk=disk, name=name, deleted=deleted))

    async def checkpoints(self, request: web.Request) -> web.Response:
        found = await asyncio.to_thread(self._reporter.checkpoints, request.query.get("disk"))
        return _answer(CheckpointList(checkpoints=found))

    async def delete_checkpoint(self, request: web.Request) -> web.Response:
        disk, name = _which(request)
        deleted = await asyncio.to_thread(self._manager.delete_checkpoint, disk, name)
        return _answer(Deleted(disk=disk, name=name, deleted=deleted))

    async def extents(self, request: web.Request) -> web.Response:
        return _answer(await asyncio.to_thread(self._reporter.extent_page, *_which(request), *_page(request)))

    async def bitmap(self, request: web.Request) -> web.Response:
        body = await asyncio.to_thread(self._reporter.bitmap_file, *_which(request))
        return web.Response(body=body, content_type="application/octet-stream")

    async def map(self, request: web.Request) -> web.Response:
        return _answer(await asyncio.to_thread(self._reporter.map_page, *_which(request), *_page(request)))

    async def metrics(self, request: web.Request) -> web.Response:
        return await answer(self._metrics)

    async def openapi(self, request: web.Request) -> web.Response:
        return web.json_response(document(self.routes))


def _answer(model: BaseModel, status: int = 200) -> web.Response:
    return web.Response(text=model.model_dump_json() + "\n", status=status, content_type="application/json")


def _which(request: web.Request) -> tuple[str, str]:
    return request.match_info["disk"], request.match_info["name"]


def _page(request: web.Request) -> tuple[int, int]:
    limit = min(max(_number(request, "limit", MAX_MAP_RUNS), 1), MAX_MAP_RUNS)
    return _number(request, "offset", 0), limit


def _number(request: web.Request, name: str, default: int) -> int:
    text = request.query.get(name, str(default))
    if not (text.isascii() and text.isdecimal() and len(text) < 20):
        raise ControlError(400, f"{name}={text[:40]} is no whole number of 0 or more")
    return int(text)


def _only_for(group: int | None) -> Middleware:
    """Whatever the mode of the socket is by now: only who may use it is answered."""

    @web.middleware
    async def check(request: web.Request, handler: Handler) -> web.StreamResponse:
        sock = None if request.transport is None else request.transport.get_extra_info("socket")
        peer = Peer() if sock is None else peer_of(sock)
        if peer.uid not in (0, os.geteuid()) and group not in peer.groups:
            log.warning("control socket: %s %s refused to user %s", request.method, request.path, peer.uid)
            raise ControlError(
                403,
                f"user {peer.uid} may not use this control socket: root, the server's user and the members of "
                "control-group may",
            )
        return await handler(request)

    return check


@web.middleware
async def _errors_as_json(request: web.Request, handler: Handler) -> web.StreamResponse:
    """The one place where an error becomes a status and {"error": sentence}."""
    try:
        return await handler(request)
    except ControlError as e:
        return _problem(e.status, e.text)
    except web.HTTPException as e:
        text = f"{request.method} {request.path} is not possible: {e.reason}; /openapi.json shows what is"
        return _problem(e.status, text, allow=e.headers.get("Allow"))
    except (FleecingError, OSError) as e:
        log.error("%s %s: %s", request.method, request.path, e)
        return _problem(500, str(e))
    except Exception:
        log.exception("%s %s ended in an error that nobody expected", request.method, request.path)
        return _problem(500, "internal error: the server's log has the details")


def _problem(status: int, text: str, *, allow: str | None = None) -> web.Response:
    headers = {"Allow": allow} if allow else None
    body = json.dumps({"error": text}) + "\n"
    return web.Response(text=body, status=status, content_type="application/json", headers=headers)
