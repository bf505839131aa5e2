"""The controller over a real store, step by step."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest

from cloudai.resources import RunPhase, TaskStatus, Worker
from cloudai.settings import Settings
from cloudai.store.protocol import Change, FenceLost, Store
from cloudai_controller import memory
from cloudai_controller.loop import Controller
from tests.controller.driven import DEADLINE, Ahead, HandClock, beat, join, report, until, until_status, wish

STARTED = (RunPhase.PULLING, RunPhase.STARTING, RunPhase.RUNNING)


async def test_a_task_is_placed_runs_and_completes(store: Store, controller: Controller, clock: HandClock) -> None:
    await join(store, clock)
    task = await store.create_task(wish())
    placed = await until_status(controller, store, task, TaskStatus.PENDING)
    assert (placed.worker_id, placed.attempt) == ("worker-1", 1)
    await report(store, task, *STARTED)
    await until_status(controller, store, task, TaskStatus.RUNNING)
    await report(store, task, RunPhase.SUCCEEDED)
    done = await until_status(controller, store, task, TaskStatus.COMPLETED)
    assert (done.exit_code, done.started_at, done.finished_at) == (0, 5, 9)


async def test_a_run_that_ends_before_it_was_seen_running_still_shows_a_start(
    store: Store, controller: Controller, clock: HandClock
) -> None:
    await join(store, clock)
    task = await store.create_task(wish())
    await until_status(controller, store, task, TaskStatus.PENDING)
    await report(store, task, *STARTED, RunPhase.SUCCEEDED)
    await until_status(controller, store, task, TaskStatus.COMPLETED)
    seen = [change.event async for change in changes(store, task.task_id, "completed")]
    assert seen == ["queued", "pending", "running", "completed"]


async def changes(store: Store, key: str, last: str) -> AsyncIterator[Change]:
    async for batch in store.watch(0):
        for change in batch:
            if change.key == key:
                yield change
                if change.event == last:
                    return


async def test_a_cancelled_task_ends_when_its_container_is_gone(
    store: Store, controller: Controller, clock: HandClock
) -> None:
    await join(store, clock)
    task = await store.create_task(wish())
    await until_status(controller, store, task, TaskStatus.PENDING)
    await store.cancel_task(task.task_id)

    async def asked_to_stop() -> bool:
        return (await store.list_runs(task.task_id))[0].stop_requested

    await until(controller, asked_to_stop)
    assert (await store.get_task(task.task_id)).status is TaskStatus.PENDING
    await report(store, task, RunPhase.STOPPED)
    await until_status(controller, store, task, TaskStatus.CANCELLED)


async def test_a_failed_task_is_tried_again_as_often_as_it_asked(
    store: Store, controller: Controller, clock: HandClock
) -> None:
    await join(store, clock)
    task = await store.create_task(wish(max_retries=1))
    await until_status(controller, store, task, TaskStatus.PENDING)
    await report(store, task, RunPhase.FAILED)

    async def second() -> bool:
        return (await store.get_task(task.task_id)).attempt == 2

    await until(controller, second)
    await report(store, task, RunPhase.FAILED, attempt=2)
    failed = await until_status(controller, store, task, TaskStatus.FAILED)
    assert (failed.reason, failed.exit_code) == ("ExitCode", 3)


async def test_a_worker_silent_for_the_lease_loses_its_task_to_another(
    store: Store, controller: Controller, clock: HandClock
) -> None:
    await join(store, clock)
    task = await store.create_task(wish())
    await until_status(controller, store, task, TaskStatus.PENDING)
    await join(store, clock, "worker-2")
    for _ in range(33):
        clock.forward(10)
        await beat(store, clock, "worker-2")
        await controller.step()

    async def moved() -> bool:
        return (await store.get_task(task.task_id)).worker_id == "worker-2"

    await until(controller, moved)
    assert [run.phase for run in await store.list_runs(task.task_id)] == [RunPhase.LOST, RunPhase.ASSIGNED]


@pytest.mark.parametrize(
    ("promised", "seconds", "status"),
    [
        (600_000, 610, TaskStatus.PENDING),
        (600_000, 630, TaskStatus.FAILED),
        (200_000, 320, TaskStatus.PENDING),
        (200_000, 340, TaskStatus.FAILED),
    ],
)
async def test_a_worker_is_given_up_by_the_lease_it_was_promised_where_that_is_the_longer(
    store: Store, controller: Controller, clock: HandClock, promised: int, seconds: int, status: TaskStatus
) -> None:
    await join(store, clock, lease=promised)
    task = await store.create_task(wish(max_retries=0))
    await until_status(controller, store, task, TaskStatus.PENDING)
    for _ in range(seconds // 10):
        clock.forward(10)
        await controller.step()
    assert (await store.get_task(task.task_id)).status is status


async def test_a_worker_that_comes_back_with_a_shorter_lease_and_dies_is_given_up_by_that(
    store: Store, controller: Controller, clock: HandClock
) -> None:
    await join(store, clock, lease=3_600_000)
    task = await store.create_task(wish(max_retries=0))
    await until_status(controller, store, task, TaskStatus.PENDING)
    await controller.step()
    await join(store, clock, lease=310_000)
    await beat(store, clock, lease=310_000)
    await controller.step()
    for _ in range(34):
        clock.forward(10)
        await controller.step()
    assert (await store.get_task(task.task_id)).status is TaskStatus.FAILED


@pytest.mark.parametrize("ahead", [-3600, -325, -31, 31, 3600])
async def test_a_worker_is_judged_by_the_controllers_own_clock(
    ahead: float, store: Store, controller: Controller, clock: HandClock
) -> None:
    api = Ahead(clock, ahead)
    await join(store, api)
    await controller.step()
    clock.forward(5)
    await beat(store, api)
    task = await store.create_task(wish())
    await until_status(controller, store, task, TaskStatus.PENDING)
    for _ in range(70):
        clock.forward(5)
        await beat(store, api)
        await controller.step()
    assert [run.phase for run in await store.list_runs(task.task_id)] == [RunPhase.ASSIGNED]
    silence = 0
    while (await store.list_runs(task.task_id))[0].phase is RunPhase.ASSIGNED:
        clock.forward(5)
        silence += 5
        await controller.step()
    assert silence == 325, "the lease of 300 s, 10 s to stop and 10 s more"


async def test_a_heartbeat_that_came_while_workers_were_read_counts_from_then(
    store: Store, controller: Controller, clock: HandClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    await join(store, clock)
    task = await store.create_task(wish())
    await until_status(controller, store, task, TaskStatus.PENDING)
    get_workers = store.get_workers

    async def slowly(worker_ids: Sequence[str] | None = None) -> Mapping[str, Worker]:
        clock.forward(4)
        await beat(store, clock)
        return await get_workers(worker_ids)

    with monkeypatch.context() as patch:
        patch.setattr(store, "get_workers", slowly)
        clock.forward(6)
        await controller.step()
    for _ in range(64):
        clock.forward(5)
        await controller.step()
    assert [run.phase for run in await store.list_runs(task.task_id)] == [RunPhase.ASSIGNED]
    clock.forward(5)
    await controller.step()
    assert [run.phase for run in await store.list_runs(task.task_id)] == [RunPhase.LOST]


async def test_a_worker_that_died_while_there_was_nothing_to_do_gets_no_task(
    store: Store, controller: Controller, clock: HandClock
) -> None:
    await join(store, clock)
    await controller.step()
    clock.forward(2000)
    await beat(store, clock)
    clock.forward(1000)
    task = await store.create_task(wish())
    await controller.step()
    assert (await store.get_task(task.task_id)).status is TaskStatus.QUEUED


async def test_after_an_outage_nobody_is_lost_before_a_whole_lease(
    store: Store, controller: Controller, clock: HandClock
) -> None:
    await join(store, clock)
    task = await store.create_task(wish())
    await until_status(controller, store, task, TaskStatus.PENDING)
    clock.forward(3600)
    while (await controller.step()).applied:
        pass
    assert [run.phase for run in await store.list_runs(task.task_id)] == [RunPhase.ASSIGNED]


async def test_a_heartbeat_after_silence_brings_a_worker_back_into_use(
    store: Store, controller: Controller, clock: HandClock
) -> None:
    await join(store, clock)
    await controller.step()
    clock.forward(60)
    task = await store.create_task(wish())
    while (await controller.step()).applied:
        pass
    assert (await store.get_task(task.task_id)).status is TaskStatus.QUEUED
    clock.forward(6)
    await beat(store, clock)
    await until_status(controller, store, task, TaskStatus.PENDING)


async def test_a_new_controller_ends_what_ended_while_none_was_there(
    store: Store, controller: Controller, clock: HandClock
) -> None:
    await join(store, clock)
    task = await store.create_task(wish())
    await until_status(controller, store, task, TaskStatus.PENDING)
    await controller.close()
    await report(store, task, *STARTED, RunPhase.SUCCEEDED)
    await until_status(controller, store, task, TaskStatus.COMPLETED)


async def test_another_controller_takes_over_and_the_first_can_write_no_more(
    store: Store, controller: Controller, clock: HandClock
) -> None:
    second = Controller(store, Settings(), "two", clock)
    try:
        assert (await controller.step()).leading
        assert not (await second.step()).leading
        clock.forward(5)
        assert (await second.step()).leading
        lease = await store.get_lease("controller")
        assert lease is not None
        assert (lease.holder, lease.epoch) == ("two", 2)
        assert not (await controller.step()).leading
    finally:
        await second.close()


async def test_a_commit_of_a_former_leader_is_refused(store: Store, controller: Controller, clock: HandClock) -> None:
    await controller.step()
    before = await store.get_lease("controller")
    second = Controller(store, Settings(), "two", clock)
    await second.step()
    clock.forward(5)
    assert (await second.step()).leading
    await second.close()
    with pytest.raises(FenceLost):
        await store.commit([], before)


async def test_a_leader_that_loses_its_lead_in_the_midst_of_a_pass_writes_nothing_more(
    store: Store, controller: Controller, clock: HandClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    await join(store, clock)
    task = await store.create_task(wish())
    refresh = memory.refresh

    async def overtaken(*arguments: Any) -> None:
        await refresh(*arguments)
        held = await store.get_lease("controller")
        assert held is not None
        assert await store.put_lease(replace(held, holder="two", epoch=held.epoch + 1), held.version)
        controller._leadership.lost()  # as its timer finds out

    monkeypatch.setattr(memory, "refresh", overtaken)
    assert not (await controller.step()).leading
    assert (await store.get_task(task.task_id)).status is TaskStatus.QUEUED


async def test_a_leader_that_stops_hands_over_at_once(store: Store, clock: HandClock) -> None:
    clock.at = time.time_ns() // 1_000_000
    first, second, stop = Controller(store, Settings(), "one"), Controller(store, Settings(), "two"), asyncio.Event()
    running = asyncio.create_task(first.run(stop))
    await join(store, clock)
    task = await store.create_task(wish())
    async with asyncio.timeout(DEADLINE):
        async for _ in changes(store, task.task_id, "pending"):
            pass
        stop.set()
        await running
        assert (await second.step()).leading
    await second.close()


async def test_a_cancel_that_comes_between_reading_and_writing_wins(
    store: Store, controller: Controller, clock: HandClock
) -> None:
    await join(store, clock)
    await controller.step()
    tasks = [await store.create_task(wish(cores=0.01)) for _ in range(20)]
    for task in tasks:
        await asyncio.gather(controller.step(), store.cancel_task(task.task_id))
    for task in tasks:
        held = await store.get_task(task.task_id)
        runs = await store.list_runs(task.task_id)
        assert held.cancel_requested
        assert held.status is TaskStatus.PENDING or not runs


async def test_what_changed_while_no_controller_looked_is_found_without_the_change_log(
    store: Store, controller: Controller, clock: HandClock
) -> None:
    await controller.step()
    await controller.close()
    await join(store, clock)
    task = await store.create_task(wish())
    await store.prune_changes(0)
    await until_status(controller, store, task, TaskStatus.PENDING)
