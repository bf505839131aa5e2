"""What lies behind the API and behind a TaskStore in the tests of what every store promises.

A world says how tasks get placed, run, speak and end there; what may differ from world to world has a name in it.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import itertools
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import Protocol

from cloudai.api.explain import Waiting
from cloudai.resources import Reason, Resources, RunPhase, Task, TaskSpec, TaskStatus, run_id
from cloudai.settings import Settings
from cloudai.store.kube.store import KubernetesStore, open_kubernetes
from cloudai.store.protocol import FacadeStore, Heartbeat, RunReport
from cloudai.store.sql import SqlStore, open_store
from tests.cluster.cluster import played_node
from tests.cluster.images import SHELL
from tests.engines import missing
from tests.kube.kube import Place
from tests.store.values import WORKER, placing

MIB = 1024 * 1024
PATIENCE = 90.0
# Goes on, whatever signals come, until it is told its exit code.
OBEDIENT = TaskSpec(
    user_id="ann",
    image=SHELL,
    command="mkfifo /end 2>/dev/null; read code < /end; exit $code",
    resources=Resources(100, 32 * MIB, 0, 0),
)
STARTLESS = replace(OBEDIENT, image="registry.invalid/nothing:1")  # once placed it stays pending: its image never comes
TOO_LARGE = replace(OBEDIENT, resources=Resources(100_000_000, 64 * MIB, 0, 0))  # stays queued
_numbers = itertools.count(1)


class World(Protocol):
    """`worker_id`: the worker that tasks are placed on. `idle` is why a task waits before `begin`, `too_large` why TOO_LARGE
    waits after it; of the messages only what they contain.
    """

    worker_id: str
    idle: Waiting
    too_large: Waiting

    @property
    def store(self) -> FacadeStore: ...

    async def begin(self) -> None:
        """From now on tasks are placed where there is room, and cancellations are carried out."""
        ...

    async def place(self, task_id: str) -> None:
        """Return once the task has its worker."""
        ...

    async def run(self, task_id: str) -> None:
        """Return once the task runs."""
        ...

    async def write(self, task_id: str, lines: bytes, times: int = 1) -> None:
        """A running OBEDIENT task writes whole lines, so many times over; return once all can be read."""
        ...

    async def end(self, task_id: str, exit_code: int = 0) -> None:
        """A running OBEDIENT task ends; return once it has ended."""
        ...

    async def remove_log(self, task_id: str) -> None:
        """The log of a task that has ended is kept no longer."""
        ...

    async def add_worker(self) -> str:
        """Another worker joins; returns its id."""
        ...

    async def hinder_worker(self, worker_id: str) -> str:
        """That worker can start nothing any more; returns words of the problem that it tells."""
        ...


class Sql:
    """A database, with the test in the place of controller and agents."""

    worker_id = WORKER.worker_id
    idle = Waiting(Reason.NO_WORKERS, "start an agent")
    too_large = Waiting(Reason.TOO_LARGE, "worker-1 is too small by 99996 CPU")

    def __init__(self, store: SqlStore) -> None:
        self.store = store

    async def begin(self) -> None:
        await self._join(self.worker_id)

    async def place(self, task_id: str) -> None:
        await self.begin()
        await self._commit(*placing(await self.store.get_task(task_id)))

    async def run(self, task_id: str) -> None:
        if (await self.store.get_task(task_id)).status is TaskStatus.QUEUED:
            await self.place(task_id)
        now = _now()
        await self._report(task_id, RunPhase.STARTING)
        await self._report(task_id, RunPhase.RUNNING, started_at=now)
        await self._commit(replace(await self.store.get_task(task_id), status=TaskStatus.RUNNING, started_at=now))

    async def write(self, task_id: str, lines: bytes, times: int = 1) -> None:
        run = run_id(task_id, (await self.store.get_task(task_id)).attempt)
        end = (await self.store.log_ends([run])).get(run, 0)
        for _ in range(times):
            assert await self.store.append_log(run, end, lines) == end + len(lines)
            end += len(lines)

    async def end(self, task_id: str, exit_code: int = 0) -> None:
        now = _now()
        phase = RunPhase.FAILED if exit_code else RunPhase.SUCCEEDED
        await self._report(task_id, phase, finished_at=now, exit_code=exit_code)
        status = TaskStatus.FAILED if exit_code else TaskStatus.COMPLETED
        task = await self.store.get_task(task_id)
        await self._commit(replace(task, status=status, finished_at=now, exit_code=exit_code))

    async def remove_log(self, task_id: str) -> None:
        assert (await self.store.get_task(task_id)).status.terminal
        await self.store.delete_logs(2**52, 10)

    async def add_worker(self) -> str:
        await self._join("worker-2")
        return "worker-2"

    async def hinder_worker(self, worker_id: str) -> str:
        worker = (await self.store.get_worker(worker_id)).worker
        problem = "dockerd does not answer"
        await self.store.record_heartbeats([Heartbeat(worker_id, worker.identity, _now(), False, problem, None, None)])
        return problem

    async def _join(self, worker_id: str) -> None:
        now = _now()
        joining = replace(WORKER, worker_id=worker_id, identity=worker_id, registered_at=now, last_heartbeat=now)
        await self.store.register_worker(joining)

    async def _report(self, task_id: str, phase: RunPhase, **news: int) -> None:
        attempt = (await self.store.get_task(task_id)).attempt
        report = RunReport(task_id=task_id, attempt=attempt, worker_id=self.worker_id, phase=phase)
        told = await self.store.report_run(replace(report, **news))  # type: ignore[arg-type]
        assert told is not None
        assert told.phase is phase

    async def _commit(self, *group: object) -> None:
        assert (await self.store.commit([group])).applied == [True]  # type: ignore[list-item]


class OnKubernetes:
    """A namespace of a real cluster; its operator starts when it is needed, unless one runs there already."""

    idle = Waiting(Reason.NO_CONTROLLER, "nobody leads")
    too_large = Waiting(Reason.UNSCHEDULABLE, "Insufficient cpu")

    def __init__(self, store: KubernetesStore, place: Place, ends: contextlib.ExitStack, operated: bool) -> None:
        self.store = store
        self.worker_id = place.kube.node
        self._place = place
        self._ends = ends
        self._operated = operated
        self._written: Counter[str] = Counter()

    async def begin(self) -> None:
        if not self._operated:
            self._operated = True
            await asyncio.to_thread(self._ends.enter_context, self._place.operator())

    async def place(self, task_id: str) -> None:
        await self.begin()
        await self._until(task_id, lambda task: task.worker_id == self.worker_id)

    async def run(self, task_id: str) -> None:
        await self.begin()
        await self._until(task_id, lambda task: task.status is TaskStatus.RUNNING)

    async def write(self, task_id: str, lines: bytes, times: int = 1) -> None:
        self._written[task_id] += len(lines) * times
        script = f"base64 -d > /lines; for _ in $(seq {times}); do cat /lines; done > /proc/1/fd/1"
        words = ["exec", "-i", f"{task_id}-1", "--", "sh", "-c", script]
        await self._kubectl(*words, given=base64.b64encode(lines).decode())
        await asyncio.to_thread(self._place.until_written, f"{task_id}-1", self._written[task_id])

    async def end(self, task_id: str, exit_code: int = 0) -> None:
        script = f"mkfifo /end 2>/dev/null; echo {exit_code} > /end"
        await self._kubectl("exec", f"{task_id}-1", "--", "sh", "-c", script, check=False)  # it ends with the container
        await self._until(task_id, lambda task: task.status.terminal)

    async def remove_log(self, task_id: str) -> None:
        await asyncio.to_thread(self._place.until_kept, task_id)
        kept = await asyncio.to_thread(self._place.log_of, task_id)
        await self._kubectl("delete", f"configmap/{kept}", f"pod/{task_id}-1")

    async def add_worker(self) -> str:
        if self._place.kube.own is None:
            missing("Played nodes", "unset CLOUDAI_TEST_KUBECONFIG")
        name = f"{self._place.name}-node"
        await self._kubectl("create", "-f", "-", given=played_node(name))
        self._ends.callback(self._place.kubectl, "delete", "node", name)
        return name

    async def hinder_worker(self, worker_id: str) -> str:
        await self._kubectl("cordon", worker_id)
        return "cordoned"

    async def _kubectl(self, *arguments: str, given: object = None, check: bool = True) -> None:
        await asyncio.to_thread(self._place.kubectl, *arguments, given=given, check=check)

    async def _until(self, task_id: str, true: Callable[[Task], bool]) -> None:
        async with asyncio.timeout(PATIENCE):
            changes = self.store.watch(0)
            async with contextlib.aclosing(changes):  # type: ignore[type-var]
                while not true(await self.store.get_task(task_id)):
                    await anext(changes)


def _now() -> int:
    return time.time_ns() // 1_000_000


def new_name() -> str:
    """Of a database."""
    return f"world_{next(_numbers)}"


@contextlib.asynccontextmanager
async def on_sql(url: str) -> AsyncIterator[Sql]:
    store = await open_store(url)
    try:
        yield Sql(store)
    finally:
        await store.close()


@contextlib.asynccontextmanager
async def on_kubernetes(place: Place, *, operated: bool) -> AsyncIterator[OnKubernetes]:
    """`operated`: whether an operator runs there."""
    settings = Settings(namespace=place.name, kubeconfig=place.kube.kubeconfig, store="kubernetes")
    store = await open_kubernetes(settings)
    await asyncio.to_thread(lambda: place.kube.node)  # asked for once; what answers may run in this event loop
    ends = contextlib.ExitStack()
    try:
        yield OnKubernetes(store, place, ends, operated)
    finally:
        await asyncio.to_thread(ends.close)
        await store.close()
