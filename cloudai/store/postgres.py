"""Connections to PostgreSQL that give up where nobody answers, rather than wait for ever.

The server is told how long a lock may be waited for, a statement may last and a transaction may stay open; the kernel, how long
bytes may stay unacknowledged. A server that is stopped, or behind a network that takes everything and answers nothing, says
none of that: the connection itself notices the silence. What stands in the URL (`?connect_timeout=…`, `?options=-c…`) goes
before what is said here.
"""

from __future__ import annotations

import os
import time
from collections.abc import Generator
from typing import Any, TypeVar

import psycopg
from psycopg.abc import PQGen
from psycopg.rows import TupleRow
from sqlalchemy import URL, Engine, create_engine, event, make_url

LOCK_SECONDS = 5.0  # how long to wait for a lock that another transaction holds
STATEMENT_SECONDS = 30.0
OPEN_SECONDS = 10.0  # how long the server keeps a transaction, with its locks, of a client that says nothing more
SILENT_SECONDS = 15.0  # how long the server may say nothing while it is to answer
RV = TypeVar("RV")


class Silent(psycopg.OperationalError):
    """The server did not answer in time. Whether it did what it was last asked is not known."""


class Impatient(psycopg.Connection[TupleRow]):
    """Closed, with Silent raised, when the server has said nothing for SILENT_SECONDS."""

    def wait(self, gen: PQGen[RV], *args: Any, **kwargs: Any) -> RV:
        try:
            return super().wait(_heard(gen), *args, **kwargs)
        except Silent:
            self.close()
            raise


def _heard(gen: PQGen[RV]) -> Generator[Any, Any, RV]:
    """`gen`, which psycopg resumes when its socket is ready, and with nothing a few times a second."""
    heard = time.monotonic()
    try:
        wanted = next(gen)
        while True:
            ready = yield wanted
            if ready:
                heard = time.monotonic()
            elif time.monotonic() - heard > SILENT_SECONDS:
                raise Silent(f"the database has not answered for {SILENT_SECONDS:g} s")
            wanted = gen.send(ready)
    except StopIteration as end:
        result: RV = end.value
        return result


def engine(url: str, *, patient: bool = False, **options: Any) -> Engine:
    """`patient`: waits for locks and answers as long as it takes, unless the server is gone."""
    place = make_url(url)
    made = create_engine(place, max_overflow=0, connect_args=_arguments(place, patient), **options)
    kind = psycopg.Connection if patient else Impatient

    @event.listens_for(made, "do_connect")
    def connect(_dialect: Any, _record: Any, args: Any, kwargs: Any) -> psycopg.Connection[TupleRow]:
        return kind.connect(*args, **kwargs)

    return made


def listening_connection(url: str) -> Impatient:
    """For LISTEN, outside of transactions."""
    place = make_url(url)
    args, kwargs = place.get_dialect()().create_connect_args(place)
    return Impatient.connect(*args, **{**kwargs, **_arguments(place)}, autocommit=True)


def _arguments(url: URL, patient: bool = False) -> dict[str, Any]:
    """What a connection is made with beside what stands in the URL."""
    ours = {
        "connect_timeout": 5,
        "application_name": "cloudai",
        "keepalives_idle": 5,
        "keepalives_interval": 2,
        "keepalives_count": 3,
        "tcp_user_timeout": 10_000,
    }
    limits = {
        "lock_timeout": LOCK_SECONDS,
        "statement_timeout": STATEMENT_SECONDS,
        "idle_in_transaction_session_timeout": OPEN_SECONDS,
    }
    options = [] if patient else [f"-c {name}={round(seconds * 1000)}" for name, seconds in limits.items()]
    theirs = url.query.get("options") or os.environ.get("PGOPTIONS", "")
    options += [theirs] if isinstance(theirs, str) else theirs  # the last word counts
    return {name: value for name, value in ours.items() if name not in url.query} | {"options": " ".join(options)}
