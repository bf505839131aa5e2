"""Small reads of a SQLite store in the event loop itself: a look into the page cache is cheaper than asking a thread."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
from collections import namedtuple
from collections.abc import Collection
from pathlib import Path
from typing import Any

from cloudai.resources import Run, Task
from cloudai.store import rows
from cloudai.store.engine import file_uri
from cloudai.store.protocol import Change, Kind, Lease
from cloudai.store.tables import RUNS, TASKS

_TaskRow = namedtuple("_TaskRow", [column.name for column in TASKS.columns])  # type: ignore[misc]
_RunRow = namedtuple("_RunRow", [column.name for column in RUNS.columns])  # type: ignore[misc]
_VERSION = "SELECT version FROM tasks WHERE id = ?"
_TASK = f"SELECT {', '.join(_TaskRow._fields)} FROM tasks WHERE id = ?"
_RUN = f"SELECT {', '.join(_RunRow._fields)} FROM runs WHERE task_id = ? AND attempt = ?"
_LEASE = "SELECT name, holder, epoch, version FROM leases WHERE name = ?"
_REVISION = "SELECT value FROM counters WHERE name = 'revision'"
_CHANGES = "SELECT revision, kind, key, event FROM changes WHERE revision > ? ORDER BY revision LIMIT ?"
MOST = 64  # objects; more are read by a thread
REMEMBERED = 1_000  # tasks
LONG = 4096  # bytes of a command; a task with a longer one is not remembered


class NearReader:
    """Nothing here ever waits: where the database is busy or away it raises sqlite3.Error, and the threads have to ask.

    All reads of one turn of the event loop share a transaction, since to begin one costs more than to read. It ends
    before the loop hands out any request that came later, so nobody reads what was out of date when it was asked. Most
    reads are of a task that did not change since the last one: of those only the version is read.
    """

    def __init__(self, file: Path) -> None:
        self._connection = sqlite3.connect(f"{file_uri(file)}?mode=ro", uri=True, timeout=0, isolation_level=None)
        self._loop = asyncio.get_running_loop()
        self._reading = False
        self._known: dict[int, Task] = {}

    def task(self, key: int) -> Task | None:
        self._begin()
        row = self._connection.execute(_VERSION, (key,)).fetchone()
        if row is None:
            return None
        task = self._known.get(key)
        if task is None or task.version != row[0]:
            found: Any = _TaskRow._make(self._connection.execute(_TASK, (key,)).fetchone())
            task = rows.task(found)
            if len(self._known) >= REMEMBERED:
                self._known.clear()
            if len(found.command or "") <= LONG:
                self._known[key] = task
        return task

    def tasks(self, keys: Collection[int]) -> dict[int, Task]:
        return {key: task for key in keys if (task := self.task(key)) is not None}

    def runs(self, keys: Collection[tuple[int, int]]) -> dict[str, Run]:
        self._begin()
        found = (self._connection.execute(_RUN, key).fetchone() for key in keys)
        runs = [rows.run(_RunRow._make(row)) for row in found if row is not None]
        return {run.run_id: run for run in runs}

    def leases(self, name: str) -> list[Lease]:
        """The one of that name, or none."""
        self._begin()
        return [Lease(*row) for row in self._connection.execute(_LEASE, (name,))]

    def changes(self, since: int, limit: int) -> tuple[int, list[Change]]:
        """The newest revision, and up to `limit` changes after `since`, as of now: not of when this turn began."""
        self._end()
        self._begin()
        newest: int = self._connection.execute(_REVISION).fetchone()[0]
        found = self._connection.execute(_CHANGES, (since, limit)).fetchall()
        return newest, [Change(revision, Kind(kind), key, event) for revision, kind, key, event in found]

    def _begin(self) -> None:
        if not self._reading:
            self._connection.execute("BEGIN")
            self._reading = True
            self._loop.call_soon(self._end)

    def _end(self) -> None:
        if self._reading:
            self._reading = False
            with contextlib.suppress(sqlite3.Error):  # closed, or the disk fails: the next BEGIN tells
                self._connection.execute("ROLLBACK")

    def close(self) -> None:
        self._connection.close()
