"""The controller's writes: groups of tasks and runs, each applied as a whole where every version still is the one it read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from cloudai.resources import RUN_TRANSITIONS, TASK_TRANSITIONS, Run, RunPhase, Task, TaskStatus
from cloudai.store import rows
from cloudai.store.protocol import Committed, FenceLost, Kind, Lease
from cloudai.store.tables import RUNS
from cloudai.store.transaction import Transaction

Group = Sequence[Task | Run]
Key = int | tuple[int, int]

RUN_COLUMNS = [column.name for column in RUNS.columns]
UPDATE_TASK = f"UPDATE tasks SET {', '.join(f'{name} = ?' for name in rows.TASK_STATE)} WHERE id = ?"
UPDATE_RUN = f"UPDATE runs SET {', '.join(f'{name} = ?' for name in rows.RUN_STATE)} WHERE task_id = ? AND attempt = ?"


@dataclass(frozen=True, slots=True)
class Commit:
    groups: Sequence[Group]
    fence: Lease | None


def commit(transaction: Transaction, commits: Sequence[Commit]) -> list[Committed | Exception]:
    return [_apply(transaction, each) for each in commits]


def _apply(transaction: Transaction, each: Commit) -> Committed | FenceLost:
    if each.fence and not holds(transaction, each.fence):
        return FenceLost(each.fence.name)
    first = transaction.revision + 1
    stored = _stored(transaction, each.groups)
    applied: list[bool] = []
    objects: list[tuple[Task | Run, ...]] = []
    tasks: list[tuple[str, Task]] = []
    runs: list[Run] = []
    new_runs: list[Run] = []
    for group in each.groups:
        fits = all(_fits(stored, thing) for thing in group)
        applied.append(fits)
        objects.append(tuple(replace(thing, version=thing.version + 1) for thing in group) if fits else ())
        for thing in objects[-1]:
            before = stored.pop(_key(thing), None)  # a second change of it in this commit no longer fits
            stored[_key(thing)] = (-1, "", "")
            if isinstance(thing, Run):
                (runs if before else new_runs).append(thing)
                _check_run(before, thing)
            else:
                assert before is not None
                tasks.append((before[1], thing))
    write_tasks(transaction, tasks)
    write_runs(transaction, runs)
    transaction.insert("runs", RUN_COLUMNS, [rows.new_run(run) for run in new_runs])
    for run in new_runs:
        transaction.change(Kind.RUN, run.run_id, run.phase.value)
    return Committed(applied, first, transaction.revision, objects)


def holds(transaction: Transaction, lease: Lease) -> bool:
    row = transaction.one("SELECT holder, epoch FROM leases WHERE name = ?", (lease.name,))
    return row is not None and (row[0], row[1]) == (lease.holder, lease.epoch)


def _key(thing: Task | Run) -> Key:
    key = rows.task_key(thing.task_id)
    return (key, thing.attempt) if isinstance(thing, Run) else key


def _stored(transaction: Transaction, groups: Sequence[Group]) -> dict[Key, tuple[int, str, str]]:
    """Version, status or phase, and user of every object that the groups name."""
    tasks: set[int] = set()
    runs: set[int] = set()
    for group in groups:
        for thing in group:
            (runs if isinstance(thing, Run) else tasks).add(rows.task_key(thing.task_id))
    stored: dict[Key, tuple[int, str, str]] = {}
    for row in transaction.among("SELECT id, version, status, user_id FROM tasks WHERE id IN (KEYS)", tasks):
        stored[row[0]] = (row[1], row[2], row[3])
    sql = "SELECT task_id, attempt, version, phase, user_id FROM runs WHERE task_id IN (KEYS)"
    for row in transaction.among(sql, runs):
        stored[row[0], row[1]] = (row[2], row[3], row[4])
    return stored


def _fits(stored: dict[Key, tuple[int, str, str]], thing: Task | Run) -> bool:
    found = stored.get(_key(thing))
    if thing.version == 0:
        return found is None and isinstance(thing, Run)
    return found is not None and found[0] == thing.version


def _check_run(before: tuple[int, str, str] | None, run: Run) -> None:
    if before is not None and before[1] != run.phase.value and run.phase not in RUN_TRANSITIONS[RunPhase(before[1])]:
        raise ValueError(f"{run.run_id}: {before[1]} may not become {run.phase.value}")


def write_tasks(transaction: Transaction, changes: Sequence[tuple[str, Task]]) -> None:
    """Store tasks whose status was the one given, with their totals and changes. ValueError for a forbidden transition."""
    for before, task in changes:
        status = task.status.value
        if before != status and task.status not in TASK_TRANSITIONS[TaskStatus(before)]:
            raise ValueError(f"{task.task_id}: {before} may not become {status}")
        transaction.count(task.spec.user_id, before, status)
        transaction.change(Kind.TASK, task.task_id, status if before != status else "updated")
    transaction.many(UPDATE_TASK, [(*rows.task_state(task), rows.task_key(task.task_id)) for _, task in changes])


def write_runs(transaction: Transaction, runs: Sequence[Run]) -> None:
    """Store runs that exist already, with their changes."""
    for run in runs:
        transaction.change(Kind.RUN, run.run_id, run.phase.value)
    transaction.many(UPDATE_RUN, [(*rows.run_state(run), rows.task_key(run.task_id), run.attempt) for run in runs])
