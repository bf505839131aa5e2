"""A store whose place fails says `unavailable`, loses nothing that it acknowledged, and recovers by itself."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from pathlib import Path

import psycopg
import pytest
from sqlalchemy import Engine

from cloudai.errors import CloudAIError, Code
from cloudai.resources import TaskStatus
from cloudai.settings import Settings
from cloudai.store import engine, sql
from cloudai.store import postgres as postgres_connections
from cloudai.store.engine import READERS, migrating_engine, normal_url, reading_engine, writing_engine
from cloudai.store.protocol import Store, TaskQuery
from cloudai.store.sql import SqlStore, open_store
from tests.engines.postgres import Postgres
from tests.engines.proxy import Proxy
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


async def test_a_place_that_cannot_hold_a_database_is_told(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no database\n" * 100)
    (tmp_path / "directory").mkdir()
    for place, words in (
        ("missing/cloudai.db", "unable to open"),
        ("directory", "unable to open"),
        ("text", "not a database"),
    ):
        assert words in await refused(lambda place=place: open_store(f"sqlite:///{tmp_path}/{place}"))  # type: ignore[misc]


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


@pytest.mark.parametrize("name", ["a#1", "a%20b", "a b", "a?b"])
async def test_a_directory_may_have_any_name(tmp_path: Path, name: str) -> None:
    place = tmp_path / name
    os.mkdir(place)
    url = Settings(data_dir=place).url
    store = await open_store(url)
    task = await store.create_task(SPEC)
    assert await store.get_task(task.task_id) == task
    await store.close()
    again = await open_store(url)
    assert await again.get_task(task.task_id) == task
    await again.close()
    assert os.listdir(tmp_path) == [name]
    assert "cloudai.db" in os.listdir(place)


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


@contextlib.asynccontextmanager
async def opened(url: str) -> AsyncIterator[SqlStore]:
    store = await open_store(url)
    try:
        yield store
    finally:
        await store.close()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(postgres_connections, "SILENT_SECONDS", 0.5)


async def test_a_table_that_another_has_locked_refuses_and_recovers(postgres: Postgres) -> None:
    url = postgres.create("locked")
    async with opened(f"{url}?options=-c%20lock_timeout%3D200") as store:
        task = await store.create_task(SPEC)
        with psycopg.connect(url) as other:
            other.execute("LOCK TABLE tasks")
            assert "lock timeout" in await refused(lambda: store.create_task(SPEC))
            assert "lock timeout" in await refused(lambda: store.get_task(task.task_id))
            assert "lock timeout" in await refused(lambda: store.list_tasks(TaskQuery()))
        await store.create_task(SPEC)
        assert await consistent(store) == 2


@pytest.mark.usefixtures("impatient")
async def test_a_server_that_is_stopped_refuses_and_recovers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sql, "TURN_SECONDS", 0.2)
    with Postgres() as server:
        async with opened(f"{server.create('cloudai')}?connect_timeout=2") as store:
            task = await store.create_task(SPEC)
            server.pause()
            try:
                assert "has not answered" in await refused(lambda: store.create_task(SPEC))
                reads = [refused(lambda: store.list_tasks(TaskQuery())) for _ in range(3 * READERS)]
                reasons = await asyncio.gather(*reads)
                assert "those who asked before" in reasons[-1]  # it was not tried, to be answered at all
                await refused(lambda: store.get_task(task.task_id))
            finally:
                server.go_on()
            await back(store.ping)
            await back(lambda: store.get_task(task.task_id))
            await store.create_task(SPEC)
            await consistent(store)


@pytest.mark.usefixtures("impatient")
async def test_a_network_that_swallows_everything_refuses_and_recovers(postgres: Postgres) -> None:
    url = postgres.create("swallowed")
    with Proxy(postgres.port) as network:
        through = url.replace(str(postgres.port), str(network.port))
        async with opened(f"{through}?connect_timeout=2") as store, opened(url) as other:
            acknowledged = {(await store.create_task(SPEC)).task_id}
            watch = store.watch(1)
            network.cut()
            await refused(lambda: store.create_task(SPEC))
            await refused(lambda: store.list_tasks(TaskQuery()))
            acknowledged.add((await other.create_task(SPEC)).task_id)
            network.mend()
            await back(store.ping)
            await back(lambda: store.list_tasks(TaskQuery()))
            acknowledged.add((await store.create_task(SPEC)).task_id)
            found = await store.list_tasks(TaskQuery())
            assert acknowledged <= {task.task_id for task in found.tasks}
            assert await consistent(store) == await consistent(other)
            async with asyncio.timeout(60):
                assert [change.event for change in await anext(watch)] == ["queued"] * (found.total - 1)


@pytest.mark.usefixtures("impatient")
async def test_a_commit_whose_outcome_is_unknown_is_not_acknowledged(postgres: Postgres) -> None:
    """A COMMIT that waits for a second server that never comes: the first one has it, and nobody may be told so."""
    url = postgres.create("alone")
    async with opened(url) as store:
        acknowledged = 0
        with commits_wait_for_a_second_server(url), contextlib.suppress(CloudAIError):
            while acknowledged < 10_000:  # the server learns of its setting a moment later
                await store.create_task(SPEC)
                acknowledged += 1
        assert acknowledged < 10_000
        await back(store.ping)
        assert await consistent(store) == (await store.snapshot()).revision == acknowledged + 1


@contextlib.contextmanager
def commits_wait_for_a_second_server(url: str) -> Iterator[None]:
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("ALTER SYSTEM SET synchronous_standby_names = 'nobody'")
        connection.execute("SELECT pg_reload_conf()")
        try:
            yield
        finally:
            connection.execute("ALTER SYSTEM RESET synchronous_standby_names")
            connection.execute("SELECT pg_reload_conf()")


@pytest.mark.parametrize(
    ("engine_of", "lock", "statement", "open_transaction"),
    [(writing_engine, "5s", "30s", "10s"), (reading_engine, "5s", "30s", "10s"), (migrating_engine, "0", "0", "0")],
)
def test_readers_and_writers_wait_so_long_and_migrations_as_long_as_it_takes(
    postgres: Postgres, engine_of: Callable[[str], Engine], lock: str, statement: str, open_transaction: str
) -> None:
    names = ("lock_timeout", "statement_timeout", "idle_in_transaction_session_timeout")
    expected = dict(zip(names, (lock, statement, open_transaction), strict=True))
    assert shown(engine_of(normal_url(postgres.url())), *names) == expected


def test_what_the_url_says_goes_before(postgres: Postgres) -> None:
    url = normal_url(f"{postgres.url()}?application_name=mine&options=-c%20lock_timeout%3D1min%20-c%20work_mem%3D1MB")
    expected = {"application_name": "mine", "lock_timeout": "1min", "work_mem": "1MB", "statement_timeout": "30s"}
    assert shown(reading_engine(url), *expected) == expected


def shown(engine: Engine, *names: str) -> dict[str, str]:
    """Settings of a connection."""
    with engine.connect() as connection:
        found = {name: str(connection.exec_driver_sql(f"SHOW {name}").scalar_one()) for name in names}
    engine.dispose()
    return found


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
