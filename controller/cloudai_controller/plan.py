"""`plan(view, now)`: everything to do now, as complete actions. Pure: the same view and time give the same plan."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from cloudai.resources import Reason
from cloudai_controller.actions import Action, LoseRun, Place
from cloudai_controller.reconcile import reconcile
from cloudai_controller.schedule import schedule
from cloudai_controller.state import Findings, View

PLACEMENTS = 500  # in one plan: enough to share a commit well, few enough to keep others waiting only briefly


@dataclass(frozen=True, slots=True)
class Plan:
    """What to do, and what the view may take down once it is being done."""

    actions: list[Action]
    findings: Findings


def plan(view: View, now: int, limit: int = PLACEMENTS) -> Plan:
    lost, expiry = _lost(view, now)
    actions: list[Action] = list(lost)
    losing = {action.run.run_id for action in lost}
    for task_id in sorted(view.dirty):
        runs = view.runs_of(task_id)
        if losing.isdisjoint(runs):  # else the verdict comes first, and the task is looked at again
            actions.extend(reconcile(view.tasks.get(task_id), runs, now))
    made = schedule(view, now, limit)
    actions.extend(Place(placed.task, placed.worker_id, placed.gpus, now) for placed in made.placements)
    fit = frozenset(placed.task.spec.resources for placed in made.placements) - made.unfit
    return Plan(actions, Findings(now, fit, made.unfit, made.hold, made.complete, expiry))


def _lost(view: View, now: int) -> tuple[list[LoseRun], int | None]:
    """Runs of workers whose lease has run out, and when to look again (ms)."""
    if view.expiry is None or now < view.expiry:
        return [], view.expiry
    lost: list[LoseRun] = []
    expiry = None
    for worker_id in sorted(view.busy_workers()):
        due = view.expires(worker_id)
        if due is None:
            continue
        if due <= now:
            lost.extend(_lose(view, worker_id, now))
        else:
            expiry = due if expiry is None else min(due, expiry)
    return lost, expiry


def _lose(view: View, worker_id: str, now: int) -> Iterator[LoseRun]:
    message = (
        f"Worker {worker_id} sent no heartbeat for longer than its lease; "
        "check that the machine is up and reaches the server."
    )
    runs = view.runs_on(worker_id)
    for key in sorted(runs):
        yield LoseRun(runs[key], now, Reason.WORKER_LOST, message)
