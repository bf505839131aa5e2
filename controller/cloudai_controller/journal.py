"""One line of log and one count for each stored action that an operator wants to know of."""

from __future__ import annotations

import logging
from typing import Any

from cloudai_controller import metrics
from cloudai_controller.actions import Action, Finish, LoseRun, MarkRunning, Note, Place, Requeue, StopRun

log = logging.getLogger("cloudai.controller")


def record(action: Action) -> None:
    metrics.ACTIONS.labels(action=type(action).__name__).inc()
    match action:
        case Place(task, worker_id):
            metrics.PLACEMENTS.inc()
            _say(task.task_id, "%s: attempt %d placed on %s", action.attempt, worker_id)
        case MarkRunning(task):
            _say(task.task_id, "%s: attempt %d runs on %s", task.attempt, task.worker_id)
        case Requeue(task, reason, message):
            _say(task.task_id, "%s: queued again (%s): %s", reason, message)
        case Finish(task, status):
            _say(task.task_id, "%s: %s%s", status, f" ({action.reason})" if action.reason else "")
        case StopRun(run, why):
            _say(run.task_id, "%s: attempt %d is to stop, %s", run.attempt, why)
        case LoseRun(run):
            metrics.LOST.inc()
            log.warning(
                "%s: attempt %d is lost with %s",
                run.task_id,
                run.attempt,
                run.worker_id,
                extra={"task_id": run.task_id},
            )
        case Note():
            pass


def _say(task_id: str, text: str, *values: Any) -> None:
    if log.isEnabledFor(logging.INFO):
        log.info(text, task_id, *values, extra={"task_id": task_id})
