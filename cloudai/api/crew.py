"""The workers as a moment ago: what explanations and metrics read, so that a thousand of these cost one read of the workers."""

from __future__ import annotations

import time
from collections.abc import Sequence

from cloudai.api.explain import Waiting, explain, explain_wish
from cloudai.api.fresh import Fresh
from cloudai.resources import Resources, Task, TaskStatus, WorkerState
from cloudai.store.protocol import FacadeStore

FRESH = 0.25  # seconds


class Crew:
    """Workers read at most FRESH seconds ago, and why tasks are queued in view of them."""

    def __init__(self, store: FacadeStore, heartbeat_ms: int) -> None:
        self._store = store
        self._heartbeat_ms = heartbeat_ms
        self._now = 0
        self._workers = Fresh(self._read, FRESH)
        self._known: dict[Resources, Waiting] = {}

    async def workers(self) -> Sequence[WorkerState]:
        return await self._workers.get()

    async def why(self, task: Task) -> Waiting | None:
        """Why a queued task waits; None for any other, and where the store itself says why."""
        if task.status is not TaskStatus.QUEUED or self._store.agents is None:
            return None
        workers = await self._workers.get()
        if task.message:
            return explain(task, workers, self._now, self._heartbeat_ms)
        wish = task.spec.resources
        if (known := self._known.get(wish)) is None:
            known = self._known[wish] = explain_wish(wish, workers, self._now, self._heartbeat_ms)
        return known

    async def _read(self) -> Sequence[WorkerState]:
        workers = await self._store.list_workers()
        self._known, self._now = {}, time.time_ns() // 1_000_000
        return workers
