"""The real facade: over every store, behind a real uvicorn, for what the store has a part in; else over a real SQLite store.

What never reaches a store - validation, routes and methods, rate limits, hosts and origins - is the same code whatever lies
behind it, so `api` (in process) and `server` (behind uvicorn) try it over SQLite only.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import socket
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn

from cloudai.api.app import create_app
from cloudai.documents import body_of
from cloudai.settings import Settings
from cloudai.store.protocol import FacadeStore
from cloudai.store.sql import SqlStore, open_store
from tests.engines import missing
from tests.store import worlds
from tests.store.worlds import World

Document = dict[str, Any]
BODY: dict[str, Any] = {
    "user_id": "user-123",
    "docker_image": "docker.io/library/ubuntu:latest",
    "command": "echo 'Hello World'",
    "req_cpu": 1.0,
    "req_memory": 2.0,
    "req_storage": 5.0,
    "req_gpu": 0.0,
}
OBEDIENT = body_of(worlds.OBEDIENT)
STARTLESS = body_of(worlds.STARTLESS)
TOO_LARGE = body_of(worlds.TOO_LARGE)
PATIENCE = 90  # seconds; whatever takes longer counts as never


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(data_dir=tmp_path, rate_limit_enabled=False, telemetry_seconds=0.2)


@pytest.fixture
async def store(settings: Settings) -> AsyncIterator[SqlStore]:
    opened = await open_store(settings.url)
    yield opened
    await opened.close()


@contextlib.asynccontextmanager
async def client_of(
    store: FacadeStore, settings: Settings, address: str = "127.0.0.1"
) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the facade in this process; `address` is where it seems to call from."""
    app = create_app(store, settings)
    transport = httpx.ASGITransport(app, client=(address, 1))
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://localhost") as api,
    ):
        yield api


@pytest.fixture
async def api(store: SqlStore, settings: Settings) -> AsyncIterator[httpx.AsyncClient]:
    async with client_of(store, settings) as client:
        yield client


class Server(uvicorn.Server):
    """uvicorn in this event loop, without the process's signals."""

    port = 0

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@contextlib.asynccontextmanager
async def serving(store: FacadeStore, settings: Settings, port: int = 0) -> AsyncIterator[Server]:
    listener = socket.create_server(("127.0.0.1", port))
    config = uvicorn.Config(
        create_app(store, settings),
        log_config=None,
        access_log=False,
        proxy_headers=False,
        ws_per_message_deflate=False,
        lifespan="on",
        timeout_graceful_shutdown=5,
    )
    server = Server(config)
    server.port = listener.getsockname()[1]
    running = asyncio.ensure_future(server.serve([listener]))
    while not server.started and not running.done():  # noqa: ASYNC110 - uvicorn has no event for it
        await asyncio.sleep(0)
    try:
        yield server
    finally:
        server.should_exit = True
        await running
        listener.close()


@pytest.fixture
async def server(store: SqlStore, settings: Settings) -> AsyncIterator[Server]:
    async with serving(store, settings) as running:
        yield running


@dataclass(frozen=True)
class Facade:
    """A client of a facade that listens on `port`, and the world behind it."""

    http: httpx.AsyncClient
    port: int
    world: World

    async def submit(self, **fields: Any) -> str:
        return await submit(self.http, **fields)

    async def task(self, task_id: str, query: str = "") -> Document:
        answer = await self.http.get(f"/api/tasks/{task_id}?{query}")
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    async def until(self, task_id: str, true: Callable[[Document], bool], patience: float = PATIENCE) -> Document:
        """The task once it is as wished."""
        task = await self.task(task_id)
        async with asyncio.timeout(patience):
            while not true(task):
                task = await self.task(task_id, f"wait_seconds=30&version={task['version']}")
        return task

    async def running(self, **fields: Any) -> str:
        """The id of a task that runs until it is told to end."""
        task_id = await self.submit(**OBEDIENT | fields)
        await self.world.run(task_id)
        return task_id


@contextlib.asynccontextmanager
async def facing(world: World, settings: Settings) -> AsyncIterator[Facade]:
    async with (
        serving(world.store, settings) as server,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{server.port}", timeout=PATIENCE) as client,
    ):
        yield Facade(client, server.port, world)


@pytest.fixture
async def facade(world: World, settings: Settings) -> AsyncIterator[Facade]:
    """Over each kind of store, without tasks; none is placed before `world.begin()`."""
    async with facing(world, settings) as facade:
        yield facade


@pytest.fixture
async def shared_facade(shared_world: World, settings: Settings) -> AsyncIterator[Facade]:
    """Over each kind of store, where tasks are placed; other tests may have left some."""
    async with facing(shared_world, settings) as facade:
        yield facade


@pytest.fixture
def redis_url() -> Iterator[str]:
    """A Redis of this test's own."""
    program = shutil.which("redis-server")
    if program is None:
        missing("Redis", "apt-get install redis-server")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [program, "--port", str(port), "--save", "", "--bind", "127.0.0.1"], stdout=subprocess.PIPE
    )
    assert process.stdout
    for line in process.stdout:
        if b"Ready to accept" in line:
            break
    yield f"redis://127.0.0.1:{port}"
    process.terminate()
    process.communicate()


async def submit(api: httpx.AsyncClient, **fields: Any) -> str:
    answer = await api.post("/api/tasks", json=BODY | fields)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["task_id"])


async def error_of(answer: httpx.Response) -> dict[str, Any]:
    """The envelope's inside, with its form checked."""
    document = answer.json()
    assert list(document) == ["error"]
    assert set(document["error"]) == {"code", "message", "details"}
    return dict(document["error"])
