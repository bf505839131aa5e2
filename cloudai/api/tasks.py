"""Submit, get, list and cancel tasks."""

from __future__ import annotations

import asyncio
import hashlib
import re

import orjson
from starlette.responses import Response

from cloudai.api import validation, views
from cloudai.api.answers import Json
from cloudai.api.changes import Changes
from cloudai.api.convert import byte_count, milli
from cloudai.api.crew import Crew
from cloudai.api.models import ListQuery, NoQuery, TaskGetQuery, TaskRequest
from cloudai.api.routing import Request
from cloudai.errors import invalid, task_not_found
from cloudai.resources import Resources, Task, TaskSpec
from cloudai.store.protocol import FacadeStore, Idempotency, TaskQuery

REPAIR = 5.0  # seconds after which a held-back answer reads its task again, should a wake-up have been lost
_TASK_ID = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?", re.ASCII).fullmatch
_KEY = re.compile(rb"[\x21-\x7e]{1,255}")


def spec_of(wish: TaskRequest) -> TaskSpec:
    """The wish in the units everything is computed with."""
    command = wish.command
    return TaskSpec(
        user_id=wish.user_id,
        image=wish.docker_image,
        command=(tuple(command) if isinstance(command, list) else command) or None,
        resources=Resources(
            milli(wish.req_cpu), byte_count(wish.req_memory), byte_count(wish.req_storage), milli(wish.req_gpu)
        ),
        timeout_seconds=wish.timeout_seconds,
        max_retries=wish.max_retries,
    )


def task_id_of(request: Request) -> str:
    """The id in the path: `task-<number>`, or the name of a task applied to Kubernetes. Raises TASK_NOT_FOUND."""
    task_id = request.params["task_id"]
    if not _TASK_ID(task_id):
        raise task_not_found(validation.shown(task_id))
    return task_id


class Tasks:
    """The handlers of `/api/tasks` and below, except logs."""

    def __init__(self, store: FacadeStore, crew: Crew, changes: Changes, max_body: int) -> None:
        self._store = store
        self._crew = crew
        self._changes = changes
        self._max_body = max_body

    async def submit(self, request: Request) -> Response:
        if request.query:
            validation.query(NoQuery, request.query)
        wish = validation.body(TaskRequest, await request.json_body(self._max_body))
        key = request.header(b"idempotency-key")
        task = await self._store.create_task(spec_of(wish), None if key is None else _idempotency(key, wish))
        return Json({"task_id": task.task_id, "status": "queued", "message": "Task submitted successfully"})

    async def get(self, request: Request) -> Response:
        task_id = task_id_of(request)
        if request.query and (query := validation.query(TaskGetQuery, request.query)).wait_seconds:
            task = await self._changed(task_id, query)
        else:
            task = await self._store.get_task(task_id)
        [waiting] = await self._crew.why([task])
        return Json(views.full(task, waiting))

    async def _changed(self, task_id: str, query: TaskGetQuery) -> Task:
        """The task when it has ended or has another version than asked for, or when the time or the API is over."""
        deadline = asyncio.get_running_loop().time() + query.wait_seconds
        with self._changes.of_task(task_id) as changed:
            while True:
                changed.clear()
                task = await self._store.get_task(task_id)
                left = deadline - asyncio.get_running_loop().time()
                news = task.status.terminal or query.version not in (None, task.version)
                if news or left <= 0 or self._changes.ended.is_set():
                    return task
                try:
                    async with asyncio.timeout(min(left, REPAIR)):
                        await changed.wait()
                except TimeoutError:
                    continue

    async def list(self, request: Request) -> Response:
        query = validation.query(ListQuery, request.query)
        brief = query.view != "full"
        page = await self._store.list_tasks(
            TaskQuery(status=query.status, user_id=query.user_id, limit=query.limit, offset=query.offset, brief=brief)
        )
        if brief:
            tasks = [views.summary(task) for task in page.tasks]
        else:
            waiting = await self._crew.why(page.tasks)
            tasks = [views.full(task, why) for task, why in zip(page.tasks, waiting, strict=True)]
        return Json({"tasks": tasks, "total": page.total, "limit": query.limit, "offset": query.offset})

    async def cancel(self, request: Request) -> Response:
        task_id = task_id_of(request)
        validation.query(NoQuery, request.query)
        await self._store.cancel_task(task_id)
        return Json({"task_id": task_id, "status": "cancelled", "message": "Task cancellation requested"})


def _idempotency(key: bytes, wish: TaskRequest) -> Idempotency:
    """The key with a digest of what is wished, however the JSON was written."""
    if not _KEY.fullmatch(key):
        raise invalid("Idempotency-Key", "must be 1 to 255 visible ASCII characters")
    body = orjson.dumps(wish.model_dump(), option=orjson.OPT_SORT_KEYS)
    return Idempotency(key.decode(), hashlib.sha256(body).digest())
