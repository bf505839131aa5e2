"""One write transaction: the statements of all operations that share a commit, and the change log and totals they leave."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from sqlalchemy import Connection

from cloudai.store.protocol import Change, Kind
from cloudai.store.tables import GLOBAL_USER

CHUNK = 500  # keys in one IN (…)
ROWS = 64  # rows in one INSERT; a statement for each number of rows up to this one is kept prepared


def chunks(keys: Iterable[Any]) -> Iterator[list[Any]]:
    wanted = list(keys)
    for start in range(0, len(wanted), CHUNK):
        yield wanted[start : start + CHUNK]


class Transaction:
    """Begins by taking the revision counter, so that transactions that write are ordered like their revisions."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.postgres = connection.dialect.name == "postgresql"
        driver: Any = connection.connection.dbapi_connection
        self.session: int | None = driver.info.backend_pid if self.postgres else None
        lock = " FOR UPDATE" if self.postgres else ""
        row = self.one(f"SELECT value FROM counters WHERE name = 'revision'{lock}")
        assert row is not None
        self.revision: int = row[0]
        self.changes: list[Change] = []
        self.totals: defaultdict[tuple[str, str], int] = defaultdict(int)
        self.deleted: set[str] = set()  # users of tasks that went
        self.logs: set[str] = set()  # ids of tasks whose logs grew

    def all(self, sql: str, values: Sequence[Any] = ()) -> Sequence[Any]:
        return self.connection.exec_driver_sql(self._sql(sql), tuple(values)).fetchall()

    def one(self, sql: str, values: Sequence[Any] = ()) -> Any:
        return self.connection.exec_driver_sql(self._sql(sql), tuple(values)).fetchone()

    def run(self, sql: str, values: Sequence[Any] = ()) -> int:
        """Execute one statement; how many rows it touched."""
        return self.connection.exec_driver_sql(self._sql(sql), tuple(values)).rowcount

    def many(self, sql: str, rows: list[tuple[Any, ...]]) -> None:
        """Execute one statement for each row of values."""
        if rows:
            self.connection.exec_driver_sql(self._sql(sql), rows)

    def insert(self, table: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], suffix: str = "") -> None:
        """Insert many rows with few statements: each one is a chance for another thread to keep the interpreter busy."""
        marks = f"({', '.join('?' * len(columns))})"
        for start in range(0, len(rows), ROWS):
            part = rows[start : start + ROWS]
            sql = f"INSERT INTO {table} ({', '.join(columns)}) VALUES {', '.join([marks] * len(part))}{suffix}"
            self.run(sql, [value for row in part for value in row])

    def among(self, sql: str, keys: Iterable[Any]) -> list[Any]:
        """Rows of a SELECT whose text has `IN (KEYS)`, for any number of keys."""
        found: list[Any] = []
        for part in chunks(keys):
            found += self.all(sql.replace("KEYS", ", ".join("?" * len(part))), part)
        return found

    def _sql(self, sql: str) -> str:
        return sql.replace("?", "%s") if self.postgres else sql

    def change(self, kind: Kind, key: str, event: str) -> None:
        """Note that something changed; its revision is the next one."""
        self.revision += 1
        self.changes.append(Change(self.revision, kind, key, event))

    def count(self, user_id: str, before: str | None, after: str | None) -> None:
        """Move one task of a user from one status to another in the kept totals (None: from or to nowhere)."""
        if before == after:
            return
        for status, step in ((before, -1), (after, 1)):
            if status is not None:
                self.totals[user_id, status] += step
                self.totals[GLOBAL_USER, status] += step
        if after is None:
            self.deleted.add(user_id)

    def finish(self) -> None:
        """Write what the operations left behind; the commit comes next."""
        if self.changes:
            self.run("UPDATE counters SET value = ? WHERE name = 'revision'", (self.revision,))
            changes = [(change.revision, change.kind.value, change.key, change.event) for change in self.changes]
            self.insert("changes", ("revision", "kind", "key", "event"), changes)
        self.insert(
            "totals",
            ("user_id", "status", "count"),
            [(user, status, step) for (user, status), step in self.totals.items() if step],
            " ON CONFLICT (user_id, status) DO UPDATE SET count = totals.count + excluded.count",
        )
        # A user without tasks leaves nothing.
        self.many("DELETE FROM totals WHERE user_id = ? AND count = 0", [(user,) for user in self.deleted])
        if self.postgres:
            if self.changes:
                self.run("SELECT pg_notify('cloudai', '')")
            if self.logs:
                self.run("SELECT pg_notify('cloudai_log', unnest(?::text[]))", ([*self.logs],))
