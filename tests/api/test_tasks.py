from __future__ import annotations

import asyncio
import time
from typing import Any

import httpx
import pytest

from cloudai.api.models import TaskList, TaskSummary, TaskView
from cloudai.errors import Code
from cloudai.settings import Settings
from cloudai.store.sql import SqlStore
from tests.api.conftest import BODY, client_of, error_of, finish, join, start, submit

ODD_IDS = [
    "task-",
    "task-x",
    "task-007",
    "task--1",
    "task-1-1",
    "Task-1",
    "1",
    "task-" + "9" * 19,
    "task-" + "9" * 400,
    "%00",
    "a%20b",
]


async def test_a_submit_answers_as_documented(api: httpx.AsyncClient) -> None:
    answer = await api.post("/api/tasks", json=BODY)
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "application/json"
    document = answer.json()
    assert document.pop("task_id").startswith("task-")
    assert document == {"status": "queued", "message": "Task submitted successfully"}


async def test_a_task_reads_as_it_was_wished(api: httpx.AsyncClient) -> None:
    task = (await api.get(f"/api/tasks/{await submit(api)}")).json()
    assert {name: task[name] for name in BODY} == BODY
    assert task["status"] == "queued"
    for name in ("started_at", "worker_id", "finished_at", "exit_code"):
        assert task[name] is None
    assert set(task) == set(TaskView.model_fields)


async def test_a_queued_task_says_why_it_waits(api: httpx.AsyncClient, store: SqlStore) -> None:
    task_id = await submit(api)
    task = (await api.get(f"/api/tasks/{task_id}")).json()
    assert task["reason"] == "NoWorkers"
    assert "agent" in task["message"]


async def test_a_task_larger_than_every_worker_waits_and_says_so(api: httpx.AsyncClient, store: SqlStore) -> None:
    await join(store, now=time.time_ns() // 10**6)
    task = (await api.get(f"/api/tasks/{await submit(api, req_cpu=9)}")).json()
    assert (task["status"], task["reason"]) == ("queued", "TooLargeForEveryWorker")
    assert "worker-1 is too small by 1 CPU" in task["message"]


async def test_a_running_and_a_finished_task_have_their_times(api: httpx.AsyncClient, store: SqlStore) -> None:
    await join(store)
    task_id = await submit(api)
    await start(store, task_id)
    running = (await api.get(f"/api/tasks/{task_id}")).json()
    assert (running["status"], running["worker_id"], running["started_at"]) == (
        "running",
        "worker-1",
        "2025-11-16T10:30:05Z",
    )
    await finish(store, task_id)
    done = (await api.get(f"/api/tasks/{task_id}")).json()
    assert (done["status"], done["exit_code"], done["finished_at"]) == ("completed", 0, "2025-11-16T10:30:06Z")


async def test_a_list_has_the_documented_fields_newest_first(api: httpx.AsyncClient) -> None:
    ids = [await submit(api, user_id=user) for user in ("a", "b", "a")]
    page = (await api.get("/api/tasks")).json()
    assert set(page) == set(TaskList.model_fields)
    assert [task["task_id"] for task in page["tasks"]] == ids[::-1]
    assert all(set(task) == set(TaskSummary.model_fields) for task in page["tasks"])
    assert (page["total"], page["limit"], page["offset"]) == (3, 50, 0)
    own = (await api.get("/api/tasks", params={"user_id": "a", "limit": 1, "offset": 1})).json()
    assert ([task["task_id"] for task in own["tasks"]], own["total"]) == ([ids[0]], 2)


async def test_a_list_by_status_and_in_full(api: httpx.AsyncClient) -> None:
    task_id = await submit(api)
    await api.post(f"/api/tasks/{await submit(api)}/cancel")
    page = (await api.get("/api/tasks?status=queued&view=full")).json()
    assert [task["task_id"] for task in page["tasks"]] == [task_id]
    assert page["tasks"][0]["reason"] == "NoWorkers"
    assert set(page["tasks"][0]) == set(TaskView.model_fields)


async def test_cancel_answers_200_for_whatever_is_not_finished(api: httpx.AsyncClient, store: SqlStore) -> None:
    await join(store)
    queued, running = await submit(api), await submit(api)
    await start(store, running)
    for task_id in (queued, queued, running, running):
        answer = await api.post(f"/api/tasks/{task_id}/cancel")
        assert answer.status_code == 200
        assert answer.json() == {"task_id": task_id, "status": "cancelled", "message": "Task cancellation requested"}
    assert (await api.get(f"/api/tasks/{queued}")).json()["status"] == "cancelled"
    told = (await api.get(f"/api/tasks/{running}")).json()
    assert (told["status"], told["cancel_requested"]) == ("running", True)


@pytest.mark.parametrize("exit_code", [0, 3])
async def test_a_finished_task_cannot_be_cancelled(api: httpx.AsyncClient, store: SqlStore, exit_code: int) -> None:
    await join(store)
    task_id = await submit(api)
    await start(store, task_id)
    await finish(store, task_id, exit_code)
    answer = await api.post(f"/api/tasks/{task_id}/cancel")
    assert answer.status_code == 409
    assert (await error_of(answer))["code"] == "TASK_FINISHED"


@pytest.mark.parametrize("task_id", [*ODD_IDS, "task-1731753000123456789"])
@pytest.mark.parametrize(("method", "rest"), [("GET", ""), ("GET", "/logs"), ("POST", "/cancel")])
async def test_an_unknown_or_odd_id_is_not_found(api: httpx.AsyncClient, task_id: str, method: str, rest: str) -> None:
    answer = await api.request(method, f"/api/tasks/{task_id}{rest}")
    assert answer.status_code == 404
    assert (await error_of(answer))["code"] == "TASK_NOT_FOUND"


async def test_an_idempotency_key_gives_the_first_answer_again(api: httpx.AsyncClient) -> None:
    key = {"Idempotency-Key": "nightly-1"}
    first, again = [await api.post("/api/tasks", json=BODY, headers=key) for _ in range(2)]
    assert first.json() == again.json()
    other = await api.post("/api/tasks", json=BODY | {"req_cpu": 2}, headers=key)
    assert other.status_code == 409
    assert (await error_of(other))["code"] == "IDEMPOTENCY_CONFLICT"
    assert (await api.get("/api/tasks")).json()["total"] == 1


@pytest.mark.parametrize("key", ["", "a b", "x" * 256])
async def test_an_odd_idempotency_key_is_refused(api: httpx.AsyncClient, key: str) -> None:
    answer = await api.post("/api/tasks", json=BODY, headers={"Idempotency-Key": key})
    assert (await error_of(answer))["details"]["field"] == "Idempotency-Key"


async def test_a_held_back_answer_comes_when_the_task_has_ended(api: httpx.AsyncClient, store: SqlStore) -> None:
    task_id = await submit(api)
    waiting = asyncio.ensure_future(api.get(f"/api/tasks/{task_id}?wait_seconds=60"))
    await store.get_task(task_id)
    await api.post(f"/api/tasks/{task_id}/cancel")
    async with asyncio.timeout(30):
        assert (await waiting).json()["status"] == "cancelled"


async def test_a_held_back_answer_comes_at_another_version(api: httpx.AsyncClient, store: SqlStore) -> None:
    await join(store)
    task_id = await submit(api)
    version = (await api.get(f"/api/tasks/{task_id}")).json()["version"]
    waiting = asyncio.ensure_future(api.get(f"/api/tasks/{task_id}?wait_seconds=60&version={version}"))
    await start(store, task_id)
    async with asyncio.timeout(30):
        assert (await waiting).json()["version"] > version


async def test_a_held_back_answer_comes_when_the_time_is_over(api: httpx.AsyncClient) -> None:
    answer = await api.get(f"/api/tasks/{await submit(api)}?wait_seconds=1")
    assert answer.json()["status"] == "queued"


# ---- errors of no particular endpoint


@pytest.mark.parametrize(
    "path", ["/", "/api", "/api/tasks/", "/api/nothing", "/api/tasks/task-1/nothing", "/ws/telemetry"]
)
async def test_an_unknown_path_is_told_in_the_envelope(api: httpx.AsyncClient, path: str) -> None:
    answer = await api.get(path)
    assert answer.status_code == 404
    assert (await error_of(answer))["code"] == "ROUTE_NOT_FOUND"


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("PUT", "/api/tasks", "GET, HEAD, OPTIONS, POST"),
        ("DELETE", "/api/tasks/task-1", "GET, HEAD, OPTIONS"),
        ("GET", "/api/tasks/task-1/cancel", "OPTIONS, POST"),
        ("POST", "/healthz", "GET, HEAD, OPTIONS"),
        ("BREW", "/api/workers", "GET, HEAD, OPTIONS"),
    ],
)
async def test_a_wrong_method_is_told_with_those_allowed(
    api: httpx.AsyncClient, method: str, path: str, allowed: str
) -> None:
    answer = await api.request(method, path)
    assert (answer.status_code, answer.headers["allow"]) == (405, allowed)
    assert (await error_of(answer))["code"] == "METHOD_NOT_ALLOWED"


