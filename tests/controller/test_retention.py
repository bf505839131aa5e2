from __future__ import annotations

import pytest

from cloudai.errors import CloudAIError, Code
from cloudai.resources import RunPhase, TaskStatus
from cloudai.settings import Settings
from cloudai.store.protocol import Store
from cloudai_controller.loop import Controller
from cloudai_controller.retention import sweep
from tests.controller.driven import HandClock, join, report, until_status, wish

DAY = 86_400_000


async def finished(store: Store, controller: Controller, clock: HandClock) -> str:
    """A task that finished at 9 ms, with two bytes of log."""
    await join(store, clock)
    task = await store.create_task(wish())
    await until_status(controller, store, task, TaskStatus.PENDING)
    await report(store, task, RunPhase.STARTING, RunPhase.RUNNING)
    await store.append_log(f"{task.task_id}-1", 0, b"hi")
    await report(store, task, RunPhase.SUCCEEDED)
    await until_status(controller, store, task, TaskStatus.COMPLETED)
    return task.task_id


async def test_logs_go_before_their_tasks(store: Store, controller: Controller, clock: HandClock) -> None:
    task_id = await finished(store, controller, clock)
    assert await sweep(store, Settings(), 8 * DAY) == 0
    with pytest.raises(CloudAIError) as raised:
        await store.read_log(task_id, None, 0, 10)
    assert raised.value.code is Code.LOGS_REMOVED
    assert await sweep(store, Settings(), 31 * DAY) == 1
    with pytest.raises(CloudAIError) as raised:
        await store.get_task(task_id)
    assert raised.value.code is Code.TASK_NOT_FOUND


async def test_for_ever_keeps_everything(store: Store, controller: Controller, clock: HandClock) -> None:
    task_id = await finished(store, controller, clock)
    for_ever = Settings(task_retention_seconds=float("inf"), log_retention_seconds=float("inf"))
    assert await sweep(store, for_ever, 9999 * DAY) == 0
    assert (await store.read_log(task_id, None, 0, 10)).data == b"hi"
