"""Queries. Each takes a connection inside a transaction, so that what it reads in several statements is one state."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from sqlalchemy import Connection, Select, and_, case, func, null, or_, select, text, tuple_

from cloudai.errors import CloudAIError, Code, task_not_found
from cloudai.resources import (
    ACTIVE_STATUSES,
    PLACED_STATUSES,
    Resources,
    Run,
    RunPhase,
    Task,
    TaskStatus,
    Worker,
    WorkerState,
    gpu_free,
)
from cloudai.store import rows
from cloudai.store.protocol import Change, Kind, Lease, LogSlice, Snapshot, TaskPage, TaskQuery, Token
from cloudai.store.tables import (
    CHANGES,
    COUNTERS,
    GLOBAL_USER,
    LEASES,
    LIVE_RUNS,
    LOGS,
    META,
    RUNS,
    TASKS,
    TOKENS,
    TOTALS,
    WORKERS,
)
from cloudai.store.transaction import chunks

_ACTIVE = sorted(status.value for status in ACTIVE_STATUSES)
_PLACED = sorted(status.value for status in PLACED_STATUSES)
# As text, since SQLite uses a partial index only where the query repeats its condition.
_LIVE = text(LIVE_RUNS)
_BRIEF = [null().label("command") if column.name == "command" else column for column in TASKS.columns]
_IDLE = (0, None, 0, 0, 0, 0)  # of a worker: runs, GPU shares, amounts


def tasks_by_key(connection: Connection, keys: Collection[int]) -> dict[int, Task]:
    found = {}
    for part in chunks(keys):
        for row in connection.execute(select(TASKS).where(TASKS.c.id.in_(part))):
            found[row.id] = rows.task(row)
    return found


def runs_by_key(connection: Connection, keys: Collection[tuple[int, int]]) -> dict[str, Run]:
    found = {}
    for part in chunks(keys):
        for row in connection.execute(select(RUNS).where(tuple_(RUNS.c.task_id, RUNS.c.attempt).in_(part))):
            run = rows.run(row)
            found[run.run_id] = run
    return found


def runs_of_task(connection: Connection, key: int) -> list[Run]:
    query = select(RUNS).where(RUNS.c.task_id == key).order_by(RUNS.c.attempt)
    return [rows.run(row) for row in connection.execute(query)]


def runs_of_worker(connection: Connection, worker_id: str) -> list[Run]:
    query = select(RUNS).where(_LIVE, RUNS.c.worker_id == worker_id).order_by(RUNS.c.task_id)
    return [rows.run(row) for row in connection.execute(query)]


def task_page(connection: Connection, query: TaskQuery) -> TaskPage:
    """A page, newest first, and the number of all that match from the kept totals."""
    columns = _BRIEF if query.brief else TASKS.columns
    wanted: Select[Any] = select(*columns).order_by(TASKS.c.id.desc()).limit(query.limit).offset(query.offset)
    counted = select(func.coalesce(func.sum(TOTALS.c.count), 0))
    counted = counted.where(TOTALS.c.user_id == (GLOBAL_USER if query.user_id is None else query.user_id))
    if query.user_id is not None:
        wanted = wanted.where(TASKS.c.user_id == query.user_id)
    if query.status is not None:
        wanted = wanted.where(TASKS.c.status == query.status.value)
        counted = counted.where(TOTALS.c.status == query.status.value)
    total = int(connection.execute(counted).scalar_one())
    tasks = [rows.task(row) for row in connection.execute(wanted)] if query.offset < total else []
    return TaskPage(tasks, total)


def totals(connection: Connection) -> Mapping[TaskStatus, int]:
    query = select(TOTALS.c.status, TOTALS.c.count).where(TOTALS.c.user_id == GLOBAL_USER)
    kept = {row.status: row[1] for row in connection.execute(query)}
    return {status: kept.get(status.value, 0) for status in TaskStatus}


def workers(connection: Connection, worker_ids: Collection[str] | None) -> dict[str, Worker]:
    query = select(WORKERS).order_by(WORKERS.c.worker_id)
    if worker_ids is not None:
        query = query.where(WORKERS.c.worker_id.in_(list(worker_ids)))
    return {row.worker_id: rows.worker(row) for row in connection.execute(query)}


def worker_states(connection: Connection, worker_id: str | None = None) -> list[WorkerState]:
    """Workers with what their live runs hold; summed by the database, since there are many more runs than workers."""
    sums = (func.sum(amount) for amount in (RUNS.c.cpu, RUNS.c.memory, RUNS.c.storage, RUNS.c.gpu))
    shares = func.aggregate_strings(case((RUNS.c.gpu > 0, RUNS.c.gpus)), " ")
    query = select(RUNS.c.worker_id, func.count(), shares, *sums).where(_LIVE).group_by(RUNS.c.worker_id)
    if worker_id is not None:
        query = query.where(RUNS.c.worker_id == worker_id)
    held = {row[0]: row[1:] for row in connection.execute(query)}
    known = workers(connection, None if worker_id is None else [worker_id])
    return [_state(worker, *held.get(name, _IDLE)) for name, worker in known.items()]


def _state(worker: Worker, runs: int, gpus: str | None, *amounts: Any) -> WorkerState:
    shares = [share for each in (gpus or "").split() for share in rows.gpu_shares(each)]
    # A worker that came back with fewer devices may still hold runs on those it had.
    devices = max([worker.gpu_devices, *(share.device + 1 for share in shares)])
    return WorkerState(
        worker=worker,
        allocated=Resources(*(int(amount) for amount in amounts)),  # PostgreSQL sums to decimals
        runs=runs,
        gpu_free=tuple(gpu_free(devices, shares)[: worker.gpu_devices]),
    )


def revision(connection: Connection) -> int:
    return int(connection.execute(select(COUNTERS.c.value).where(COUNTERS.c.name == "revision")).scalar_one())


def snapshot(connection: Connection) -> Snapshot:
    """All that is active. Runs: the live ones, and of placed tasks the current one even where it has ended."""
    tasks = {}
    for row in connection.execute(select(TASKS).where(TASKS.c.status.in_(_ACTIVE)).order_by(TASKS.c.id)):
        task = rows.task(row)
        tasks[task.task_id] = task
    runs = {}
    current = (
        select(RUNS)
        .join(TASKS, and_(TASKS.c.id == RUNS.c.task_id, TASKS.c.attempt == RUNS.c.attempt))
        .where(TASKS.c.status.in_(_PLACED))
    )
    for query in (select(RUNS).where(_LIVE), current):
        for row in connection.execute(query):
            run = rows.run(row)
            runs[run.run_id] = run
    return Snapshot(revision(connection), tasks, runs, workers(connection, None))


def changes(connection: Connection, since: int, limit: int) -> tuple[int, list[Change]]:
    """The newest revision, and up to `limit` changes after `since`."""
    query = select(CHANGES).where(CHANGES.c.revision > since).order_by(CHANGES.c.revision).limit(limit)
    newest = revision(connection)
    return newest, [Change(row.revision, Kind(row.kind), row.key, row.event) for row in connection.execute(query)]


def lease(connection: Connection, name: str) -> Lease | None:
    row = connection.execute(select(LEASES).where(LEASES.c.name == name)).one_or_none()
    return Lease(row.name, row.holder, row.epoch, row.version) if row else None


def has_token(connection: Connection, digest: bytes) -> bool:
    return connection.execute(select(TOKENS.c.name).where(TOKENS.c.digest == digest)).one_or_none() is not None


def tokens(connection: Connection) -> list[Token]:
    query = select(TOKENS).order_by(TOKENS.c.created_at, TOKENS.c.digest)
    return [Token(bytes(row.digest), row.name, row.created_at) for row in connection.execute(query)]


def cluster_id(connection: Connection) -> str:
    return str(connection.execute(select(META.c.value).where(META.c.name == "cluster_id")).scalar_one())


def log_ends(connection: Connection, keys: Collection[tuple[int, int]]) -> dict[str, int]:
    """How many bytes are stored of each attempt's log."""
    ends = {f"{rows.task_id(task)}-{attempt}": 0 for task, attempt in keys}
    for part in chunks(keys):
        query = (
            select(LOGS.c.task_id, LOGS.c.attempt, func.max(LOGS.c.end))
            .where(or_(*(and_(LOGS.c.task_id == task, LOGS.c.attempt == attempt) for task, attempt in part)))
            .group_by(LOGS.c.task_id, LOGS.c.attempt)
        )
        for task, attempt, end in connection.execute(query):
            ends[f"{rows.task_id(task)}-{attempt}"] = end
    return ends


