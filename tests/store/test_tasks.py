"""What clients write and read."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from cloudai.errors import CloudAIError, Code
from cloudai.resources import Run, TaskStatus
from cloudai.store.protocol import Idempotency, Store, TaskQuery
from cloudai.store.sql import open_store
from tests.store.values import SPEC, finished, placed


async def refused(code: Code, work: object) -> CloudAIError:
    with pytest.raises(CloudAIError) as caught:
        await work  # type: ignore[misc]
    assert caught.value.code is code
    return caught.value


async def test_a_new_task_is_queued_and_read_back_as_it_was_written(store: Store) -> None:
    spec = replace(SPEC, command=("echo", "a b"), timeout_seconds=60, max_retries=2)
    task = await store.create_task(spec)
    assert (task.status, task.version, task.spec) == (TaskStatus.QUEUED, 1, spec)
    assert await store.get_task(task.task_id) == task


async def test_ids_are_unique_and_grow_even_when_the_clock_goes_back(url: str) -> None:
    times = iter([2000, 1000, 1000, 3000])
    store = await open_store(url, clock=lambda: next(times, 9000))
    ids = [(await store.create_task(SPEC)).task_id for _ in range(4)]
    assert ids == ["task-2000", "task-2001", "task-2002", "task-3000"]
    await store.close()


async def test_many_submits_at_once_are_all_kept(store: Store) -> None:
    tasks = await asyncio.gather(*(store.create_task(SPEC) for _ in range(300)))
    assert len({task.task_id for task in tasks}) == 300
    assert (await store.totals())[TaskStatus.QUEUED] == 300


@pytest.mark.parametrize(
    "name", ["task-1", "task-01", "task-x", "nothing", "task-99999999999999999999", "task-", "task-1\0"]
)
async def test_what_is_not_there_is_not_found(store: Store, name: str) -> None:
    await refused(Code.TASK_NOT_FOUND, store.get_task(name))
    await refused(Code.TASK_NOT_FOUND, store.cancel_task(name))
    await refused(Code.TASK_NOT_FOUND, store.read_log(name, None, 0, 10))


async def test_an_idempotency_key_gives_its_first_task_again(store: Store) -> None:
    key = Idempotency("key", b"body")
    first = await store.create_task(SPEC, key)
    assert await store.create_task(SPEC, key) == first
    await refused(Code.IDEMPOTENCY_CONFLICT, store.create_task(SPEC, Idempotency("key", b"another")))
    at_once = await asyncio.gather(*(store.create_task(SPEC, Idempotency("new", b"body")) for _ in range(5)))
    assert len({task.task_id for task in at_once}) == 1
    assert (await store.totals())[TaskStatus.QUEUED] == 2


async def test_a_queued_task_is_cancelled_at_once_and_again(store: Store) -> None:
    task = await store.create_task(SPEC)
    cancelled = await store.cancel_task(task.task_id)
    assert (cancelled.status, cancelled.reason) == (TaskStatus.CANCELLED, "Cancelled")
    assert cancelled.finished_at is not None
    assert await store.cancel_task(task.task_id) == cancelled


async def test_a_placed_task_is_asked_to_end(store: Store) -> None:
    task, _ = await placed(store)
    wished = await store.cancel_task(task.task_id)
    assert (wished.status, wished.cancel_requested, wished.version) == (TaskStatus.PENDING, True, task.version + 1)
    assert await store.cancel_task(task.task_id) == wished


async def test_a_finished_task_cannot_be_cancelled(store: Store) -> None:
    task = await finished(store)
    await refused(Code.TASK_FINISHED, store.cancel_task(task.task_id))
    assert await store.get_task(task.task_id) == task


async def test_lists_are_filtered_counted_and_newest_first(store: Store) -> None:
    ann = [await store.create_task(SPEC) for _ in range(3)]
    ben = await store.create_task(replace(SPEC, user_id="ben"))
    await store.cancel_task(ann[0].task_id)

    async def listed(**query: object) -> tuple[list[str], int]:
        page = await store.list_tasks(TaskQuery(**query))  # type: ignore[arg-type]
        return [task.task_id for task in page.tasks], page.total

    everything = [ben.task_id, *(task.task_id for task in reversed(ann))]
    assert await listed() == (everything, 4)
    assert await listed(limit=2, offset=1) == (everything[1:3], 4)
    assert await listed(offset=9) == ([], 4)
    assert await listed(user_id="ben") == ([ben.task_id], 1)
    assert await listed(user_id="nobody") == ([], 0)
    assert await listed(status=TaskStatus.CANCELLED) == ([ann[0].task_id], 1)
    assert await listed(status=TaskStatus.QUEUED, user_id="ann") == ([ann[2].task_id, ann[1].task_id], 2)


async def test_totals_follow_every_change(store: Store) -> None:
    await finished(store)
    await placed(store)
    await store.cancel_task((await store.create_task(SPEC)).task_id)
    totals = {status: count for status, count in (await store.totals()).items() if count}
    assert totals == {TaskStatus.COMPLETED: 1, TaskStatus.PENDING: 1, TaskStatus.CANCELLED: 1}


async def test_a_finished_task_goes_after_its_retention_with_all_that_belongs_to_it(store: Store) -> None:
    old, new = await finished(store, at=1000), await finished(store, at=9000)
    await placed(store)
    assert await store.delete_finished(5000, 10) == 1
    await refused(Code.TASK_NOT_FOUND, store.get_task(old.task_id))
    assert await store.list_runs(old.task_id) == []
    assert await store.get_task(new.task_id) == new
    assert await store.delete_finished(5000, 10) == 0
    assert (await store.list_tasks(TaskQuery())).total == 2


async def test_retention_works_in_batches_oldest_end_first(store: Store) -> None:
    tasks = [await finished(store, at=at) for at in (3000, 1000, 2000)]
    assert await store.delete_finished(5000, 2) == 2
    assert [task.task_id for task in (await store.list_tasks(TaskQuery())).tasks] == [tasks[0].task_id]


async def test_snapshot_holds_what_is_active(store: Store) -> None:
    await finished(store)
    queued = await store.create_task(SPEC)
    task, run = await placed(store)
    snapshot = await store.snapshot()
    assert dict(snapshot.tasks) == {queued.task_id: queued, task.task_id: task}
    assert dict(snapshot.runs) == {run.run_id: run}
    assert isinstance(run, Run)
