"""What the API has over Kubernetes alone; what it promises over every store is tried in tests/api."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from cloudai.settings import Settings
from tests.api.conftest import OBEDIENT, Facade, error_of, facing
from tests.kube.faulty import Faulty
from tests.kube.kube import Place
from tests.store.worlds import on_kubernetes

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
    assert (task["user_id"], task["req_cpu"], task["command"]) == ("ben", 0.02, "echo by hand")
    assert (await facade.http.get("/api/tasks?user_id=ben")).json()["total"] == 1
    assert (await facade.http.get(f"/api/tasks/{name}/logs")).text == "by hand\n"


@pytest.mark.timeout(300)
async def test_a_bad_api_server_costs_time_only(place: Place, tmp_path: Path) -> None:
    faulty = Faulty(place.kube.kubeconfig, seed=7, badness=0.2)
    async with faulty.serving(tmp_path) as kubeconfig:
        through = replace(place, kube=replace(place.kube, kubeconfig=kubeconfig))
        async with on_kubernetes(through, operated=False) as world, facing(world, SETTINGS) as facade:
            await world.begin()
            commands = [f"exit {number % 2}" for number in range(20)]
            names = [await facade.submit(**OBEDIENT | {"command": command}) for command in commands]
            ended = [await facade.until(name, lambda task: task["status"] in ("completed", "failed")) for name in names]
    assert [(task["exit_code"], task["attempt"]) for task in ended] == [(number % 2, 1) for number in range(20)]
    assert len(faulty.faults) >= 5, faulty.faults
