"""/metrics over TCP, for Prometheus, which knows no Unix sockets. Nothing else can be had there."""

from __future__ import annotations

import asyncio

from aiohttp import web

from fleecing.control.metrics import CONTENT_TYPE, Metrics

PATH = "/metrics"


async def answer(metrics: Metrics) -> web.Response:
    """The figures as they are now."""
    return web.Response(body=await asyncio.to_thread(metrics.text), headers={"Content-Type": CONTENT_TYPE})


def make_metrics_app(metrics: Metrics) -> web.Application:
    """The application for listeners that everybody may ask."""

    async def get(request: web.Request) -> web.Response:
        return await answer(metrics)

    app = web.Application(client_max_size=0)
    app.router.add_get(PATH, get)
    return app
