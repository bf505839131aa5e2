"""Errors that are no client's mistake: exactly the documented status and envelope, and nothing of what went wrong inside."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

import httpx
import jsonschema_rs
import pytest

from cloudai.api import changes
from cloudai.api.openapi import document
from cloudai.settings import Settings
from cloudai.store.protocol import Change
from cloudai.store.sql import SqlStore
from tests.api.conftest import BODY, PATIENCE, client_of, error_of
from tests.store.values import SPEC

REQUESTS = [
    ("POST", "/api/tasks", "create_task"),
    ("GET", "/api/tasks/task-1", "get_task"),
    ("GET", "/api/tasks", "list_tasks"),
    ("GET", "/api/tasks/task-1/logs", "read_log"),
    ("POST", "/api/tasks/task-1/cancel", "cancel_task"),
    ("GET", "/api/workers", "list_workers"),
    ("GET", "/api/workers/worker-1", "get_worker"),
    ("GET", "/api/cluster/status", "totals"),
]
API = document()


async def send(api: httpx.AsyncClient, method: str, path: str) -> httpx.Response:
    return await api.request(method, path, json=BODY if path == "/api/tasks" and method == "POST" else None)


def documented(answer: httpx.Response, method: str, path: str) -> None:
    """The answer has the form that the OpenAPI document gives to its status."""
    described = API["paths"][path][method.lower()]["responses"][str(answer.status_code)]
    schema = described["content"][answer.headers["content-type"]]["schema"]
    jsonschema_rs.validate(schema | {"components": API["components"]}, answer.json())
    for name, header in described.get("headers", {}).items():
        assert header["schema"] == {"type": "integer"}
        assert int(answer.headers[name]) >= 0


@pytest.mark.parametrize(("method", "path", "_"), REQUESTS)
async def test_a_closed_store_is_unavailable(
    store: SqlStore, settings: Settings, method: str, path: str, _: str
) -> None:
    async with client_of(store, settings) as api:
        await store.close()
        answer = await send(api, method, path)
    assert answer.status_code == 503
    assert int(answer.headers["retry-after"]) >= 1
    error = await error_of(answer)
    assert error["code"] == "UNAVAILABLE"
    assert "Idempotency-Key" in error["message"]  # it may have been stored all the same


@pytest.mark.parametrize(("method", "path", "name"), REQUESTS)
async def test_a_fault_tells_nothing_of_itself(
    store: SqlStore, settings: Settings, monkeypatch: pytest.MonkeyPatch, method: str, path: str, name: str
) -> None:
    async def failing(*_: Any, **__: Any) -> None:
        raise RuntimeError("secret words")

    monkeypatch.setattr(store, name, failing)
    async with client_of(store, settings) as api:
        answer = await send(api, method, path)
    assert answer.status_code == 500
    assert answer.json() == {"error": {"code": "INTERNAL", "message": "Internal server error", "details": {}}}


async def test_refusals_have_the_form_of_the_openapi_document(store: SqlStore, settings: Settings) -> None:
    limits = {"rate_limit_enabled": True, "rate_limit_submit": "1/hour", "rate_limit_status": "1/hour"}
    async with client_of(store, settings.model_copy(update=limits)) as api:
        for method in ("POST", "GET"):
            assert [(await send(api, method, "/api/tasks")).status_code for _ in range(2)] == [200, 429]
            documented(await send(api, method, "/api/tasks"), method, "/api/tasks")
    async with client_of(store, settings) as api:
        await store.close()
        for method, path in (("POST", "/api/tasks"), ("GET", "/api/workers"), ("GET", "/readyz")):
            answer = await send(api, method, path)
            assert answer.status_code == 503
            documented(answer, method, path)


async def test_a_fault_while_the_store_is_followed_is_told_and_ends_nothing(
    store: SqlStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    faults = iter([RuntimeError("a fault of ours")])
    watch = store.watch

    def failing(since: int | None = None) -> AsyncIterator[Sequence[Change]]:
        for fault in faults:
            raise fault
        return watch(since)

    monkeypatch.setattr(store, "watch", failing)
    monkeypatch.setattr(changes, "PAUSE", 0)
    followed = changes.Changes(store)
    heard: asyncio.Queue[Sequence[Change] | None] = asyncio.Queue()
    with followed.listening(heard.put_nowait):
        running = asyncio.ensure_future(followed.run())
        async with asyncio.timeout(PATIENCE):
            assert await heard.get() is None  # something may have been missed
            then = asyncio.ensure_future(heard.get())
            while not then.done():
                await store.create_task(SPEC)
        assert then.result()
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
    assert "RuntimeError: a fault of ours" in caplog.text
