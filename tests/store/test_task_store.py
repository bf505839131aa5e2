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
from cloudai.store.kube import store as kube
from cloudai.store.protocol import Idempotency, TaskQuery, TaskStore
from tests.api.conftest import serving
from tests.store.values import refused
from tests.store.worlds import OBEDIENT, TOO_LARGE, World


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """On Kubernetes a cancel waits a moment for the operator, and says so where that takes longer: here it is to wait."""
    monkeypatch.setattr(kube, "CANCEL_SECONDS", 60.0)


@pytest.fixture(params=["store", "client"])
async def tasks(request: pytest.FixtureRequest, world: World, tmp_path: Path) -> AsyncIterator[TaskStore]:
    """What is tested; `world.store` is what lies behind it."""
    if request.param == "store":
        yield world.store
        return
    settings = Settings(data_dir=tmp_path, rate_limit_enabled=False)
    async with serving(world.store, settings) as server, Client(f"http://127.0.0.1:{server.port}") as client:
        yield client


async def running(world: World) -> Task:
    task = await world.store.create_task(OBEDIENT)
    await world.run(task.task_id)
    return await world.store.get_task(task.task_id)


async def finished(world: World) -> Task:
    """A task that completed, having written `done`."""
    task = await running(world)
    await world.write(task.task_id, b"done\n")
    await world.end(task.task_id)
    return await world.store.get_task(task.task_id)


def plain(task: Task) -> Task:
    """Without the explanation that is added to a task that waits."""
    return replace(task, reason=None, message=None) if task.status is TaskStatus.QUEUED else task


async def test_a_new_task_is_queued_and_read_back_as_it_was_written(tasks: TaskStore, world: World) -> None:
    spec = replace(TOO_LARGE, command=("echo", "a b"), timeout_seconds=60, max_retries=2)
    task = await tasks.create_task(spec)
    assert (task.status, task.spec) == (TaskStatus.QUEUED, spec)
    assert task.version > 0
    assert plain(await tasks.get_task(task.task_id)) == plain(task)


async def test_many_submits_at_once_are_all_kept(tasks: TaskStore, world: World) -> None:
    made = await asyncio.gather(*(tasks.create_task(TOO_LARGE) for _ in range(100)))
    assert len({task.task_id for task in made}) == 100
    assert (await tasks.totals())[TaskStatus.QUEUED] == 100


@pytest.mark.parametrize(
    "name", ["task-1", "task-01", "task-x", "nothing", "task-99999999999999999999", "task-", "task-1\0"]
)
async def test_what_is_not_there_is_not_found(tasks: TaskStore, name: str) -> None:
    await refused(Code.TASK_NOT_FOUND, tasks.get_task(name))
    await refused(Code.TASK_NOT_FOUND, tasks.cancel_task(name))
    await refused(Code.TASK_NOT_FOUND, tasks.read_log(name, None, 0, 10))


async def test_an_idempotency_key_gives_its_first_task_again(tasks: TaskStore, world: World) -> None:
    key = Idempotency("key", b"body")
    first = await tasks.create_task(TOO_LARGE, key)
    assert plain(await tasks.create_task(TOO_LARGE, key)) == plain(first)
    await refused(
        Code.IDEMPOTENCY_CONFLICT,
        tasks.create_task(replace(TOO_LARGE, image="other"), Idempotency("key", b"other")),
    )
    at_once = await asyncio.gather(*(tasks.create_task(TOO_LARGE, Idempotency("new", b"body")) for _ in range(5)))
    assert len({task.task_id for task in at_once}) == 1
    assert (await tasks.totals())[TaskStatus.QUEUED] == 2


async def test_a_queued_task_is_cancelled_at_once_and_again(tasks: TaskStore, world: World) -> None:
    await world.begin()
    task = await tasks.create_task(TOO_LARGE)
    cancelled = await tasks.cancel_task(task.task_id)
    assert (cancelled.status, cancelled.reason) == (TaskStatus.CANCELLED, "Cancelled")
    assert cancelled.finished_at is not None
    assert await tasks.cancel_task(task.task_id) == cancelled


async def test_a_running_task_is_asked_to_end(tasks: TaskStore, world: World) -> None:
    task = await running(world)
    wished = await tasks.cancel_task(task.task_id)
    assert (wished.status, wished.cancel_requested) == (task.status, True)
    assert wished.version > task.version
    assert await tasks.cancel_task(task.task_id) == wished


async def test_a_finished_task_cannot_be_cancelled(tasks: TaskStore, world: World) -> None:
    task = await finished(world)
    await refused(Code.TASK_FINISHED, tasks.cancel_task(task.task_id))
    assert await tasks.get_task(task.task_id) == task


async def test_lists_are_filtered_counted_and_newest_first(tasks: TaskStore, world: World) -> None:
    await world.begin()
    ann = [await tasks.create_task(TOO_LARGE) for _ in range(3)]
    ben = await tasks.create_task(replace(TOO_LARGE, user_id="ben"))
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


async def test_totals_follow_every_change(tasks: TaskStore, world: World) -> None:
    await finished(world)
    await running(world)
    await tasks.cancel_task((await tasks.create_task(TOO_LARGE)).task_id)
    totals = {status: count for status, count in (await tasks.totals()).items() if count}
    assert totals == {TaskStatus.COMPLETED: 1, TaskStatus.RUNNING: 1, TaskStatus.CANCELLED: 1}


async def test_a_log_is_read_in_pieces_and_waited_for(tasks: TaskStore, world: World) -> None:
    task = await running(world)
    nothing = await tasks.read_log(task.task_id, None, 0, 100)
    assert (nothing.data, nothing.end, nothing.complete) == (b"", 0, False)
    waiting = asyncio.ensure_future(_said(tasks, task.task_id))
    await world.write(task.task_id, b"one two\n")
    await waiting
    piece = await tasks.read_log(task.task_id, 1, 4, 2)
    assert (piece.data, piece.end, piece.complete) == (b"tw", 8, False)
    assert (await tasks.read_log(task.task_id, None, 99, 100)).data == b""
    await refused(Code.ATTEMPT_NOT_FOUND, tasks.read_log(task.task_id, 2, 0, 100))


async def _said(tasks: TaskStore, task_id: str) -> None:
    """Return when something of the log is there."""
    async with asyncio.timeout(60):
        while (await tasks.read_log(task_id, None, 0, 1)).end == 0:
            await tasks.wait_log(task_id, None, 0, 60)


async def test_a_finished_log_is_complete(tasks: TaskStore, world: World) -> None:
    task = await finished(world)
    log = await tasks.read_log(task.task_id, None, 0, 100)
    assert (log.data, log.complete) == (b"done\n", True)
    await tasks.wait_log(task.task_id, None, 5, 60)


async def test_workers_are_listed_with_what_they_hold(tasks: TaskStore, world: World) -> None:
    await refused(Code.WORKER_NOT_FOUND, tasks.get_worker("nobody"))
    task = await running(world)
    name = world.worker_id
    state = await tasks.get_worker(name)
    assert state.runs >= 1
    assert task.spec.resources.within(state.allocated)
    assert state.available + state.allocated == state.worker.capacity
    assert name in [other.worker.worker_id for other in await tasks.list_workers()]
    assert task.task_id in [run.task_id for run in await world.store.runs_of_worker(name)]
