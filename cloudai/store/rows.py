"""Rows of the tables ⇄ values of cloudai.resources. Column order here is the tables' own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import orjson

from cloudai.errors import task_not_found
from cloudai.resources import GpuShare, Resources, Run, RunPhase, Task, TaskSpec, TaskStatus, Worker

_PREFIX = "task-"
_MAX_KEY = 2**63 - 1
# Of columns that repeat in many rows one copy is kept in memory.
_shapes: dict[tuple[int, int, int, int], Resources] = {}


def task_id(key: int) -> str:
    return f"{_PREFIX}{key}"


def task_key(text: str) -> int:
    """The integer in a task's id. TASK_NOT_FOUND for what no task can be called."""
    digits = text.removeprefix(_PREFIX)
    if len(digits) == len(text) or not (digits.isascii() and digits.isdigit()) or digits != digits.lstrip("0"):
        raise task_not_found(text)
    key = int(digits)
    if key > _MAX_KEY:
        raise task_not_found(text)
    return key


def run_key(text: str) -> tuple[int, int]:
    """Task key and attempt of a run's id. TASK_NOT_FOUND for what no run can be called."""
    task, _, attempt = text.rpartition("-")
    if not (attempt.isascii() and attempt.isdigit() and len(attempt) < 10):
        raise task_not_found(text)
    return task_key(task), int(attempt)


def _resources(cpu: int, memory: int, storage: int, gpu: int) -> Resources:
    shape = (cpu, memory, storage, gpu)
    if len(_shapes) > 10_000:
        _shapes.clear()
    return _shapes.setdefault(shape, Resources(*shape))


def _command(text: str | None) -> str | tuple[str, ...] | None:
    if text is None:
        return None
    value = orjson.loads(text)
    return tuple(value) if isinstance(value, list) else str(value)


def command_text(command: str | tuple[str, ...] | None) -> str | None:
    return None if command is None else orjson.dumps(command).decode()


def task(row: Any) -> Task:
    """A whole row of `tasks` as a Task."""
    return Task(
        task_id=task_id(row.id),
        version=row.version,
        spec=TaskSpec(
            user_id=row.user_id,
            image=row.image,
            command=_command(row.command),
            resources=_resources(row.cpu, row.memory, row.storage, row.gpu),
            timeout_seconds=row.timeout_seconds,
            max_retries=row.max_retries,
        ),
        status=TaskStatus(row.status),
        created_at=row.created_at,
        attempt=row.attempt,
        cancel_requested=bool(row.cancel_requested),
        worker_id=row.worker_id,
        started_at=row.started_at,
        finished_at=row.finished_at,
        exit_code=row.exit_code,
        reason=row.reason,
        message=row.message,
    )


def new_task(task: Task, key: int, idempotency: tuple[str, bytes] | None) -> tuple[Any, ...]:
    """The columns of a new row of `tasks`, in the table's order."""
    spec, amounts = task.spec, task.spec.resources
    return (
        *(key, task.version, spec.user_id, spec.image, command_text(spec.command)),
        *(amounts.cpu, amounts.memory, amounts.storage, amounts.gpu),
        *(
            spec.timeout_seconds,
            spec.max_retries,
            task.status.value,
            task.created_at,
            task.attempt,
            task.cancel_requested,
        ),
        *(task.worker_id, task.started_at, task.finished_at, task.exit_code, task.reason, task.message),
        *(idempotency or (None, None)),
        False,
    )


TASK_STATE = (
    "version",
    "status",
    "attempt",
    "cancel_requested",
    "worker_id",
    "started_at",
    "finished_at",
    "exit_code",
    "reason",
    "message",
)
RUN_STATE = ("version", "stop_requested", "phase", "started_at", "finished_at", "exit_code", "reason", "message")


def task_state(task: Task) -> tuple[Any, ...]:
    """What may change of a task, in the order of TASK_STATE."""
    return (
        *(task.version, task.status.value, task.attempt, task.cancel_requested, task.worker_id),
        *(task.started_at, task.finished_at, task.exit_code, task.reason, task.message),
    )


def run(row: Any) -> Run:
    """A whole row of `runs` as a Run."""
    return Run(
        task_id=task_id(row.task_id),
        attempt=row.attempt,
        version=row.version,
        worker_id=row.worker_id,
        user_id=row.user_id,
        image=row.image,
        command=_command(row.command),
        resources=_resources(row.cpu, row.memory, row.storage, row.gpu),
        gpus=gpu_shares(row.gpus),
        timeout_seconds=row.timeout_seconds,
        created_at=row.created_at,
        stop_requested=bool(row.stop_requested),
        phase=RunPhase(row.phase),
        started_at=row.started_at,
        finished_at=row.finished_at,
        exit_code=row.exit_code,
        reason=row.reason,
        message=row.message,
    )


def gpu_shares(text: str) -> tuple[GpuShare, ...]:
    return () if text == "[]" else tuple(GpuShare(device, milli) for device, milli in orjson.loads(text))


def new_run(run: Run) -> tuple[Any, ...]:
    """The columns of a new row of `runs`, in the table's order."""
    amounts = run.resources
    shares = orjson.dumps([(share.device, share.milli) for share in run.gpus]).decode() if run.gpus else "[]"
    return (
        *(task_key(run.task_id), run.attempt, run.version, run.worker_id, run.user_id, run.image),
        *(command_text(run.command), amounts.cpu, amounts.memory, amounts.storage, amounts.gpu, shares),
        *(run.timeout_seconds, run.created_at, run.stop_requested, run.phase.value, run.started_at, run.finished_at),
        *(run.exit_code, run.reason, run.message),
    )


def run_state(run: Run) -> tuple[Any, ...]:
    """What may change of a run, in the order of RUN_STATE."""
    return (
        *(run.version, run.stop_requested, run.phase.value, run.started_at, run.finished_at),
        *(run.exit_code, run.reason, run.message),
    )


def worker(row: Any) -> Worker:
    """A whole row of `workers` as a Worker."""
    return Worker(
        worker_id=row.worker_id,
        identity=row.identity,
        address=row.address,
        capacity=_resources(row.cpu, row.memory, row.storage, row.gpu),
        runtime=row.runtime,
        registered_at=row.registered_at,
        last_heartbeat=row.last_heartbeat,
        ready=row.ready,
        problem=row.problem,
        cpu_usage=row.cpu_usage,
        memory_usage=row.memory_usage,
        lease=row.lease,
    )


def worker_columns(worker: Worker) -> Mapping[str, Any]:
    amounts = worker.capacity
    return {
        "worker_id": worker.worker_id,
        "identity": worker.identity,
        "address": worker.address,
        "cpu": amounts.cpu,
        "memory": amounts.memory,
        "storage": amounts.storage,
        "gpu": amounts.gpu,
        "runtime": worker.runtime,
        "registered_at": worker.registered_at,
        "last_heartbeat": worker.last_heartbeat,
        "ready": worker.ready,
        "problem": worker.problem,
        "cpu_usage": worker.cpu_usage,
        "memory_usage": worker.memory_usage,
        "lease": worker.lease,
    }
