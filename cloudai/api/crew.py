"""The workers as a moment ago: what explanations and metrics read, so that a thousand of these cost one read of the workers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from cloudai.api.explain import Waiting, after_the_last, explain_inactive, explain_no_controller, explain_wish
from cloudai.api.fresh import Fresh
from cloudai.api.lead import Lead
from cloudai.clock import now_ms
from cloudai.errors import CloudAIError
from cloudai.resources import Reason, Resources, Task, TaskStatus, Worker, WorkerState
from cloudai.settings import Settings
from cloudai.store.protocol import FacadeStore

FRESH = 0.25  # seconds
_UP_TO_A_CONTROLLER = (Reason.WAITING_FOR_CAPACITY, Reason.WORKER_INACTIVE)  # before anything else


class Crew:
    """Workers read at most FRESH seconds ago, and what keeps tasks from going on in view of them."""

    def __init__(self, store: FacadeStore, lead: Lead, settings: Settings) -> None:
        self._store = store
        self._lead = lead
        self._heartbeat_ms = settings.heartbeat_ms
        self._lease_seconds = math.inf if store.agents is None else settings.lease_seconds  # Kubernetes has its own
        self._now = 0
        self._workers = Fresh(self._read, FRESH)
        self._inactive = Fresh(self._read_inactive, FRESH)
        self._known: dict[Resources, Waiting] = {}

    async def workers(self) -> Sequence[WorkerState]:
        return await self._workers.get()

    async def why(self, tasks: Sequence[Task]) -> list[Waiting | None]:
        """Of each, why it waits when it is queued, or what is uncertain when it was given to a worker; None where nothing is,
        where the store itself says why, and where it does not answer: the tasks are known all the same.
        """
        nothing: list[Waiting | None] = [None] * len(tasks)
        if all(task.status.terminal for task in tasks):
            return nothing
        try:
            told = [await self._of(task) for task in tasks]
            problem = self._lead.known if self._store.agents is None else await self._lead.problem()
        except CloudAIError:
            return nothing
        if problem is None:
            return told
        return [
            explain_no_controller(task, problem) if self._is_up_to_a_controller(task, one) else one
            for task, one in zip(tasks, told, strict=True)
        ]

    def _is_up_to_a_controller(self, task: Task, one: Waiting | None) -> bool:
        if one is None and self._store.agents is None and task.reason is not None:
            return task.reason == Reason.WAITING_FOR_CAPACITY
        return not task.status.terminal and (one is None or one.reason in _UP_TO_A_CONTROLLER)

    async def _of(self, task: Task) -> Waiting | None:
        if task.status.terminal:
            return None
        if task.status is not TaskStatus.QUEUED:
            return await self._of_placed(task)
        return None if self._store.agents is None else await self._of_queued(task)

    async def _of_queued(self, task: Task) -> Waiting:
        workers = await self._workers.get()
        wish = task.spec.resources
        if (known := self._known.get(wish)) is None:
            known = self._known[wish] = explain_wish(wish, workers, self._now, self._heartbeat_ms)
        return Waiting(known.reason, after_the_last(task, known.message))

    async def _of_placed(self, task: Task) -> Waiting | None:
        inactive = (await self._inactive.get()).get(task.worker_id or "")
        return (
            None
            if inactive is None
            else explain_inactive(task, inactive, now_ms(), self._heartbeat_ms, self._lease_seconds)
        )

    async def _read(self) -> Sequence[WorkerState]:
        workers = await self._store.list_workers()
        self._known, self._now = {}, now_ms()
        return workers

    async def _read_inactive(self) -> Mapping[str, Worker]:
        """Without what runs hold, which costs more and matters to none that has its place."""
        agents, now = self._store.agents, now_ms()
        if agents is None:  # a node that only takes no more Pods is no worry to those it has
            nodes = [state.worker for state in await self._workers.get()]
            return {one.worker_id: one for one in nodes if not one.heard(now, self._heartbeat_ms)}
        workers = await agents.get_workers()
        return {name: one for name, one in workers.items() if not one.active(now, self._heartbeat_ms)}
