"""Rate limits, who may call at all, and what may come before a request's body."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
import pytest
import redis
import websockets

from cloudai.api.clients import Clients
from cloudai.api.ratelimit import SWEPT, Memory, RateLimit, counter
from cloudai.cli import malformed
from cloudai.cli.malformed import MAX_HEAD
from cloudai.errors import CloudAIError
from cloudai.settings import Settings
from cloudai.store.sql import SqlStore
from tests.api.conftest import BODY, PATIENCE, client_of, error_of
from tests.test_client import SPEC, placed, served


def limited(tmp_path: Path, **fields: Any) -> Settings:
    return Settings(data_dir=tmp_path, **fields)


async def statuses(
    api: httpx.AsyncClient, count: int, method: str = "POST", headers: dict[str, str] | None = None
) -> list[int]:
    body = BODY if method == "POST" else None
    return [(await api.request(method, "/api/tasks", json=body, headers=headers)).status_code for _ in range(count)]


async def test_ten_submits_a_minute_by_default(store: SqlStore, tmp_path: Path) -> None:
    async with client_of(store, limited(tmp_path)) as api:
        assert await statuses(api, 11) == [200] * 10 + [429]
        answer = await api.post("/api/tasks", json=BODY)
        assert (await error_of(answer))["code"] == "RATE_LIMITED"
        assert 1 <= int(answer.headers["retry-after"]) <= 60
        assert (await api.get("/api/tasks")).json()["total"] == 10


async def test_sixty_status_queries_a_minute_by_default(store: SqlStore, tmp_path: Path) -> None:
    async with client_of(store, limited(tmp_path)) as api:
        paths = ("/api/tasks", "/api/workers", "/api/cluster/status", "/api/tasks/task-1")
        for turn in range(60):
            assert (await api.get(paths[turn % 4])).status_code in (200, 404)
        for path in paths:
            assert (await api.get(path)).status_code == 429


async def test_cancels_health_and_documents_are_not_limited(store: SqlStore, tmp_path: Path) -> None:
    async with client_of(store, limited(tmp_path, rate_limit_submit="1/day", rate_limit_status="1/day")) as api:
        await statuses(api, 2)
        await statuses(api, 2, "GET")
        for path in ("/healthz", "/readyz", "/metrics", "/openapi.json", "/docs"):
            assert [(await api.get(path)).status_code for _ in range(3)] == [200] * 3
        assert [(await api.post("/api/tasks/task-1/cancel")).status_code for _ in range(3)] == [404] * 3


async def test_each_address_has_its_own_count(store: SqlStore, tmp_path: Path) -> None:
    settings = limited(tmp_path, rate_limit_submit="1/hour", trusted_proxies="10.0.0.0/8")
    async with client_of(store, settings, "10.1.1.1") as api:
        for forwarded, expected in (
            ("1.2.3.4", 200),
            ("1.2.3.4", 429),
            ("1.2.3.5", 200),
            ("9.9.9.9, 1.2.3.5", 429),  # what a client wrote itself does not count
            ("1.2.3.5, 10.2.2.2", 429),  # a second trusted proxy
            ("2001:db8:1:2:3::4", 200),
            ("2001:db8:1:2:ffff::5", 429),  # the same /64
            ("2001:db8:1:3::4", 200),
            ("::ffff:1.2.3.4", 429),
        ):
            assert await statuses(api, 1, headers={"X-Forwarded-For": forwarded}) == [expected], forwarded


async def test_forwarded_addresses_of_strangers_are_not_believed(store: SqlStore, tmp_path: Path) -> None:
    async with client_of(store, limited(tmp_path, rate_limit_submit="1/hour"), "10.1.1.1") as api:
        assert await statuses(api, 1, headers={"X-Forwarded-For": "1.2.3.4"}) == [200]
        assert await statuses(api, 1, headers={"X-Forwarded-For": "1.2.3.5"}) == [429]


async def test_two_servers_count_together_in_redis(store: SqlStore, tmp_path: Path, redis_url: str) -> None:
    settings = limited(tmp_path, rate_limit_submit="3/hour", rate_limit_storage=redis_url)
    async with client_of(store, settings) as one, client_of(store, settings) as other:
        assert await statuses(one, 2) == [200, 200]
        assert await statuses(other, 2) == [200, 429]


async def test_without_its_redis_requests_pass_and_the_log_says_so_once(
    store: SqlStore, tmp_path: Path, redis_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    settings = limited(tmp_path, rate_limit_submit="1/hour", rate_limit_storage=redis_url)
    async with client_of(store, settings) as api:
        with redis.Redis.from_url(redis_url) as stopping:
            stopping.shutdown(nosave=True)
        assert await statuses(api, 3) == [200] * 3
    assert caplog.text.count("requests pass uncounted") == 1


async def test_a_redis_that_hangs_holds_up_one_request_only(
    tmp_path: Path, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = RateLimit(limited(tmp_path, rate_limit_submit="1/hour", rate_limit_storage=redis_url), Clients(""))
    asked = []
    hit = limit._limiter.hit

    async def counted(*what: Any) -> bool:
        asked.append(what)
        return await hit(*what)

    monkeypatch.setattr(limit._limiter, "hit", counted)
    request = {"method": "POST", "path": "/api/tasks", "client": ("10.1.1.1", 1), "headers": []}
    with redis.Redis.from_url(redis_url) as server:
        server.execute_command("CLIENT PAUSE 60000 WRITE")
        for _ in range(5):
            await limit.check(request)
        assert len(asked) == 1
        server.execute_command("CLIENT UNPAUSE")
    monkeypatch.setattr(limit, "_ask_at", 0.0)
    await limit.check(request)
    with pytest.raises(CloudAIError, match="Too many"):
        await limit.check(request)
    await limit.close()


async def test_counts_that_have_run_out_are_forgotten_and_no_request_goes_over_all() -> None:
    counts = counter("memory://")
    assert isinstance(counts, Memory)
    assert await counts.incr("stays", 3600) == 1
    for number in range(3 * SWEPT):
        assert await counts.incr(str(number), 0) == 1
    assert await counts.incr("stays", 3600) == 2
    assert "stays" in counts.expirations
    assert len(counts.expirations) == len(counts.storage) < SWEPT
    assert counts.timer is None


# ---- hosts and origins


@pytest.mark.parametrize("host", ["localhost", "localhost:8080", "127.0.0.1:8080", "[::1]:8080", "LOCALHOST"])
async def test_a_loopback_server_answers_to_loopback_names(api: httpx.AsyncClient, host: str) -> None:
    assert (await api.get("/healthz", headers={"Host": host})).status_code == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "localhost.evil.example", "127.0.0.1.evil.example", "", "[", "10.0.0.1"]
)
async def test_a_loopback_server_refuses_other_names(api: httpx.AsyncClient, host: str) -> None:
    answer = await api.get("/healthz", headers={"Host": host})
    assert answer.status_code == 403
    assert (await error_of(answer))["code"] == "FORBIDDEN_HOST"


@pytest.mark.parametrize(
    "fields", [{"allowed_hosts": "cloudai.example.org"}, {"allowed_hosts": "*"}, {"host": "0.0.0.0"}], ids=str
)
async def test_further_names_may_be_allowed(store: SqlStore, tmp_path: Path, fields: dict[str, str]) -> None:
    async with client_of(store, limited(tmp_path, **fields)) as api:
        assert (await api.get("/healthz", headers={"Host": "cloudai.example.org"})).status_code == 200


@pytest.mark.parametrize(
    "origin", ["http://evil.example", "null", "http://localhost:3000", "https://localhost.evil.example"]
)
async def test_a_page_of_another_site_may_not_cancel(api: httpx.AsyncClient, origin: str) -> None:
    answer = await api.post("/api/tasks/task-1/cancel", headers={"Origin": origin})
    assert answer.status_code == 403
    assert (await error_of(answer))["code"] == "FORBIDDEN_ORIGIN"


async def test_a_page_of_an_allowed_name_may_whatever_the_server_is_bound_to(store: SqlStore, tmp_path: Path) -> None:
    async with client_of(store, limited(tmp_path, host="0.0.0.0", allowed_hosts="ours.example")) as api:
        for origin, status in (("https://ours.example", 200), ("https://not.ours.example", 403)):
            assert (await api.get("/api/tasks", headers={"Origin": origin})).status_code == status


async def test_a_page_of_this_server_may(api: httpx.AsyncClient) -> None:
    assert (await api.get("/api/tasks", headers={"Origin": "http://localhost"})).status_code == 200


# ---- what comes before a body

GET = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n"
Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def connected(url: str) -> Connection:
    return await asyncio.open_connection(*url.removeprefix("http://").split(":"))


async def status(reader: asyncio.StreamReader) -> int:
    """Of the next answer, which is read whole."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
    await reader.readexactly(int(head.partition("content-length: ")[2].partition("\r\n")[0]))
    return int(head.split()[1])


