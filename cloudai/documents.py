"""The API's documents as the values of `cloudai.resources`, for a client that computes with them."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from cloudai.resources import GIB, Resources, Task, TaskSpec, TaskStatus, Worker, WorkerState

Document = Mapping[str, Any]


def body_of(spec: TaskSpec) -> dict[str, Any]:
    """The body of a submit; what is not wished is left out."""
    body: dict[str, Any] = {
        "user_id": spec.user_id,
        "docker_image": spec.image,
        "command": list(spec.command) if isinstance(spec.command, tuple) else spec.command,
        "req_cpu": spec.resources.cpu / 1000,
        "req_memory": spec.resources.memory / GIB,
        "req_storage": spec.resources.storage / GIB,
        "req_gpu": spec.resources.gpu / 1000,
        "timeout_seconds": spec.timeout_seconds,
        "max_retries": spec.max_retries,
    }
    return {name: value for name, value in body.items() if value is not None}


def task_of(document: Document) -> Task:
    command = document["command"]
    return Task(
        task_id=document["task_id"],
        spec=TaskSpec(
            user_id=document["user_id"],
            image=document["docker_image"],
            command=tuple(command) if isinstance(command, list) else command,
            resources=amounts(document, "req"),
            timeout_seconds=document["timeout_seconds"],
            max_retries=document["max_retries"],
        ),
        status=TaskStatus(document["status"]),
        created_at=document["created_at_ms"],
        attempt=document["attempt"],
        cancel_requested=document["cancel_requested"],
        worker_id=document["worker_id"],
        started_at=document["started_at_ms"],
        finished_at=document["finished_at_ms"],
        exit_code=document["exit_code"],
        reason=document["reason"],
        message=document["message"],
        version=document["version"],
    )


def amounts(document: Document, prefix: str) -> Resources:
    """`<prefix>_cpu` and so on, in cores and GiB, as the integers they were made from."""
    return Resources(
        round(document[f"{prefix}_cpu"] * 1000),
        round(document[f"{prefix}_memory"] * GIB),
        round(document[f"{prefix}_storage"] * GIB),
        round(document[f"{prefix}_gpu"] * 1000),
    )


def worker_of(document: Document) -> WorkerState:
    """A worker without its `identity`, which the API keeps to itself."""
    worker = Worker(
        worker_id=document["worker_id"],
        identity="",
        address=document["worker_ip"],
        capacity=amounts(document, "total"),
        runtime=document["runtime"],
        registered_at=milliseconds(document["registered_at"]),
        last_heartbeat=document["last_heartbeat"] * 1000,
        ready=document["problem"] is None,
        problem=document["problem"],
        cpu_usage=document["cpu_usage"],
        memory_usage=document["memory_usage"],
    )
    return WorkerState(worker=worker, allocated=amounts(document, "allocated"), runs=document["running"], gpu_free=())


def milliseconds(instant: str) -> int:
    """Of the documented form, `2025-11-16T10:30:00Z`, since the Unix epoch."""
    return round(datetime.fromisoformat(instant).timestamp() * 1000)
