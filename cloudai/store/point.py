"""Reading one task of a SQLite store in the event loop itself: a look into the page cache is cheaper than asking a thread."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
from collections import namedtuple
from pathlib import Path

from cloudai.resources import Task
from cloudai.store import rows
from cloudai.store.tables import TASKS

_Row = namedtuple("_Row", [column.name for column in TASKS.columns])  # type: ignore[misc]
_VERSION = "SELECT version FROM tasks WHERE id = ?"
_SELECT = f"SELECT {', '.join(_Row._fields)} FROM tasks WHERE id = ?"
REMEMBERED = 1_000  # tasks


class PointReader:
    """`task` never waits: where the database is busy or away it raises sqlite3.Error, and the threads have to ask.

    All reads of one turn of the event loop share a transaction, since to begin one costs more than to read. It ends
    before the loop hands out any request that came later, so nobody reads what was out of date when it was asked. Most
    reads are of a task that did not change since the last one: of those only the version is read.
    """

    def __init__(self, file: Path) -> None:
        self._connection = sqlite3.connect(f"file:{file.absolute()}?mode=ro", uri=True, timeout=0, isolation_level=None)
        self._loop = asyncio.get_running_loop()
        self._reading = False
        self._known: dict[int, Task] = {}

    def task(self, key: int) -> Task | None:
        if not self._reading:
            self._connection.execute("BEGIN")
            self._reading = True
            self._loop.call_soon(self._end)
        row = self._connection.execute(_VERSION, (key,)).fetchone()
        if row is None:
            return None
        task = self._known.get(key)
        if task is None or task.version != row[0]:
            row = self._connection.execute(_SELECT, (key,)).fetchone()
            if len(self._known) >= REMEMBERED:
                self._known.clear()
            task = self._known[key] = rows.task(_Row._make(row))
        return task

    def _end(self) -> None:
        self._reading = False
        with contextlib.suppress(sqlite3.ProgrammingError):  # closed
            self._connection.execute("ROLLBACK")

    def close(self) -> None:
        self._connection.close()
