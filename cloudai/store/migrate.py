"""Brings a database to the schema of this version, under a lock, so that several processes may start at once."""

from __future__ import annotations

import secrets
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from alembic.util.exc import CommandError
from sqlalchemy import Connection, text

from cloudai.store.engine import create_sqlite_file, migrating_engine, sqlite_file

_ADVISORY_LOCK = 0x636C6F75646169  # "cloudai"


class SchemaTooNew(Exception):
    """The database was used by a newer CloudAI."""


def configuration(connection: Connection | None = None) -> Config:
    """Alembic's configuration for our migrations."""
    config = Config(attributes={"connection": connection})
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    config.set_main_option("path_separator", "os")
    return config


def migrate(url: str) -> None:
    """Make the schema, or bring an older one up to date, in one transaction. Raises SchemaTooNew."""
    file = sqlite_file(url)
    if file is not None:
        create_sqlite_file(file)
    engine = migrating_engine(url)
    try:
        with engine.begin() as connection:  # SQLite: this takes the write lock
            if file is None:
                connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": _ADVISORY_LOCK})
            _upgrade(connection)
            _fill(connection)
    finally:
        engine.dispose()


def _upgrade(connection: Connection) -> None:
    config = configuration(connection)
    try:
        command.upgrade(config, "head")
    except CommandError as error:
        head = ScriptDirectory.from_config(config).get_current_head()
        raise SchemaTooNew(
            f"the database has a schema that this version of CloudAI ({head}) does not know: start the newer version ({error})"
        ) from error


def _fill(connection: Connection) -> None:
    """The rows that every database has."""
    once = " ON CONFLICT (name) DO NOTHING"
    connection.execute(text(f"INSERT INTO counters (name, value) VALUES ('revision', 0){once}"))
    cluster = {"cluster": secrets.token_hex(8)}
    connection.execute(text(f"INSERT INTO meta (name, value) VALUES ('cluster_id', :cluster){once}"), cluster)
