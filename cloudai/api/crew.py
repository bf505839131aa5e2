"""The workers as a moment ago: what explanations and metrics read, so that a thousand of these cost one read of the workers."""

from __future__ import annotations

import time
from collections.abc import Sequence

from cloudai.api.explain import Waiting, explain, explain_inactive, explain_no_controller, explain_wish
from cloudai.api.fresh import Fresh
from cloudai.api.lead import Lead
from cloudai.resources import Reason, Resources, Task, TaskStatus, Worker, WorkerState
from cloudai.settings import Settings
from cloudai.store.protocol import FacadeStore

FRESH = 0.25  # seconds


class Crew:
    """Workers read at most FRESH seconds ago, and what keeps tasks from going on in view of them."""

    def __init__(self, store: FacadeStore, lead: Lead, settings: Settings) -> None:
        self._store = store
        self._lead = lead
        self._heartbeat_ms = settings.heartbeat_ms
        self._lease_seconds = settings.lease_seconds
        self._now = 0
        self._workers = Fresh(self._read, FRESH)
        self._known: dict[Resources, Waiting] = {}
        self._inactive: dict[str, Worker] = {}

    async def workers(self) -> Sequence[WorkerState]:
        return await self._workers.get()

    async def why(self, task: Task) -> Waiting | None:
        """Why a queued task waits, or what is uncertain of one that was given to a worker; None where nothing is, and where
        the store itself says why.
        """
        if task.status.terminal or self._store.agents is None:
            return None
        waiting = await self._of_workers(task)
        if waiting is None or waiting.reason is Reason.WAITING_FOR_CAPACITY:
            problem = await self._lead.problem()
            return waiting if problem is None else explain_no_controller(task, problem)
        return waiting

    async def _of_workers(self, task: Task) -> Waiting | None:
        workers = await self._workers.get()
        if task.status is not TaskStatus.QUEUED:
            inactive = self._inactive.get(task.worker_id or "")
            return explain_inactive(task, inactive, self._now, self._lease_seconds) if inactive else None
        if task.message:
            return explain(task, workers, self._now, self._heartbeat_ms)
        wish = task.spec.resources
        if (known := self._known.get(wish)) is None:
            known = self._known[wish] = explain_wish(wish, workers, self._now, self._heartbeat_ms)
        return known

    async def _read(self) -> Sequence[WorkerState]:
        workers = await self._store.list_workers()
        self._known, self._now = {}, time.time_ns() // 1_000_000
        everybody = (state.worker for state in workers)
        self._inactive = {one.worker_id: one for one in everybody if not one.active(self._now, self._heartbeat_ms)}
        return workers
