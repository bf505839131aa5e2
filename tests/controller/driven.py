"""Drives a controller step by step over a real store."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from cloudai.resources import GIB, Resources, RunPhase, Task, TaskSpec, TaskStatus, Worker
from cloudai.store.protocol import Heartbeat, RunReport, Store
from cloudai_controller.loop import Controller

DEADLINE = 20.0
AMOUNTS = Resources(1000, GIB, 0, 0)


class HandClock:
    """Both clocks, moved by hand."""

    def __init__(self) -> None:
        self.at = 1_800_000_000_000

    def now(self) -> int:
        return self.at

    def elapsed(self) -> float:
        return self.at / 1000

    def forward(self, seconds: float) -> None:
        self.at += round(seconds * 1000)


class Ahead(HandClock):
    """The clock of a machine that is `seconds` ahead of another's."""

    def __init__(self, clock: HandClock, seconds: float) -> None:
        super().__init__()
        self._clock = clock
        self._seconds = seconds

    def now(self) -> int:
        return self._clock.now() + round(self._seconds * 1000)


async def until(controller: Controller, done: Callable[[], Awaitable[bool]]) -> None:
    """Step until `done`; what changed is heard of between two steps."""
    async with asyncio.timeout(DEADLINE):
        while True:
            while (await controller.step()).applied:
                pass
            if await done():
                return
            await asyncio.sleep(0)


async def until_status(controller: Controller, store: Store, task: Task, status: TaskStatus) -> Task:
    async def reached() -> bool:
        return (await store.get_task(task.task_id)).status is status

    await until(controller, reached)
    return await store.get_task(task.task_id)


def wish(max_retries: int | None = None, cores: float = 1) -> TaskSpec:
    amounts = Resources(round(cores * 1000), GIB, 0, 0)
    return TaskSpec(user_id="ann", image="busybox", command="true", resources=amounts, max_retries=max_retries)


async def join(store: Store, clock: HandClock, name: str = "worker-1", cores: int = 4, lease: int = 0) -> None:
    await store.register_worker(
        Worker(
            worker_id=name,
            identity="identity-1",
            address="10.0.0.1:50052",
            capacity=Resources(cores * 1000, 8 * GIB, 8 * GIB, 0),
            runtime="docker",
            registered_at=clock.now(),
            last_heartbeat=clock.now(),
            lease=lease,
        )
    )


async def beat(store: Store, clock: HandClock, name: str = "worker-1", lease: int | None = None) -> None:
    await store.record_heartbeats([Heartbeat(name, "identity-1", clock.now(), True, None, None, None, lease)])


async def report(store: Store, task: Task, *phases: RunPhase, attempt: int = 1, worker_id: str = "worker-1") -> None:
    for phase in phases:
        run = await store.report_run(
            RunReport(
                task_id=task.task_id,
                attempt=attempt,
                worker_id=worker_id,
                phase=phase,
                started_at=5 if phase is RunPhase.RUNNING else None,
                finished_at=9 if phase.terminal else None,
                exit_code=0 if phase is RunPhase.SUCCEEDED else 3 if phase is RunPhase.FAILED else None,
            )
        )
        assert run is not None
        assert run.phase is phase
