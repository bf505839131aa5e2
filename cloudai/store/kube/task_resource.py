"""The Task resource and the Task value, both ways.

The wish (`spec`) is written by the facade or by hand, what became of it (`status`) by the operator alone. Both are plain
JSON; nothing here reads or writes anything.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from cloudai.resources import ENDED_WELL, Reason, Resources, Task, TaskSpec, TaskStatus
from cloudai.store.kube import quantity

GROUP = "cloudai.dev"
VERSION = "v1alpha1"
API_VERSION = f"{GROUP}/{VERSION}"
PLURAL = "tasks"
KIND = "Task"
USER_LABEL = f"{GROUP}/user"
TASK_LABEL = f"{GROUP}/task"
ATTEMPT_LABEL = f"{GROUP}/attempt"
SUBMITTED = f"{GROUP}/submitted-at"  # annotation: when it was submitted, in ms since the epoch
CANCEL = {"spec": {"cancelRequested": True}}
LONGEST_MESSAGE = 1000  # characters
_INSTANT = re.compile(r"[0-9]{1,15}", re.ASCII)

Json = dict[str, Any]

PHASES: Mapping[TaskStatus, str] = {status: status.value.capitalize() for status in TaskStatus}
_STATUS = {phase: status for status, phase in PHASES.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """An attempt that has ended, as the Task's status lists it. Times in ms since the epoch."""

    attempt: int
    node: str | None = None
    started_at: int | None = None
    finished_at: int | None = None
    exit_code: int | None = None
    reason: str | None = None


