"""Every list and every periodic query uses an index: its cost follows the answer, not the history."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, event

from cloudai.resources import TaskStatus
from cloudai.store.protocol import TaskQuery
from cloudai.store.sql import SqlStore, open_store
from tests.store.values import WORKER, finished, placed

SMALL = ("workers", "counters", "totals", "leases", "meta", "tokens")  # tables that do not grow with the history


@pytest.fixture
async def store(tmp_path: Path) -> SqlStore:
    return await open_store(f"sqlite:///{tmp_path}/cloudai.db")


async def test_no_query_scans_tasks_runs_changes_or_logs(store: SqlStore) -> None:
    asked: list[tuple[str, Any]] = []

    def note(_conn: object, _cursor: object, statement: str, values: Any, *_: object) -> None:
        asked.append((statement, values))

    engines: list[Engine] = [store._reads, store._writer._engine]
    for engine in engines:
        event.listen(engine, "before_cursor_execute", note)
    await store.register_worker(WORKER)
    task = await finished(store)
    _, run = await placed(store)
    for status in (None, TaskStatus.COMPLETED):
        for user_id in (None, "ann"):
            await store.list_tasks(TaskQuery(status=status, user_id=user_id))
    await store.snapshot()
    await store.get_worker("worker-1")
    await store.runs_of_worker("worker-1")
    await store.get_runs([run.run_id])
    await store.list_runs(task.task_id)
    await store.read_log(task.task_id, None, 0, 10)
    await store.log_ends([run.run_id])
    await store.delete_logs(1, 10)
    await store.delete_finished(1, 10)
    await store.prune_changes(5)
    await anext(store.watch(0))
    with store._reads.begin() as connection:
        for statement, values in asked:
            if not statement.startswith(("SELECT", "UPDATE", "DELETE")):
                continue
            newest = "WHERE" not in statement and "ORDER BY tasks.id DESC\n LIMIT" in statement  # ends at its limit
            for row in connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", values).fetchall():
                step = row[3]
                if step.startswith("SCAN") and "INDEX runs_live" not in step and not newest:
                    assert step.split()[1] in (*SMALL, "CONSTANT"), f"{step}: {statement}"
    await store.close()