async def test_a_head_has_at_most_64_kib(tmp_path: Path) -> None:
    room = MAX_HEAD - len(GET + b"X: \r\n\r\n")
    async with served(tmp_path) as (_, url), asyncio.timeout(PATIENCE):
        reader, writer = await connected(url)
        for cut in (MAX_HEAD, 1000, 0):
            head = GET + b"X: " + b"a" * room + b"\r\n\r\n"
            writer.write(head[:cut])
            await writer.drain()
            writer.write(head[cut:])
            assert await status(reader) == 200
        writer.write(GET + b"X: a" + b"a" * room + b"\r\n\r\n")
        answer, _, body = (await reader.read()).partition(b"\r\n\r\n")
        writer.close()
    assert answer.startswith(b"HTTP/1.1 400 ")
    error = json.loads(body)["error"]
    assert (error["code"], error["details"]["field"]) == ("INVALID_REQUEST", "request")
    assert "65536 bytes before its body" in error["details"]["reason"]


async def test_a_head_that_never_ends_is_ended(tmp_path: Path) -> None:
    async with served(tmp_path) as (_, url), asyncio.timeout(PATIENCE):
        reader, writer = await connected(url)
        try:
            writer.write(GET + b"X: " + b"a" * 2**20)
            await writer.drain()
            assert (await reader.read()).startswith(b"HTTP/1.1 400 ")
        except ConnectionError:
            pass  # it was ended before all of it had come
        writer.close()


