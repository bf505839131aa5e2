"""Every operation of the API as OpenAPI tells it: its models, its answers and its errors."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel

from cloudai.api import models
from cloudai.errors import Code

EXAMPLE = {
    "user_id": "user-123",
    "docker_image": "docker.io/library/ubuntu:latest",
    "command": "echo 'Hello World'",
    "req_cpu": 1.0,
    "req_memory": 2.0,
    "req_storage": 5.0,
    "req_gpu": 0.0,
}


@dataclass(frozen=True, kw_only=True)
class Operation:
    """`answer` is the model of the 200; where it is None, `media` says what the body is."""

    method: str
    path: str
    name: str
    tag: str
    summary: str
    description: str
    answer: type[BaseModel] | None = None
    media: str = "application/json"
    query: type[BaseModel] = models.NoQuery
    body: type[BaseModel] | None = None
    example: Any = None
    headers: list[dict[str, Any]] = field(default_factory=list)
    answer_headers: dict[str, Any] = field(default_factory=dict)
    errors: tuple[Code, ...] = ()
    also_503: type[BaseModel] | None = None

    def path_parameters(self) -> list[dict[str, Any]]:
        return [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
            for name in re.findall(r"{(\w+)}", self.path)
        ]

    def success(self) -> dict[str, Any]:
        if self.answer:
            schema: dict[str, Any] = {"$ref": f"#/components/schemas/{self.answer.__name__}"}
        else:
            schema = {"type": "object"} if self.media == "application/json" else {"type": "string"}
        answer: dict[str, Any] = {"description": "Success", "content": {self.media: {"schema": schema}}}
        if self.answer_headers:
            answer["headers"] = self.answer_headers
        return answer


_KEY = {
    "name": "Idempotency-Key",
    "in": "header",
    "description": "The same key with the same body gives the first answer again and makes no second task.",
    "schema": {"type": "string", "minLength": 1, "maxLength": 255, "pattern": "^[!-~]+$"},
}
_LOG_HEADERS = {
    "X-Log-Offset": {"description": "The first byte sent.", "schema": {"type": "integer"}},
    "X-Log-End": {"description": "How many bytes are stored.", "schema": {"type": "integer"}},
    "X-Log-Complete": {"description": "`true` when none will follow.", "schema": {"type": "string"}},
}
_READ = (Code.RATE_LIMITED,)
_TASK = (Code.TASK_NOT_FOUND, Code.RATE_LIMITED)

OPERATIONS = (
    Operation(
        method="POST",
        path="/api/tasks",
        name="submit_task",
        tag="tasks",
        summary="Submit a task",
        description="Answers once the task is on disk.",
        answer=models.Submitted,
        body=models.TaskRequest,
        example=EXAMPLE,
        headers=[_KEY],
        errors=(Code.IDEMPOTENCY_CONFLICT, Code.BODY_TOO_LARGE, Code.UNSUPPORTED_MEDIA_TYPE, Code.RATE_LIMITED),
    ),
    Operation(
        method="GET",
        path="/api/tasks",
        name="list_tasks",
        tag="tasks",
        summary="List tasks",
        description="Newest first, with how many match in all.",
        answer=models.TaskList,
        query=models.ListQuery,
        errors=_READ,
    ),
    Operation(
        method="GET",
        path="/api/tasks/{task_id}",
        name="get_task",
        tag="tasks",
        summary="Get a task",
        description="The wish and what became of it. A queued task says in `reason` and `message` why it waits.",
        answer=models.TaskView,
        query=models.TaskGetQuery,
        errors=_TASK,
    ),
    Operation(
        method="POST",
        path="/api/tasks/{task_id}/cancel",
        name="cancel_task",
        tag="tasks",
        summary="Cancel a task",
        description="Records the wish. The task itself reads `cancelled` once its container is gone.",
        answer=models.Submitted,
        errors=(Code.TASK_NOT_FOUND, Code.TASK_FINISHED),
    ),
    Operation(
        method="GET",
        path="/api/tasks/{task_id}/logs",
        name="get_task_logs",
        tag="tasks",
        summary="Read a task's log",
        description="The bytes of one attempt, both streams in order; with `follow`, as they come until it has ended.",
        media="text/plain",
        query=models.LogQuery,
        answer_headers=_LOG_HEADERS,
        errors=(*_TASK, Code.ATTEMPT_NOT_FOUND, Code.LOGS_REMOVED),
    ),
    Operation(
        method="GET",
        path="/api/workers",
        name="list_workers",
        tag="workers",
        summary="List workers",
        description="Every worker that has joined; retention removes those that have long been silent and hold nothing.",
        answer=models.WorkerList,
        errors=_READ,
    ),
    Operation(
        method="GET",
        path="/api/workers/{worker_id}",
        name="get_worker",
        tag="workers",
        summary="Get a worker",
        description="A worker with the tasks placed on it.",
        answer=models.WorkerDetails,
        errors=(Code.WORKER_NOT_FOUND, Code.RATE_LIMITED),
    ),
    Operation(
        method="GET",
        path="/api/cluster/status",
        name="get_cluster_status",
        tag="cluster",
        summary="Cluster overview",
        description="Totals of workers and tasks. What is available counts active workers only.",
        answer=models.ClusterStatus,
        errors=_READ,
    ),
    Operation(
        method="GET",
        path="/healthz",
        name="healthz",
        tag="operation",
        summary="Is the process alive",
        description="Always ok while the process answers.",
        answer=models.Health,
    ),
    Operation(
        method="GET",
        path="/readyz",
        name="readyz",
        tag="operation",
        summary="Is it ready",
        description="503 while the store cannot be written. Whether a controller leads is told beside it.",
        answer=models.Readiness,
        also_503=models.Readiness,
    ),
    Operation(
        method="GET",
        path="/metrics",
        name="metrics",
        tag="operation",
        summary="Metrics",
        description="For Prometheus.",
        media="text/plain",
    ),
)
