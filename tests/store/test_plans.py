"""Every list and every periodic query uses an index: its cost follows the answer, not the history."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sqlalchemy import Connection, event

from cloudai.resources import TaskStatus
from cloudai.store.protocol import TaskQuery
from cloudai.store.sql import SqlStore, open_store
from cloudai.store.tables import CHANGES, RUNS, TASKS
from tests.engines.postgres import Postgres
from tests.store.values import WORKER, finished, placed

SMALL = ("workers", "counters", "totals", "leases", "meta", "tokens")  # tables that do not grow with the history
Statement = tuple[str, Any]


async def asked_by(store: SqlStore) -> list[Statement]:
    """The statements, with their values, of everything that is asked of a store again and again."""
    asked: list[Statement] = []

    def note(_conn: object, _cursor: object, statement: str, values: Any, _context: object, many: bool) -> None:
        if statement.startswith(("SELECT", "UPDATE", "DELETE")):
            asked.append((statement, values[0] if many else values))

    for engine in (store._reads, store._writer._engine):
        event.listen(engine, "before_cursor_execute", note)
    await store.register_worker(WORKER)
    task = await finished(store)
    _, run = await placed(store)
    for status in (None, TaskStatus.COMPLETED):
        for user_id in (None, "ann"):
            await store.list_tasks(TaskQuery(status=status, user_id=user_id))
    await store.snapshot()
    await store.get_task(task.task_id)
    await store.get_tasks([task.task_id])
    await store.list_workers()
    await store.get_worker("worker-1")
    await store.totals()
    await store.runs_of_worker("worker-1")
    await store.get_runs([run.run_id])
    await store.list_runs(task.task_id)
    await store.read_log(task.task_id, None, 0, 10)
    await store.log_ends([run.run_id])
    await store.delete_logs(6000, 10)
    await store.delete_finished(6000, 10)
    await store.delete_workers(5)
    await store.prune_changes(5)
    await anext(store.watch(0))
    for engine in (store._reads, store._writer._engine):
        event.remove(engine, "before_cursor_execute", note)
    return asked


def is_list_of_tasks(statement: str) -> bool:
    return "ORDER BY tasks.id DESC" in statement


async def test_on_sqlite_no_query_scans_tasks_runs_changes_or_logs(tmp_path: Path) -> None:
    store = await open_store(f"sqlite:///{tmp_path}/cloudai.db")
    asked = await asked_by(store)
    with store._reads.begin() as connection:
        for statement, values in asked:
            newest = "WHERE" not in statement and is_list_of_tasks(statement)  # ends at its limit
            for row in connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", values).fetchall():
                step = row[3]
                if step.startswith("SCAN") and "INDEX runs_live" not in step and not newest:
                    assert step.split()[1] in (*SMALL, "CONSTANT"), f"{step}: {statement}"
                if is_list_of_tasks(statement):
                    assert "TEMP B-TREE" not in step, f"{step}: {statement}"
    await store.close()


async def test_on_postgresql_no_query_scans_tasks_runs_changes_or_logs(postgres: Postgres) -> None:
    store = await open_store(postgres.create("plans"))
    asked = await asked_by(store)
    assert sum(is_list_of_tasks(statement) for statement, _ in asked) == 4
    with store._writer._engine.begin() as connection:
        add_history(connection)
    with store._reads.begin() as connection:
        for statement, values in asked:
            plan = [row[0] for row in connection.exec_driver_sql(f"EXPLAIN {statement}", values)]
            scanned = {line.partition("Seq Scan on ")[2].split()[0] for line in plan if "Seq Scan on " in line}
            assert scanned <= set(SMALL), f"{statement}: {plan}"
            # Rows that an index finds and a condition then drops are history too.
            assert scanned or not any("Filter:" in line for line in plan), f"{statement}: {plan}"
    await store.close()


def add_history(connection: Connection, size: int = 20_000) -> None:
    """Tasks that failed long ago, a few of them ann's, made of one that is there: of a handful of rows a scan is best."""
    news = {
        TASKS: {
            "id": "number",
            "user_id": "CASE WHEN mod(number, 2000) = 0 THEN 'ann' ELSE 'user-' || number END",
            "status": "'failed'",
            "finished_at": "0",
            "logs_removed": "true",
            "idempotency_key": "NULL",
        },
        RUNS: {"task_id": "number", "phase": "'failed'"},
        CHANGES: {"revision": "1000000 + number"},
    }
    for table, given in news.items():
        names = [column.name for column in table.columns]
        values = ", ".join(given.get(name, f'"{name}"') for name in names)
        quoted = ", ".join(f'"{name}"' for name in names)
        one = f"(SELECT * FROM {table.name} LIMIT 1) AS one, generate_series(1, {size}) AS number"
        connection.exec_driver_sql(f"INSERT INTO {table.name} ({quoted}) SELECT {values} FROM {one}")
    numbers = f"generate_series(1, {size}) AS number"
    connection.exec_driver_sql(f"INSERT INTO logs SELECT number, 1, 1, 'x' FROM {numbers}")
    connection.exec_driver_sql("ANALYZE")
