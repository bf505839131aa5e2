"""The documented API over a real cluster."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import websockets

from cloudai.settings import Settings
from cloudai.store.kube.store import open_kubernetes
from tests.api.conftest import Server, error_of, serving
from tests.api.test_openapi import SECONDS, check_document
from tests.api.test_reference import ENDPOINTS, REFERENCE, blocks, run, same_form
from tests.cluster.images import SHELL
from tests.kube.faulty import Faulty
from tests.kube.kube import Kube, Place

BODY = {"user_id": "user-123", "docker_image": SHELL, "command": "echo hello", "req_cpu": 0.02, "req_memory": 0.03125}
SOON = 90


@pytest.fixture
async def server(place: Place) -> AsyncIterator[Server]:
    settings = Settings(namespace=place.name, kubeconfig=place.kube.kubeconfig, rate_limit_enabled=False)
    store = await open_kubernetes(settings)
    async with serving(store, settings) as running:
        yield running
    await store.close()


@pytest.fixture
async def api(server: Server) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{server.port}", timeout=SOON) as client:
        yield client


async def submit(api: httpx.AsyncClient, **fields: Any) -> str:
    answer = await api.post("/api/tasks", json=BODY | fields)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["task_id"])


async def until(api: httpx.AsyncClient, task_id: str, *statuses: str) -> dict[str, Any]:
    version = 0
    async with asyncio.timeout(SOON):
        while True:
            task = (await api.get(f"/api/tasks/{task_id}?wait_seconds=30&version={version}")).json()
            if task["status"] in statuses:
                return dict(task)
            version = task["version"]


@pytest.mark.usefixtures("operator")
async def test_real_answers_have_the_documented_fields_and_types(api: httpx.AsyncClient) -> None:
    running = await submit(api, command="sleep 1000")
    await until(api, running, "running")
    for method, path, text in sorted(ENDPOINTS):  # reads first
        body = BODY if (method, path) == ("POST", "/api/tasks") else None
        answer = await api.request(method, path.format(task_id=running, worker_id="real-1"), json=body)
        assert answer.status_code == 200, answer.text
        documented = json.loads(blocks(text, "json")[-1])
        usage = answer.json().get("cpu_usage", 0)
        assert usage is None or isinstance(usage, float | int)
        same_form(documented, answer.json())
    await until(api, running, "cancelled")


async def test_the_curl_examples_work(server: Server) -> None:
    submitting, listing = blocks(REFERENCE.partition("## Examples")[2], "bash")

    async def shell(example: str) -> Any:
        return json.loads(await run("sh", "-c", example.replace("localhost:8080", f"127.0.0.1:{server.port}")))

    answer = await shell(submitting)
    assert (answer["status"], answer["message"]) == ("queued", "Task submitted successfully")
    assert (await shell(listing))["tasks"] == []


@pytest.mark.timeout(SECONDS)
async def test_the_api_keeps_to_its_own_document(server: Server, tmp_path: Path) -> None:
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{server.port}") as api:
        await submit(api)
    await check_document(server.port, tmp_path, examples=8)


@pytest.mark.usefixtures("operator")
async def test_events_and_logs_arrive_as_they_happen(api: httpx.AsyncClient, server: Server) -> None:
    told: list[dict[str, Any]] = []
    async with (
        asyncio.timeout(SOON),
        websockets.connect(f"ws://127.0.0.1:{server.port}/ws/telemetry", proxy=None) as ws,
    ):
        assert json.loads(await ws.recv())["type"] == "telemetry_update"
        task_id = await submit(api, command="echo one; sleep 2; echo two; exit 3")
        await until(api, task_id, "running")
        async with api.stream("GET", f"/api/tasks/{task_id}/logs?follow=true") as log:
            words = [line async for line in log.aiter_lines()]
        while not any(message["type"] == "task_completed" for message in told):
            told.append(json.loads(await ws.recv()))
    assert words == ["one", "two"]
    of_task = [message for message in told if message["data"].get("task_id") == task_id]
    assert [message["type"] for message in of_task] == ["task_started", "task_completed"]
    assert (of_task[-1]["data"]["status"], of_task[-1]["data"]["exit_code"]) == ("failed", 3)
    assert (await api.get(f"/api/tasks/{task_id}/logs?offset=4&limit=3")).text == "two"


async def test_what_kubernetes_cannot_do_is_refused_by_field(api: httpx.AsyncClient) -> None:
    error = await error_of(await api.post("/api/tasks", json=BODY | {"req_gpu": 0.5}))
    assert error["details"]["field"] == "req_gpu"
    assert "whole" in error["details"]["reason"]


async def test_a_task_that_waits_says_why(api: httpx.AsyncClient) -> None:
    task = (await api.get(f"/api/tasks/{await submit(api)}")).json()
    assert (task["status"], task["reason"]) == ("queued", "WaitingForCapacity")
    assert "operator" in task["message"]


@pytest.mark.usefixtures("operator")
async def test_tasks_applied_by_hand_are_tasks_like_any_other(api: httpx.AsyncClient, place: Place) -> None:
    name = await asyncio.to_thread(place.apply, "echo by hand", userId="ben")
    task = await until(api, name, "completed")
    assert (task["user_id"], task["req_cpu"], task["command"]) == ("ben", 0.02, "echo by hand")
    assert (await api.get("/api/tasks?user_id=ben")).json()["total"] == 1
    assert (await api.get(f"/api/tasks/{name}/logs")).text == "by hand\n"


async def test_a_bad_api_server_costs_time_only(kube: Kube, place: Place, tmp_path: Path) -> None:
    faulty = Faulty(kube.kubeconfig, seed=7, badness=0.2)
    async with faulty.serving(tmp_path) as kubeconfig:
        settings = Settings(namespace=place.name, kubeconfig=kubeconfig, rate_limit_enabled=False)
        with contextlib.ExitStack() as ends:
            await asyncio.to_thread(ends.enter_context, place.operator(kubeconfig=str(kubeconfig)))
            store = await open_kubernetes(settings)
            async with (
                serving(store, settings) as server,
                httpx.AsyncClient(base_url=f"http://127.0.0.1:{server.port}", timeout=SOON) as api,
            ):
                names = [await submit(api, command=f"exit {number % 2}") for number in range(20)]
                ended = [await until(api, name, "completed", "failed") for name in names]
            await store.close()
            await asyncio.to_thread(ends.close)
    assert [(task["exit_code"], task["attempt"]) for task in ended] == [(number % 2, 1) for number in range(20)]
    assert len(faulty.faults) >= 5, faulty.faults
