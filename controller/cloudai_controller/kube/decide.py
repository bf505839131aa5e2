"""What one Task needs on Kubernetes, from what it says and what its Pods say. Pure, and level-based.

`reconcile` is the one that decides everywhere; here its verdicts are followed to their end, so that a task that came far
since the last look costs one write. A task whose Pod exists counts as placed whether or not its status says so yet, and
reads as queued until the scheduler has found a node.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from cloudai.resources import Reason, Run, RunPhase, Task, TaskStatus, run_id
from cloudai.store.kube.task_resource import Attempt
from cloudai_controller.actions import Finish, Requeue, StopRun, group
from cloudai_controller.reconcile import reconcile

_FAR = 10  # more verdicts than a task can need in one look
# An attempt is given up for these though its Pod would try for ever; the cause is noted before the Pod is deleted.
_GIVEN_UP = frozenset(
    {Reason.INVALID_IMAGE_NAME, Reason.IMAGE_NOT_FOUND, Reason.IMAGE_PULL_FAILED, Reason.START_FAILED}
)


@dataclass(frozen=True, slots=True)
class Decision:
    """`task` and `ended` as the status shall say; then the Pods to delete, then the attempt whose Pod to make.

    `look_at`: when to look again (ms) though nothing changes. `failing`: the attempt fails to start, and is given up then.
    """

    task: Task
    ended: tuple[Attempt, ...]
    delete: tuple[Run, ...] = ()
    create: int | None = None
    look_at: int | None = None
    failing: bool = False


def decide(
    task: Task,
    ended: Sequence[Attempt],
    runs: Mapping[str, Run],
    now: int,
    image_grace: int,
    failing_since: int | None = None,
) -> Decision:
    """`runs`: by run id. `image_grace`: ms that the current attempt may fail to start before it is given up, counted from
    `failing_since`, or from now where that is not known.
    """
    listed = {one.attempt: one for one in ended}
    seen = {name: _as_noted(task, _in_order(task, run)) for name, run in runs.items()}
    live = {name: run for name, run in seen.items() if not run.phase.terminal}
    if task.status.terminal:
        stops = tuple(action.run for action in reconcile(None, live, now) if isinstance(action, StopRun))
        return Decision(task, tuple(ended), stops)
    current = _begun(task, seen, listed)
    for _ in range(_FAR):
        relevant = live | {name: run for name, run in seen.items() if name == run_id(task.task_id, current.attempt)}
        if current.status is TaskStatus.QUEUED or current.status.terminal:
            relevant = live
        verdicts = list(reconcile(None if current.status.terminal else current, relevant, now))
        moves = [verdict for verdict in verdicts if not isinstance(verdict, StopRun)]
        if not moves:
            break
        for move in moves:
            if isinstance(move, Finish | Requeue) and current.attempt:
                run = seen.get(run_id(task.task_id, current.attempt))
                if run is not None and current.attempt not in listed:
                    listed[current.attempt] = _attempt(run)
            (after,) = group(move)
            assert isinstance(after, Task)
            current = after
    stops = tuple(verdict.run for verdict in verdicts if isinstance(verdict, StopRun))
    hopeless, look_at = _hopeless(current, live, now, (now if failing_since is None else failing_since) + image_grace)
    starts = current.status is TaskStatus.QUEUED and not live and not current.cancel_requested
    told, tell_at = _unprepared(_shown(current, seen), live, now, image_grace)
    return Decision(
        told,
        tuple(listed[number] for number in sorted(listed)),
        stops + tuple(run for run in hopeless if run not in stops),
        current.attempt + 1 if starts else None,
        look_at if tell_at is None else tell_at,
        failing=look_at is not None,
    )


def vanished(task: Task) -> Run:
    """The current attempt of a placed task whose Pod is not there: somebody took it away past its finalizer."""
    return Run(
        task_id=task.task_id,
        attempt=task.attempt,
        worker_id=task.worker_id or "",
        user_id=task.spec.user_id,
        image=task.spec.image,
        command=None,
        resources=task.spec.resources,
        phase=RunPhase.LOST,
        started_at=task.started_at,
        reason=Reason.CONTAINER_GONE,
        message="Its Pod vanished: somebody removed it without waiting for its end.",
    )


def _begun(task: Task, runs: Mapping[str, Run], listed: Mapping[int, Attempt]) -> Task:
    """Where the attempt of a queued task is there, the status is behind, or somebody else wrote its phase."""
    if task.status is TaskStatus.QUEUED:
        number = task.attempt + (task.attempt in listed or run_id(task.task_id, task.attempt) not in runs)
        run = runs.get(run_id(task.task_id, number))
        if run is None:
            return task
        task = replace(task, status=TaskStatus.PENDING, attempt=run.attempt, reason=None, message=None)
    else:
        run = runs.get(run_id(task.task_id, task.attempt))
    return task if run is None else replace(task, worker_id=run.worker_id or None)


def _in_order(task: Task, run: Run) -> Run:
    """Kubernetes tells whole seconds, rounded down; nothing of an attempt was before its task."""
    began = None if run.started_at is None else max(run.started_at, task.created_at)
    over = None if run.finished_at is None else max(run.finished_at, task.created_at)
    same = began == run.started_at and over == run.finished_at
    return run if same else replace(run, started_at=began, finished_at=over)


def _as_noted(task: Task, run: Run) -> Run:
    """What keeps an attempt from its start stays the cause, whatever is said of its Pod while that is taken down."""
    noted = task.attempt == run.attempt and run.started_at is None and task.reason in _GIVEN_UP
    ended_by_us = run.phase is RunPhase.FAILED and run.reason in (Reason.CONTAINER_GONE, Reason.START_FAILED)
    if ended_by_us and task.cancel_requested:
        return replace(run, phase=RunPhase.STOPPED, reason=Reason.CANCELLED, message=None)
    going = run.stop_requested and not run.phase.terminal
    if noted and (ended_by_us or going or run.phase is RunPhase.PULLING):
        return replace(run, reason=task.reason, message=task.message)
    return run


def _hopeless(task: Task, live: Mapping[str, Run], now: int, due: int) -> tuple[tuple[Run, ...], int | None]:
    """The attempt to give up; or when that is due."""
    run = live.get(run_id(task.task_id, task.attempt))
    if run is None or run.stop_requested or run.reason not in _GIVEN_UP or task.reason != run.reason:
        return (), None
    if run.phase is RunPhase.STARTING or now >= due:
        return (run,), None
    return (), due


def _unprepared(task: Task, live: Mapping[str, Run], now: int, grace: int) -> tuple[Task, int | None]:
    """A task whose node makes no place for its Pod (network, runtime, volumes) says so after a while; or when that is due."""
    run = live.get(run_id(task.task_id, task.attempt))
    if task.status is not TaskStatus.PENDING or run is None or run.reason is not None or run.message is None:
        return task, None
    due = run.created_at + grace
    if now < due:  # without words: of a write without a reason nobody would take them back
        return replace(task, message=None), due
    return replace(task, reason=Reason.WAITING_FOR_NODE, message=run.message), None


def _attempt(run: Run) -> Attempt:
    return Attempt(
        attempt=run.attempt,
        node=run.worker_id or None,
        started_at=run.started_at,
        finished_at=run.finished_at,
        exit_code=run.exit_code,
        reason=run.reason,
    )


def _shown(task: Task, runs: Mapping[str, Run]) -> Task:
    """Placed is what has a node; before that the task is queued, with the scheduler's words."""
    run = runs.get(run_id(task.task_id, task.attempt))
    if task.status is not TaskStatus.PENDING or run is None or run.worker_id:
        return task
    return replace(task, status=TaskStatus.QUEUED, attempt=task.attempt - 1, worker_id=None)
