"""What workers write: themselves, their heartbeats, what became of their runs, and the logs of these."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from sqlalchemy import select

from cloudai.errors import task_not_found
from cloudai.resources import RUN_TRANSITIONS, Run, Worker
from cloudai.store import rows
from cloudai.store.commit import write_runs
from cloudai.store.protocol import Heartbeat, Kind, NameTaken, RunReport
from cloudai.store.tables import RUNS, WORKERS
from cloudai.store.transaction import Transaction

_WORKER_COLUMNS = [column.name for column in WORKERS.columns]
_KEPT = {"worker_id", "registered_at", "lease"}
UPSERT_WORKER = (
    f"INSERT INTO workers ({', '.join(_WORKER_COLUMNS)}) VALUES ({', '.join('?' * len(_WORKER_COLUMNS))})"
    " ON CONFLICT (worker_id) DO UPDATE SET "
    + ", ".join(f"{name} = excluded.{name}" for name in _WORKER_COLUMNS if name not in _KEPT)
    # Until the agent is known to have heard of a shorter one.
    + ", lease = CASE WHEN workers.lease > excluded.lease THEN workers.lease ELSE excluded.lease END"
    + " WHERE workers.identity IN (excluded.identity, ?)"
)


@dataclass(frozen=True, slots=True)
class LogPiece:
    run_id: str
    offset: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Registration:
    """`replaces`: the identity, beside its own, that the stored worker may have."""

    worker: Worker
    replaces: str | None


def register(transaction: Transaction, registrations: Sequence[Registration]) -> list[Worker | Exception]:
    """Insert or replace workers; a known one keeps its `registered_at`, and its lease where that is the longer."""
    outcomes: list[Worker | Exception] = []
    for each in registrations:
        worker = each.worker
        columns = rows.worker_columns(worker)
        values = [columns[name] for name in _WORKER_COLUMNS]
        if not transaction.run(UPSERT_WORKER, [*values, each.replaces or worker.identity]):
            outcomes.append(NameTaken(worker.worker_id))
            continue
        transaction.change(Kind.WORKER, worker.worker_id, "registered")
        row = transaction.one("SELECT registered_at, lease FROM workers WHERE worker_id = ?", (worker.worker_id,))
        outcomes.append(replace(worker, registered_at=row[0], lease=row[1]))
    return outcomes


def heartbeats(
    transaction: Transaction, batches: Sequence[Sequence[Heartbeat]]
) -> list[set[tuple[str, str]] | Exception]:
    """Store signs of life; a change is noted only where a worker's readiness changed. The outcomes are whose were stored."""
    outcomes: list[set[tuple[str, str]] | Exception] = []
    for beats in batches:
        before = {
            (row[0], row[1]): (bool(row[2]), row[3])
            for row in transaction.among(
                "SELECT worker_id, identity, ready, problem FROM workers WHERE worker_id IN (KEYS)",
                {beat.worker_id for beat in beats},
            )
        }
        transaction.many(
            "UPDATE workers SET last_heartbeat = ?, ready = ?, problem = ?, cpu_usage = ?, memory_usage = ?,"
            " lease = COALESCE(?, lease) WHERE worker_id = ? AND identity = ?",
            [
                (
                    *(beat.at, beat.ready, beat.problem, beat.cpu_usage, beat.memory_usage, beat.lease),
                    *(beat.worker_id, beat.identity),
                )
                for beat in beats
            ],
        )
        for beat in beats:
            state = before.get((beat.worker_id, beat.identity))
            if state is not None and state != (beat.ready, beat.problem):
                transaction.change(Kind.WORKER, beat.worker_id, "updated")
        outcomes.append(before.keys() & {(beat.worker_id, beat.identity) for beat in beats})
    return outcomes


def report(transaction: Transaction, reports: Sequence[RunReport]) -> list[Run | Exception | None]:
    """Store reports that the table of transitions allows; each outcome is the run as stored now."""
    return [_report(transaction, each) for each in reports]


def _report(transaction: Transaction, report: RunReport) -> Run | None:
    key = rows.task_key(report.task_id)
    query = select(RUNS).where(RUNS.c.task_id == key, RUNS.c.attempt == report.attempt)
    row = transaction.connection.execute(query).one_or_none()
    if row is None or row.worker_id != report.worker_id:
        return None
    run = rows.run(row)
    if run.phase.terminal or (report.phase is not run.phase and report.phase not in RUN_TRANSITIONS[run.phase]):
        return run
    news = {
        name: value
        for name in ("started_at", "finished_at", "exit_code", "reason", "message")
        if (value := getattr(report, name)) is not None
    }
    told = replace(run, phase=report.phase, **news)
    if told == run:
        return run
    told = replace(told, version=run.version + 1)
    write_runs(transaction, [told])
    return told


def append_log(transaction: Transaction, pieces: Sequence[LogPiece]) -> list[int | Exception]:
    """Store what is new of each piece; the outcomes are how many bytes of the attempt's log are stored."""
    ends: dict[tuple[int, int], int] = {}
    new: list[tuple[object, ...]] = []
    outcomes: list[int | Exception] = []
    for piece in pieces:
        key = rows.run_key(piece.run_id)
        if key not in ends:
            end = _log_end(transaction, key)
            if end is None:
                outcomes.append(task_not_found(piece.run_id))
                continue
            ends[key] = end
        end = ends[key]
        fresh = piece.data[end - piece.offset :] if piece.offset <= end else b""
        if fresh:
            ends[key] = end + len(fresh)
            new.append((*key, ends[key], fresh))
            transaction.logs.add(rows.task_id(key[0]))
        outcomes.append(ends[key])
    transaction.many('INSERT INTO logs (task_id, attempt, "end", data) VALUES (?, ?, ?, ?)', new)
    return outcomes


def _log_end(transaction: Transaction, key: tuple[int, int]) -> int | None:
    """Bytes stored of an attempt's log, None where there is no such attempt."""
    if transaction.one("SELECT 1 FROM runs WHERE task_id = ? AND attempt = ?", key) is None:
        return None
    row = transaction.one('SELECT max("end") FROM logs WHERE task_id = ? AND attempt = ?', key)
    return row[0] or 0
