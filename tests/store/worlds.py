"""What lies behind a TaskStore in the tests of what every TaskStore promises: how tasks get placed, speak and end there."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Protocol

from cloudai.resources import Resources, Run, Task, TaskSpec, TaskStatus
from cloudai.settings import Settings
from cloudai.store.kube.store import KubernetesStore, open_kubernetes
from cloudai.store.protocol import FacadeStore
from cloudai.store.sql import SqlStore
from tests.cluster.images import SHELL
from tests.kube.kube import Operating, Place
from tests.store.values import SPEC, WORKER, finished, placed

MIB = 1024 * 1024
PATIENCE = 90.0


class World(Protocol):
    """`waiting`: what a task asks for that stays queued."""

    @property
    def store(self) -> FacadeStore: ...

    waiting: TaskSpec

    async def begin(self) -> None:
        """From now on tasks are placed where there is room, and cancellations are carried out."""
        ...

    async def placed(self) -> Task:
        """A task that lives."""
        ...

    async def says(self, task: Task) -> None:
        """That task writes the line `one two`."""
        ...

    async def finished(self) -> Task:
        """A task that completed, having written `done`."""
        ...

    async def worker(self) -> str:
        """The one that tasks are placed on."""
        ...


class Sql:
    """A database, with the test in the place of controller and agents."""

    waiting = SPEC

    def __init__(self, store: SqlStore) -> None:
        self.store = store
        self._runs: dict[str, Run] = {}

    async def begin(self) -> None: ...

    async def placed(self) -> Task:
        task, run = await placed(self.store)
        self._runs[task.task_id] = run
        return task

    async def says(self, task: Task) -> None:
        await self.store.append_log(self._runs[task.task_id].run_id, 0, b"one two\n")

    async def finished(self) -> Task:
        return await finished(self.store)

    async def worker(self) -> str:
        await self.store.register_worker(WORKER)
        return WORKER.worker_id


class OnKubernetes:
    """A namespace of a real cluster; its operator starts when it is needed."""

    waiting = replace(SPEC, image=SHELL, resources=Resources(100_000_000, 64 * MIB, 0, 0))

    def __init__(self, store: KubernetesStore, place: Place, ends: contextlib.ExitStack) -> None:
        self.store = store
        self._place = place
        self._ends = ends
        self._operator: Operating | None = None

    async def begin(self) -> None:
        if self._operator is None:
            started = self._place.operator()
            self._operator = await asyncio.to_thread(self._ends.enter_context, started)

    async def placed(self) -> Task:
        words = "until [ -e /go ]; do sleep 0.1; done; echo one two; trap '' TERM; while true; do sleep 1; done"
        return await self._ran(words, TaskStatus.RUNNING)

    async def says(self, task: Task) -> None:
        await asyncio.to_thread(self._place.kubectl, "exec", f"{task.task_id}-1", "--", "touch", "/go")

    async def finished(self) -> Task:
        return await self._ran("printf done", TaskStatus.COMPLETED)

    async def worker(self) -> str:
        return "real-1"

    async def _ran(self, command: str, status: TaskStatus) -> Task:
        await self.begin()
        spec = TaskSpec(user_id="ann", image=SHELL, command=command, resources=Resources(20, 32 * MIB, 0, 0))
        task = await self.store.create_task(spec)
        async with asyncio.timeout(PATIENCE):
            changes = self.store.watch(0)
            async with contextlib.aclosing(changes):  # type: ignore[type-var]
                while task.status is not status:
                    await anext(changes)
                    task = await self.store.get_task(task.task_id)
        return task


@contextlib.asynccontextmanager
async def on_kubernetes(place: Place) -> AsyncIterator[OnKubernetes]:
    settings = Settings(namespace=place.name, kubeconfig=place.kube.kubeconfig, store="kubernetes")
    store = await open_kubernetes(settings)
    try:
        with contextlib.ExitStack() as ends:
            yield OnKubernetes(store, place, ends)
    finally:
        await store.close()
