"""The real facade over a real SQLite store: in process for most tests, behind a real uvicorn for sockets and streams."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn

from cloudai.api.app import create_app
from cloudai.resources import Resources, Run, RunPhase, Task, TaskStatus, Worker, run_id
from cloudai.settings import Settings
from cloudai.store.protocol import FacadeStore, RunReport
from cloudai.store.sql import SqlStore, open_store

BODY: dict[str, Any] = {
    "user_id": "user-123",
    "docker_image": "docker.io/library/ubuntu:latest",
    "command": "echo 'Hello World'",
    "req_cpu": 1.0,
    "req_memory": 2.0,
    "req_storage": 5.0,
    "req_gpu": 0.0,
}
GIB = 1024**3


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


async def join(store: SqlStore, worker_id: str = "worker-1", now: int = 0, **fields: Any) -> Worker:
    """A worker of 8 cores, 16 GiB, 100 GiB and 2 GPUs, heard of at `now` (ms)."""
    worker = Worker(
        worker_id=worker_id,
        identity=f"identity-{worker_id}",
        address="192.168.1.100:50052",
        capacity=Resources(8000, 16 * GIB, 100 * GIB, 2000),
        runtime="docker",
        registered_at=now,
        last_heartbeat=now,
        **fields,
    )
    return await store.register_worker(worker)


async def place(store: SqlStore, task_id: str, worker_id: str = "worker-1") -> Run:
    """As the controller does: the task is pending, its run assigned."""
    task = await store.get_task(task_id)
    run = Run(
        task_id=task_id,
        attempt=task.attempt + 1,
        worker_id=worker_id,
        user_id=task.spec.user_id,
        image=task.spec.image,
        command=task.spec.command,
        resources=task.spec.resources,
    )
    changed = _changed(task, status=TaskStatus.PENDING, attempt=run.attempt, worker_id=worker_id)
    committed = await store.commit([[changed, run]])
    assert committed.applied == [True]
    return run


async def start(store: SqlStore, task_id: str, worker_id: str = "worker-1", at: int = 1_763_289_005_000) -> Run:
    """Placed and running."""
    run = await place(store, task_id, worker_id)
    for phase in (RunPhase.STARTING, RunPhase.RUNNING):
        started = at if phase is RunPhase.RUNNING else None
        await store.report_run(
            RunReport(task_id=task_id, attempt=run.attempt, worker_id=worker_id, phase=phase, started_at=started)
        )
    await store.commit([[_changed(await store.get_task(task_id), status=TaskStatus.RUNNING, started_at=at)]])
    return run


async def finish(store: SqlStore, task_id: str, exit_code: int = 0) -> None:
    """A running task, completed or failed."""
    task = await store.get_task(task_id)
    assert task.worker_id
    phase = RunPhase.FAILED if exit_code else RunPhase.SUCCEEDED
    end = task.started_at or 0
    await store.report_run(
        RunReport(
            task_id=task_id,
            attempt=task.attempt,
            worker_id=task.worker_id,
            phase=phase,
            finished_at=end + 1000,
            exit_code=exit_code,
        )
    )
    status = TaskStatus.FAILED if exit_code else TaskStatus.COMPLETED
    await store.commit([[_changed(task, status=status, finished_at=end + 1000, exit_code=exit_code)]])


async def write_log(store: SqlStore, task_id: str, data: bytes, offset: int = 0, attempt: int = 1) -> None:
    assert await store.append_log(run_id(task_id, attempt), offset, data) == offset + len(data)


def _changed(task: Task, **fields: Any) -> Task:
    from dataclasses import replace

    return replace(task, **fields)
