"""What every TaskStore promises: the stores themselves, and the client that speaks to one through the API."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from cloudai.client import Client
from cloudai.errors import Code
from cloudai.resources import Task, TaskStatus
from cloudai.settings import Settings
from cloudai.store.protocol import Idempotency, Store, TaskQuery, TaskStore
from tests.api.conftest import serving
from tests.store.values import SPEC, WORKER, finished, placed, refused


@pytest.fixture(params=["store", "client"])
async def tasks(request: pytest.FixtureRequest, store: Store, tmp_path: Path) -> AsyncIterator[TaskStore]:
    """What is tested; `store` is what lies behind it."""
    if request.param == "store":
        yield store
        return
    settings = Settings(data_dir=tmp_path, rate_limit_enabled=False)
    async with serving(store, settings) as server, Client(f"http://127.0.0.1:{server.port}") as client:
        yield client


def plain(task: Task) -> Task:
    """Without the explanation that the API adds to a task that waits."""
    return replace(task, reason=None, message=None) if task.status is TaskStatus.QUEUED else task


async def test_a_new_task_is_queued_and_read_back_as_it_was_written(tasks: TaskStore) -> None:
    spec = replace(SPEC, command=("echo", "a b"), timeout_seconds=60, max_retries=2)
    task = await tasks.create_task(spec)
    assert (task.status, task.version, task.spec) == (TaskStatus.QUEUED, 1, spec)
    assert plain(await tasks.get_task(task.task_id)) == plain(task)


async def test_many_submits_at_once_are_all_kept(tasks: TaskStore) -> None:
    made = await asyncio.gather(*(tasks.create_task(SPEC) for _ in range(200)))
    assert len({task.task_id for task in made}) == 200
    assert (await tasks.totals())[TaskStatus.QUEUED] == 200


@pytest.mark.parametrize(
    "name", ["task-1", "task-01", "task-x", "nothing", "task-99999999999999999999", "task-", "task-1\0"]
)
async def test_what_is_not_there_is_not_found(tasks: TaskStore, name: str) -> None:
    await refused(Code.TASK_NOT_FOUND, tasks.get_task(name))
    await refused(Code.TASK_NOT_FOUND, tasks.cancel_task(name))
    await refused(Code.TASK_NOT_FOUND, tasks.read_log(name, None, 0, 10))


async def test_an_idempotency_key_gives_its_first_task_again(tasks: TaskStore) -> None:
    key = Idempotency("key", b"body")
    first = await tasks.create_task(SPEC, key)
    assert plain(await tasks.create_task(SPEC, key)) == plain(first)
    await refused(
        Code.IDEMPOTENCY_CONFLICT, tasks.create_task(replace(SPEC, image="other"), Idempotency("key", b"other"))
    )
    at_once = await asyncio.gather(*(tasks.create_task(SPEC, Idempotency("new", b"body")) for _ in range(5)))
    assert len({task.task_id for task in at_once}) == 1
    assert (await tasks.totals())[TaskStatus.QUEUED] == 2


async def test_a_queued_task_is_cancelled_at_once_and_again(tasks: TaskStore) -> None:
    task = await tasks.create_task(SPEC)
    cancelled = await tasks.cancel_task(task.task_id)
    assert (cancelled.status, cancelled.reason) == (TaskStatus.CANCELLED, "Cancelled")
    assert cancelled.finished_at is not None
    assert await tasks.cancel_task(task.task_id) == cancelled


async def test_a_placed_task_is_asked_to_end(tasks: TaskStore, store: Store) -> None:
    task, _ = await placed(store)
    wished = await tasks.cancel_task(task.task_id)
    assert (wished.status, wished.cancel_requested, wished.version) == (TaskStatus.PENDING, True, task.version + 1)
    assert await tasks.cancel_task(task.task_id) == wished


async def test_a_finished_task_cannot_be_cancelled(tasks: TaskStore, store: Store) -> None:
    task = await finished(store)
    await refused(Code.TASK_FINISHED, tasks.cancel_task(task.task_id))
    assert await tasks.get_task(task.task_id) == task


async def test_lists_are_filtered_counted_and_newest_first(tasks: TaskStore) -> None:
    ann = [await tasks.create_task(SPEC) for _ in range(3)]
    ben = await tasks.create_task(replace(SPEC, user_id="ben"))
    await tasks.cancel_task(ann[0].task_id)

    async def listed(**query: object) -> tuple[list[str], int]:
        page = await tasks.list_tasks(TaskQuery(**query))  # type: ignore[arg-type]
        return [task.task_id for task in page.tasks], page.total

    everything = [ben.task_id, *(task.task_id for task in reversed(ann))]
    assert await listed() == (everything, 4)
    assert await listed(limit=2, offset=1) == (everything[1:3], 4)
    assert await listed(offset=9) == ([], 4)
    assert await listed(user_id="ben") == ([ben.task_id], 1)
    assert await listed(user_id="nobody") == ([], 0)
    assert await listed(status=TaskStatus.CANCELLED) == ([ann[0].task_id], 1)
    assert await listed(status=TaskStatus.QUEUED, user_id="ann") == ([ann[2].task_id, ann[1].task_id], 2)


async def test_totals_follow_every_change(tasks: TaskStore, store: Store) -> None:
    await finished(store)
    await placed(store)
    await tasks.cancel_task((await tasks.create_task(SPEC)).task_id)
    totals = {status: count for status, count in (await tasks.totals()).items() if count}
    assert totals == {TaskStatus.COMPLETED: 1, TaskStatus.PENDING: 1, TaskStatus.CANCELLED: 1}


async def test_a_log_is_read_in_pieces_and_waited_for(tasks: TaskStore, store: Store) -> None:
    task, run = await placed(store)
    nothing = await tasks.read_log(task.task_id, None, 0, 100)
    assert (nothing.data, nothing.end, nothing.complete) == (b"", 0, False)
    waiting = asyncio.ensure_future(tasks.wait_log(task.task_id, None, 0, 60))
    await store.append_log(run.run_id, 0, b"one two")
    await waiting
    piece = await tasks.read_log(task.task_id, 1, 4, 2)
    assert (piece.data, piece.end, piece.complete) == (b"tw", 7, False)
    assert (await tasks.read_log(task.task_id, None, 99, 100)).data == b""
    await refused(Code.ATTEMPT_NOT_FOUND, tasks.read_log(task.task_id, 2, 0, 100))


async def test_a_finished_log_is_complete(tasks: TaskStore, store: Store) -> None:
    task = await finished(store)
    log = await tasks.read_log(task.task_id, None, 0, 100)
    assert (log.data, log.complete) == (b"done", True)
    await tasks.wait_log(task.task_id, None, 4, 60)


async def test_workers_are_listed_with_what_they_hold(tasks: TaskStore, store: Store) -> None:
    assert await tasks.list_workers() == []
    await refused(Code.WORKER_NOT_FOUND, tasks.get_worker("worker-1"))
    await store.register_worker(WORKER)
    await placed(store)
    worker = await tasks.get_worker("worker-1")
    assert (worker.worker.capacity, worker.allocated, worker.runs) == (WORKER.capacity, SPEC.resources, 1)
    assert worker.available == WORKER.capacity - SPEC.resources
    assert [state.worker.worker_id for state in await tasks.list_workers()] == ["worker-1"]
