"""What the API has over Kubernetes alone; what it promises over every store is tried in tests/api."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
from websockets.asyncio.client import ClientConnection

from cloudai.api import health
from cloudai.settings import Settings
from cloudai.store.kube import store, watch
from cloudai.store.kube.api import NoCluster
from tests.api.conftest import OBEDIENT, Facade, error_of, facing
from tests.api.test_telemetry import listening, told
from tests.kube.faulty import KINDS, Faulty
from tests.kube.kube import Place
from tests.store.worlds import on_kubernetes

LONG = 300.0  # seconds: every fault is one more wait, of kopf's too
SETTINGS = Settings(rate_limit_enabled=False)


@pytest.fixture
async def facade(shared: Place) -> AsyncIterator[Facade]:
    async with on_kubernetes(shared, operated=True) as world, facing(world, SETTINGS) as facade:
        yield facade


async def test_what_kubernetes_cannot_do_is_refused_by_field(facade: Facade) -> None:
    answer = await facade.http.post("/api/tasks", json=OBEDIENT | {"req_gpu": 0.5, "user_id": "half"})
    assert answer.status_code == 400
    error = await error_of(answer)
    assert error["details"]["field"] == "req_gpu"
    assert "whole" in error["details"]["reason"]
    assert (await facade.http.get("/api/tasks?user_id=half")).json()["total"] == 0


async def test_tasks_applied_by_hand_are_tasks_like_any_other(facade: Facade, shared: Place) -> None:
    name = await asyncio.to_thread(shared.apply, "echo by hand", userId="ben")
    task = await facade.until(name, lambda task: task["status"] == "completed")
    assert (task["user_id"], task["req_cpu"], task["command"]) == ("ben", 0.1, "echo by hand")
    assert (await facade.http.get("/api/tasks?user_id=ben")).json()["total"] == 1
    assert (await facade.http.get(f"/api/tasks/{name}/logs")).text == "by hand\n"


async def test_it_hears_of_tasks_again_after_its_watches_fell_silent(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "SILENCE", 1.0)
    with place.almighty(tmp_path) as almighty:
        faulty = Faulty(almighty)
        faulty.due = {"/tasks": "silent", "/pods": "silent", "/nodes": "silent"}
        async with faulty.serving(tmp_path) as kubeconfig:
            through = replace(place, kube=replace(place.kube, kubeconfig=kubeconfig))
            async with on_kubernetes(through, operated=False) as world:
                await faulty.silenced.wait()
                name = await asyncio.to_thread(place.apply, "true")
                async for changes in world.store.watch(0):
                    if name in {change.key for change in changes}:
                        break
    assert not faulty.due


@pytest.mark.parametrize("fault", ["hangs", "busy"])
async def test_an_api_server_that_is_slow_takes_no_replica_out_of_service(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    monkeypatch.setattr(health, "FRESH", -1.0)
    with place.almighty(tmp_path) as almighty:
        faulty = Faulty(almighty)
        async with faulty.serving(tmp_path) as kubeconfig:
            through = replace(place, kube=replace(place.kube, kubeconfig=kubeconfig))
            async with on_kubernetes(through, operated=False) as world, facing(world, SETTINGS) as facade:
                faulty.always = fault
                slow = await facade.http.get("/readyz")
                monkeypatch.setattr(store, "HEARD_SECONDS", 0.0)
                away = await facade.http.get("/readyz")
                faulty.always = ""
                back = await facade.http.get("/readyz")
    assert (slow.status_code, slow.json()["checks"]["store"]) == (200, "ok")
    assert "unknown" in slow.json()["checks"]["controller"]
    assert (away.status_code, back.status_code) == (503, 200)
    assert "has not been heard of for" in away.json()["checks"]["store"]


async def test_without_tasks_or_their_namespace_it_is_not_ready_and_says_what_is_missing(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health, "FRESH", -1.0)
    monkeypatch.setattr(store, "NEW_SECONDS", 0.0)
    with place.almighty(tmp_path) as almighty:
        faulty = Faulty(almighty)
        async with faulty.serving(tmp_path) as kubeconfig:
            through = replace(place, kube=replace(place.kube, kubeconfig=kubeconfig))
            async with on_kubernetes(through, operated=False) as world, facing(world, SETTINGS) as facade:
                for absent, words in (("/tasks", "no Task resource"), (f"/{place.name}", "no namespace")):
                    faulty.absent = absent
                    answer = await facade.http.get("/readyz")
                    assert (answer.status_code, words in answer.json()["checks"]["store"]) == (503, True), answer.text
                    with pytest.raises(NoCluster, match=words):
                        await store.open_kubernetes(Settings(namespace=place.name, kubeconfig=kubeconfig))
                faulty.absent = None
                assert (await facade.http.get("/readyz")).status_code == 200


@pytest.mark.timeout(900)
async def test_a_bad_api_server_costs_time_only(place: Place, tmp_path: Path) -> None:
    with place.almighty(tmp_path) as almighty:
        faulty = Faulty(almighty, badness=0.2)
        async with faulty.serving(tmp_path) as kubeconfig:
            through = replace(place, kube=replace(place.kube, kubeconfig=kubeconfig))
            async with on_kubernetes(through, operated=False) as world, facing(world, SETTINGS) as facade:
                await world.begin()
                async with listening(facade) as socket:
                    await everything_works(facade, socket)
    wrong = {(what, kind) for what, kinds in KINDS.items() for kind in kinds}
    assert faulty.faults.keys() == wrong


async def everything_works(facade: Facade, socket: ClientConnection) -> None:
    commands = [f"exit {number % 2}" for number in range(20)]
    names = [await facade.submit(**OBEDIENT | {"command": command}) for command in commands]
    ended = [await facade.until(name, lambda task: task["status"] in ("completed", "failed"), LONG) for name in names]
    assert [(task["exit_code"], task["attempt"]) for task in ended] == [(number % 2, 1) for number in range(20)]
    assert (await facade.http.get("/api/tasks?status=completed")).json()["total"] == 10
    worker_id = facade.world.worker_id
    workers = (await facade.http.get("/api/workers")).json()["workers"]
    assert worker_id in {worker["worker_id"] for worker in workers}

    key = {"Idempotency-Key": "once"}
    lasting = OBEDIENT | {"command": "echo words; exec sleep 1000"}
    answers = [await facade.http.post("/api/tasks", json=lasting, headers=key) for _ in range(3)]
    (running,) = {answer.json()["task_id"] for answer in answers}
    await told(socket, "task_started", task_id=running)
    logs = f"/api/tasks/{running}/logs"
    async with facade.http.stream("GET", f"{logs}?follow=true") as answer:
        lines = answer.aiter_lines()
        assert await anext(lines) == "words"
        cancelled = await facade.http.post(f"/api/tasks/{running}/cancel")
        assert cancelled.status_code == 200
        assert [line async for line in lines] == []
    assert (await facade.until(running, lambda task: task["status"] == "cancelled"))["attempt"] == 1
    await told(socket, "task_completed", task_id=running, status="cancelled")
    assert (await facade.http.get(logs)).text == "words\n"
