"""The life of the server process, from the first lock to the last flush."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import os
import resource
import signal
import socket
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack

import uvloop
from aiohttp import web

from fleecing.control.access import make_policy
from fleecing.control.accounts import group_id
from fleecing.control.activation import Inherited
from fleecing.control.addresses import Addresses, paste_lines
from fleecing.control.api import make_app
from fleecing.control.certificates import Certificates
from fleecing.control.config import ServerSettings, TcpAddress
from fleecing.control.event_stream import EventRing, EventStream
from fleecing.control.jobs import Jobs
from fleecing.control.lag import LoopLag
from fleecing.control.logs import LogFormat, Logs
from fleecing.control.manager import Manager
from fleecing.control.metrics import Metrics
from fleecing.control.metrics_site import PATH as METRICS_PATH
from fleecing.control.metrics_site import make_metrics_app
from fleecing.control.notify import Notifier
from fleecing.control.report import Reporter
from fleecing.control.sockets import bind_tcp, bind_unix, remove_socket
from fleecing.errors import ConfigError
from fleecing.events import Event, tell
from fleecing.nbd.handshake import TlsMode
from fleecing.server.access import Policy
from fleecing.server.client_memory import MEMORIES
from fleecing.server.limits import Limits
from fleecing.server.listener import NbdServer

log = logging.getLogger(__name__)

READY = "Ready. Ctrl-C or SIGTERM stops the server."
"""The last line that is announced: all listeners answer from here on."""

CALLS = 32
"""Calls of the control API that may be at work at a time."""

FREE_FILES = 256 + MEMORIES
"""File descriptors that the connections of NBD clients leave to disks, snapshots and the control API, and to memory
that clients share."""

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


def run(
    settings: ServerSettings,
    *,
    program: str,
    announce: Callable[[str], None],
    logs: Logs,
    inherited: Inherited | None = None,
    reread: Callable[[], ServerSettings] | None = None,
) -> None:
    """Serve until SIGTERM or SIGINT comes, then drain. SIGHUP has certificates and access rules read again.

    `announce` gets the lines to paste once, when everything listens and the log is for people; `program` is what starts
    this program in a shell.
    `inherited` sockets, which systemd keeps, are served besides those of the settings; the control socket goes first.
    `reread` gives the settings as they are by then; None where there is no file that they come from.
    Raises ConfigError where the server cannot start; then nothing of it is left.
    """
    uvloop.run(_serve(settings, program, announce, logs, inherited or Inherited(), reread))


async def _serve(
    settings: ServerSettings,
    program: str,
    announce: Callable[[str], None],
    logs: Logs,
    inherited: Inherited,
    reread: Callable[[], ServerSettings] | None,
) -> None:
    loop = asyncio.get_running_loop()
    # Calls that wait for a slow disk must not hold up a status: the default is 4 more than there are CPUs.
    loop.set_default_executor(ThreadPoolExecutor(CALLS, "control"))
    stop = asyncio.Event()
    for number in _SIGNALS:
        loop.add_signal_handler(number, stop.set)
    reload = asyncio.Event()
    loop.add_signal_handler(signal.SIGHUP, reload.set)
    certificates = None
    if settings.uses_tls and settings.tls_dir is not None:
        certificates = Certificates(settings.tls_dir, settings.tls_verify_client)
    async with AsyncExitStack() as life:
        ring = EventRing(loop)
        life.callback(logging.getLogger().removeHandler, ring)
        logging.getLogger().addHandler(ring)
        notifier = Notifier()
        life.callback(notifier.close)
        manager = await asyncio.to_thread(Manager, settings)
        life.push_async_callback(asyncio.to_thread, manager.close)
        server = NbdServer(manager, limits=_within_reach(settings.limits.limits()), policy=_policy(settings))
        life.push_async_callback(server.close, settings.drain_seconds)
        if certificates is not None:
            server.tls_context = certificates.load()
            if (flaw := certificates.flaw(server.tls_context)) is not None:
                log.error("%s", flaw)

        async def reload_all() -> None:
            with notifier.reloading(lambda: _status(manager, server)):
                await _reload(certificates, server, settings, reread)

        addresses = _listen(settings, server, life, inherited)
        jobs = await asyncio.to_thread(Jobs, manager, settings.state_dir)
        life.push_async_callback(asyncio.to_thread, jobs.close)
        group = _group_of(settings.control_group)
        reporter = Reporter(manager, server, addresses)
        metrics = await _start_metrics(settings, reporter, jobs, life)
        app = make_app(reporter, jobs, EventStream(ring), logs, metrics, group=group)
        await _start_control(settings, app, addresses.control, life, inherited)
        life.callback(ring.close)  # those who listen are told that the end begins, and let go
        if logs.format is LogFormat.TEXT:
            announce("\n".join([*paste_lines(list(manager.disks), addresses, program), READY]))
        else:
            tell(log, logging.INFO, Event.SERVER_READY, READY, control=addresses.control)
        notifier.ready(_status(manager, server))
        signs = loop.create_task(notifier.run(lambda: _status(manager, server)))
        life.push_async_callback(_end, signs)  # signs of life are given until the last request has ended
        life.callback(notifier.stopping)
        # Only now: a reload ends in telling that the server is ready. One that was asked for earlier begins now.
        life.push_async_callback(_end, loop.create_task(_each_time(reload, reload_all)))
        await asyncio.to_thread(manager.guests.recover, manager.disks)
        life.push_async_callback(asyncio.to_thread, manager.guests.close)  # first of all: guests need their disks
        await stop.wait()
        text = "stopping: requests in flight have %g s to end"
        tell(log, logging.INFO, Event.SERVER_STOPPING, text, settings.drain_seconds)
    log.info("stopped")


async def _end(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


def _status(manager: Manager, server: NbdServer) -> str:
    """What `systemctl status` shows. Reads lists only: it must not wait for a disk."""
    snapshots = manager.snapshots()
    broken = sum(s.node.broken is not None for s in snapshots)
    clients = len(tuple(server.connections))
    text = f"{len(manager.disks)} disks, {clients} clients, {len(snapshots)} snapshots"
    return f"{text}, {broken} of them broken" if broken else text


async def _each_time(asked: asyncio.Event, call: Callable[[], Awaitable[None]]) -> None:
    """Call whenever it is asked for, once for all that was asked meanwhile; until cancelled."""
    while True:
        await asked.wait()
        asked.clear()
        await call()


async def _reload(
    certificates: Certificates | None,
    server: NbdServer,
    settings: ServerSettings,
    reread: Callable[[], ServerSettings] | None,
) -> None:
    """SIGHUP came: later clients meet the certificates and access rules that are there now."""
    if certificates is None:
        log.info("SIGHUP: there are no certificates to read again")
    else:
        await _reload_certificates(certificates, server)
    if reread is not None:
        await _reload_rules(reread, server, settings)


async def _reload_certificates(certificates: Certificates, server: NbdServer) -> None:
    try:
        server.tls_context = await asyncio.to_thread(certificates.renew)
    except (ConfigError, OSError) as e:
        log.error("the certificates stay as they were: %s", e)
    else:
        log.info("certificates read again from %s", certificates.folder)


async def _reload_rules(reread: Callable[[], ServerSettings], server: NbdServer, settings: ServerSettings) -> None:
    try:
        fresh = await asyncio.to_thread(reread)
        server.policy = await asyncio.to_thread(_policy, fresh)
    except (ConfigError, ValueError) as e:
        log.error("the access rules stay as they were: %s", e)
        return
    log.info("access rules read again: %s", "none" if fresh.access is None else f"{len(fresh.access)} of them")
    if fresh.model_copy(update={"access": settings.access}) != settings:
        log.warning("other settings have changed as well: they wait for the next start")


def _policy(settings: ServerSettings) -> Policy | None:
    """Without rules everybody who gets in may do everything."""
    return None if settings.access is None else make_policy(settings.access)


def _within_reach(limits: Limits) -> Limits:
    """With as many clients as may be: a crowd of them must not take the descriptors that the operator needs.

    Shells and systemd start a program with a soft limit of 1024 that it may raise by itself.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = limits.clients + FREE_FILES
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return limits
    soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return dataclasses.replace(limits, clients=min(limits.clients, max(soft - FREE_FILES, soft // 4)))


def _group_of(group: int | str | None) -> int | None:
    return None if group is None else group_id(group)


def check_inherited(settings: ServerSettings, listener: socket.socket) -> None:
    """What holds for `listen` holds for a TCP socket of systemd, too. Raises ConfigError."""
    host, port = listener.getsockname()[:2]
    try:
        settings.check_open(TcpAddress(host=host, port=port))
    except ValueError as e:
        raise ConfigError(f"systemd passes a socket: {e}") from None


def _listen(settings: ServerSettings, server: NbdServer, life: AsyncExitStack, inherited: Inherited) -> Addresses:
    tcp, encrypted = [], set()
    unix = []
    for listener in inherited.nbd:
        local = listener.family == socket.AF_UNIX
        if not local:
            check_inherited(settings, listener)
        server.add_listener(listener, tls_mode=settings.tls_unix if local else settings.tls)
        if local:
            unix.append(os.path.abspath(listener.getsockname()))
        else:
            tcp.append(listener.getsockname()[:2])
            if settings.tls is TlsMode.REQUIRE:
                encrypted.add(tcp[-1])
    for address in settings.listen:
        mode = settings.tls_of(address)
        for listener in bind_tcp(address.host, address.port):
            server.add_listener(listener, tls_mode=mode)
            tcp.append(listener.getsockname()[:2])
            if mode is TlsMode.REQUIRE:
                encrypted.add(tcp[-1])
    for path in settings.unix:
        if not inherited.takes(path):
            listener = bind_unix(path, int(settings.unix_mode, 8), _group_of(settings.unix_group))
            server.add_listener(listener, tls_mode=settings.tls_unix)
            life.callback(remove_socket, path)
            unix.append(path)
    control = settings.control if inherited.control is None else os.path.abspath(inherited.control.getsockname())
    addresses = Addresses(
        tuple(tcp),
        tuple(unix),
        control,
        tls_tcp=frozenset(encrypted),
        tls_unix=settings.tls_unix is TlsMode.REQUIRE,
        tls_dir=settings.tls_dir,
    )
    log.info("NBD on %s", " and ".join(addresses.listeners()))
    return addresses


async def _start_metrics(settings: ServerSettings, reporter: Reporter, jobs: Jobs, life: AsyncExitStack) -> Metrics:
    lag = LoopLag()
    life.push_async_callback(_end, asyncio.get_running_loop().create_task(lag.run()))
    metrics = Metrics(reporter, jobs, lag)
    runner = web.AppRunner(make_metrics_app(metrics), access_log=None, shutdown_timeout=0)
    await runner.setup()
    life.push_async_callback(runner.cleanup)
    for address in settings.metrics:
        for listener in bind_tcp(address.host, address.port):
            await web.SockSite(runner, listener).start()
            place = TcpAddress(host=address.host, port=listener.getsockname()[1])
            log.info("metrics on http://%s%s", place, METRICS_PATH)
    return metrics


async def _start_control(
    settings: ServerSettings, app: web.Application, path: str, life: AsyncExitStack, inherited: Inherited
) -> None:
    listener = inherited.control
    group = _group_of(settings.control_group)
    if listener is None:
        listener = bind_unix(settings.control, 0o600 if group is None else 0o660, group)
        life.callback(remove_socket, settings.control)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=settings.drain_seconds)
    await runner.setup()
    life.push_async_callback(runner.cleanup)
    await web.SockSite(runner, listener).start()
    log.info("control socket %s", path)
