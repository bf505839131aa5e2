"""The task store over HTTP: what `cloudai.store.protocol.TaskStore` promises, spoken with the documented API.

The command line uses the documents as the API gives them; a program may use the same values as the servers do
(`Task`, `WorkerState`). Both go through one Transport, so that limits and restarts of the server are handled once.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping
from typing import Any
from urllib.parse import quote

import httpx

from cloudai.documents import body_of, task_of, worker_of
from cloudai.errors import task_not_found
from cloudai.resources import Task, TaskSpec, TaskStatus, WorkerState
from cloudai.store.protocol import Idempotency, LogSlice, TaskPage, TaskQuery
from cloudai.transport import Transport, not_cloudai

WAIT_SECONDS = 30  # how long one request for a change may be held back


class Document(dict[str, Any]):
    """A JSON object of the API. What a foreign server answered lacks what is looked for, and then says so."""

    server = ""

    def __missing__(self, key: str) -> Any:
        raise not_cloudai(self.server)


class Client(Transport):
    """A CloudAI server as a TaskStore. `async with Client("http://127.0.0.1:8080") as store: …`

    Errors are those of the protocol; a server that cannot be reached raises `Unreachable`, which is UNAVAILABLE.
    """

    # -- documents, as the API gives them

    async def get(self, path: str, query: Mapping[str, Any] | None = None) -> Document:
        return self._document(await self.request("GET", path, query=query))

    async def post(self, path: str, body: Any = None, headers: Mapping[str, str] | None = None) -> Document:
        return self._document(await self.request("POST", path, body=body, headers=headers))

    def _document(self, answer: httpx.Response) -> Document:
        try:
            document = Document(answer.json())
        except (ValueError, TypeError):
            raise not_cloudai(self.server) from None
        document.server = self.server
        return document

    async def task(self, task_id: str) -> Document:
        return await self.get(task_path(task_id))

    async def changed_task(self, task: Document, seconds: int = WAIT_SECONDS) -> Document:
        """The task once it differs from `task`, or as it is after `seconds`."""
        return await self.get(task_path(task["task_id"]), {"wait_seconds": seconds, "version": task["version"]})

    async def log(self, task_id: str, attempt: int | None = None, follow: bool = False) -> AsyncIterator[bytes]:
        """The log of an attempt (None: the latest) as it is now, or followed until the attempt has ended.

        A broken connection is taken up again at the byte where it broke; at once, unless it brought none.
        """
        offset = 0
        while True:
            before = offset
            query = log_query(attempt, offset) | ({"follow": "true"} if follow else {})
            try:
                async with self.stream(f"{task_path(task_id)}/logs", query) as answer:
                    if "X-Log-End" not in answer.headers:
                        raise not_cloudai(self.server)
                    async for data in answer.aiter_raw():
                        offset += len(data)
                        yield data
                return
            except httpx.TransportError:  # the next request waits for the server, or raises Unreachable
                if offset == before:
                    self._notice(f"The log from {self.server} breaks off; trying again")
                    await asyncio.sleep(1)

    # -- the store

    async def create_task(self, spec: TaskSpec, idempotency: Idempotency | None = None) -> Task:
        headers = {"Idempotency-Key": idempotency.key} if idempotency else None
        answer = await self.post("/api/tasks", body=body_of(spec), headers=headers)
        return await self.get_task(answer["task_id"])

    async def get_task(self, task_id: str) -> Task:
        return task_of(await self.task(task_id))

    async def list_tasks(self, query: TaskQuery) -> TaskPage:
        wanted = {"status": query.status, "user_id": query.user_id, "limit": query.limit, "offset": query.offset}
        given = {name: value for name, value in wanted.items() if value is not None}
        page = await self.get("/api/tasks", {"view": "full"} | given)
        return TaskPage([task_of(document) for document in page["tasks"]], page["total"])

    async def cancel_task(self, task_id: str) -> Task:
        await self.post(f"{task_path(task_id)}/cancel")
        return await self.get_task(task_id)

    async def list_workers(self) -> list[WorkerState]:
        return [worker_of(document) for document in (await self.get("/api/workers"))["workers"]]

    async def get_worker(self, worker_id: str) -> WorkerState:
        return worker_of(await self.get(f"/api/workers/{quote(worker_id, safe='')}"))

    async def totals(self) -> Mapping[TaskStatus, int]:
        status = await self.get("/api/cluster/status")
        return {kind: status[f"{kind}_tasks"] for kind in TaskStatus}

    async def read_log(self, task_id: str, attempt: int | None, offset: int, limit: int) -> LogSlice:
        query = log_query(attempt, offset) | {"limit": limit}
        answer = await self.request("GET", f"{task_path(task_id)}/logs", query=query)
        end, complete = int(answer.headers["X-Log-End"]), answer.headers["X-Log-Complete"] == "true"
        return LogSlice(answer.content, offset, end, complete)

    async def wait_log(self, task_id: str, attempt: int | None, beyond: int, timeout: float) -> None:
        query = log_query(attempt, beyond) | {"follow": "true", "limit": 1}
        with contextlib.suppress(TimeoutError, httpx.TransportError):
            async with asyncio.timeout(timeout), self.stream(f"{task_path(task_id)}/logs", query) as answer:
                await answer.aread()


def log_query(attempt: int | None, offset: int) -> dict[str, Any]:
    return {"offset": offset} | ({} if attempt is None else {"attempt": attempt})


def task_path(task_id: str) -> str:
    """Raises TASK_NOT_FOUND for what would lead to another path."""
    if not task_id or "/" in task_id:
        raise task_not_found(task_id)
    return f"/api/tasks/{quote(task_id, safe='')}"
