"""`/readyz` says in time what is not ready, whatever became of the store or of the controllers."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace

import pytest

from cloudai.api import health, lead
from cloudai.clock import now_ms
from cloudai.errors import unavailable
from cloudai.resources import GIB, Resources, Run, TaskSpec, TaskStatus, Worker
from cloudai.settings import Settings
from cloudai.store.protocol import Lease
from cloudai.store.sql import SqlStore, open_store
from tests.api.conftest import Document, client_of
from tests.engines.postgres import Postgres


async def asked(store: SqlStore, settings: Settings) -> tuple[int, Document]:
    async with client_of(store, settings) as api:
        answer = await api.get("/readyz")
        return answer.status_code, answer.json()


async def test_a_database_that_answers_nobody_is_told_before_it_is_given_up(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health, "ANSWER", 0.3)
    with Postgres() as server:
        store = await open_store(server.create("cloudai"))
        async with client_of(store, settings) as api:
            server.pause()
            try:
                answer = await api.get("/readyz")
                measured = (await api.get("/metrics")).text
            finally:
                server.go_on()
        await store.close()
    assert (answer.status_code, answer.json()["ready"]) == (503, False)
    assert "does not answer" in answer.json()["checks"]["store"]
    assert "unknown" in answer.json()["checks"]["controller"]
    assert "cloudai_store_up 0.0" in measured


async def test_many_who_ask_at_once_cost_one_look(
    store: SqlStore, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[str] = []
    for name in ("ping", "list_workers"):
        monkeypatch.setattr(store, name, noting(looks, name, getattr(store, name)))
    async with client_of(store, settings) as api:
        answers = await asyncio.gather(*(api.get(path) for _ in range(20) for path in ("/readyz", "/metrics")))
    assert {answer.status_code for answer in answers} == {200}
    assert sorted(looks) == ["list_workers", "ping"]


def noting(looks: list[str], name: str, method: Callable[[], Awaitable[object]]) -> Callable[[], Awaitable[object]]:
    async def noted() -> object:
        looks.append(name)
        return await method()

    return noted


async def test_a_controller_that_leads_is_ok(store: SqlStore, settings: Settings) -> None:
    await store.put_lease(Lease("controller", "one", 1, 0), 0)
    assert await asked(store, settings) == (200, {"ready": True, "checks": {"store": "ok", "controller": "ok"}})


async def test_a_leader_that_no_longer_renews_is_told(
    store: SqlStore, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health, "FRESH", -1.0)
    monkeypatch.setattr(lead, "SILENT", -1.0)
    await store.put_lease(Lease("controller", "one", 1, 0), 0)
    status, verdict = await asked(store, settings)
    assert (status, verdict["ready"]) == (200, True)  # tasks are taken, and wait
    assert "one has not renewed its lead" in verdict["checks"]["controller"]


async def test_a_leader_that_gave_up_its_lead_leads_no_more(store: SqlStore, settings: Settings) -> None:
    await store.put_lease(Lease("controller", "", 1, 0), 0)
    _, verdict = await asked(store, settings)
    assert "nobody leads" in verdict["checks"]["controller"]


async def test_why_it_is_not_known_who_leads_is_told(
    store: SqlStore, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refusing(_: str) -> Lease | None:
        raise unavailable("leases are forbidden")

    monkeypatch.setattr(store, "get_lease", refusing)
    status, verdict = await asked(store, settings)
    assert (status, verdict["checks"]["store"]) == (200, "ok")
    assert "leases are forbidden" in verdict["checks"]["controller"]


async def test_without_a_controller_tasks_say_so(store: SqlStore, settings: Settings) -> None:
    amount = Resources(8000, 16 * GIB, 100 * GIB, 0)
    worker = Worker(
        worker_id="worker-1",
        identity="identity",
        address="host:1",
        capacity=amount,
        runtime="docker",
        registered_at=now_ms(),
        last_heartbeat=now_ms(),
    )
    await store.register_worker(worker)
    spec = TaskSpec(user_id="ann", image="busybox", command=None, resources=Resources(1000, GIB, 0, 0))
    task = await store.create_task(spec)
    placed = replace(await store.create_task(spec), status=TaskStatus.PENDING, attempt=1, worker_id="worker-1")
    async with client_of(store, settings) as api:

        async def told(task_id: str) -> tuple[str | None, str | None]:
            document = (await api.get(f"/api/tasks/{task_id}")).json()
            return document["reason"], document["message"]

        assert (await told(task.task_id))[0] == "NoController"
        assert "nobody leads" in ((await told(task.task_id))[1] or "")
        run = Run(
            task_id=placed.task_id,
            attempt=1,
            worker_id="worker-1",
            user_id="ann",
            image="busybox",
            command=None,
            resources=spec.resources,
        )
        assert (await store.commit([[placed, run]])).applied == [True]
        assert (await told(placed.task_id))[0] == "NoController"
        await store.put_lease(Lease("controller", "one", 1, 0), 0)
        assert (await told(task.task_id))[0] == "WaitingForCapacity"
        assert await told(placed.task_id) == (None, None)


async def test_many_who_ask_at_once_what_keeps_a_task_share_the_look_at_who_leads(
    store: SqlStore, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[str] = []
    ask = store.get_lease

    async def noted(name: str) -> Lease | None:
        looks.append(name)
        return await ask(name)

    monkeypatch.setattr(store, "get_lease", noted)
    spec = TaskSpec(user_id="ann", image="busybox", command=None, resources=Resources(1000, GIB, 0, 0))
    task = await store.create_task(spec)
    async with client_of(store, settings) as api:
        answers = await asyncio.gather(*(api.get(f"/api/tasks/{task.task_id}") for _ in range(50)))
    assert {answer.status_code for answer in answers} == {200}
    assert len(looks) < 10
