"""What a million finished tasks cost those who come after them: a POST, and a pass of the controller."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import tempfile
import time
from pathlib import Path

from cloudai.store.sql import SqlStore, open_store
from tests.bench.http import cloudai, post, rate
from tests.bench.placements import fill, place
from tests.bench.table import Row, costs
from tests.store.values import WORKER, finished

HISTORY = 1_000_000
ROUNDS = 7
POSTS = 4_000
PLACED = 2_000  # tasks a round
USERS = 100


def remember(database: Path) -> None:
    """Copy one task that really finished, with its run and its log, until there are HISTORY."""
    at = time.time_ns() // 1_000_000

    async def one() -> None:
        store = await open_store(f"sqlite:///{database}")
        await store.register_worker(WORKER)
        await finished(store, at=at)
        await store.close()

    asyncio.run(one())
    with contextlib.closing(sqlite3.connect(database)) as connection:
        connection.execute("PRAGMA synchronous = OFF")
        connection.execute("CREATE TEMP TABLE n AS WITH RECURSIVE r(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM r LIMIT ?)"
                           " SELECT n FROM r", (HISTORY - 1,))  # fmt: skip
        for table, key in (("tasks", "id"), ("runs", "task_id"), ("logs", "task_id")):
            columns = [row[1] for row in connection.execute(f"PRAGMA table_info({table})")]
            special = {key: f"{key} - n * 1000", "user_id": f"'user-' || (n % {USERS})"}
            values = ", ".join(special.get(column, column) for column in columns)
            # The oldest first, as they came.
            connection.execute(f"INSERT INTO {table} SELECT {values} FROM {table}, n ORDER BY n DESC")
        total = "INSERT INTO totals SELECT user_id, status, count(*) FROM tasks GROUP BY 1, 2"
        connection.execute(f"{total} ON CONFLICT DO UPDATE SET count = excluded.count")
        connection.execute("UPDATE totals SET count = ? WHERE user_id = '' AND status = 'completed'", (HISTORY,))
        connection.execute("DELETE FROM workers")
        connection.commit()


def posts() -> Row:
    with cloudai() as empty, cloudai(prepare=remember) as old:
        with_history, without = [], []
        for turn in range(ROUNDS + 1):
            now = (rate(old.port, [post("/api/tasks")], POSTS), rate(empty.port, [post("/api/tasks")], POSTS))
            if turn:  # the first round warms both up
                with_history.append(now[0])
                without.append(now[1])
    what = f"POST with {HISTORY:,} finished tasks"
    return costs(what, with_history, without, 1.15, "make bench ARGS=history")


async def _plans(old: Path, empty: Path) -> Row:
    stores: list[SqlStore] = []
    for database in (old, empty):
        stores.append(await open_store(f"sqlite:///{database}"))
        await fill(stores[-1], (ROUNDS + 1) * PLACED)
    taken: list[list[float]] = [[], []]
    for turn in range(ROUNDS + 1):
        for store, seconds in zip(stores, taken, strict=True):
            began = time.perf_counter()
            await place(store, PLACED)
            if turn:
                seconds.append(PLACED / (time.perf_counter() - began))
    for store in stores:
        await store.close()
    what = f"plan and placing with {HISTORY:,} finished tasks"
    return costs(what, taken[0], taken[1], 1.15, "make bench ARGS=history")


def plans() -> Row:
    with tempfile.TemporaryDirectory() as directory:
        old, empty = Path(directory) / "old.db", Path(directory) / "empty.db"
        remember(old)
        return asyncio.run(_plans(old, empty))


def cost() -> list[Row]:
    return [posts(), plans()]
