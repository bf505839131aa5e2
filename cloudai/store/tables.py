"""The SQL schema, as SQLModel tables; a test holds the migrations equal to it.

A task's key is the integer in its id (`task-<nanoseconds>`). Amounts and times are the integers of cloudai.resources.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import BigInteger, Column, Index, Integer, LargeBinary, Table, text
from sqlmodel import Field, SQLModel

from cloudai.resources import RunPhase

# SQLite makes only a column called INTEGER its row id.
BIG = BigInteger().with_variant(Integer(), "sqlite")
GLOBAL_USER = ""  # the totals of all users together
LIVE_RUNS = f"phase IN ({', '.join(repr(phase.value) for phase in RunPhase if not phase.terminal)})"


def _big(*, key: bool = False, nullable: bool = False) -> Column[int]:
    return Column(BIG, primary_key=key, nullable=nullable, autoincrement=False)


def _where(condition: str) -> dict[str, Any]:
    return {"sqlite_where": text(condition), "postgresql_where": text(condition)}


class TaskRow(SQLModel, table=True):
    __tablename__ = "tasks"
    __table_args__ = (
        Index("tasks_by_status", "status", "id"),
        Index("tasks_by_user", "user_id", "id"),
        Index("tasks_by_user_status", "user_id", "status", "id"),
        Index("tasks_finished", "finished_at", **_where("finished_at IS NOT NULL")),
        Index("tasks_with_logs", "finished_at", **_where("finished_at IS NOT NULL AND NOT logs_removed")),
    )
    id: int = Field(sa_column=_big(key=True))
    version: int
    user_id: str
    image: str
    command: str | None  # JSON: a string or a list
    cpu: int = Field(sa_column=_big())
    memory: int = Field(sa_column=_big())
    storage: int = Field(sa_column=_big())
    gpu: int = Field(sa_column=_big())
    timeout_seconds: int | None
    max_retries: int | None
    status: str
    created_at: int = Field(sa_column=_big())
    attempt: int
    cancel_requested: bool
    worker_id: str | None
    started_at: int | None = Field(sa_column=_big(nullable=True))
    finished_at: int | None = Field(sa_column=_big(nullable=True))
    exit_code: int | None
    reason: str | None
    message: str | None
    idempotency_key: str | None = Field(unique=True)
    body_digest: bytes | None = Field(sa_column=Column(LargeBinary, nullable=True))
    logs_removed: bool


class RunRow(SQLModel, table=True):
    __tablename__ = "runs"
    __table_args__ = (Index("runs_live", "worker_id", "task_id", **_where(LIVE_RUNS)),)
    task_id: int = Field(sa_column=_big(key=True))
    attempt: int = Field(primary_key=True)
    version: int
    worker_id: str
    user_id: str
    image: str
    command: str | None
    cpu: int = Field(sa_column=_big())
    memory: int = Field(sa_column=_big())
    storage: int = Field(sa_column=_big())
    gpu: int = Field(sa_column=_big())
    gpus: str  # JSON: [[device, milli], …]
    timeout_seconds: int | None
    created_at: int = Field(sa_column=_big())
    stop_requested: bool
    phase: str
    started_at: int | None = Field(sa_column=_big(nullable=True))
    finished_at: int | None = Field(sa_column=_big(nullable=True))
    exit_code: int | None
    reason: str | None
    message: str | None


class WorkerRow(SQLModel, table=True):
    __tablename__ = "workers"
    worker_id: str = Field(primary_key=True)
    identity: str
    address: str
    cpu: int = Field(sa_column=_big())
    memory: int = Field(sa_column=_big())
    storage: int = Field(sa_column=_big())
    gpu: int = Field(sa_column=_big())
    runtime: str
    registered_at: int = Field(sa_column=_big())
    last_heartbeat: int = Field(sa_column=_big())
    ready: bool
    problem: str | None
    cpu_usage: float | None
    memory_usage: float | None
    lease: int = Field(sa_column=_big())


class ChangeRow(SQLModel, table=True):
    """The change log. Revisions are dense and grow in the order of commits: a transaction that writes holds the counter."""

    __tablename__ = "changes"
    revision: int = Field(sa_column=_big(key=True))
    kind: str
    key: str
    event: str


class CounterRow(SQLModel, table=True):
    __tablename__ = "counters"
    name: str = Field(primary_key=True)
    value: int = Field(sa_column=_big())


class TotalRow(SQLModel, table=True):
    """How many tasks of a user have a status; user '' is everybody."""

    __tablename__ = "totals"
    user_id: str = Field(primary_key=True)
    status: str = Field(primary_key=True)
    count: int = Field(sa_column=_big())


class LogRow(SQLModel, table=True):
    """A piece of an attempt's log; `end` is the offset of the byte after it."""

    __tablename__ = "logs"
    task_id: int = Field(sa_column=_big(key=True))
    attempt: int = Field(primary_key=True)
    end: int = Field(sa_column=_big(key=True))
    data: bytes = Field(sa_column=Column(LargeBinary, nullable=False))


class LeaseRow(SQLModel, table=True):
    __tablename__ = "leases"
    name: str = Field(primary_key=True)
    holder: str
    epoch: int
    version: int = Field(sa_column=_big())


class TokenRow(SQLModel, table=True):
    """Join tokens of agents, as SHA-256: a copy of the database lets nobody join."""

    __tablename__ = "tokens"
    digest: bytes = Field(sa_column=Column(LargeBinary, primary_key=True))
    name: str
    created_at: int = Field(sa_column=_big())


class MetaRow(SQLModel, table=True):
    __tablename__ = "meta"
    name: str = Field(primary_key=True)
    value: str


def table(model: type[SQLModel]) -> Table:
    """The SQLAlchemy table of a model."""
    return model.__table__  # type: ignore[attr-defined,no-any-return]


TASKS = table(TaskRow)
RUNS = table(RunRow)
WORKERS = table(WorkerRow)
CHANGES = table(ChangeRow)
COUNTERS = table(CounterRow)
TOTALS = table(TotalRow)
LOGS = table(LogRow)
LEASES = table(LeaseRow)
TOKENS = table(TokenRow)
META = table(MetaRow)
