"""What was written at any revision of the schema is there, and can be read, after the upgrade to the newest.

Each revision that Alembic knows is tried by itself. A column that a later one adds gets a value here where it needs one.
"""

from __future__ import annotations

from typing import Any

import pytest
from alembic import command
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, MetaData, Table, select

from cloudai.resources import GIB, GpuShare, Resources, RunPhase, TaskStatus
from cloudai.store.engine import create_sqlite_file, migrating_engine, normal_url, sqlite_file
from cloudai.store.migrate import configuration, migrate
from cloudai.store.protocol import Kind, Lease, TaskQuery
from cloudai.store.sql import open_store

REVISIONS = [script.revision for script in ScriptDirectory.from_config(configuration()).walk_revisions()]
Row = dict[str, Any]

_AMOUNTS = {"cpu": 1500, "memory": GIB, "storage": 2 * GIB, "gpu": 500}
_WISH = {"user_id": "ann", "image": "busybox", "command": '["echo","hi"]', "timeout_seconds": 60, **_AMOUNTS}
_END = {"started_at": 2000, "finished_at": 3000, "exit_code": 3, "reason": "ExitCode", "message": "It said 3."}
ROWS: dict[str, Row] = {
    "tasks": {
        "id": 7,
        "version": 4,
        **_WISH,
        "max_retries": 2,
        "status": "failed",
        "created_at": 1000,
        "attempt": 1,
        "cancel_requested": False,
        "worker_id": "worker-1",
        **_END,
        "idempotency_key": "nightly",
        "body_digest": b"\x00\xff",
        "logs_removed": False,
    },
    "runs": {
        "task_id": 7,
        "attempt": 1,
        "version": 3,
        "worker_id": "worker-1",
        **_WISH,
        "gpus": "[[1,500]]",
        "created_at": 1000,
        "stop_requested": False,
        "phase": "failed",
        **_END,
    },
    "logs": {"task_id": 7, "attempt": 1, "end": 3, "data": b"h\x00i"},
    "workers": {
        "worker_id": "worker-1",
        "identity": "identity-1",
        "address": "10.0.0.1:50052",
        "cpu": 4000,
        "memory": 8 * GIB,
        "storage": 0,
        "gpu": 2000,
        "runtime": "docker",
        "registered_at": 10,
        "last_heartbeat": 20,
        "ready": False,
        "problem": "no engine",
        "cpu_usage": 12.5,
        "memory_usage": None,
        "lease": 300_000,
    },
    "changes": {"revision": 1, "kind": "task", "key": "task-7", "event": "failed"},
    "counters": {"name": "revision", "value": 1},
    "totals": {"user_id": "", "status": "failed", "count": 1},
    "leases": {"name": "controller", "holder": "one", "epoch": 2, "version": 5},
    "tokens": {"digest": b"\x01" * 32, "name": "machines", "created_at": 5},
    "meta": {"name": "cluster_id", "value": "0123456789abcdef"},
}
OTHERS = {"totals": [{"user_id": "ann", "status": "failed", "count": 1}]}


def tables(connection: Connection) -> dict[str, Table]:
    """Those of the database as it is now."""
    found = MetaData()
    found.reflect(connection)
    return {name: table for name, table in found.tables.items() if name != "alembic_version"}


def rows_for(table: Table) -> list[Row]:
    names = {column.name for column in table.columns}
    return [
        {name: value for name, value in row.items() if name in names}
        for row in [ROWS[table.name], *OTHERS.get(table.name, [])]
    ]


def stored(connection: Connection, table: Table, row: Row) -> Row:
    """The row of the same key, as far as it has the same columns."""
    common = [column for column in table.columns if column.name in row]
    key = [column == row[column.name] for column in table.primary_key]
    return dict(connection.execute(select(*common).where(*key)).mappings().one())


@pytest.mark.parametrize("revision", REVISIONS)
async def test_what_was_written_at_a_revision_survives_the_upgrade(url: str, revision: str) -> None:
    url = normal_url(url)
    file = sqlite_file(url)
    if file is not None:
        create_sqlite_file(file)
    engine = migrating_engine(url)
    with engine.begin() as connection:
        command.upgrade(configuration(connection), revision)
        before = {name: rows_for(table) for name, table in tables(connection).items()}
        for name, table in tables(connection).items():
            connection.execute(table.insert(), before[name])
    migrate(url)
    with engine.begin() as connection:
        for name, table in tables(connection).items():
            for row in before.get(name, []):
                kept = stored(connection, table, row)
                assert kept == {column: row[column] for column in kept}, name
    engine.dispose()
    await readable(url)


async def readable(url: str) -> None:
    """The store of this version makes of it what was meant."""
    store = await open_store(url)
    task = await store.get_task("task-7")
    assert (task.status, task.exit_code, task.version) == (TaskStatus.FAILED, 3, 4)
    assert (task.spec.command, task.spec.resources) == (("echo", "hi"), Resources(1500, GIB, 2 * GIB, 500))
    assert await store.list_tasks(TaskQuery(user_id="ann", status=TaskStatus.FAILED)) == await store.list_tasks(
        TaskQuery()
    )
    assert (await store.totals())[TaskStatus.FAILED] == 1
    (run,) = await store.list_runs("task-7")
    assert (run.phase, run.gpus, run.finished_at) == (RunPhase.FAILED, (GpuShare(1, 500),), 3000)
    assert (await store.read_log("task-7", None, 0, 10)).data == b"h\x00i"
    worker = (await store.get_workers())["worker-1"]
    assert (worker.identity, worker.ready, worker.problem) == ("identity-1", False, "no engine")
    assert [(change.kind, change.key) for change in await anext(store.watch(0))] == [(Kind.TASK, "task-7")]
    assert await store.get_lease("controller") == Lease("controller", "one", 2, 5)
    assert await store.has_token(b"\x01" * 32)
    assert store.cluster_id == "0123456789abcdef"
    await store.close()


def test_a_row_is_written_with_every_column_that_a_database_of_today_has(url: str) -> None:
    """A new column, or a new table, needs a value in ROWS: then the revision that brings it is tried with data as well."""
    migrate(normal_url(url))
    engine = migrating_engine(normal_url(url))
    with engine.begin() as connection:
        names = {name: {column.name for column in table.columns} for name, table in tables(connection).items()}
    engine.dispose()
    assert names == {name: set(row) for name, row in ROWS.items()}
