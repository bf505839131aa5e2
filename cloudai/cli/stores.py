"""Opening the store that the settings name, or saying in one sentence why not."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

from sqlalchemy.exc import SQLAlchemyError

from cloudai.cli.place import StartRefused, make_dir
from cloudai.errors import CloudAIError
from cloudai.settings import Settings
from cloudai.store.migrate import SchemaTooNew
from cloudai.store.protocol import Store
from cloudai.store.sql import open_store


@contextlib.asynccontextmanager
async def opened_store(settings: Settings) -> AsyncIterator[Store]:
    if not settings.database_url:
        make_dir(settings.data_dir)
    try:
        store = await open_store(settings.url)
    except (CloudAIError, SchemaTooNew, SQLAlchemyError, OSError, ValueError) as error:
        raise StartRefused(f"cannot open the store {shown(settings.url)}: {_first_line(error)}") from error
    try:
        yield store
    finally:
        await store.close()


def shown(url: str) -> str:
    """A database URL without its password."""
    scheme, separator, rest = url.partition("://")
    login, at, place = rest.rpartition("@")
    return f"{scheme}{separator}{login.partition(':')[0]}{at}{place}"


def _first_line(error: Exception) -> str:
    reason = error.details.get("reason", error.message) if isinstance(error, CloudAIError) else str(error)
    return str(reason).strip().partition("\n")[0]
