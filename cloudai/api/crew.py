"""The workers as a moment ago: what explanations read, so that a thousand reads of queued tasks cost one of the workers."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

from cloudai.api.explain import Waiting, explain, explain_wish
from cloudai.resources import Resources, Task, TaskStatus, WorkerState
from cloudai.store.protocol import FacadeStore

FRESH = 0.25  # seconds


class Crew:
    """Explains queued tasks from workers read at most FRESH seconds ago."""

    def __init__(self, store: FacadeStore, heartbeat_ms: int) -> None:
        self._store = store
        self._heartbeat_ms = heartbeat_ms
        self._read_at = float("-inf")
        self._now = 0
        self._workers: Sequence[WorkerState] = ()
        self._known: dict[Resources, Waiting] = {}
        self._reading: asyncio.Task[None] | None = None

    async def why(self, task: Task) -> Waiting | None:
        """Why a queued task waits; None for any other, and where the store itself says why."""
        if task.status is not TaskStatus.QUEUED or self._store.agents is None:
            return None
        if time.monotonic() - self._read_at > FRESH:
            await self._fresh()
        if task.message:
            return explain(task, self._workers, self._now, self._heartbeat_ms)
        wish = task.spec.resources
        if (known := self._known.get(wish)) is None:
            known = self._known[wish] = explain_wish(wish, self._workers, self._now, self._heartbeat_ms)
        return known

    async def _fresh(self) -> None:
        """Those who ask while the workers are read wait for the same answer, or the same error."""
        if self._reading is None:
            self._reading = asyncio.ensure_future(self._read())
            self._reading.add_done_callback(self._done)
        await asyncio.shield(self._reading)

    def _done(self, reading: asyncio.Task[None]) -> None:
        self._reading = None
        if not reading.cancelled():
            reading.exception()  # each asker raises it; where all have left nobody needs to hear of it

    async def _read(self) -> None:
        workers = await self._store.list_workers()
        self._workers, self._known = workers, {}
        self._now, self._read_at = time.time_ns() // 1_000_000, time.monotonic()
