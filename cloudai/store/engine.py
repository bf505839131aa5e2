"""Connections to SQLite and PostgreSQL, and what their errors mean for a caller."""

from __future__ import annotations

import sqlite3
import time
from pathlib import Path
from typing import Any
from urllib.parse import quote

from sqlalchemy import URL, Connection, Engine, create_engine, event, make_url
from sqlalchemy.exc import (
    DBAPIError,
    InterfaceError,
    InternalError,
    OperationalError,
    ResourceClosedError,
    TimeoutError,
)

from cloudai.errors import CloudAIError, unavailable

BUSY_SECONDS = 5.0  # how long to wait for another process that writes the same SQLite file
READERS = 4


class Vanished(Exception):
    """The database file is not the one that was opened; what is written to it would be lost."""


def normal_url(url: str) -> str:
    """`postgresql://…` with the driver that CloudAI brings. Raises ValueError for another kind of database."""
    parsed = make_url(url)
    if parsed.get_backend_name() == "postgresql":
        return parsed.set(drivername="postgresql+psycopg").render_as_string(hide_password=False)
    if parsed.get_backend_name() != "sqlite":
        raise ValueError(f"database_url: {parsed.drivername} is not supported; use sqlite:///FILE or postgresql://…")
    if not parsed.database or parsed.database == ":memory:":
        raise ValueError("database_url: the SQLite store needs a file, such as sqlite:////var/lib/cloudai/cloudai.db")
    return url


def sqlite_file(url: str) -> Path | None:
    """The file behind a SQLite URL, None for PostgreSQL."""
    parsed = make_url(url)
    return Path(str(parsed.database)) if parsed.get_backend_name() == "sqlite" else None


def writing_engine(url: str) -> Engine:
    """One connection; on SQLite a transaction takes the write lock when it begins."""
    if sqlite_file(url) is None:
        return _postgres_engine(url, pool_size=1)
    return _sqlite_engine(url, "BEGIN IMMEDIATE", pool_size=1)


def migrating_engine(url: str) -> Engine:
    """The same, but on PostgreSQL it waits for as long as another process takes."""
    return _postgres_engine(url, patient=True, pool_size=1) if sqlite_file(url) is None else writing_engine(url)


def file_uri(file: Path) -> str:
    """Without its options. What means something in a URI may stand in a path: https://www.sqlite.org/uri.html"""
    return f"file:{quote(str(file.absolute()))}"


def reading_engine(url: str) -> Engine:
    """A few connections whose transactions each see one state of the database."""
    if sqlite_file(url) is None:
        return _postgres_engine(url, pool_size=READERS, isolation_level="REPEATABLE READ")
    return _sqlite_engine(url, "BEGIN", pool_size=READERS)


def _postgres_engine(url: str, **options: Any) -> Engine:
    from cloudai.store import postgres  # its library comes with the extra `postgres` only

    return postgres.engine(url, **options)


def _sqlite_engine(url: str, begin: str, **options: Any) -> Engine:
    file = sqlite_file(url)
    assert file is not None
    engine = create_engine(
        URL.create("sqlite+pysqlite", database=file_uri(file), query={"mode": "rw", "uri": "true"}),
        connect_args={"timeout": BUSY_SECONDS, "check_same_thread": False, "cached_statements": 512},
        max_overflow=0,
        **options,
    )

    @event.listens_for(engine, "connect")
    def prepare(connection: sqlite3.Connection, _record: Any) -> None:
        connection.isolation_level = None  # transactions are begun below, not by the driver
        for pragma in ("synchronous=FULL", "journal_size_limit=67108864", "cache_size=-16000", "temp_store=MEMORY"):
            connection.execute(f"PRAGMA {pragma}")

    @event.listens_for(engine, "begin")
    def start(connection: Connection) -> None:
        connection.exec_driver_sql(begin)

    return engine


def create_sqlite_file(file: Path) -> None:
    """Make the file, in write-ahead mode, where there is none."""
    connection = sqlite3.connect(file, timeout=BUSY_SECONDS, isolation_level=None)
    deadline = time.monotonic() + BUSY_SECONDS
    try:
        while True:
            try:
                connection.execute("PRAGMA journal_mode=WAL")
                return
            except sqlite3.OperationalError:
                # Another process makes the same file: for the change of mode SQLite does not always wait by itself.
                if time.monotonic() > deadline:
                    raise
            time.sleep(0.01)
    finally:
        connection.close()


def translated(error: BaseException) -> CloudAIError | None:
    """`unavailable` for an error of the place where the database lives, None for a mistake in our own statements."""
    if isinstance(error, CloudAIError):
        return error
    if isinstance(error, Vanished | TimeoutError | OSError | ResourceClosedError | sqlite3.Error):
        return unavailable(str(error) or type(error).__name__)
    if isinstance(error, OperationalError | InterfaceError | InternalError):
        return unavailable(str(error.orig).strip().partition("\n")[0])
    if isinstance(error, DBAPIError) and (
        error.connection_invalidated or isinstance(error.orig, sqlite3.DatabaseError)
    ):
        # A damaged or foreign file is a plain DatabaseError; its subclasses are mistakes of ours.
        return unavailable(str(error.orig)) if type(error.orig) is sqlite3.DatabaseError else None
    return None
