"""What a plan consists of. Each action is complete: `group` writes it out as values for the store without any choice left.

A group is stored as a whole or not at all; its objects carry the version they were planned on, so one that was planned
on yesterday's facts is refused.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from cloudai.resources import GpuShare, Run, RunPhase, Task, TaskStatus


@dataclass(frozen=True, slots=True)
class Place:
    """Start the next attempt of a queued task on a worker, with these GPU devices."""

    task: Task
    worker_id: str
    gpus: tuple[GpuShare, ...]
    at: int

    @property
    def attempt(self) -> int:
        return self.task.attempt + 1


@dataclass(frozen=True, slots=True)
class MarkRunning:
    """The container runs (or ran)."""

    task: Task
    started_at: int
    reason: str | None
    message: str | None


@dataclass(frozen=True, slots=True)
class Note:
    """Show what the worker says of the attempt, such as how far the image has come."""

    task: Task
    reason: str | None
    message: str | None


@dataclass(frozen=True, slots=True)
class Requeue:
    """The attempt is over and another one may be made."""

    task: Task
    reason: str
    message: str


@dataclass(frozen=True, slots=True)
class Finish:
    """The task has come to its end."""

    task: Task
    status: TaskStatus
    started_at: int | None
    finished_at: int
    exit_code: int | None
    reason: str | None
    message: str | None


@dataclass(frozen=True, slots=True)
class StopRun:
    """Wish a run's end; the worker stops the container and reports. `why` is for the log."""

    run: Run
    why: str


@dataclass(frozen=True, slots=True)
class LoseRun:
    """The worker's lease has run out: it has stopped the container by now, and no word of it counts any more."""

    run: Run
    at: int
    reason: str
    message: str


Action = Place | MarkRunning | Note | Requeue | Finish | StopRun | LoseRun


def group(action: Action) -> tuple[Task | Run, ...]:
    """The objects an action stores, each with the version it replaces (0: new)."""
    match action:
        case Place(task, worker_id):
            return _placed(action, task, worker_id)
        case MarkRunning(task, started_at, reason, message):
            return (replace(task, status=TaskStatus.RUNNING, started_at=started_at, reason=reason, message=message),)
        case Note(task, reason, message):
            return (replace(task, reason=reason, message=message),)
        case Requeue(task, reason, message):
            return (
                replace(
                    task, status=TaskStatus.QUEUED, worker_id=None, started_at=None, reason=reason, message=message
                ),
            )
        case Finish(task, status):
            return (
                replace(
                    task,
                    status=status,
                    started_at=action.started_at,
                    finished_at=action.finished_at,
                    exit_code=action.exit_code,
                    reason=action.reason,
                    message=action.message,
                ),
            )
        case StopRun(run):
            return (replace(run, stop_requested=True),)
        case LoseRun(run, at, reason, message):
            return (replace(run, phase=RunPhase.LOST, finished_at=at, reason=reason, message=message),)


def _placed(action: Place, task: Task, worker_id: str) -> tuple[Task, Run]:
    spec = task.spec
    run = Run(
        task_id=task.task_id,
        attempt=action.attempt,
        worker_id=worker_id,
        user_id=spec.user_id,
        image=spec.image,
        command=spec.command,
        resources=spec.resources,
        gpus=action.gpus,
        timeout_seconds=spec.timeout_seconds,
        created_at=action.at,
    )
    placed = replace(
        task, status=TaskStatus.PENDING, attempt=action.attempt, worker_id=worker_id, reason=None, message=None
    )
    return (placed, run)
