"""Migrations make the schema that the tables say, whoever comes first."""

from __future__ import annotations

import asyncio
import subprocess
import sys

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import text
from sqlmodel import SQLModel

from cloudai.store import tables
from cloudai.store.engine import create_sqlite_file, migrating_engine, normal_url, sqlite_file, writing_engine
from cloudai.store.migrate import SchemaTooNew, configuration, migrate
from cloudai.store.sql import open_store
from tests.store.values import SPEC

OPEN = """
import asyncio, sys
from cloudai.store.sql import open_store
async def main():
    store = await open_store(sys.argv[1])
    print(store.cluster_id)
    await store.close()
asyncio.run(main())
"""


def test_the_migrated_schema_is_that_of_the_tables(url: str) -> None:
    migrate(normal_url(url))
    engine = writing_engine(normal_url(url))
    with engine.begin() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, SQLModel.metadata) == []
        indexes = connection.execute(text(_INDEXES[engine.dialect.name])).scalars().all()
    engine.dispose()
    assert {index.name for table in SQLModel.metadata.tables.values() for index in table.indexes} <= set(indexes)
    assert tables.TASKS.indexes


_INDEXES = {
    "sqlite": "SELECT name FROM sqlite_master WHERE type = 'index'",
    "postgresql": "SELECT indexname FROM pg_indexes",
}


def test_several_processes_may_open_a_new_database_at_once(url: str) -> None:
    command = [sys.executable, "-c", OPEN, url]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(4)]
    answers = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [0] * 4, answers
    assert len({out for out, _ in answers}) == 1


async def test_a_database_keeps_what_it_has_when_opened_again(url: str) -> None:
    store = await open_store(url)
    task = await store.create_task(SPEC)
    cluster_id = store.cluster_id
    await store.close()
    store = await open_store(url)
    assert await store.get_task(task.task_id) == task
    assert store.cluster_id == cluster_id
    await store.close()


async def test_what_the_first_schema_held_is_there_in_the_newest(url: str) -> None:
    at = normal_url(url)
    if (file := sqlite_file(at)) is not None:
        create_sqlite_file(file)
    engine = migrating_engine(at)
    with engine.begin() as connection:
        command.upgrade(configuration(connection), "0001")
        names = "worker_id, identity, address, cpu, memory, storage, gpu, runtime, registered_at, last_heartbeat, ready"
        connection.execute(
            text(f"INSERT INTO workers ({names}) VALUES ('w', 'i', 'h:1', 1, 2, 3, 4, 'docker', 5, 6, true)")
        )
    engine.dispose()
    store = await open_store(url)
    [state] = await store.list_workers()
    assert (state.worker.worker_id, state.worker.last_heartbeat, state.worker.lease) == ("w", 6, 0)
    await store.close()


async def test_a_newer_schema_is_refused_in_words(url: str) -> None:
    await (await open_store(url)).close()
    engine = writing_engine(normal_url(url))
    with engine.begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    engine.dispose()
    with pytest.raises(SchemaTooNew, match="newer version"):
        await open_store(url)


@pytest.mark.parametrize("url", ["mysql://localhost/x", "sqlite://", "sqlite:///:memory:"])
def test_another_kind_of_database_is_refused_in_words(url: str) -> None:
    with pytest.raises(ValueError, match="database_url"):
        asyncio.run(open_store(url))