async def test_options_lists_the_methods_and_grants_nothing_to_other_sites(api: httpx.AsyncClient) -> None:
    answer = await api.options("/api/tasks")
    assert (answer.status_code, answer.headers["allow"]) == (204, "GET, HEAD, OPTIONS, POST")
    assert not any(name.startswith("access-control") for name in answer.headers)


@pytest.mark.parametrize("kind", [None, "text/plain", "application/x-www-form-urlencoded", "application/jsonx"])
async def test_a_body_of_another_type_is_refused(api: httpx.AsyncClient, kind: str | None) -> None:
    headers = {"Content-Type": kind} if kind else {}
    answer = await api.post("/api/tasks", content=b"{}", headers=headers)
    assert answer.status_code == 415
    assert (await error_of(answer))["code"] == "UNSUPPORTED_MEDIA_TYPE"


@pytest.mark.parametrize("kind", ["application/json; charset=utf-8", "Application/JSON"])
async def test_json_is_json_however_it_is_spelt(api: httpx.AsyncClient, kind: str) -> None:
    answer = await api.post("/api/tasks", json=BODY, headers={"Content-Type": kind})
    assert answer.status_code == 200


@pytest.mark.parametrize("declared", [True, False])
async def test_a_body_over_the_limit_is_refused(api: httpx.AsyncClient, settings: Settings, declared: bool) -> None:
    async def pieces() -> Any:
        for _ in range(settings.max_body_bytes // 65536 + 1):
            yield b" " * 65536

    content = b" " * (settings.max_body_bytes + 1) if declared else pieces()
    answer = await api.post("/api/tasks", content=content, headers={"Content-Type": "application/json"})
    assert answer.status_code == 413
    assert (await error_of(answer))["code"] == "BODY_TOO_LARGE"


async def test_a_store_that_is_gone_gives_503_and_a_fault_tells_nothing(store: SqlStore, settings: Settings) -> None:
    async with client_of(store, settings) as api:
        task_id = await submit(api)
        await store.close()
        answer = await api.get(f"/api/tasks/{task_id}")
        assert answer.status_code in (500, 503)
        error = await error_of(answer)
        assert error["code"] in (Code.INTERNAL, Code.UNAVAILABLE)
        assert "Traceback" not in answer.text
