"""What one task needs, from what is wished and what its runs say. Pure and level-based: it asks what is, never what
happened, so a lost event is made good by looking again.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from cloudai.resources import Reason, Run, RunPhase, Task, TaskStatus, run_id
from cloudai_controller.actions import Action, Finish, MarkRunning, Note, Requeue, StopRun

_LOST = (RunPhase.LOST, RunPhase.STOPPED)


def reconcile(task: Task | None, runs: Mapping[str, Run], now: int) -> Iterator[Action]:
    """`task` is None when it is finished or unknown; `runs` are its live runs and the current one even when it has ended."""
    if task is None:
        yield from _stop_all(runs.values(), "its task has ended")
    elif task.status is TaskStatus.QUEUED:
        yield from _stop_all(runs.values(), "its task waits for another attempt")
        if task.cancel_requested and not runs:
            yield _cancelled(task, None, now)
    else:
        yield from _placed(task, runs, now)


def _placed(task: Task, runs: Mapping[str, Run], now: int) -> Iterator[Action]:
    name = run_id(task.task_id, task.attempt)
    current = runs.get(name)
    others = [run for key, run in runs.items() if key != name and not run.phase.terminal]
    yield from _stop_all(others, f"attempt {task.attempt} is the current one")
    if current is not None and not current.phase.terminal:
        yield from _live(task, current, now)
    elif others:
        return  # the next attempt waits until they are gone
    elif current is not None:
        yield _ended(task, current, now)
    elif task.cancel_requested:
        yield _cancelled(task, None, now)
    else:
        message = f"Attempt {task.attempt} left no record; waits for another attempt."
        yield Requeue(task, Reason.WORKER_LOST, message)


def _live(task: Task, run: Run, now: int) -> Iterator[Action]:
    if task.cancel_requested and not run.stop_requested:
        yield StopRun(run, "its task was cancelled")
    if run.phase is RunPhase.RUNNING and task.status is TaskStatus.PENDING:
        yield _started(task, run, now)
    elif (run.reason, run.message) != (task.reason, task.message) and not task.cancel_requested:
        yield Note(task, run.reason, run.message)


def _ended(task: Task, run: Run, now: int) -> Action:
    if task.cancel_requested:
        return _cancelled(task, run, now)
    began = run.started_at is not None or run.phase is RunPhase.SUCCEEDED
    if began and task.status is TaskStatus.PENDING:
        return _started(task, run, now)  # whoever follows the changes sees it start; its end comes with the next plan
    if run.phase is RunPhase.SUCCEEDED:
        return _finish(task, run, TaskStatus.COMPLETED, now)
    if task.attempt <= allowed_retries(task, run):
        return Requeue(task, _reason(run), _again(task, run))
    return _finish(task, run, TaskStatus.FAILED, now)


def allowed_retries(task: Task, run: Run) -> int:
    """How many further attempts the task gets after the first, given how `run` ended."""
    if task.spec.max_retries is not None:
        return task.spec.max_retries
    return 1 if _was_lost(run) else 0


def _was_lost(run: Run) -> bool:
    """Ended by what befell the worker; a run that stopped though nobody cancelled was stopped by its worker's lease."""
    return run.phase in _LOST or run.reason == Reason.WORKER_LOST


def _reason(run: Run) -> str:
    return run.reason or (Reason.WORKER_LOST if _was_lost(run) else Reason.EXIT_CODE)


def _again(task: Task, run: Run) -> str:
    attempts = allowed_retries(task, run) + 1
    return f"Waits for attempt {task.attempt + 1} of {attempts}. Attempt {task.attempt} ended: {_account(run)}"


def _account(run: Run) -> str:
    if run.message:  # another sentence follows
        return run.message if run.message.endswith((".", "!", "?")) else f"{run.message}."
    if _was_lost(run):
        return f"worker {run.worker_id} was cut off for longer than the lease and stopped it."
    return "the worker gave no message; see the logs."


def _started(task: Task, run: Run, now: int) -> MarkRunning:
    ended = run.phase.terminal  # its last words belong to its end
    words = (None, None) if ended else (run.reason, run.message)
    return MarkRunning(task, run.started_at or run.finished_at or now, *words)


def _finish(task: Task, run: Run, status: TaskStatus, now: int) -> Finish:
    failed = status is TaskStatus.FAILED
    return Finish(
        task,
        status,
        started_at=task.started_at or run.started_at,
        finished_at=run.finished_at or now,
        exit_code=run.exit_code,
        reason=_reason(run) if failed else run.reason,
        message=_last_words(task, run) if failed else run.message,
    )


def _last_words(task: Task, run: Run) -> str:
    account = _account(run)
    if task.attempt > 1:
        return f"{account} It was attempt {task.attempt}, the last."
    if _was_lost(run):
        return f"{account} No attempt is left; submit it again, with `max_retries` where it may run more than once."
    return account


def _cancelled(task: Task, run: Run | None, now: int) -> Finish:
    return Finish(
        task,
        TaskStatus.CANCELLED,
        started_at=task.started_at or (run.started_at if run else None),
        finished_at=(run.finished_at if run else None) or now,
        exit_code=run.exit_code if run else None,
        reason=Reason.CANCELLED,
        message=_cancel_words(run),
    )


def _cancel_words(run: Run | None) -> str:
    if run is not None and run.phase is RunPhase.LOST:
        return f"Cancelled on request. Worker {run.worker_id}, which had it, was lost; it stops its containers itself."
    stopped = run is not None and run.phase is RunPhase.STOPPED and run.started_at is not None
    return "Stopped on request." if stopped else "Cancelled on request."


def _stop_all(runs: Iterable[Run], why: str) -> Iterator[StopRun]:
    for run in runs:
        if not run.phase.terminal and not run.stop_requested:
            yield StopRun(run, why)
