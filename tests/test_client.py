"""The task store over HTTP, against a real API over a real SQLite."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from cloudai.cli.follow import follow
from cloudai.cli.place import listen, url_of
from cloudai.cli.serving import api_part
from cloudai.cli.session import Session
from cloudai.client import WAIT_SECONDS, Client, Document
from cloudai.errors import CloudAIError, Code
from cloudai.resources import GIB, Resources, Run, RunPhase, Task, TaskSpec, TaskStatus, Worker
from cloudai.settings import load
from cloudai.store.protocol import Idempotency, RunReport, Store, TaskQuery, TaskStore
from cloudai.store.sql import open_store

SPEC = TaskSpec(
    user_id="ada",
    image="busybox",
    command=("echo", "a b"),
    resources=Resources(cpu=100, memory=GIB // 10, storage=GIB // 3, gpu=500),
    timeout_seconds=60,
    max_retries=2,
)


@contextlib.asynccontextmanager
async def served(directory: Path, **settings: object) -> AsyncIterator[tuple[Store, str]]:
    """A store and the URL of an API over it."""
    chosen = load({"data_dir": directory, "port": 0, "rate_limit_enabled": False} | settings)
    store = await open_store(chosen.url)
    stop, listening = asyncio.Event(), asyncio.Event()
    with listen(chosen) as listener:
        url = url_of(listener, chosen.host)
        serving = asyncio.ensure_future(api_part(store, chosen, listener, listening)(stop))
        try:
            await listening.wait()
            yield store, url
        finally:
            stop.set()
            await serving
            await store.close()


@pytest.fixture
async def pair(tmp_path: Path) -> AsyncIterator[tuple[Store, Client]]:
    async with served(tmp_path) as (store, url), Client(url) as client:
        yield store, client


async def placed(store: Store, task: Task, phase: RunPhase = RunPhase.RUNNING) -> None:
    """The task as a controller and a worker would have it: attempt 1 on worker `w`."""
    worker = Worker(
        worker_id="w",
        identity="identity",
        address="127.0.0.1:1",
        capacity=Resources(4000, 8 * GIB, 100 * GIB, 2000),
        runtime="docker",
        registered_at=1_700_000_000_000,
        last_heartbeat=1_700_000_000_000,
    )
    await store.register_worker(worker)
    spec = task.spec
    run = Run(
        task_id=task.task_id,
        attempt=1,
        worker_id="w",
        user_id=spec.user_id,
        image=spec.image,
        command=spec.command,
        resources=spec.resources,
    )
    await store.commit([[replace(task, status=TaskStatus.PENDING, attempt=1, worker_id="w"), run]])
    for step in (RunPhase.STARTING, phase):
        await store.report_run(RunReport(task_id=task.task_id, attempt=1, worker_id="w", phase=step))


def is_a_task_store(client: Client) -> TaskStore:
    """mypy holds the client to the protocol here."""
    return client


async def test_a_task_reads_as_the_store_has_it(pair: tuple[Store, Client]) -> None:
    store, client = pair
    made = await client.create_task(SPEC)
    assert made.spec == SPEC
    assert made == await store.get_task(made.task_id) or made.reason == "NoWorkers"
    assert replace(made, reason=None, message=None) == await store.get_task(made.task_id)


async def test_a_command_may_be_a_line_or_absent(pair: tuple[Store, Client]) -> None:
    _, client = pair
    for command in ("echo hi", None):
        assert (await client.create_task(replace(SPEC, command=command))).spec.command == command


async def test_a_repeated_key_gives_the_first_task(pair: tuple[Store, Client]) -> None:
    _, client = pair
    key = Idempotency("once", b"")
    first = await client.create_task(SPEC, key)
    assert await client.create_task(SPEC, key) == first
    with pytest.raises(CloudAIError) as error:
        await client.create_task(replace(SPEC, user_id="eve"), key)
    assert error.value.code is Code.IDEMPOTENCY_CONFLICT


async def test_lists_are_pages_of_whole_tasks(pair: tuple[Store, Client]) -> None:
    _, client = pair
    tasks = [await client.create_task(replace(SPEC, user_id=user)) for user in ("ada", "bob", "ada")]
    page = await client.list_tasks(TaskQuery(user_id="ada", limit=1))
    assert (page.tasks, page.total) == ([tasks[2]], 2)
    assert (await client.list_tasks(TaskQuery(status=TaskStatus.RUNNING))).total == 0


async def test_cancelling_reads_cancelled_once_it_is(pair: tuple[Store, Client]) -> None:
    store, client = pair
    queued, running = await client.create_task(SPEC), await client.create_task(SPEC)
    assert (await client.cancel_task(queued.task_id)).status is TaskStatus.CANCELLED
    await placed(store, await store.get_task(running.task_id))
    task = await client.cancel_task(running.task_id)
    assert (task.status, task.cancel_requested) == (TaskStatus.PENDING, True)


async def test_workers_read_as_the_store_has_them_but_for_their_identity(pair: tuple[Store, Client]) -> None:
    store, client = pair
    await placed(store, await client.create_task(SPEC))
    (stored,) = await store.list_workers()
    (read,) = await client.list_workers()
    assert (read.allocated, read.runs) == (SPEC.resources, 1)
    assert read.worker == replace(stored.worker, identity="")
    assert await client.get_worker("w") == read
    assert (await client.totals())[TaskStatus.PENDING] == 1


async def test_unknown_tasks_and_workers_are_told(pair: tuple[Store, Client]) -> None:
    _, client = pair
    for asked, code in (
        (client.get_task("task-1"), Code.TASK_NOT_FOUND),
        (client.get_worker("x"), Code.WORKER_NOT_FOUND),
    ):
        with pytest.raises(CloudAIError) as error:
            await asked
        assert error.value.code is code


async def test_a_log_is_read_in_slices(pair: tuple[Store, Client]) -> None:
    store, client = pair
    task = await client.create_task(SPEC)
    await placed(store, task)
    await store.append_log(f"{task.task_id}-1", 0, b"hello world")
    assert await client.read_log(task.task_id, None, 0, 5) == await store.read_log(task.task_id, None, 0, 5)
    assert (await client.read_log(task.task_id, 1, 6, 100)).data == b"world"
    assert (await client.read_log(task.task_id, 1, 100, 5)).data == b""


async def test_a_log_is_followed_to_its_end(pair: tuple[Store, Client]) -> None:
    store, client = pair
    task = await client.create_task(SPEC)
    await placed(store, task)
    pieces = client.log(task.task_id, follow=True)
    await store.append_log(f"{task.task_id}-1", 0, b"one")
    assert await anext(pieces) == b"one"
    await store.append_log(f"{task.task_id}-1", 3, b"two")
    await store.report_run(RunReport(task_id=task.task_id, attempt=1, worker_id="w", phase=RunPhase.SUCCEEDED))
    assert b"".join([piece async for piece in pieces]) == b"two"


async def test_waiting_for_more_of_a_log_returns_when_it_comes(pair: tuple[Store, Client]) -> None:
    store, client = pair
    task = await client.create_task(SPEC)
    await placed(store, task)
    waiting = asyncio.ensure_future(client.wait_log(task.task_id, 1, 0, 60))
    await store.append_log(f"{task.task_id}-1", 0, b"x")
    async with asyncio.timeout(30):
        await waiting
    await client.wait_log(task.task_id, 1, 1, 0.01)  # nothing comes: the time is over


async def test_a_changed_task_is_told_at_once(pair: tuple[Store, Client]) -> None:
    store, client = pair
    task = await client.create_task(SPEC)
    waiting = asyncio.ensure_future(client.changed_task(await client.task(task.task_id)))
    await store.cancel_task(task.task_id)
    async with asyncio.timeout(20):
        assert (await waiting)["status"] == "cancelled"


class Asking(Client):
    """`patience`: for how long it asked for a change, once it has."""

    patience: asyncio.Future[int]

    async def changed_task(self, task: Document, seconds: int = WAIT_SECONDS) -> Document:
        if not self.patience.done():
            self.patience.set_result(seconds)
        return await super().changed_task(task, seconds)


async def test_following_a_placed_task_without_its_log_asks_for_as_long_as_any_client(tmp_path: Path) -> None:
    async with served(tmp_path) as (store, url), Asking(url) as client:
        client.patience = asyncio.Future()
        task = await client.create_task(SPEC)
        await placed(store, task)
        following = asyncio.ensure_future(follow(Session(client, json=True), task.task_id))
        async with asyncio.timeout(30):
            assert await client.patience == WAIT_SECONDS
            await store.commit([[replace(await store.get_task(task.task_id), status=TaskStatus.FAILED)]])
            assert (await following)["status"] == "failed"


async def test_a_limited_client_waits_and_goes_on(tmp_path: Path) -> None:
    notices: list[str] = []
    async with served(tmp_path, rate_limit_enabled=True, rate_limit_submit="1/second") as (store, url):
        async with Client(url, notices.append) as client:
            for _ in range(3):
                await client.create_task(SPEC)
        assert (await store.totals())[TaskStatus.QUEUED] == 3
    assert notices
    assert set(notices) == {"The server limits requests; going on in 1 s"}
