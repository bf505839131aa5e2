"""How many submits and status queries one client address may send a minute.

Status queries are the GETs below /api/; a cancel is never limited, nor are health, metrics and documents. Counts live in
memory, or in a Redis that several servers share. When that Redis does not answer, requests pass uncounted, and for some
seconds without asking it: an outage of the counter must not become an outage of the service.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from typing import Any

from limits import RateLimitItem, parse
from limits.aio.storage import MemoryStorage, RedisStorage, Storage
from limits.aio.strategies import FixedWindowRateLimiter
from limits.errors import ConfigurationError
from limits.storage import storage_from_string
from starlette.types import Scope

from cloudai.api.clients import Clients
from cloudai.errors import CloudAIError, Code
from cloudai.settings import Settings, SettingsError

logger = logging.getLogger(__name__)
ANSWER = 1.0  # seconds the counter may take
AGAIN = 5.0  # seconds until one that took longer is asked again
SWEPT = 1000  # further addresses, until memory is cleared of counts that have run out


class RateLimit:
    """A window begins with an address's first request and lasts as long as the limit says."""

    def __init__(self, settings: Settings, clients: Clients) -> None:
        self._clients = clients
        self._submit = parse(settings.rate_limit_submit)
        self._status = parse(settings.rate_limit_status)
        self._storage = counter(settings.rate_limit_storage)
        self._limiter = FixedWindowRateLimiter(self._storage)
        self._trouble = False
        self._ask_at = 0.0  # by the monotonic clock

    async def check(self, scope: Scope) -> None:
        """Count a request. Raises RATE_LIMITED when it is one too many."""
        if (kind := self._kind(scope)) is None:
            return
        limit, what = kind
        wait = await self._wait(limit, what, self._clients.address(scope))
        if wait:
            raise CloudAIError(
                Code.RATE_LIMITED,
                f"Too many {what} from this address; try again in {wait} s",
                {"limit": f"{limit.amount} per {limit.GRANULARITY.name}", "retry_after_seconds": wait},
                retry_after=wait,
            )

    @property
    def redis(self) -> Any | None:
        """The client of the Redis that counts, where one does."""
        if not isinstance(self._storage, RedisStorage):
            return None
        bridge: Any = self._storage.bridge
        return bridge.storage

    async def close(self) -> None:
        if self.redis is not None:
            await self.redis.aclose()

    def _kind(self, scope: Scope) -> tuple[RateLimitItem, str] | None:
        path: str = scope["path"]
        if scope["method"] == "POST":
            return (self._submit, "task submissions") if path == "/api/tasks" else None
        if scope["method"] in ("GET", "HEAD") and path.startswith("/api/"):
            return self._status, "status queries"
        return None

    async def _wait(self, limit: RateLimitItem, what: str, address: str) -> int:
        """Seconds to wait; 0 when the request may pass."""
        if time.monotonic() < self._ask_at:
            return 0
        try:
            async with asyncio.timeout(ANSWER):
                passes = await self._limiter.hit(limit, what, address)
                reset = 0.0 if passes else (await self._limiter.get_window_stats(limit, what, address)).reset_time
        except Exception as error:  # noqa: BLE001 - whatever the counter's client raises
            if not self._trouble:
                logger.warning("requests pass uncounted, the rate limit storage does not answer: %r", error)
            self._trouble = True
            self._ask_at = time.monotonic() + AGAIN
            return 0
        if self._trouble:
            logger.warning("the rate limit storage answers again")
            self._trouble = False
        return 0 if passes else max(math.ceil(reset - time.time()), 1)


class Memory(MemoryStorage):
    """The library's, which goes over the counts of all addresses at each request; this one does at each SWEPT further ones."""

    STORAGE_SCHEME = ["async+memory"]  # noqa: RUF012 - by which the library finds it, in its own one's place

    async def incr(self, key: str, expiry: float, amount: int = 1) -> int:
        count = await self.get(key) + amount  # of a window that is over there is none
        self.storage[key] = count
        if key not in self.expirations:
            self.expirations[key] = time.time() + expiry
            if len(self.expirations) % SWEPT == 0:
                for known in list(self.expirations):
                    await self.get(known)
        return count


def counter(url: str) -> Storage:
    """The counts' storage. Raises SettingsError for a URL of no known kind, or a library that is missing."""
    options: dict[str, Any] = (
        {} if url.startswith("memory") else {"implementation": "redispy", "socket_timeout": ANSWER}
    )
    try:
        storage = storage_from_string(f"async+{url}", **options)
    except (ConfigurationError, ValueError) as error:
        raise SettingsError(f"CLOUDAI_RATE_LIMIT_STORAGE={url}: {error}") from error
    assert isinstance(storage, Storage)
    return storage
