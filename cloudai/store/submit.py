"""What clients write: new tasks and the wish to end one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from cloudai.errors import CloudAIError, Code, task_not_found
from cloudai.resources import Reason, Task, TaskSpec, TaskStatus
from cloudai.store import rows
from cloudai.store.commit import write_tasks
from cloudai.store.protocol import Idempotency, Kind
from cloudai.store.reading import tasks_by_key
from cloudai.store.tables import TASKS
from cloudai.store.transaction import Transaction

COLUMNS = [column.name for column in TASKS.columns]


@dataclass(frozen=True, slots=True)
class Submit:
    """`now` in nanoseconds."""

    spec: TaskSpec
    idempotency: Idempotency | None
    now: int


@dataclass(frozen=True, slots=True)
class Cancel:
    """`now` in milliseconds."""

    task_id: str
    now: int


def submit(transaction: Transaction, submits: Sequence[Submit]) -> list[Task | Exception]:
    """Insert tasks. A known idempotency key gives its first task, or IDEMPOTENCY_CONFLICT where the body differs."""
    known = _known(transaction, [each.idempotency.key for each in submits if each.idempotency])
    row = transaction.one("SELECT max(id) FROM tasks")
    last: int = row[0] or 0
    inserted: list[tuple[Any, ...]] = []
    outcomes: list[Task | Exception] = []
    for each in submits:
        key = each.idempotency
        if key and key.key in known:
            digest, earlier = known[key.key]
            outcomes.append(earlier if digest == key.digest else _conflict(key))
            continue
        last = max(each.now, last + 1)  # unique and increasing, even where the clock is not
        task = Task(
            task_id=rows.task_id(last),
            spec=each.spec,
            status=TaskStatus.QUEUED,
            created_at=each.now // 1_000_000,
            version=1,
        )
        if key:
            known[key.key] = (key.digest, task)
        inserted.append(rows.new_task(task, last, (key.key, key.digest) if key else None))
        transaction.change(Kind.TASK, task.task_id, TaskStatus.QUEUED.value)
        transaction.count(each.spec.user_id, None, TaskStatus.QUEUED.value)
        outcomes.append(task)
    transaction.insert("tasks", COLUMNS, inserted)
    return outcomes


def _known(transaction: Transaction, keys: list[str]) -> dict[str, tuple[bytes, Task]]:
    if not keys:
        return {}
    sql = "SELECT idempotency_key, body_digest, id FROM tasks WHERE idempotency_key IN (KEYS)"
    found = transaction.among(sql, set(keys))
    tasks = tasks_by_key(transaction.connection, [row[2] for row in found])
    return {row[0]: (bytes(row[1]), tasks[row[2]]) for row in found}


def _conflict(key: Idempotency) -> CloudAIError:
    return CloudAIError(
        Code.IDEMPOTENCY_CONFLICT,
        "This Idempotency-Key came with another request body before; use a new key for a new task",
        {"idempotency_key": key.key},
    )


def cancel(transaction: Transaction, cancels: Sequence[Cancel]) -> list[Task | Exception]:
    """Cancel queued tasks at once, wish the end of placed ones."""
    tasks = tasks_by_key(transaction.connection, {rows.task_key(each.task_id) for each in cancels})
    outcomes: list[Task | Exception] = []
    changed: dict[int, tuple[Task, Task]] = {}
    for each in cancels:
        key = rows.task_key(each.task_id)
        task = changed[key][1] if key in changed else tasks.get(key)
        if task is None:
            outcomes.append(task_not_found(each.task_id))
            continue
        wished = _cancelled(task, each.now)
        if isinstance(wished, Task) and wished is not task:
            changed[key] = (tasks[key], wished)
        outcomes.append(wished)
    write_tasks(transaction, [(before.status.value, after) for before, after in changed.values()])
    return outcomes


def _cancelled(task: Task, now: int) -> Task | CloudAIError:
    if task.status is TaskStatus.CANCELLED or (task.cancel_requested and not task.status.terminal):
        return task
    if task.status.terminal:
        return CloudAIError(
            Code.TASK_FINISHED,
            f"Task cannot be cancelled: it already {'completed' if task.status is TaskStatus.COMPLETED else 'failed'}",
            {"task_id": task.task_id, "status": task.status.value},
        )
    if task.status is TaskStatus.QUEUED:
        return replace(
            task,
            status=TaskStatus.CANCELLED,
            cancel_requested=True,
            finished_at=now,
            reason=Reason.CANCELLED.value,
            message="Cancelled before it was placed on a worker.",
            version=task.version + 1,
        )
    return replace(task, cancel_requested=True, version=task.version + 1)
