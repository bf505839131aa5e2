from __future__ import annotations

import asyncio

import httpx
import pytest

from cloudai.store.sql import SqlStore
from tests.api.conftest import Server, error_of, finish, join, place, start, submit, write_log

BYTES = b"first\nsecond \xff\x00 bytes\n"


@pytest.fixture
async def task_id(api: httpx.AsyncClient, store: SqlStore) -> str:
    await join(store)
    task_id = await submit(api)
    await start(store, task_id)
    await write_log(store, task_id, BYTES)
    return task_id


async def test_a_log_is_the_bytes_that_were_written(api: httpx.AsyncClient, task_id: str) -> None:
    answer = await api.get(f"/api/tasks/{task_id}/logs")
    assert (answer.status_code, answer.content) == (200, BYTES)
    assert answer.headers["content-type"].startswith("text/plain")
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert (answer.headers["x-log-offset"], answer.headers["x-log-end"]) == ("0", str(len(BYTES)))
    assert answer.headers["x-log-complete"] == "false"


@pytest.mark.parametrize(
    ("query", "part"),
    [
        ("offset=6", BYTES[6:]),
        ("limit=5", BYTES[:5]),
        ("offset=6&limit=6", BYTES[6:12]),
        ("offset=1000", b""),
        ("attempt=1", BYTES),
    ],
)
async def test_a_part_of_a_log(api: httpx.AsyncClient, task_id: str, query: str, part: bytes) -> None:
    answer = await api.get(f"/api/tasks/{task_id}/logs?{query}")
    assert (answer.status_code, answer.content) == (200, part)


@pytest.mark.parametrize("query", ["offset=-1", "limit=0", "follow=yes", "attempt=0", "from=1"])
async def test_an_odd_part_is_refused(api: httpx.AsyncClient, task_id: str, query: str) -> None:
    assert (await api.get(f"/api/tasks/{task_id}/logs?{query}")).status_code == 400


async def test_an_attempt_that_never_was_is_not_found(api: httpx.AsyncClient, task_id: str) -> None:
    answer = await api.get(f"/api/tasks/{task_id}/logs?attempt=2")
    assert answer.status_code == 404
    assert (await error_of(answer))["code"] == "ATTEMPT_NOT_FOUND"


async def test_a_long_log_comes_whole(api: httpx.AsyncClient, store: SqlStore, task_id: str) -> None:
    more = bytes(range(256)) * 4096
    for start_at in range(0, len(more), 131072):
        await write_log(store, task_id, more[start_at : start_at + 131072], len(BYTES) + start_at)
    assert (await api.get(f"/api/tasks/{task_id}/logs")).content == BYTES + more
    assert (await api.get(f"/api/tasks/{task_id}/logs?offset=7&limit=700000")).content == (BYTES + more)[7:700007]


async def test_logs_that_retention_removed_are_gone(api: httpx.AsyncClient, store: SqlStore, task_id: str) -> None:
    await finish(store, task_id)
    await store.delete_logs(2**52, 10)
    for query in ("", "?follow=true"):
        answer = await api.get(f"/api/tasks/{task_id}/logs{query}")
        assert answer.status_code == 410
        assert (await error_of(answer))["code"] == "LOGS_REMOVED"


async def test_a_follower_reads_to_the_end(server: Server, store: SqlStore) -> None:
    await join(store)
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{server.port}", timeout=30) as api:
        task_id = await submit(api)
        async with api.stream("GET", f"/api/tasks/{task_id}/logs?follow=true") as answer:
            pieces = answer.aiter_raw()
            await start(store, task_id)
            await write_log(store, task_id, b"one")
            assert await anext(pieces) == b"one"
            await write_log(store, task_id, b"two", 3)
            assert await anext(pieces) == b"two"
            await finish(store, task_id)
            assert [piece async for piece in pieces] == []


async def test_following_a_task_that_never_starts_ends_with_it(server: Server, store: SqlStore) -> None:
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{server.port}", timeout=30) as api:
        task_id = await submit(api)
        async with api.stream("GET", f"/api/tasks/{task_id}/logs?follow=true") as answer:
            await api.post(f"/api/tasks/{task_id}/cancel")
            assert await answer.aread() == b""


async def test_a_follower_that_leaves_is_let_go(server: Server, store: SqlStore) -> None:
    await join(store)
    before = asyncio.all_tasks()
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{server.port}", timeout=30) as api:
        task_id = await submit(api)
        await place(store, task_id)
        async with api.stream("GET", f"/api/tasks/{task_id}/logs?follow=true") as answer:
            assert answer.status_code == 200
    async with asyncio.timeout(30):
        while any("_Stream" in str(task.get_coro()) for task in asyncio.all_tasks() - before):  # noqa: ASYNC110
            await asyncio.sleep(0)