def instant(ms: int) -> str:
    """RFC 3339 with milliseconds."""
    return datetime.fromtimestamp(ms / 1000, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def micros(ms: int) -> str:
    """The same with microseconds, the form of Leases and Events."""
    return instant(ms).replace("Z", "000Z")


def millis(text: str | None) -> int | None:
    """Milliseconds since the epoch of an RFC 3339 time; None for none."""
    return None if text is None else round(datetime.fromisoformat(text).timestamp() * 1000)


def tasks_path(namespace: str) -> str:
    """Where the API server has the Tasks of a namespace."""
    return f"/apis/{API_VERSION}/namespaces/{namespace}/{PLURAL}"


# -- the wish


def task_resource(name: str, namespace: str, spec: TaskSpec) -> Json:
    """The resource to create for a submit. `spec.resources.gpu` must be whole devices."""
    wish: Json = {"userId": spec.user_id, "image": spec.image, "resources": _amounts(spec.resources)}
    if isinstance(spec.command, str):
        wish["script"] = spec.command
    elif spec.command is not None:
        wish["command"] = list(spec.command)
    if spec.timeout_seconds is not None:
        wish["timeoutSeconds"] = spec.timeout_seconds
    if spec.max_retries is not None:
        wish["maxRetries"] = spec.max_retries
    return {
        "apiVersion": API_VERSION,
        "kind": KIND,
        "metadata": {"name": name, "namespace": namespace},
        "spec": wish,
    }


def _amounts(resources: Resources) -> Json:
    amounts: Json = {
        "cpu": quantity.of_milli(resources.cpu),
        "memory": quantity.of_bytes(resources.memory),
    }
    if resources.storage:
        amounts["storage"] = quantity.of_bytes(resources.storage)
    if resources.gpu:
        amounts["gpu"] = resources.gpu // 1000
    return amounts


def task_of(resource: Mapping[str, Any]) -> Task:
    """The Task that a resource holds. Its version is the resource version."""
    meta, spec, status = resource["metadata"], resource["spec"], resource.get("status") or {}
    user = spec.get("userId") or (meta.get("labels") or {}).get(USER_LABEL) or meta["namespace"]
    command: Sequence[str] | str | None = spec.get("command") or spec.get("script") or None
    return Task(
        task_id=meta["name"],
        spec=TaskSpec(
            user_id=user,
            image=spec["image"],
            command=tuple(command) if isinstance(command, list) else command,  # type: ignore[arg-type]
            resources=_resources(spec["resources"]),
            timeout_seconds=spec.get("timeoutSeconds"),
            max_retries=spec.get("maxRetries"),
        ),
        status=_STATUS[status.get("phase", PHASES[TaskStatus.QUEUED])],
        created_at=_created_at(meta),
        attempt=status.get("attempt", 0),
        cancel_requested=spec.get("cancelRequested", False),
        worker_id=status.get("node"),
        started_at=millis(status.get("startedAt")),
        finished_at=millis(status.get("finishedAt")),
        exit_code=status.get("exitCode"),
        reason=status.get("reason"),
        message=status.get("message") or (ENDED_WELL if status.get("phase") == PHASES[TaskStatus.COMPLETED] else None),
        version=int(meta["resourceVersion"]),
    )


def _resources(amounts: Mapping[str, Any]) -> Resources:
    return Resources(
        quantity.milli(amounts["cpu"]),
        quantity.whole(amounts["memory"]),
        quantity.whole(amounts.get("storage", 0)),
        1000 * quantity.whole(amounts.get("gpu", 0)),
    )


def _created_at(meta: Mapping[str, Any]) -> int:
    """The instant of a submit is finer than the resource's own, which is in whole seconds."""
    created = millis(meta["creationTimestamp"]) or 0
    said = (meta.get("annotations") or {}).get(SUBMITTED, "")
    submitted = int(said) if _INSTANT.fullmatch(said) else 0
    return submitted if created <= submitted < created + 1000 else created


# -- what became of it


def status_of(task: Task, ended: Sequence[Attempt], before: Mapping[str, Any], generation: int, now: int) -> Json:
    """The whole status to store for `task`. `before` is the stored one, for the times of its conditions."""
    fields: Json = {
        "phase": PHASES[task.status],
        "observedGeneration": generation,
        "attempt": task.attempt,
        "attempts": [_attempt(one) for one in ended],
        "node": task.worker_id,
        "startedAt": None if task.started_at is None else instant(task.started_at),
        "finishedAt": None if task.finished_at is None else instant(task.finished_at),
        "exitCode": task.exit_code,
        "reason": task.reason,
        "message": None if task.message is None else task.message[:LONGEST_MESSAGE],
    }
    fields["conditions"] = list(_conditions(task, before.get("conditions") or [], now))
    return _known(fields)


def attempts_of(status: Mapping[str, Any]) -> list[Attempt]:
    """The ended attempts that a stored status lists."""
    return [
        Attempt(
            attempt=one["attempt"],
            node=one.get("node"),
            started_at=millis(one.get("startedAt")),
            finished_at=millis(one.get("finishedAt")),
            exit_code=one.get("exitCode"),
            reason=one.get("reason"),
        )
        for one in status.get("attempts") or []
    ]


def _attempt(one: Attempt) -> Json:
    return _known(
        {
            "attempt": one.attempt,
            "node": one.node,
            "startedAt": None if one.started_at is None else instant(one.started_at),
            "finishedAt": None if one.finished_at is None else instant(one.finished_at),
            "exitCode": one.exit_code,
            "reason": one.reason,
        }
    )


def _known(fields: Json) -> Json:
    return {name: value for name, value in fields.items() if value is not None}


def _conditions(task: Task, before: Iterable[Mapping[str, Any]], now: int) -> Iterable[Json]:
    """Each costs the API server a write of its own size again, so there are no more than tell something."""
    known = {condition["type"]: condition for condition in before}
    for kind, status, reason, message in _facts(task):
        last = known.get(kind)
        same = last is not None and last["status"] == status
        yield {
            "type": kind,
            "status": status,
            "lastTransitionTime": last["lastTransitionTime"] if last is not None and same else instant(now)[:19] + "Z",
            "reason": reason,
            "message": message,
        }


def _facts(task: Task) -> Iterable[tuple[str, str, str, str]]:
    """Type, status, reason and message of each condition."""
    placed = task.worker_id is not None
    waits = task.reason or Reason.WAITING_FOR_CAPACITY.value
    words = (task.message or "")[:LONGEST_MESSAGE]
    yield (
        ("Scheduled", "True", "Bound", f"on node {task.worker_id}") if placed else ("Scheduled", "False", waits, words)
    )
    began = task.started_at is not None
    yield ("Started", "True", "Running", "") if began else ("Started", "False", "NotStarted", "")
    if task.status is TaskStatus.COMPLETED:
        yield "Succeeded", "True", "Completed", words
    elif task.status.terminal:
        yield "Succeeded", "False", task.reason or "Failed", words
    else:
        yield "Succeeded", "Unknown", PHASES[task.status], words
    if task.status is TaskStatus.CANCELLED:
        yield "Cancelled", "True", "Cancelled", words
    elif task.cancel_requested:
        yield "Cancelled", "False", "CancelRequested", ""
