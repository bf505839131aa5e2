"""`cloudai operator`: lead, follow, reconcile; and a port for probes and Prometheus."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import socket
import time
from collections.abc import AsyncIterator

import click
import uvicorn
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from cloudai.cli.parts import run_until_signal, unless
from cloudai.cli.place import StartRefused, listen
from cloudai.errors import CloudAIError
from cloudai.settings import Settings
from cloudai.store.kube.api import Api, ApiError, NoCluster, connect
from cloudai_controller import metrics
from cloudai_controller.handlers import feed
from cloudai_controller.kube.facts import REPAIR_SECONDS, Facts, Over
from cloudai_controller.kube.lease import Leader
from cloudai_controller.kube.loop import Operator

AWAY_SECONDS = 60.0  # without a word about the lease, after which the operator is not ready: it could not take over
SILENT_SECONDS = 3 * REPAIR_SECONDS  # without any word of the API server, after which a restart is asked for

log = logging.getLogger("cloudai.operator")


def run_operator(settings: Settings) -> None:
    """The command: until a signal. Raises StartRefused, and ClickException where a new process is needed."""
    with listen(settings) as listener:

        async def body(stop: asyncio.Event) -> None:
            try:
                api = await connect(settings)
            except NoCluster as error:
                raise StartRefused(str(error)) from None
            try:
                await _operate(api, settings, listener, stop)
            except Over as reason:
                raise click.ClickException(f"{reason}: start again") from None
            except (ApiError, CloudAIError) as error:
                raise click.ClickException(f"tasks and pods cannot be listed: {error}") from None
            finally:
                await api.close()

        run_until_signal(body)


async def _operate(api: Api, settings: Settings, listener: socket.socket, stop: asyncio.Event) -> None:
    leader = Leader(api, settings.namespace, f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}")
    operator = Operator(api, settings, leader)
    metrics.LEADING.set_function(leader.leads)
    async with _probes(operator.facts, leader, listener):
        click.echo(f"The operator follows tasks of namespace {settings.namespace}")
        await unless(stop, leader.acquire())
        if stop.is_set() and not leader.leads():
            return
        click.echo("This operator leads")
        keeping = asyncio.ensure_future(leader.keep())
        operating = asyncio.ensure_future(operator.run(lambda facts: feed(facts, api, settings.namespace)))
        stopping = asyncio.ensure_future(stop.wait())
        works = (keeping, operating, stopping)
        try:
            await asyncio.wait(works, return_when=asyncio.FIRST_COMPLETED)
            if operating.done():
                _told(operating)
            if keeping.done():
                keeping.result()
                raise Over("the lease was lost")  # another operator may lead by now
        finally:
            for work in works:
                work.cancel()
            await asyncio.gather(*works, return_exceptions=True)
            await leader.release()


def _told(work: asyncio.Future[None]) -> None:
    """Raise what ended that work; Over, alone, where it is among what several of its parts raised."""
    try:
        work.result()
    except BaseExceptionGroup as group:
        over, _ = group.split(Over)
        raise (over.exceptions[0] if over is not None else group) from None


@contextlib.asynccontextmanager
async def _probes(facts: Facts, leader: Leader, listener: socket.socket) -> AsyncIterator[None]:
    """`/healthz`, `/readyz` and `/metrics`. A standby that can take over is ready."""

    async def healthz(_: Request) -> Response:
        silent = time.monotonic() - facts.heard_at
        if leader.leads() and silent > SILENT_SECONDS:
            return PlainTextResponse(f"no word of the API server for {silent:.0f} s\n", 503)
        return PlainTextResponse("ok\n")

    async def readyz(request: Request) -> Response:
        if leader.silent() > AWAY_SECONDS:
            return PlainTextResponse(f"the lease cannot be had: {leader.trouble or 'no answer yet'}\n", 503)
        if leader.leads() and facts.trouble:
            return PlainTextResponse(f"tasks cannot be listed: {facts.trouble}\n", 503)
        return await healthz(request)

    async def scraped(_: Request) -> Response:
        return Response(generate_latest(), media_type=CONTENT_TYPE_LATEST)

    app = Starlette(routes=[Route("/healthz", healthz), Route("/readyz", readyz), Route("/metrics", scraped)])
    config = uvicorn.Config(app, log_config=None, access_log=False, lifespan="off", server_header=False)
    server = uvicorn.Server(config)
    server.capture_signals = contextlib.nullcontext  # type: ignore[method-assign, assignment]
    serving = asyncio.ensure_future(server.serve([listener]))
    try:
        yield
    finally:
        server.should_exit = True
        await serving
