"""The values of `cloudai.resources` as the documents of the API; `models.py` has the same fields as types."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from cloudai.api.convert import gib, instant, maybe_instant, units, wished_gib
from cloudai.api.explain import Waiting
from cloudai.resources import NOTHING, Resources, Run, Task, TaskStatus, WorkerState

Document = dict[str, Any]


def summary(task: Task) -> Document:
    return {
        "task_id": task.task_id,
        "user_id": task.spec.user_id,
        "status": task.status.value,
        "created_at": instant(task.created_at),
        "worker_id": task.worker_id,
    }


def full(task: Task, waiting: Waiting | None = None) -> Document:
    """Every field of a task. `waiting`: what keeps it from going on."""
    spec = task.spec
    wish = spec.resources
    return {
        "task_id": task.task_id,
        "user_id": spec.user_id,
        "docker_image": spec.image,
        "command": spec.command,
        "req_cpu": units(wish.cpu),
        "req_memory": wished_gib(wish.memory),
        "req_storage": wished_gib(wish.storage),
        "req_gpu": units(wish.gpu),
        "status": task.status.value,
        "created_at": instant(task.created_at),
        "started_at": maybe_instant(task.started_at),
        "worker_id": task.worker_id,
        "finished_at": maybe_instant(task.finished_at),
        "exit_code": task.exit_code,
        "reason": waiting.reason.value if waiting else task.reason,
        "message": waiting.message if waiting else task.message,
        "attempt": task.attempt,
        "cancel_requested": task.cancel_requested,
        "timeout_seconds": spec.timeout_seconds,
        "max_retries": spec.max_retries,
        "created_at_ms": task.created_at,
        "started_at_ms": task.started_at,
        "finished_at_ms": task.finished_at,
        "version": task.version,
    }


def amounts(prefix: str, amount: Resources) -> Document:
    return {
        f"{prefix}_cpu": units(amount.cpu),
        f"{prefix}_memory": gib(amount.memory),
        f"{prefix}_storage": gib(amount.storage),
        f"{prefix}_gpu": units(amount.gpu),
    }


def worker(state: WorkerState, now: int, heartbeat_ms: int) -> Document:
    """`now`: milliseconds by the server's clock."""
    it = state.worker
    return {
        "worker_id": it.worker_id,
        "worker_ip": it.address,
        **amounts("total", it.capacity),
        **amounts("allocated", state.allocated),
        **amounts("available", state.available),
        "is_active": it.active(now, heartbeat_ms),
        "last_heartbeat": it.last_heartbeat // 1000,
        "registered_at": instant(it.registered_at),
        "runtime": it.runtime,
        "problem": None if it.ready else it.problem or "the agent says that it is not ready",
        "cpu_usage": it.cpu_usage,
        "memory_usage": it.memory_usage,
        "running": state.runs,
    }


def running_task(run: Run) -> Document:
    """Of a run that has started."""
    return {"task_id": run.task_id, "user_id": run.user_id, "started_at": maybe_instant(run.started_at)}


def cluster(workers: Iterable[WorkerState], totals: Mapping[TaskStatus, int], now: int, heartbeat_ms: int) -> Document:
    states = list(workers)
    active = [state for state in states if state.worker.active(now, heartbeat_ms)]
    return {
        "total_workers": len(states),
        "active_workers": len(active),
        **amounts("total", sum((state.worker.capacity for state in states), NOTHING)),
        **amounts("available", sum((state.available for state in active), NOTHING)),
        "total_tasks": sum(totals.values()),
        **{f"{status.value}_tasks": totals.get(status, 0) for status in TaskStatus},
    }
