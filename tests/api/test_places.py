"""Telemetry connections of one address, counted over several servers by a real Redis."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import redis
import websockets
from websockets.asyncio.client import ClientConnection

from cloudai.api import places
from cloudai.settings import Settings
from cloudai.store.sql import SqlStore
from tests.api.conftest import PATIENCE, Server, serving

KEY = places.KEY.format(name="telemetry", address="127.0.0.1")


@pytest.fixture
def counts(redis_url: str) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(redis_url) as client:
        yield client


@pytest.fixture
async def servers(store: SqlStore, tmp_path: Path, redis_url: str) -> AsyncIterator[list[Server]]:
    """Two, of which an address may hold two connections."""
    settings = Settings(data_dir=tmp_path, rate_limit_websockets=2, rate_limit_storage=redis_url)
    async with serving(store, settings) as one, serving(store, settings) as other:
        yield [one, other]


def connection(server: Server) -> websockets.connect:
    return websockets.connect(f"ws://127.0.0.1:{server.port}/ws/telemetry", proxy=None)


async def refused(server: Server) -> None:
    with pytest.raises(websockets.InvalidStatus) as refusal:
        await connection(server)
    assert refusal.value.response.status_code == 429


async def opened(server: Server) -> ClientConnection:
    """A connection, as soon as there is a place for it."""
    async with asyncio.timeout(PATIENCE):
        while True:
            with contextlib.suppress(websockets.InvalidStatus):
                return await connection(server)


async def test_two_servers_count_connections_together(servers: list[Server], counts: redis.Redis) -> None:
    one, other = servers
    async with connection(one):
        async with connection(other):
            for server in servers:
                await refused(server)
            assert counts.zcard(KEY) == 2
        await (await opened(one)).close()


async def test_a_place_whose_server_died_is_free_when_its_lease_is_over(
    servers: list[Server], counts: redis.Redis
) -> None:
    seconds, _ = counts.time()
    counts.zadd(KEY, {"a": seconds + 1000, "b": seconds + 1000})
    await refused(servers[0])
    counts.zadd(KEY, {"b": seconds - 1})
    async with connection(servers[0]):
        assert counts.zscore(KEY, "b") is None
        assert 0 < counts.ttl(KEY) <= places.LEASE
        await refused(servers[1])


async def test_the_place_of_an_open_connection_is_renewed(
    servers: list[Server], counts: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(places, "RENEW", 0.01)
    async with connection(servers[0]), asyncio.timeout(PATIENCE):
        (place,) = counts.zrange(KEY, 0, -1)
        counts.flushall()  # as a Redis that was started anew
        while counts.zrange(KEY, 0, -1) != [place]:  # noqa: ASYNC110 - Redis tells nobody
            await asyncio.sleep(0)


async def test_without_its_redis_each_server_counts_by_itself(
    servers: list[Server], counts: redis.Redis, caplog: pytest.LogCaptureFixture
) -> None:
    counts.shutdown(nosave=True)
    one, other = servers
    async with connection(one), connection(one), connection(other), connection(other):
        for server in servers:
            await refused(server)
    assert "not counted" in caplog.text
