"""One answer for all who ask within a moment: what is asked of the store does not grow with how many ask."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Fresh(Generic[T]):
    """What `read` gave at most `seconds` ago."""

    def __init__(self, read: Callable[[], Awaitable[T]], seconds: float) -> None:
        self._read = read
        self._seconds = seconds
        self._read_at = float("-inf")
        self._reading: asyncio.Task[T] | None = None
        self._last: T

    async def get(self) -> T:
        """Those who ask while it is read wait for the same answer, or the same error."""
        if time.monotonic() - self._read_at > self._seconds:
            if self._reading is None:
                self._reading = asyncio.ensure_future(self._renewed())
                self._reading.add_done_callback(self._done)
            return await asyncio.shield(self._reading)
        return self._last

    async def _renewed(self) -> T:
        self._last = await self._read()
        self._read_at = time.monotonic()
        return self._last

    def _done(self, reading: asyncio.Task[T]) -> None:
        self._reading = None
        if not reading.cancelled():
            reading.exception()  # each asker raises it; where all have left nobody needs to hear of it