async def test_a_long_body_is_no_part_of_the_next_head(tmp_path: Path) -> None:
    body = b" " * 10 * MAX_HEAD + json.dumps(BODY).encode()
    head = "POST /api/tasks HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    async with served(tmp_path) as (_, url), asyncio.timeout(PATIENCE):
        reader, writer = await connected(url)
        writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body + GET)
        assert await status(reader) == 200
        writer.write(b"\r\n")
        assert await status(reader) == 200
        writer.close()


async def test_a_connection_without_a_whole_head_is_ended_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(malformed, "HEAD_SECONDS", 1.0)
    async with served(tmp_path) as (store, url), asyncio.timeout(PATIENCE):
        task = await store.create_task(SPEC)
        await placed(store, task)
        reader, writer = await connected(url)
        writer.write(GET + b"\r\n")
        assert await status(reader) == 200
        async with (
            httpx.AsyncClient(base_url=url) as api,
            api.stream("GET", f"/api/tasks/{task.task_id}/logs?follow=true") as log,
            websockets.connect(f"{url.replace('http', 'ws')}/ws/telemetry", proxy=None) as telemetry,
        ):
            # Begun after the others: what ends these would have ended those.
            (silent, nothing), (cut, unfinished) = await connected(url), await connected(url)
            unfinished.write(GET)
            assert (await silent.read(), await cut.read()) == (b"", b"")
            nothing.close()
            unfinished.close()
            await store.append_log(f"{task.task_id}-1", 0, b"one")
            assert await anext(log.aiter_raw()) == b"one"
            await telemetry.ping()
            writer.write(GET + b"\r\n")
            assert await status(reader) == 200
            writer.close()
