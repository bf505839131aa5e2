"""Tasks, over every store; what is refused before a store is asked, over SQLite only, below."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from typing import Any

import httpx
import pytest

from cloudai.api.models import TaskList, TaskSummary, TaskView
from cloudai.errors import Code
from cloudai.settings import Settings
from cloudai.store.protocol import TaskPage, TaskQuery
from cloudai.store.sql import SqlStore
from tests.api.conftest import BODY, OBEDIENT, STARTLESS, TOO_LARGE, Facade, error_of, submit

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
    "task-1731753000123456789",
]
SMALLEST = {"req_cpu": 0.001, "req_memory": 6 / 1024, "req_storage": 1e-09, "timeout_seconds": 1, "max_retries": 0}
LARGEST = {"req_cpu": 100_000.0, "req_memory": 1_048_576.0, "req_storage": 1_048_576.0, "req_gpu": 1024.0}
WISHES: list[dict[str, Any]] = [
    {},
    SMALLEST,
    LARGEST | {"timeout_seconds": 315_360_000, "max_retries": 100},
    {"req_cpu": 0.1, "req_memory": 0.1, "req_storage": 0.0},
    {"user_id": "Ünïcode – 用户 \U0001f600/" + "x" * 230},
    {"docker_image": "localhost:5000/" + "a" * 400 + "@sha256:" + "0" * 64},
    {"command": None},
    {"command": [""]},
    {"command": ["sh", "-c", "echo $(HOME) $$HOME", "a  b\n\t\u2028\U0001f600"]},
    {"command": "é\n" * 16_000},
    {"command": ["x"] * 1000},
]


async def test_a_submit_answers_as_documented(facade: Facade) -> None:
    answer = await facade.http.post("/api/tasks", json=BODY)
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "application/json"
    document = answer.json()
    assert document.pop("task_id").startswith("task-")
    assert document == {"status": "queued", "message": "Task submitted successfully"}


async def test_a_task_reads_as_it_was_wished(facade: Facade) -> None:
    for wish in WISHES:
        wished = BODY | {"timeout_seconds": None, "max_retries": None} | wish
        task = await facade.task(await facade.submit(**wish))
        assert {name: task[name] for name in wished} == wished
        assert task["status"] == "queued"
        assert [task[name] for name in ("started_at", "worker_id", "finished_at", "exit_code")] == [None] * 4
        assert set(task) == set(TaskView.model_fields)


async def test_a_queued_task_says_why_it_waits(facade: Facade) -> None:
    why = facade.world.idle
    task = await facade.until(await facade.submit(), lambda task: task["reason"] == why.reason)
    assert task["status"] == "queued"
    assert why.message in task["message"]


async def test_a_task_larger_than_every_worker_waits_and_says_so(shared_facade: Facade) -> None:
    why = shared_facade.world.too_large
    task = await shared_facade.until(await shared_facade.submit(**TOO_LARGE), lambda task: task["reason"] == why.reason)
    assert task["status"] == "queued"
    assert why.message in task["message"]


@pytest.mark.parametrize(("exit_code", "status"), [(0, "completed"), (3, "failed")])
async def test_a_task_tells_its_times_and_once_it_has_ended_cannot_be_cancelled(
    shared_facade: Facade, exit_code: int, status: str
) -> None:
    task_id = await shared_facade.running()
    running = await shared_facade.task(task_id)
    assert (running["status"], running["worker_id"]) == ("running", shared_facade.world.worker_id)
    assert (running["finished_at"], running["exit_code"]) == (None, None)
    await shared_facade.world.end(task_id, exit_code)
    ended = await shared_facade.task(task_id)
    assert (ended["status"], ended["exit_code"]) == (status, exit_code)
    instants = [ended[f"{what}_at_ms"] for what in ("created", "started", "finished")]
    assert instants == sorted(instants)
    times = [ended[f"{what}_at"] for what in ("created", "started", "finished")]
    assert times == [in_seconds(instant) for instant in instants]
    assert times[:2] == [running["created_at"], running["started_at"]]
    answer = await shared_facade.http.post(f"/api/tasks/{task_id}/cancel")
    assert answer.status_code == 409
    assert (await error_of(answer))["code"] == "TASK_FINISHED"
    assert await shared_facade.task(task_id) == ended


def in_seconds(ms: int) -> str:
    return datetime.fromtimestamp(ms // 1000, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


async def test_a_list_has_the_documented_fields_newest_first(facade: Facade) -> None:
    ids = [await facade.submit(user_id=user) for user in ("a", "b", "a")]
    page = (await facade.http.get("/api/tasks")).json()
    assert set(page) == set(TaskList.model_fields)
    assert [task["task_id"] for task in page["tasks"]] == ids[::-1]
    assert all(set(task) == set(TaskSummary.model_fields) for task in page["tasks"])
    assert (page["total"], page["limit"], page["offset"]) == (3, 50, 0)
    own = (await facade.http.get("/api/tasks", params={"user_id": "a", "limit": 1, "offset": 1})).json()
    assert ([task["task_id"] for task in own["tasks"]], own["total"]) == ([ids[0]], 2)


async def test_a_list_is_newest_first_with_idempotency_keys_and_without(facade: Facade) -> None:
    ids = []
    for number in range(8):
        headers = {"Idempotency-Key": f"key-{number}"} if number % 2 else {}
        ids.append((await facade.http.post("/api/tasks", json=BODY, headers=headers)).json()["task_id"])
    page = (await facade.http.get("/api/tasks")).json()
    assert [task["task_id"] for task in page["tasks"]] == ids[::-1]


async def test_a_list_by_status_and_in_full(facade: Facade) -> None:
    await facade.world.begin()
    task_id, cancelled = await facade.submit(**TOO_LARGE), await facade.submit(**TOO_LARGE)
    await facade.http.post(f"/api/tasks/{cancelled}/cancel")
    await facade.until(cancelled, lambda task: task["status"] == "cancelled")
    await facade.until(task_id, lambda task: task["reason"] == facade.world.too_large.reason)
    page = (await facade.http.get("/api/tasks?status=queued&view=full")).json()
    assert [task["task_id"] for task in page["tasks"]] == [task_id]
    assert page["tasks"][0] == await facade.task(task_id)
    ended = (await facade.http.get("/api/tasks?status=cancelled")).json()
    assert [task["task_id"] for task in ended["tasks"]] == [cancelled]


async def test_cancel_answers_200_for_whatever_is_not_finished(shared_facade: Facade) -> None:
    queued, running = await shared_facade.submit(**TOO_LARGE), await shared_facade.running()
    for task_id in (queued, queued, running, running):
        answer = await shared_facade.http.post(f"/api/tasks/{task_id}/cancel")
        assert answer.status_code == 200
        assert answer.json() == {"task_id": task_id, "status": "cancelled", "message": "Task cancellation requested"}
        if task_id == queued:
            assert (await shared_facade.task(queued))["status"] == "cancelled"
    told = await shared_facade.task(running)
    assert (told["status"], told["cancel_requested"]) == ("running", True)


@pytest.mark.parametrize(("method", "rest"), [("GET", ""), ("GET", "/logs"), ("POST", "/cancel")])
async def test_an_unknown_or_odd_id_is_not_found(shared_facade: Facade, method: str, rest: str) -> None:
    for task_id in ODD_IDS:
        answer = await shared_facade.http.request(method, f"/api/tasks/{task_id}{rest}")
        assert answer.status_code == 404, task_id
        assert (await error_of(answer))["code"] == "TASK_NOT_FOUND"


async def test_an_unknown_or_odd_worker_is_not_found(shared_facade: Facade) -> None:
    for worker_id in ("nobody", "-", "x" * 400, "%00", "a%20b", "a%2Fb"):
        answer = await shared_facade.http.get(f"/api/workers/{worker_id}")
        assert answer.status_code == 404, worker_id
        assert (await error_of(answer))["code"] == ("ROUTE_NOT_FOUND" if "%2F" in worker_id else "WORKER_NOT_FOUND")


async def test_a_worker_lists_the_tasks_that_have_started(facade: Facade) -> None:
    running = await facade.running()
    waiting = await facade.submit(**STARTLESS)
    await facade.world.place(waiting)
    worker = (await facade.http.get(f"/api/workers/{facade.world.worker_id}")).json()
    assert [task["task_id"] for task in worker["running_tasks"]] == [running]
    assert worker["running"] == 2


async def test_an_idempotency_key_gives_the_first_answer_again(facade: Facade) -> None:
    key = {"Idempotency-Key": "nightly-1"}
    first, again = [await facade.http.post("/api/tasks", json=BODY, headers=key) for _ in range(2)]
    assert first.json() == again.json()
    other = await facade.http.post("/api/tasks", json=BODY | {"req_cpu": 2}, headers=key)
    assert other.status_code == 409
    assert (await error_of(other))["code"] == "IDEMPOTENCY_CONFLICT"
    assert (await facade.http.get("/api/tasks")).json()["total"] == 1


async def test_a_refused_request_leaves_no_task_behind(facade: Facade, settings: Settings) -> None:
    json = {"Content-Type": "application/json"}
    requests: list[tuple[int, str, dict[str, Any]]] = [
        (400, "/api/tasks", {"json": BODY | {"req_cpu": 0}}),
        (400, "/api/tasks", {"json": BODY | {"docker_image": "No Image"}}),
        (400, "/api/tasks", {"json": BODY | {"more": 1}}),
        (400, "/api/tasks", {"json": [BODY, BODY]}),
        (400, "/api/tasks", {"content": b'{"user_id": "a",', "headers": json}),
        (400, "/api/tasks?wait=1", {"json": BODY}),
        (400, "/api/tasks", {"json": BODY, "headers": {"Idempotency-Key": "a b"}}),
        (403, "/api/tasks", {"json": BODY, "headers": {"Host": "evil.example"}}),
        (403, "/api/tasks", {"json": BODY, "headers": {"Origin": "http://evil.example"}}),
        (404, "/api/tasks/", {"json": BODY}),
        (404, "/api/tasks/task-1/cancel", {}),
        (405, "/api/workers", {"json": BODY}),
        (413, "/api/tasks", {"content": b" " * (settings.max_body_bytes + 1), "headers": json}),
        (
            415,
            "/api/tasks",
            {"content": b"user_id=a", "headers": {"Content-Type": "application/x-www-form-urlencoded"}},
        ),
    ]
    for status, path, request in requests:
        answer = await facade.http.post(path, **request)
        assert answer.status_code == status, request
        await error_of(answer)
    assert (await facade.http.get("/api/tasks")).json()["tasks"] == []
    assert (await facade.http.get("/api/cluster/status")).json()["total_tasks"] == 0


async def test_a_held_back_answer_comes_when_the_task_has_ended(shared_facade: Facade) -> None:
    task_id = await shared_facade.submit(**TOO_LARGE)
    waiting = asyncio.ensure_future(shared_facade.task(task_id, "wait_seconds=60"))
    await shared_facade.http.post(f"/api/tasks/{task_id}/cancel")
    async with asyncio.timeout(30):
        assert (await waiting)["status"] == "cancelled"


async def test_a_held_back_answer_comes_at_another_version(shared_facade: Facade) -> None:
    task_id = await shared_facade.submit(**OBEDIENT)
    version = (await shared_facade.task(task_id))["version"]
    waiting = asyncio.ensure_future(shared_facade.task(task_id, f"wait_seconds=60&version={version}"))
    await shared_facade.world.place(task_id)
    async with asyncio.timeout(30):
        assert (await waiting)["version"] > version


async def test_a_held_back_answer_comes_when_the_time_is_over(facade: Facade) -> None:
    task = await facade.task(await facade.submit(), "wait_seconds=1")
    assert task["status"] == "queued"


async def test_a_store_that_is_gone_gives_503_and_a_fault_tells_nothing(facade: Facade) -> None:
    await facade.world.store.close()
    answer = await facade.http.post("/api/tasks", json=BODY)
    assert answer.status_code in (500, 503)
    error = await error_of(answer)
    assert error["code"] in (Code.INTERNAL, Code.UNAVAILABLE)
    assert "Traceback" not in answer.text


# ---- what never reaches a store


@pytest.mark.parametrize("key", ["", "a b", "x" * 256])
async def test_an_odd_idempotency_key_is_refused(api: httpx.AsyncClient, key: str) -> None:
    answer = await api.post("/api/tasks", json=BODY, headers={"Idempotency-Key": key})
    assert (await error_of(answer))["details"]["field"] == "Idempotency-Key"


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


async def test_a_list_reads_commands_only_to_show_them(
    store: SqlStore, api: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []
    list_tasks = store.list_tasks

    async def noting(query: TaskQuery) -> TaskPage:
        asked.append(query.brief)
        return await list_tasks(query)

    monkeypatch.setattr(store, "list_tasks", noting)
    await submit(api)
    assert [task["status"] for task in (await api.get("/api/tasks")).json()["tasks"]] == ["queued"]
    assert [task["command"] for task in (await api.get("/api/tasks?view=full")).json()["tasks"]] == [BODY["command"]]
    assert asked == [True, False]
