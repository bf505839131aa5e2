"""Logs, over every store; an odd query is refused before a store is asked, so that is tried over SQLite only."""

from __future__ import annotations

import asyncio
from pathlib import Path

import httpx
import pytest

from cloudai.api import app
from cloudai.settings import Settings
from cloudai.store.sql import SqlStore
from tests.api.conftest import OBEDIENT, PATIENCE, TOO_LARGE, Facade, client_of, error_of, serving
from tests.store.values import SPEC, WORKER, placed

LINES = b"first\nsecond \xff\x00 bytes\n"
MANY = bytes(range(256)) * 64 + b"\n"


async def test_a_log_is_the_bytes_that_were_written(shared_facade: Facade) -> None:
    api, task_id = shared_facade.http, await shared_facade.running()
    await shared_facade.world.write(task_id, LINES)
    answer = await api.get(f"/api/tasks/{task_id}/logs")
    assert (answer.status_code, answer.content) == (200, LINES)
    assert answer.headers["content-type"].startswith("text/plain")
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert (answer.headers["x-log-offset"], answer.headers["x-log-end"]) == ("0", str(len(LINES)))
    assert answer.headers["x-log-complete"] == "false"

    parts = [("offset=6", LINES[6:]), ("limit=5", LINES[:5]), ("offset=6&limit=6", LINES[6:12]), ("offset=1000", b"")]
    for query, part in [*parts, ("attempt=1", LINES)]:
        answer = await api.get(f"/api/tasks/{task_id}/logs?{query}")
        assert (answer.status_code, answer.content) == (200, part), query

    await shared_facade.world.end(task_id)
    answer = await api.get(f"/api/tasks/{task_id}/logs")
    assert (answer.content, answer.headers["x-log-complete"]) == (LINES, "true")


async def test_an_attempt_that_never_was_is_not_found(shared_facade: Facade) -> None:
    for task_id in (await shared_facade.submit(**TOO_LARGE), await shared_facade.running()):
        answer = await shared_facade.http.get(f"/api/tasks/{task_id}/logs?attempt=2")
        assert answer.status_code == 404
        assert (await error_of(answer))["code"] == "ATTEMPT_NOT_FOUND"


async def test_a_long_log_comes_whole(shared_facade: Facade) -> None:
    task_id = await shared_facade.running()
    await shared_facade.world.write(task_id, LINES)
    await shared_facade.world.write(task_id, MANY, 64)
    everything = LINES + MANY * 64
    url = f"/api/tasks/{task_id}/logs"
    assert (await shared_facade.http.get(url)).content == everything
    assert (await shared_facade.http.get(f"{url}?offset=7&limit=700000")).content == everything[7:700007]
    await shared_facade.world.end(task_id)
    assert (await shared_facade.http.get(url)).content == everything


async def test_logs_that_are_kept_no_longer_are_gone(shared_facade: Facade) -> None:
    task_id = await shared_facade.running()
    await shared_facade.world.write(task_id, LINES)
    await shared_facade.world.end(task_id)
    await shared_facade.world.remove_log(task_id)
    for query in ("", "?follow=true"):
        answer = await shared_facade.http.get(f"/api/tasks/{task_id}/logs{query}")
        assert answer.status_code == 410
        assert (await error_of(answer))["code"] == "LOGS_REMOVED"


async def test_a_follower_reads_to_the_end(shared_facade: Facade) -> None:
    world, task_id = shared_facade.world, await shared_facade.submit(**OBEDIENT)
    async with shared_facade.http.stream("GET", f"/api/tasks/{task_id}/logs?follow=true") as answer:
        lines = answer.aiter_lines()
        await world.run(task_id)
        for line in ("one", "two"):
            await world.write(task_id, f"{line}\n".encode())
            assert await anext(lines) == line
        await world.end(task_id)
        assert [line async for line in lines] == []


async def test_following_a_task_that_never_starts_ends_with_it(shared_facade: Facade) -> None:
    task_id = await shared_facade.submit(**TOO_LARGE)
    async with shared_facade.http.stream("GET", f"/api/tasks/{task_id}/logs?follow=true") as answer:
        told = [answer.headers[f"x-log-{name}"] for name in ("offset", "end", "complete")]
        assert told == ["0", "0", "false"]  # as of every log
        await shared_facade.http.post(f"/api/tasks/{task_id}/cancel")
        assert await answer.aread() == b""


async def test_a_follower_that_leaves_is_let_go(shared_facade: Facade) -> None:
    before = asyncio.all_tasks()

    def sending() -> bool:
        return any("_Stream._send" in str(task.get_coro()) for task in asyncio.all_tasks() - before)

    task_id = await shared_facade.submit(**OBEDIENT)
    await shared_facade.world.place(task_id)
    async with shared_facade.http.stream("GET", f"/api/tasks/{task_id}/logs?follow=true") as answer:
        assert answer.status_code == 200
        assert sending()
    async with asyncio.timeout(30):
        while sending():  # noqa: ASYNC110
            await asyncio.sleep(0)


async def test_a_followed_log_breaks_off_when_the_api_stops_and_does_not_read_as_whole(
    store: SqlStore, settings: Settings
) -> None:
    await store.register_worker(WORKER)
    for task in (await store.create_task(SPEC), (await placed(store))[0]):
        async with (
            serving(store, settings) as server,
            httpx.AsyncClient(base_url=f"http://127.0.0.1:{server.port}", timeout=PATIENCE) as api,
            api.stream("GET", f"/api/tasks/{task.task_id}/logs?follow=true") as answer,
        ):
            assert isinstance(server.config.app, app.Facade)
            server.config.app.end_waits()
            with pytest.raises(httpx.RemoteProtocolError, match="incomplete"):
                await answer.aread()


@pytest.mark.parametrize("query", ["offset=-1", "limit=0", "follow=yes", "attempt=0", "from=1"])
async def test_an_odd_part_is_refused(api: httpx.AsyncClient, query: str) -> None:
    assert (await api.get(f"/api/tasks/task-1/logs?{query}")).status_code == 400


async def test_an_address_follows_so_many_logs_at_a_time(
    store: SqlStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app, "FOLLOWED", 2)
    url = f"/api/tasks/{(await store.create_task(SPEC)).task_id}/logs?follow=true"
    async with (
        serving(store, Settings(data_dir=tmp_path, rate_limit_status="9999/second")) as server,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{server.port}", timeout=PATIENCE) as api,
    ):
        async with api.stream("GET", url) as one:
            assert one.status_code == 200
            async with api.stream("GET", url):
                answer = await api.get(url)
                assert (answer.status_code, answer.headers["retry-after"]) == (429, "1")
                assert "2 followed logs" in (await error_of(answer))["message"]
                assert (await api.get("/api/tasks/task-1/logs")).status_code == 404
        async with asyncio.timeout(PATIENCE):
            while True:  # the server hears of the closed ones in its own time
                async with api.stream("GET", url) as again:
                    if again.status_code == 200:
                        break


async def test_a_log_that_cannot_be_followed_takes_no_place(
    store: SqlStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app, "FOLLOWED", 1)
    async with client_of(store, Settings(data_dir=tmp_path)) as api:
        for _ in range(3):
            assert (await api.get("/api/tasks/task-1/logs?follow=true")).status_code == 404
