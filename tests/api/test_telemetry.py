"""Telemetry, over every store; who may listen and how fast they must read is the facade's own, over SQLite only, below."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import websockets
from websockets.asyncio.client import ClientConnection

from cloudai.api import telemetry
from cloudai.errors import unavailable
from cloudai.resources import Task, TaskStatus, WorkerState
from cloudai.settings import Settings
from cloudai.store.protocol import Heartbeat, TaskPage, TaskQuery
from cloudai.store.sql import SqlStore
from tests.api.conftest import PATIENCE, STARTLESS, TOO_LARGE, Facade, Server, serving
from tests.store.values import WORKER, finish, finished, placed


def url(server: Server | Facade) -> str:
    return f"ws://127.0.0.1:{server.port}/ws/telemetry"


async def told(socket: ClientConnection, kind: str, **data: Any) -> dict[str, Any]:
    """The data of the next message of a type, with these in it."""
    async with asyncio.timeout(PATIENCE):
        while True:
            message = json.loads(await socket.recv())
            assert set(message) == {"type", "timestamp", "data"}
            if message["type"] == kind and message["data"].items() >= data.items():
                return dict(message["data"])


@contextlib.asynccontextmanager
async def listening(facade: Facade) -> AsyncIterator[ClientConnection]:
    """A client that has had its first message and is told of everything from now on."""
    async with websockets.connect(url(facade), proxy=None) as socket:
        await told(socket, "telemetry_update")
        await told(socket, "telemetry_update")  # the second comes from the work behind, which has looked by then
        yield socket


async def test_an_update_comes_at_once_and_again(facade: Facade) -> None:
    task_id = await facade.running()
    running = {"task_id": task_id, "status": "running", "worker_id": facade.world.worker_id, "progress": None}
    async with websockets.connect(url(facade), proxy=None) as socket:
        for _ in range(2):
            data = await told(socket, "telemetry_update")
            assert data["tasks"] == [running]
            worker = {worker["worker_id"]: worker for worker in data["workers"]}[facade.world.worker_id]
            assert set(worker) == {"worker_id", "cpu_usage", "memory_usage", "active_tasks", "last_heartbeat"}
            assert worker["active_tasks"] == 1
            assert data["cluster"] == await overview(facade)


async def overview(facade: Facade) -> dict[str, float]:
    """What an update says of the cluster, computed from its workers."""
    workers = (await facade.http.get("/api/workers")).json()["workers"]
    active = [worker for worker in workers if worker["is_active"]]
    amounts = {f"available_{what}": sum(worker[f"available_{what}"] for worker in active) for what in ("cpu", "memory")}
    return {"total_workers": len(workers), "active_workers": len(active), **amounts}


@pytest.mark.parametrize(("exit_code", "status"), [(0, "completed"), (3, "failed")])
async def test_starts_and_ends_are_told_to_everybody(shared_facade: Facade, exit_code: int, status: str) -> None:
    worker_id = shared_facade.world.worker_id
    async with listening(shared_facade) as one, listening(shared_facade) as other:
        task_id = await shared_facade.running()
        for socket in (one, other):
            started = await told(socket, "task_started", task_id=task_id)
            assert (started["worker_id"], started["status"]) == (worker_id, "running")
        await shared_facade.world.end(task_id, exit_code)
        for socket in (one, other):
            ended = await told(socket, "task_completed", task_id=task_id)
            assert (ended["status"], ended["exit_code"]) == (status, exit_code)


async def test_a_task_cancelled_while_it_waits_is_told(shared_facade: Facade) -> None:
    async with listening(shared_facade) as socket:
        task_id = await shared_facade.submit(**TOO_LARGE)
        await shared_facade.http.post(f"/api/tasks/{task_id}/cancel")
        ended = await told(socket, "task_completed", task_id=task_id)
        assert (ended["status"], ended["worker_id"], ended["started_at"]) == ("cancelled", None, None)


async def test_workers_that_come_and_can_start_nothing_any_more_are_told(shared_facade: Facade) -> None:
    async with listening(shared_facade) as socket:
        worker_id = await shared_facade.world.add_worker()
        await told(socket, "worker_registered", worker_id=worker_id)
        problem = await shared_facade.world.hinder_worker(worker_id)
        gone = await told(socket, "worker_disconnected", worker_id=worker_id)
        assert problem in gone["problem"]


async def test_a_pending_task_is_shown(facade: Facade) -> None:
    task_id = await facade.submit(**STARTLESS)
    await facade.world.place(task_id)
    async with websockets.connect(url(facade), proxy=None) as socket:
        update = await told(socket, "telemetry_update")
        assert [(task["task_id"], task["status"]) for task in update["tasks"]] == [(task_id, "pending")]


# ---- the facade's own


async def test_what_a_worker_told_of_its_machine_is_passed_on(store: SqlStore, server: Server) -> None:
    await store.register_worker(WORKER)
    await store.record_heartbeats([Heartbeat("worker-1", WORKER.identity, 1731753000_999, True, None, 45.2, 60.1)])
    async with websockets.connect(url(server), proxy=None) as socket:
        (worker,) = (await told(socket, "telemetry_update"))["workers"]
    assert (worker["cpu_usage"], worker["memory_usage"], worker["last_heartbeat"]) == (45.2, 60.1, 1731753000)


async def test_of_tasks_is_told_without_a_look_at_the_workers(
    store: SqlStore, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[int] = []
    looked = asyncio.Event()
    list_workers = store.list_workers

    async def noting() -> list[WorkerState]:
        looks.append(1)
        if len(looks) == 2:  # the first is for the message at the start
            looked.set()
        return await list_workers()

    monkeypatch.setattr(store, "list_workers", noting)
    monkeypatch.setattr(telemetry, "TICK", 3600)
    async with (
        serving(store, settings.model_copy(update={"telemetry_seconds": 3600})) as server,
        websockets.connect(url(server), proxy=None) as socket,
        asyncio.timeout(PATIENCE),
    ):
        await looked.wait()
        for _ in range(5):
            task = await finished(store)
            await told(socket, "task_completed", task_id=task.task_id)
        assert len(looks) == 2
        at = time.time_ns() // 1_000_000
        for number in range(20):
            await store.register_worker(replace(WORKER, worker_id=f"worker-{number}", last_heartbeat=at))
        await told(socket, "worker_registered", worker_id="worker-19")


async def test_what_happens_while_the_first_message_is_read_is_told_after_it(
    store: SqlStore, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    task, run = await placed(store)
    list_tasks = store.list_tasks
    async with (
        serving(store, settings.model_copy(update={"telemetry_seconds": 3600})) as server,
        websockets.connect(url(server), proxy=None) as one,
    ):
        await told(one, "telemetry_update")

        async def late(query: TaskQuery) -> TaskPage:
            """The answer is out of date when it comes."""
            page = await list_tasks(query)
            if query.status is TaskStatus.PENDING:
                await finish(store, task, run, at=5000)
                await told(one, "task_completed", task_id=task.task_id)
            return page

        monkeypatch.setattr(store, "list_tasks", late)
        async with websockets.connect(url(server), proxy=None) as other, asyncio.timeout(PATIENCE):
            first = json.loads(await other.recv())
            assert first["type"] == "telemetry_update"
            assert [(shown["task_id"], shown["status"]) for shown in first["data"]["tasks"]] == [
                (task.task_id, "pending")
            ]
            await told(other, "task_completed", task_id=task.task_id)


@pytest.mark.parametrize("fault", [unavailable("the disk is full"), RuntimeError("a fault")], ids=["away", "fault"])
async def test_what_happened_is_told_though_the_store_fails_when_it_is_first_asked(
    store: SqlStore, server: Server, monkeypatch: pytest.MonkeyPatch, fault: Exception
) -> None:
    faults = [fault]
    get_tasks = store.get_tasks

    async def failing(task_ids: Sequence[str]) -> dict[str, Task]:
        if faults:
            raise faults.pop()
        return await get_tasks(task_ids)

    async with websockets.connect(url(server), proxy=None) as socket:
        await told(socket, "telemetry_update")
        monkeypatch.setattr(store, "get_tasks", failing)
        task = await finished(store)
        for kind in ("task_started", "task_completed"):
            await told(socket, kind, task_id=task.task_id)
    assert not faults


async def test_what_nobody_could_be_told_is_not_told_to_those_who_come_later(
    store: SqlStore, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = asyncio.Event()

    async def failing(_: Sequence[str]) -> dict[str, Task]:
        asked.set()
        raise unavailable("the disk is full")

    with monkeypatch.context() as away:
        async with websockets.connect(url(server), proxy=None) as socket, asyncio.timeout(PATIENCE):
            await told(socket, "telemetry_update")
            away.setattr(store, "get_tasks", failing)
            before = await finished(store)
            await asked.wait()
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{server.port}") as api, asyncio.timeout(PATIENCE):
            while "cloudai_telemetry_clients 0.0" not in (await api.get("/metrics")).text:
                pass
    async with websockets.connect(url(server), proxy=None) as socket:
        await told(socket, "telemetry_update")
        task = await finished(store)
        started = await told(socket, "task_started")
        assert started["task_id"] == task.task_id != before.task_id


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
        await store.register_worker(replace(WORKER, worker_id=f"worker-{number}", identity=f"identity-{number}"))
    async with serving(store, settings) as server, websockets.connect(url(server), proxy=None) as reading:
        slow = await websockets.connect(url(server), proxy=None, max_queue=1, ping_interval=None)
        slow.transport.pause_reading()
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{server.port}") as api, asyncio.timeout(PATIENCE):
            while "cloudai_telemetry_dropped_total 1.0" not in (await api.get("/metrics")).text:
                for _ in range(20):
                    await reading.recv()
        slow.transport.abort()
