"""The facade put together: the paths, what every request passes, and what runs beside them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from starlette.applications import Starlette
from starlette.responses import Response
from starlette.routing import WebSocketRoute
from starlette.types import Receive, Scope, Send
from starlette.websockets import WebSocket, WebSocketState

from cloudai.api import docs_page, openapi
from cloudai.api.agents import AgentHub
from cloudai.api.answers import envelope
from cloudai.api.changes import Changes
from cloudai.api.clients import Clients
from cloudai.api.crew import Crew
from cloudai.api.health import Health
from cloudai.api.hosts import HostCheck
from cloudai.api.lead import Lead
from cloudai.api.places import Places
from cloudai.api.ratelimit import RateLimit
from cloudai.api.routing import Disconnected, Path, Paths, Request, no_route
from cloudai.api.task_logs import FOLLOWED, TaskLogs
from cloudai.api.tasks import Tasks
from cloudai.api.telemetry import Telemetry
from cloudai.api.workers import Workers
from cloudai.errors import CloudAIError, Code
from cloudai.metrics import Metrics
from cloudai.settings import Settings
from cloudai.store.protocol import FacadeStore
from cloudai.wire import PATH

logger = logging.getLogger(__name__)


class Facade(Starlette):
    """WebSockets and lifespan go Starlette's way. HTTP requests go a shorter one: each passes the checks, finds its

    handler and is answered, without a layer of functions around the next for each of these.
    """

    hosts: HostCheck
    limits: RateLimit | None
    paths: Paths
    metrics: Metrics
    end_waits: Callable[[], None]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await super().__call__(scope, receive, send)
            return
        began = time.perf_counter()
        scope["path_pattern"] = "other"
        try:
            response = await self._answer(scope, receive)
        except CloudAIError as error:
            response = envelope(error)
        except Disconnected:
            return
        except Exception:
            logger.exception("a fault while answering %s %s", scope["method"], scope["path"])
            response = envelope(_fault())
        try:
            await response(scope, receive, send)
        finally:
            seconds = time.perf_counter() - began
            self.metrics.requests.answered(scope["method"], scope["path_pattern"], response.status_code, seconds)

    async def _answer(self, scope: Scope, receive: Receive) -> Response:
        self.hosts.check(scope)
        if self.limits is not None:
            await self.limits.check(scope)
        path = self.paths.find(scope)
        scope["path_pattern"] = path.pattern
        return await path.handler(scope["method"])(Request(scope, receive))


def create_app(store: FacadeStore, settings: Settings) -> Facade:
    """The ASGI application over `store`. Raises SettingsError for settings that cannot work."""
    metrics = Metrics()
    clients = Clients(settings.trusted_proxies)
    hosts = HostCheck(settings)
    changes = Changes(store)
    lead = Lead(store)
    limits = RateLimit(settings, clients) if settings.rate_limit_enabled else None
    hub = AgentHub(store.agents, settings, clients) if store.agents is not None else None
    places = followers = None
    if limits is not None:
        most = settings.rate_limit_websockets
        places = Places("telemetry", "telemetry connections", most, clients, limits.redis)
        followers = Places("logs", "followed logs", FOLLOWED, clients, limits.redis)
    telemetry = Telemetry(store, settings, changes, places, metrics)

    @contextlib.asynccontextmanager
    async def lifespan(_: Any) -> AsyncIterator[None]:
        beside = [asyncio.ensure_future(changes.run()), asyncio.ensure_future(lead.run())]
        if hub is not None:
            beside.append(asyncio.ensure_future(hub.run()))
        try:
            yield
        finally:
            await telemetry.close()
            if limits is not None:
                await limits.close()
            for task in beside:
                task.cancel()
            await asyncio.gather(*beside, return_exceptions=True)

    sockets = [("/ws/telemetry", telemetry.connect)]
    if hub is not None:
        sockets.append((PATH, hub.connect))
    app = Facade(
        routes=[WebSocketRoute(path, _guarded(hosts, connect)) for path, connect in sockets], lifespan=lifespan
    )
    app.router.default = _no_socket
    app.hosts, app.metrics, app.end_waits = hosts, metrics, changes.end
    app.limits = limits
    app.paths = _paths(store, settings, changes, lead, followers, metrics)
    return app


def _paths(
    store: FacadeStore,
    settings: Settings,
    changes: Changes,
    lead: Lead,
    followers: Places | None,
    metrics: Metrics,
) -> Paths:
    """Every path and its handlers; of those with a variable part, the busiest first."""
    crew = Crew(store, lead, settings)
    tasks = Tasks(store, crew, changes, settings.max_body_bytes)
    workers = Workers(store, settings.heartbeat_ms)
    health = Health(store, crew, lead, metrics, settings.heartbeat_ms)
    return Paths(
        [
            Path("/api/tasks/{task_id}", {"GET": tasks.get}),
            Path("/api/tasks", {"GET": tasks.list, "POST": tasks.submit}),
            Path("/api/tasks/{task_id}/logs", {"GET": TaskLogs(store, changes, followers).get}),
            Path("/api/tasks/{task_id}/cancel", {"POST": tasks.cancel}),
            Path("/api/workers", {"GET": workers.list}),
            Path("/api/workers/{worker_id}", {"GET": workers.get}),
            Path("/api/cluster/status", {"GET": workers.cluster}),
            Path("/healthz", {"GET": health.healthz}),
            Path("/readyz", {"GET": health.readyz}),
            Path("/metrics", {"GET": health.metrics}),
            Path("/openapi.json", {"GET": openapi.page(whole_gpus=store.agents is None)}),
            Path("/docs", {"GET": docs_page.serve}),
        ]
    )


Connect = Callable[[WebSocket], Awaitable[None]]


def _guarded(hosts: HostCheck, connect: Connect) -> Connect:
    """`connect`, for those who pass the check; others get the error as the answer to their handshake."""

    async def guarded(websocket: WebSocket) -> None:
        try:
            hosts.check(websocket.scope)
        except CloudAIError as error:
            await websocket.send_denial_response(envelope(error))
            return
        try:
            await connect(websocket)
        except Exception:
            if websocket.application_state is not WebSocketState.CONNECTING:
                raise  # uvicorn says so in the log, and closes it
            logger.exception("a fault while answering the handshake of %s", websocket.scope["path"])
            await websocket.send_denial_response(envelope(_fault()))

    return guarded


def _fault() -> CloudAIError:
    """The client learns nothing of it; the log has it."""
    return CloudAIError(Code.INTERNAL, "Internal server error")


async def _no_socket(scope: Scope, receive: Receive, send: Send) -> None:
    await WebSocket(scope, receive, send).send_denial_response(envelope(no_route(scope["path"])))
