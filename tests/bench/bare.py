"""The yardstick of the HTTP rows: a Starlette application that only parses and answers, under the same server settings."""

from __future__ import annotations

import orjson
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

TASK = orjson.dumps(
    {
        "task_id": "task-1731753000123456789",
        "user_id": "user-123",
        "docker_image": "docker.io/library/ubuntu:latest",
        "command": "echo 'Hello World'",
        "req_cpu": 1.0,
        "req_memory": 2.0,
        "req_storage": 5.0,
        "req_gpu": 0.0,
        "status": "running",
        "created_at": "2025-11-16T10:30:00Z",
        "started_at": "2025-11-16T10:30:05Z",
        "worker_id": "worker-1",
    }
)


async def submit(request: Request) -> Response:
    orjson.loads(await request.body())
    answer = {"task_id": "task-1", "status": "queued", "message": "Task submitted successfully"}
    return Response(orjson.dumps(answer), media_type="application/json")


async def get(request: Request) -> Response:
    return Response(TASK, media_type="application/json")


app = Starlette(routes=[Route("/api/tasks", submit, methods=["POST"]), Route("/api/tasks/{task_id}", get)])
