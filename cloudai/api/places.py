"""How many telemetry connections or followed logs one client address holds: here, and where a Redis counts, in all servers.

A place in Redis is a lease: renewed while its connection is open, over by itself a while after its server died. When Redis
does not answer, only this process's connections count.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import uuid
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

from starlette.types import Scope

from cloudai.api.clients import Clients
from cloudai.api.ratelimit import ANSWER
from cloudai.errors import CloudAIError, Code

logger = logging.getLogger(__name__)
LEASE = 60  # seconds
RENEW = 20.0
KEY = "cloudai/{name}/{address}"  # a sorted set of places by the second at which each is over, by Redis's clock
_TAKE = """
local now = tonumber(redis.call('TIME')[1])
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now)
if ARGV[2] ~= '' and redis.call('ZCARD', KEYS[1]) >= tonumber(ARGV[2]) then return 0 end
redis.call('ZADD', KEYS[1], now + ARGV[3], ARGV[1])
redis.call('EXPIRE', KEYS[1], ARGV[3])
return 1
"""


class Places:
    """`name` is the key of what is counted, `what` its plural in words. `redis`: an asynchronous client of it."""

    def __init__(self, name: str, what: str, limit: int, clients: Clients, redis: Any | None) -> None:
        self._name = name
        self._what = what
        self._limit = limit
        self._clients = clients
        self._redis = redis
        self._here: Counter[str] = Counter()

    @contextlib.asynccontextmanager
    async def taken(self, scope: Scope) -> AsyncIterator[None]:
        """Hold a place for the caller's address until the block ends. Raises RATE_LIMITED where it has none left."""
        address = self._clients.address(scope)
        if self._here[address] >= self._limit:
            raise self._none_left()
        self._here[address] += 1
        try:
            async with contextlib.AsyncExitStack() as stack:
                if self._redis is not None:
                    await stack.enter_async_context(
                        self._everywhere(self._redis, KEY.format(name=self._name, address=address))
                    )
                yield
        finally:
            self._here[address] -= 1
            if not self._here[address]:
                del self._here[address]

    @contextlib.asynccontextmanager
    async def _everywhere(self, redis: Any, key: str) -> AsyncIterator[None]:
        place = uuid.uuid4().hex
        if await _asked(redis.eval(_TAKE, 1, key, place, self._limit, LEASE)) == 0:
            raise self._none_left()
        renewing = asyncio.ensure_future(_renew(redis, key, place))
        try:
            yield
        finally:
            renewing.cancel()
            await asyncio.gather(renewing, return_exceptions=True)
            await _asked(redis.zrem(key, place))

    def _none_left(self) -> CloudAIError:
        text = f"An address may hold {self._limit} {self._what}; close one first"
        return CloudAIError(Code.RATE_LIMITED, text, {"limit": self._limit}, retry_after=1)


async def _renew(redis: Any, key: str, place: str) -> None:
    """Whatever the limit says: a connection that is open counts, also when its lease was over before Redis came back."""
    while True:
        await asyncio.sleep(RENEW)
        await _asked(redis.eval(_TAKE, 1, key, place, "", LEASE))


async def _asked(answer: Any) -> Any:
    """Redis's answer, None where there is none."""
    try:
        async with asyncio.timeout(ANSWER):
            return await answer
    except Exception as error:  # noqa: BLE001 - whatever its client raises
        logger.warning("a connection is not counted in the rate limit storage, which does not answer: %r", error)
        return None
