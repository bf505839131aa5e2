"""A store whose place fails says `unavailable`, loses nothing that it acknowledged, and recovers by itself."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path

import pytest

from cloudai.errors import CloudAIError, Code
from cloudai.resources import TaskStatus
from cloudai.store import engine
from cloudai.store.protocol import Store, TaskQuery
from cloudai.store.sql import open_store
from tests.engines.postgres import Postgres
from tests.store.values import SPEC, placed

SUBMIT_FOR_EVER = """
import asyncio, sys
from cloudai.store.sql import open_store
from tests.store.values import SPEC
async def main():
    store = await open_store(sys.argv[1])
    async def submit():
        while True:
            task = await store.create_task(SPEC)
            print(task.task_id, flush=True)
    await asyncio.gather(*(submit() for _ in range(16)))
asyncio.run(main())
"""


async def refused(work: Callable[[], Coroutine[None, None, object]]) -> str:
    with pytest.raises(CloudAIError) as caught:
        await work()
    assert caught.value.code is Code.UNAVAILABLE
    return str(caught.value.details["reason"])


async def back(work: Callable[[], Coroutine[None, None, object]]) -> None:
    """Wait until the store works again."""
    async with asyncio.timeout(60):
        while True:
            with contextlib.suppress(CloudAIError):
                await work()
                return
            await asyncio.sleep(0.05)


async def consistent(store: Store) -> int:
    """How many tasks there are, by list, total and change log alike."""
    page = await store.list_tasks(TaskQuery(limit=1000))
    assert sum((await store.totals()).values()) == page.total
    return page.total


async def test_a_full_disk_refuses_and_recovers(small_disk: Path) -> None:
    store = await open_store(f"sqlite:///{small_disk}/cloudai.db")
    task, run = await placed(store)
    ballast = small_disk / "ballast"
    with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(b"x" * 4096):
            pass
    acknowledged = 1
    with contextlib.suppress(CloudAIError):
        while acknowledged < 10_000:
            await store.create_task(SPEC)
            acknowledged += 1
    assert acknowledged < 10_000
    assert "full" in await refused(lambda: store.append_log(run.run_id, 0, b"x" * 1_000_000))
    assert (await store.get_task(task.task_id)) == task
    ballast.unlink()
    await back(store.ping)
    await store.create_task(SPEC)
    assert await consistent(store) == acknowledged + 1
    await store.close()


async def test_a_lock_that_is_held_too_long_refuses_and_recovers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "BUSY_SECONDS", 0.1)
    store = await open_store(f"sqlite:///{tmp_path}/cloudai.db")
    with contextlib.closing(sqlite3.connect(tmp_path / "cloudai.db", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        assert "locked" in await refused(lambda: store.create_task(SPEC))
        assert (await store.list_tasks(TaskQuery())).total == 0
        other.execute("ROLLBACK")
    await store.create_task(SPEC)
    assert await consistent(store) == 1
    await store.close()


async def test_a_database_file_that_vanished_takes_no_writes_until_it_is_back(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    store = await open_store(f"sqlite:///{tmp_path}/data/cloudai.db")
    await store.create_task(SPEC)
    shutil.move(tmp_path / "data", tmp_path / "elsewhere")
    assert "cloudai.db" in await refused(lambda: store.create_task(SPEC))
    shutil.move(tmp_path / "elsewhere", tmp_path / "data")
    await back(store.ping)
    await store.create_task(SPEC)
    assert await consistent(store) == 2
    await store.close()


async def test_a_server_that_was_away_is_used_again(postgres: Postgres) -> None:
    with Postgres() as server:
        store = await open_store(server.create("cloudai"))
        task = await store.create_task(SPEC)
        watch = store.watch(1)
        server.stop()
        await refused(lambda: store.create_task(SPEC))
        await refused(lambda: store.get_task(task.task_id))
        server.start()
        await back(store.ping)
        assert await store.get_task(task.task_id) == task
        await store.cancel_task(task.task_id)
        async with asyncio.timeout(60):
            assert [change.event for change in await anext(watch)] == ["cancelled"]
        await store.close()


@pytest.mark.parametrize("seconds", [0.3, 0.7])
def test_kill_amid_submits_loses_no_acknowledged_task(url: str, seconds: float) -> None:
    command = [sys.executable, "-c", SUBMIT_FOR_EVER, url]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    acknowledged = [process.stdout.readline().strip()]
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(seconds)
    process.kill()
    acknowledged += process.stdout.read().split()
    process.wait()
    process.stdout.close()

    async def look() -> None:
        store = await open_store(url)
        # The last line may have been cut in the middle of an id.
        found = await store.get_tasks([task_id for task_id in acknowledged if len(task_id) == len(acknowledged[0])])
        assert set(acknowledged[:-1]) <= set(found)
        totals = await store.totals()
        snapshot = await store.snapshot()
        assert totals[TaskStatus.QUEUED] == len(snapshot.tasks) == snapshot.revision
        await store.close()

    asyncio.run(look())
