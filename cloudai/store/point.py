"""Reading one task of a SQLite store in the event loop itself: a look into the page cache is cheaper than asking a thread."""

from __future__ import annotations

import sqlite3
from collections import namedtuple
from pathlib import Path

from cloudai.resources import Task
from cloudai.store import rows
from cloudai.store.tables import TASKS

_Row = namedtuple("_Row", [column.name for column in TASKS.columns])  # type: ignore[misc]
_SELECT = f"SELECT {', '.join(_Row._fields)} FROM tasks WHERE id = ?"


class PointReader:
    """`task` never waits: where the database is busy or away it raises sqlite3.Error, and the threads have to ask."""

    def __init__(self, file: Path) -> None:
        self._connection = sqlite3.connect(f"file:{file.absolute()}?mode=ro", uri=True, timeout=0, isolation_level=None)

    def task(self, key: int) -> Task | None:
        row = self._connection.execute(_SELECT, (key,)).fetchone()
        return None if row is None else rows.task(_Row._make(row))

    def close(self) -> None:
        self._connection.close()
