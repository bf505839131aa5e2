"""Ids, retention and the snapshot."""

from __future__ import annotations

from cloudai.errors import Code
from cloudai.resources import Run
from cloudai.store.protocol import Store, TaskQuery
from cloudai.store.sql import open_store
from tests.store.values import SPEC, finished, placed, refused


async def test_ids_are_unique_and_grow_even_when_the_clock_goes_back(url: str) -> None:
    times = iter([2000, 1000, 1000, 3000])
    store = await open_store(url, clock=lambda: next(times, 9000))
    ids = [(await store.create_task(SPEC)).task_id for _ in range(4)]
    assert ids == ["task-2000", "task-2001", "task-2002", "task-3000"]
    await store.close()


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
