"""The first schema."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

BIG = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def where(condition: str) -> dict[str, Any]:
    return {"sqlite_where": sa.text(condition), "postgresql_where": sa.text(condition)}


def upgrade() -> None:
    op.create_table(
        "changes",
        sa.Column("revision", BIG, autoincrement=False, nullable=False),
        sa.Column("kind", sa.String(), nullable=False),
        sa.Column("key", sa.String(), nullable=False),
        sa.Column("event", sa.String(), nullable=False),
        sa.PrimaryKeyConstraint("revision"),
    )
    op.create_table(
        "counters",
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("value", BIG, autoincrement=False, nullable=False),
        sa.PrimaryKeyConstraint("name"),
    )
    op.create_table(
        "leases",
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("holder", sa.String(), nullable=False),
        sa.Column("epoch", sa.Integer(), nullable=False),
        sa.Column("version", BIG, autoincrement=False, nullable=False),
        sa.PrimaryKeyConstraint("name"),
    )
    op.create_table(
        "logs",
        sa.Column("task_id", BIG, autoincrement=False, nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("end", BIG, autoincrement=False, nullable=False),
        sa.Column("data", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("task_id", "attempt", "end"),
    )
    op.create_table(
        "meta",
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("value", sa.String(), nullable=False),
        sa.PrimaryKeyConstraint("name"),
    )
    op.create_table(
        "runs",
        sa.Column("task_id", BIG, autoincrement=False, nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("worker_id", sa.String(), nullable=False),
        sa.Column("user_id", sa.String(), nullable=False),
        sa.Column("image", sa.String(), nullable=False),
        sa.Column("command", sa.String(), nullable=True),
        sa.Column("cpu", BIG, autoincrement=False, nullable=False),
        sa.Column("memory", BIG, autoincrement=False, nullable=False),
        sa.Column("storage", BIG, autoincrement=False, nullable=False),
        sa.Column("gpu", BIG, autoincrement=False, nullable=False),
        sa.Column("gpus", sa.String(), nullable=False),
        sa.Column("timeout_seconds", sa.Integer(), nullable=True),
        sa.Column("created_at", BIG, autoincrement=False, nullable=False),
        sa.Column("stop_requested", sa.Boolean(), nullable=False),
        sa.Column("phase", sa.String(), nullable=False),
        sa.Column("started_at", BIG, autoincrement=False, nullable=True),
        sa.Column("finished_at", BIG, autoincrement=False, nullable=True),
        sa.Column("exit_code", sa.Integer(), nullable=True),
        sa.Column("reason", sa.String(), nullable=True),
        sa.Column("message", sa.String(), nullable=True),
        sa.PrimaryKeyConstraint("task_id", "attempt"),
    )
    op.create_index(
        "runs_live",
        "runs",
        ["worker_id", "task_id"],
        unique=False,
        **where("phase IN ('assigned', 'pulling', 'starting', 'running')"),
    )
    op.create_table(
        "tasks",
        sa.Column("id", BIG, autoincrement=False, nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("user_id", sa.String(), nullable=False),
        sa.Column("image", sa.String(), nullable=False),
        sa.Column("command", sa.String(), nullable=True),
        sa.Column("cpu", BIG, autoincrement=False, nullable=False),
        sa.Column("memory", BIG, autoincrement=False, nullable=False),
        sa.Column("storage", BIG, autoincrement=False, nullable=False),
        sa.Column("gpu", BIG, autoincrement=False, nullable=False),
        sa.Column("timeout_seconds", sa.Integer(), nullable=True),
        sa.Column("max_retries", sa.Integer(), nullable=True),
        sa.Column("status", sa.String(), nullable=False),
        sa.Column("created_at", BIG, autoincrement=False, nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("cancel_requested", sa.Boolean(), nullable=False),
        sa.Column("worker_id", sa.String(), nullable=True),
        sa.Column("started_at", BIG, autoincrement=False, nullable=True),
        sa.Column("finished_at", BIG, autoincrement=False, nullable=True),
        sa.Column("exit_code", sa.Integer(), nullable=True),
        sa.Column("reason", sa.String(), nullable=True),
        sa.Column("message", sa.String(), nullable=True),
        sa.Column("idempotency_key", sa.String(), nullable=True),
        sa.Column("body_digest", sa.LargeBinary(), nullable=True),
        sa.Column("logs_removed", sa.Boolean(), nullable=False),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("idempotency_key"),
    )
    op.create_index("tasks_by_status", "tasks", ["status", "id"], unique=False)
    op.create_index("tasks_by_user", "tasks", ["user_id", "id"], unique=False)
    op.create_index("tasks_by_user_status", "tasks", ["user_id", "status", "id"], unique=False)
    op.create_index("tasks_finished", "tasks", ["finished_at"], unique=False, **where("finished_at IS NOT NULL"))
    op.create_index(
        "tasks_with_logs",
        "tasks",
        ["finished_at"],
        unique=False,
        **where("finished_at IS NOT NULL AND NOT logs_removed"),
    )
    op.create_table(
        "tokens",
        sa.Column("digest", sa.LargeBinary(), nullable=False),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("created_at", BIG, autoincrement=False, nullable=False),
        sa.PrimaryKeyConstraint("digest"),
    )
    op.create_table(
        "totals",
        sa.Column("user_id", sa.String(), nullable=False),
        sa.Column("status", sa.String(), nullable=False),
        sa.Column("count", BIG, autoincrement=False, nullable=False),
        sa.PrimaryKeyConstraint("user_id", "status"),
    )
    op.create_table(
        "workers",
        sa.Column("worker_id", sa.String(), nullable=False),
        sa.Column("identity", sa.String(), nullable=False),
        sa.Column("address", sa.String(), nullable=False),
        sa.Column("cpu", BIG, autoincrement=False, nullable=False),
        sa.Column("memory", BIG, autoincrement=False, nullable=False),
        sa.Column("storage", BIG, autoincrement=False, nullable=False),
        sa.Column("gpu", BIG, autoincrement=False, nullable=False),
        sa.Column("runtime", sa.String(), nullable=False),
        sa.Column("registered_at", BIG, autoincrement=False, nullable=False),
        sa.Column("last_heartbeat", BIG, autoincrement=False, nullable=False),
        sa.Column("ready", sa.Boolean(), nullable=False),
        sa.Column("problem", sa.String(), nullable=True),
        sa.Column("cpu_usage", sa.Float(), nullable=True),
        sa.Column("memory_usage", sa.Float(), nullable=True),
        sa.PrimaryKeyConstraint("worker_id"),
    )
