from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import websockets
from websockets.asyncio.client import ClientConnection

from cloudai.settings import Settings
from cloudai.store.protocol import Heartbeat
from cloudai.store.sql import SqlStore
from tests.api.conftest import BODY, Server, finish, join, place, serving, start

PATIENCE = 30


def url(server: Server) -> str:
    return f"ws://127.0.0.1:{server.port}/ws/telemetry"


async def spec_task(store: SqlStore) -> str:
    from cloudai.api.models import TaskRequest
    from cloudai.api.tasks import spec_of

    return (await store.create_task(spec_of(TaskRequest(**BODY)))).task_id


async def message(socket: ClientConnection, kind: str) -> dict[str, Any]:
    """The next message of a type."""
    async with asyncio.timeout(PATIENCE):
        while True:
            document = json.loads(await socket.recv())
            if document["type"] == kind:
                return dict(document)


def now() -> int:
    return time.time_ns() // 10**6


@contextlib.asynccontextmanager
async def listening(server: Server) -> AsyncIterator[ClientConnection]:
    """A client that has had its first message and is told of everything from now on."""
    async with websockets.connect(url(server), proxy=None) as socket:
        await message(socket, "telemetry_update")
        await message(socket, "telemetry_update")  # the second comes from the work behind, which has looked by then
        yield socket


async def test_an_update_comes_at_once_and_again(server: Server, store: SqlStore) -> None:
    await join(store, now=now())
    task_id = await spec_task(store)
    await start(store, task_id)
    async with websockets.connect(url(server), proxy=None) as socket:
        for _ in range(2):
            update = await message(socket, "telemetry_update")
            assert set(update) == {"type", "timestamp", "data"}
            data = update["data"]
            assert data["tasks"] == [
                {"task_id": task_id, "status": "running", "worker_id": "worker-1", "progress": None}
            ]
            worker = data["workers"][0]
            assert set(worker) == {"worker_id", "cpu_usage", "memory_usage", "active_tasks", "last_heartbeat"}
            assert (worker["worker_id"], worker["active_tasks"]) == ("worker-1", 1)
            expected = {"total_workers": 1, "active_workers": 1, "available_cpu": 7.0, "available_memory": 14.0}
            assert data["cluster"] == expected


@pytest.mark.parametrize(("exit_code", "status"), [(0, "completed"), (3, "failed")])
async def test_starts_and_ends_are_told(server: Server, store: SqlStore, exit_code: int, status: str) -> None:
    await join(store, now=now())
    async with listening(server) as socket:
        task_id = await spec_task(store)
        await start(store, task_id)
        started = (await message(socket, "task_started"))["data"]
        assert (started["task_id"], started["worker_id"], started["status"]) == (task_id, "worker-1", "running")
        await finish(store, task_id, exit_code)
        ended = (await message(socket, "task_completed"))["data"]
        assert (ended["task_id"], ended["status"], ended["exit_code"]) == (task_id, status, exit_code)


async def test_a_task_cancelled_while_it_waits_is_told(server: Server, store: SqlStore) -> None:
    async with listening(server) as socket:
        task_id = await spec_task(store)
        await store.cancel_task(task_id)
        assert (await message(socket, "task_completed"))["data"]["status"] == "cancelled"


async def test_workers_that_come_and_fall_silent_are_told(server: Server, store: SqlStore) -> None:
    async with listening(server) as socket:
        worker = await join(store, now=now())
        assert (await message(socket, "worker_registered"))["data"]["worker_id"] == "worker-1"
        silent = Heartbeat("worker-1", worker.identity, now(), False, "dockerd does not answer", None, None)
        await store.record_heartbeats([silent])
        assert (await message(socket, "worker_disconnected"))["data"]["problem"] == "dockerd does not answer"


async def test_every_client_is_told(server: Server, store: SqlStore) -> None:
    await join(store, now=now())
    async with listening(server) as one, listening(server) as other:
        task_id = await spec_task(store)
        await start(store, task_id)
        for socket in (one, other):
            assert (await message(socket, "task_started"))["data"]["task_id"] == task_id


async def test_a_pending_task_is_shown(server: Server, store: SqlStore) -> None:
    await join(store, now=now())
    task_id = await spec_task(store)
    await place(store, task_id)
    async with websockets.connect(url(server), proxy=None) as socket:
        update = await message(socket, "telemetry_update")
        assert [(task["task_id"], task["status"]) for task in update["data"]["tasks"]] == [(task_id, "pending")]


async def test_five_connections_an_address(store: SqlStore, tmp_path: Path) -> None:
    async with serving(store, Settings(data_dir=tmp_path)) as server, contextlib.AsyncExitStack() as stack:
        for _ in range(5):
            await stack.enter_async_context(websockets.connect(url(server), proxy=None))
        with pytest.raises(websockets.InvalidStatus) as refused:
            await websockets.connect(url(server), proxy=None)
        assert refused.value.response.status_code == 429
        assert json.loads(refused.value.response.body or b"")["error"]["code"] == "RATE_LIMITED"
        assert refused.value.response.headers["retry-after"]


async def test_a_place_is_free_again_when_a_connection_closes(store: SqlStore, tmp_path: Path) -> None:
    async with serving(store, Settings(data_dir=tmp_path, rate_limit_websockets=1)) as server:
        async with websockets.connect(url(server), proxy=None) as socket:
            await socket.recv()
        async with asyncio.timeout(PATIENCE):
            while True:
                with contextlib.suppress(websockets.InvalidStatus):
                    await (await websockets.connect(url(server), proxy=None)).close()
                    break


async def test_a_page_of_another_site_may_not_listen(server: Server) -> None:
    with pytest.raises(websockets.InvalidStatus) as refused:
        await websockets.connect(url(server), proxy=None, origin=websockets.Origin("http://evil.example"))
    assert refused.value.response.status_code == 403


async def test_an_unknown_socket_is_not_found(server: Server) -> None:
    with pytest.raises(websockets.InvalidStatus) as refused:
        await websockets.connect(url(server) + "/nothing", proxy=None)
    assert refused.value.response.status_code == 404
    assert json.loads(refused.value.response.body or b"")["error"]["code"] == "ROUTE_NOT_FOUND"


async def test_a_client_that_does_not_read_is_dropped_and_the_others_are_told(store: SqlStore, tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path, telemetry_seconds=0.001)
    for number in range(500):
        await join(store, f"worker-{number}", now=now())
    async with serving(store, settings) as server, websockets.connect(url(server), proxy=None) as reading:
        slow = await websockets.connect(url(server), proxy=None, max_queue=1, ping_interval=None)
        slow.transport.pause_reading()
        import httpx

        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{server.port}") as api, asyncio.timeout(PATIENCE * 3):
            while "cloudai_telemetry_dropped_total 1.0" not in (await api.get("/metrics")).text:
                for _ in range(20):
                    await reading.recv()
        slow.transport.abort()
