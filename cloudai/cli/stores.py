"""Opening the store that the settings name, or saying in one sentence why not."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

from sqlalchemy.exc import SQLAlchemyError

from cloudai.cli.place import StartRefused, make_dir
from cloudai.errors import CloudAIError
from cloudai.settings import Settings
from cloudai.store.migrate import SchemaTooNew
from cloudai.store.protocol import FacadeStore, Store
from cloudai.store.sql import open_store

NO_FILE = "unable to open database file"  # SQLite says no more


@contextlib.asynccontextmanager
async def opened_facade_store(settings: Settings) -> AsyncIterator[FacadeStore]:
    """What the API serves: the database, or a Kubernetes cluster."""
    if settings.store == "sql":
        async with opened_store(settings) as store:
            yield store
        return
    try:
        from cloudai.store.kube.api import NoCluster
        from cloudai.store.kube.store import open_kubernetes
    except ImportError as error:
        raise StartRefused(
            f"--store kubernetes needs more libraries: pip install '.[kubernetes]' in its directory ({error})"
        ) from None
    try:
        served = await open_kubernetes(settings)
    except (NoCluster, CloudAIError) as error:
        raise StartRefused(f"cannot open the store: {_first_line(error)}") from None
    try:
        yield served
    finally:
        await served.close()


@contextlib.asynccontextmanager
async def opened_store(settings: Settings) -> AsyncIterator[Store]:
    if not settings.database_url:
        make_dir(settings.data_dir)
    try:
        store = await open_store(settings.url)
    except (CloudAIError, SchemaTooNew, SQLAlchemyError, ValueError) as error:
        raise StartRefused(f"cannot open the store {shown(settings.url)}: {_first_line(error)}") from error
    try:
        yield store
    finally:
        await store.close()


def place_of(settings: Settings) -> str:
    """The store in words."""
    if settings.store == "kubernetes":
        return f"namespace {settings.namespace} of Kubernetes"
    return shown(settings.url)


def shown(url: str) -> str:
    """A database URL without its password."""
    scheme, separator, rest = url.partition("://")
    login, at, place = rest.rpartition("@")
    return f"{scheme}{separator}{login.partition(':')[0]}{at}{place}"


def _first_line(error: Exception) -> str:
    line = str(error).strip().partition("\n")[0]
    if "disk I/O error" in line:
        return f"{line} (is the disk full?)"
    hint = " (is it a file in a directory that is there, and may this user write both?)" if NO_FILE in line else ""
    return line + hint