def read_log(connection: Connection, task_id: str, attempt: int | None, offset: int, limit: int) -> LogSlice:
    """Bytes of an attempt's log; see the protocol for the errors."""
    key = rows.task_key(task_id)
    columns = (TASKS.c.status, TASKS.c.attempt, TASKS.c.logs_removed)
    task = connection.execute(select(*columns).where(TASKS.c.id == key)).one_or_none()
    if task is None:
        raise task_not_found(task_id)
    finished = TaskStatus(task.status).terminal
    if attempt is not None and not 1 <= attempt <= task.attempt:
        raise _no_attempt(task_id, attempt, task.attempt)
    if task.logs_removed:
        message = "The logs of this task were removed when their retention ended"
        raise CloudAIError(Code.LOGS_REMOVED, message, {"task_id": task_id})
    number = task.attempt if attempt is None else attempt
    query = select(RUNS.c.phase).where(RUNS.c.task_id == key, RUNS.c.attempt == number)
    phase = connection.execute(query).scalar_one_or_none()
    if phase is None:
        return LogSlice(b"", offset, 0, finished)
    mine = and_(LOGS.c.task_id == key, LOGS.c.attempt == number)
    end = connection.execute(select(func.max(LOGS.c.end)).where(mine)).scalar_one() or 0
    data = _log_bytes(connection, mine, offset, min(limit, end - offset))
    return LogSlice(data, offset, end, RunPhase(phase).terminal)


def _log_bytes(connection: Connection, mine: Any, offset: int, limit: int) -> bytes:
    if limit <= 0:
        return b""
    query = select(LOGS.c.end, LOGS.c.data).where(mine, LOGS.c.end > offset).order_by(LOGS.c.end)
    pieces: list[bytes] = []
    missing = limit
    with connection.execution_options(stream_results=True).execute(query) as found:
        for end, data in found:
            start = end - len(data)
            piece = data[max(0, offset - start) :][:missing]
            pieces.append(piece)
            missing -= len(piece)
            if not missing:
                break
    return b"".join(pieces)


def _no_attempt(task_id: str, attempt: int, last: int) -> CloudAIError:
    return CloudAIError(
        Code.ATTEMPT_NOT_FOUND,
        f"The task has {last} attempt{'' if last == 1 else 's'} so far",
        {"task_id": task_id, "attempt": attempt},
    )
