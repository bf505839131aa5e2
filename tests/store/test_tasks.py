"""Ids, retention and the snapshot."""

from __future__ import annotations

import contextlib
from dataclasses import replace

from sqlalchemy import select

from cloudai.errors import CloudAIError, Code
from cloudai.resources import Run, Task
from cloudai.store.protocol import Kind, Store, TaskQuery
from cloudai.store.sql import SqlStore, open_store
from cloudai.store.tables import TOTALS
from cloudai.store.upkeep import LOG_BYTES
from tests.store.values import SPEC, WORKER, finish, finished, placed, refused


async def test_ids_are_unique_and_grow_even_when_the_clock_goes_back(url: str) -> None:
    times = iter([2000, 1000, 1000, 3000])
    store = await open_store(url, clock=lambda: next(times, 9000))
    ids = [(await store.create_task(SPEC)).task_id for _ in range(4)]
    assert ids == ["task-2000", "task-2001", "task-2002", "task-3000"]
    await store.close()


async def test_a_finished_task_goes_after_its_retention_with_all_that_belongs_to_it(store: Store) -> None:
    old, new = await finished(store, at=1000), await finished(store, at=9000)
    await placed(store)
    assert await store.delete_finished(5000, 10) == 0  # its log goes first
    assert await store.delete_logs(5000, 10) == 1
    assert await store.delete_finished(5000, 10) == 1
    await refused(Code.TASK_NOT_FOUND, store.get_task(old.task_id))
    assert await store.list_runs(old.task_id) == []
    assert await store.get_task(new.task_id) == new
    assert await store.delete_finished(5000, 10) == 0
    assert (await store.list_tasks(TaskQuery())).total == 2


async def test_retention_works_in_batches_oldest_end_first(store: Store) -> None:
    tasks = [await finished(store, at=at) for at in (3000, 1000, 2000)]
    assert await store.delete_logs(5000, 2) == 2
    assert [await has_log(store, task) for task in tasks] == [True, False, False]
    assert await store.delete_finished(5000, 2) == 2
    assert [task.task_id for task in (await store.list_tasks(TaskQuery())).tasks] == [tasks[0].task_id]


async def has_log(store: Store, task: Task) -> bool:
    with contextlib.suppress(CloudAIError):
        return (await store.read_log(task.task_id, None, 0, 1)).end > 0
    await refused(Code.LOGS_REMOVED, store.read_log(task.task_id, None, 0, 1))
    return False


async def test_a_long_log_is_removed_piece_by_piece_and_cannot_be_read_from_the_first_on(url: str) -> None:
    store = await open_store(url)
    task, run = await placed(store)
    for number in range(3):
        await store.append_log(run.run_id, number * LOG_BYTES, bytes(LOG_BYTES))
    await finish(store, task, run, at=1000)
    others = [await finished(store, at=2000 + number) for number in range(3)]
    assert await store.delete_logs(5000, 10) == 1
    assert [await has_log(store, each) for each in (task, *others)] == [False, True, True, True]
    await store.close()
    store = await open_store(url)
    assert await store.delete_logs(5000, 10) == 1
    assert await store.delete_logs(5000, 2) == 2
    assert [await has_log(store, each) for each in (task, *others)] == [False, False, True, True]
    assert await store.delete_logs(5000, 10) == 3
    assert await store.delete_logs(5000, 10) == 0
    assert await store.log_ends([run.run_id, f"{others[2].task_id}-1"]) == {run.run_id: 0, f"{others[2].task_id}-1": 0}
    await store.close()


async def test_workers_that_are_silent_and_hold_nothing_are_forgotten(store: Store) -> None:
    for name, heard in (("busy", 1000), ("gone", 1000), ("here", 9000)):
        await store.register_worker(replace(WORKER, worker_id=name, identity=name, last_heartbeat=heard))
    await placed(store, worker_id="busy")
    revision = (await store.snapshot()).revision
    assert await store.delete_workers(5000) == 1
    assert list(await store.get_workers()) == ["busy", "here"]
    (change,) = await anext(store.watch(revision))
    assert (change.kind, change.key, change.event) == (Kind.WORKER, "gone", "deleted")


async def test_nothing_is_kept_of_a_user_whose_tasks_are_gone(store: SqlStore) -> None:
    for user_id in ("ann", "ben"):
        await finished(store, replace(SPEC, user_id=user_id), at=1000)
    await store.create_task(replace(SPEC, user_id="ben"))
    await store.delete_logs(5000, 10)
    assert await store.delete_finished(5000, 10) == 2
    kept = await store._read(lambda connection: list(connection.execute(select(TOTALS).where(TOTALS.c.user_id != ""))))
    assert [tuple(row) for row in kept] == [("ben", "queued", 1)]
    assert (await store.list_tasks(TaskQuery(user_id="ann"))).total == 0


async def test_a_brief_list_leaves_commands_out(store: Store) -> None:
    task = await store.create_task(SPEC)
    (brief,) = (await store.list_tasks(TaskQuery(brief=True))).tasks
    assert brief == replace(task, spec=replace(SPEC, command=None))


async def test_snapshot_holds_what_is_active(store: Store) -> None:
    await finished(store)
    queued = await store.create_task(SPEC)
    task, run = await placed(store)
    snapshot = await store.snapshot()
    assert dict(snapshot.tasks) == {queued.task_id: queued, task.task_id: task}
    assert dict(snapshot.runs) == {run.run_id: run}
    assert isinstance(run, Run)
