"""Values that store tests share."""

from __future__ import annotations

from collections.abc import Awaitable
from dataclasses import replace

import pytest

from cloudai.errors import CloudAIError, Code
from cloudai.resources import GIB, GpuShare, Resources, Run, RunPhase, Task, TaskSpec, TaskStatus, Worker
from cloudai.store.protocol import RunReport, Store

SPEC = TaskSpec(user_id="ann", image="busybox", command="echo hi", resources=Resources(500, GIB, 0, 0))
WORKER = Worker(
    worker_id="worker-1",
    identity="identity-1",
    address="127.0.0.1:50052",
    capacity=Resources(4000, 8 * GIB, 100 * GIB, 2000),
    runtime="docker",
    registered_at=1000,
    last_heartbeat=1000,
    lease=300_000,
)


def first_run(task: Task, worker_id: str = "worker-1", gpus: tuple[GpuShare, ...] = ()) -> Run:
    """The next attempt of a task, not stored yet."""
    return Run(
        task_id=task.task_id,
        attempt=task.attempt + 1,
        worker_id=worker_id,
        user_id=task.spec.user_id,
        image=task.spec.image,
        command=task.spec.command,
        resources=task.spec.resources,
        gpus=gpus,
        created_at=task.created_at,
    )


def placing(task: Task, worker_id: str = "worker-1") -> tuple[Task, Run]:
    """The group that places a queued task."""
    run = first_run(task, worker_id)
    return replace(task, status=TaskStatus.PENDING, attempt=run.attempt, worker_id=worker_id), run


async def placed(store: Store, spec: TaskSpec = SPEC, worker_id: str = "worker-1") -> tuple[Task, Run]:
    """A task that is placed on a worker."""
    committed = await store.commit([placing(await store.create_task(spec), worker_id)])
    assert committed.applied == [True]
    task, run = committed.objects[0]
    assert isinstance(task, Task)
    assert isinstance(run, Run)
    return task, run


async def finished(store: Store, spec: TaskSpec = SPEC, at: int = 5000) -> Task:
    """A task that completed at `at` (ms), having written `done`."""
    task, run = await placed(store, spec)
    await store.append_log(run.run_id, 0, b"done")
    return await finish(store, task, run, at)


async def finish(store: Store, task: Task, run: Run, at: int) -> Task:
    """A placed task completes at `at` (ms)."""
    for phase in (RunPhase.STARTING, RunPhase.RUNNING, RunPhase.SUCCEEDED):
        await store.report_run(report(run, phase))
    running = (await store.commit([[replace(task, status=TaskStatus.RUNNING)]])).objects[0][0]
    assert isinstance(running, Task)
    ended = replace(running, status=TaskStatus.COMPLETED, finished_at=at, exit_code=0)
    result = (await store.commit([[ended]])).objects[0][0]
    assert isinstance(result, Task)
    return result


def report(run: Run, phase: RunPhase, **news: int | str) -> RunReport:
    return RunReport(
        task_id=run.task_id,
        attempt=run.attempt,
        worker_id=run.worker_id,
        phase=phase,
        **news,  # type: ignore[arg-type]
    )


async def refused(code: Code, work: Awaitable[object]) -> CloudAIError:
    with pytest.raises(CloudAIError) as caught:
        await work
    assert caught.value.code is code
    return caught.value
