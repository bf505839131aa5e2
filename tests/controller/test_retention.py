from __future__ import annotations

import asyncio

import pytest

from cloudai.errors import CloudAIError, Code
from cloudai.resources import RunPhase, TaskStatus
from cloudai.settings import Settings
from cloudai.store.protocol import Store
from cloudai_controller import retention
from cloudai_controller.loop import Controller
from cloudai_controller.retention import BATCH, sweep
from tests.controller.driven import DEADLINE, HandClock, join, report, until_status, wish
from tests.store import values

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


async def test_more_than_one_batch_goes_in_one_sweep_whichever_retention_is_shorter(store: Store) -> None:
    count = BATCH + 20
    for settings in (Settings(task_retention_seconds=1, log_retention_seconds=float("inf")), Settings()):
        await asyncio.gather(*(values.finished(store, at=9) for _ in range(count)))
        assert await sweep(store, settings, 31 * DAY) == count
        assert sum((await store.totals()).values()) == 0


async def test_a_worker_is_forgotten_when_it_has_long_been_silent(
    store: Store, controller: Controller, clock: HandClock
) -> None:
    await join(store, clock)
    await controller.step()
    at = clock.now()
    for retention_seconds, day in ((1.0, 1), (30 * 86400.0, 30)):
        await join(store, clock)
        settings = Settings(task_retention_seconds=retention_seconds)
        await sweep(store, settings, at + day * DAY)
        assert list(await store.get_workers()) == ["worker-1"]
        await sweep(store, settings, at + day * DAY + 1)
        assert await store.get_workers() == {}
    task = await store.create_task(wish())
    while (await controller.step()).applied:
        pass
    assert (await store.get_task(task.task_id)).status is TaskStatus.QUEUED


async def test_a_retention_of_ages_is_one_for_ever(store: Store, controller: Controller, clock: HandClock) -> None:
    await finished(store, controller, clock)
    ages = Settings(task_retention_seconds=1e300, log_retention_seconds=1e18)
    assert await sweep(store, ages, 9999 * DAY) == 0


async def test_a_fault_of_retention_is_told_and_it_is_tried_again(
    store: Store, controller: Controller, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tries: list[int] = []
    stop = asyncio.Event()

    async def failing(_store: Store, _settings: Settings, now: int) -> int:
        tries.append(now)
        if len(tries) == 2:
            stop.set()
        raise OverflowError("too large")

    monkeypatch.setattr(retention, "EVERY_SECONDS", 0)
    monkeypatch.setattr(retention, "sweep", failing)
    async with asyncio.timeout(DEADLINE):
        await controller.run(stop)
    assert "OverflowError: too large" in caplog.text


async def test_for_ever_keeps_everything(store: Store, controller: Controller, clock: HandClock) -> None:
    task_id = await finished(store, controller, clock)
    for_ever = Settings(task_retention_seconds=float("inf"), log_retention_seconds=float("inf"))
    assert await sweep(store, for_ever, 9999 * DAY) == 0
    assert (await store.read_log(task_id, None, 0, 10)).data == b"hi"
