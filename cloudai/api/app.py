"""The facade put together: routes, what stands before them, and what runs beside them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping
from typing import Any

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.routing import BaseRoute, Route, WebSocketRoute
from starlette.types import ExceptionHandler, Receive, Scope, Send
from starlette.websockets import WebSocket, WebSocketState

from cloudai.api import docs_page, openapi
from cloudai.api.agents import AgentHub
from cloudai.api.answers import envelope, refuse
from cloudai.api.changes import Changes
from cloudai.api.clients import Clients
from cloudai.api.crew import Crew
from cloudai.api.health import Health
from cloudai.api.hosts import HostCheck
from cloudai.api.ratelimit import RateLimit
from cloudai.api.routing import Handler, Methods
from cloudai.api.task_logs import TaskLogs
from cloudai.api.tasks import Tasks
from cloudai.api.telemetry import Telemetry
from cloudai.api.workers import Workers
from cloudai.errors import CloudAIError, Code
from cloudai.metrics import Measured, Metrics
from cloudai.settings import Settings
from cloudai.store.protocol import Store
from cloudai.wire import PATH


def create_app(store: Store, settings: Settings) -> Starlette:
    """The ASGI application over `store`. Raises SettingsError for settings that cannot work."""
    metrics = Metrics()
    clients = Clients(settings.trusted_proxies)
    changes = Changes(store)
    hub = AgentHub(store, settings)
    telemetry = Telemetry(store, settings, changes, clients, metrics)

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        beside = [asyncio.ensure_future(hub.run()), asyncio.ensure_future(changes.run())]
        try:
            yield
        finally:
            await telemetry.close()
            for task in beside:
                task.cancel()
            await asyncio.gather(*beside, return_exceptions=True)

    middleware = [Middleware(Measured, metrics=metrics), Middleware(HostCheck, settings=settings)]
    if settings.rate_limit_enabled:
        middleware.append(Middleware(RateLimit, settings=settings, clients=clients))
    routes: list[BaseRoute] = [
        Route(path, Methods(path, handlers)) for path, handlers in _paths(store, settings, changes, metrics)
    ]
    routes += [WebSocketRoute("/ws/telemetry", telemetry.connect), WebSocketRoute(PATH, hub.connect)]
    handlers: Mapping[Any, ExceptionHandler] = {CloudAIError: _on_error, Exception: _on_fault}
    app = Starlette(
        routes=routes,
        middleware=middleware,
        exception_handlers=handlers,
        lifespan=lifespan,
    )
    app.router.redirect_slashes = False
    app.router.default = _no_route
    return app


def _paths(
    store: Store, settings: Settings, changes: Changes, metrics: Metrics
) -> list[tuple[str, Mapping[str, Handler]]]:
    """Every path and its handlers, the busiest first: routes are tried in order."""
    tasks = Tasks(store, Crew(store, settings.heartbeat_ms), changes, settings.max_body_bytes)
    workers = Workers(store, settings.heartbeat_ms)
    health = Health(store, metrics, settings.heartbeat_ms)
    return [
        ("/api/tasks/{task_id}", {"GET": tasks.get}),
        ("/api/tasks", {"GET": tasks.list, "POST": tasks.submit}),
        ("/api/tasks/{task_id}/logs", {"GET": TaskLogs(store, changes).get}),
        ("/api/tasks/{task_id}/cancel", {"POST": tasks.cancel}),
        ("/api/workers", {"GET": workers.list}),
        ("/api/workers/{worker_id}", {"GET": workers.get}),
        ("/api/cluster/status", {"GET": workers.cluster}),
        ("/healthz", {"GET": health.healthz}),
        ("/readyz", {"GET": health.readyz}),
        ("/metrics", {"GET": health.metrics}),
        ("/openapi.json", {"GET": openapi.serve}),
        ("/docs", {"GET": docs_page.serve}),
    ]


async def _on_error(connection: Any, error: Exception) -> Any:
    assert isinstance(error, CloudAIError)
    if not isinstance(connection, WebSocket):
        return envelope(error)
    if connection.application_state is WebSocketState.CONNECTING:
        await connection.send_denial_response(envelope(error))
    return None


async def _on_fault(_: Any, __: Exception) -> Any:
    """Says nothing of the fault: the server's log has it."""
    return envelope(CloudAIError(Code.INTERNAL, "Internal server error"))


async def _no_route(scope: Scope, receive: Receive, send: Send) -> None:
    path = str(scope["path"])
    hint = "a path without the slash at its end" if path.endswith("/") and path != "/" else "one of those at /docs"
    error = CloudAIError(Code.ROUTE_NOT_FOUND, f"There is no such path; try {hint}", {"path": path[:255]})
    await refuse(error, scope, receive, send)
