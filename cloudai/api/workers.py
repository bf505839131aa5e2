"""Workers and the whole cluster."""

from __future__ import annotations

import re

from starlette.responses import Response

from cloudai.api import validation, views
from cloudai.api.answers import Json
from cloudai.api.models import NoQuery
from cloudai.api.routing import Request
from cloudai.clock import now_ms
from cloudai.errors import CloudAIError, Code
from cloudai.resources import WORKER_NAME
from cloudai.store.protocol import FacadeStore

_WORKER_ID = re.compile(WORKER_NAME)


class Workers:
    """The handlers of `/api/workers` and `/api/cluster/status`."""

    def __init__(self, store: FacadeStore, heartbeat_ms: int) -> None:
        self._store = store
        self._heartbeat_ms = heartbeat_ms

    async def list(self, request: Request) -> Response:
        validation.query(NoQuery, request.query)
        now = now_ms()
        return Json(
            {"workers": [views.worker(state, now, self._heartbeat_ms) for state in await self._store.list_workers()]}
        )

    async def get(self, request: Request) -> Response:
        validation.query(NoQuery, request.query)
        worker_id = request.params["worker_id"]
        if not _WORKER_ID.fullmatch(worker_id):
            worker_id = validation.shown(worker_id)
            raise CloudAIError(Code.WORKER_NOT_FOUND, "Worker not found", {"worker_id": worker_id})
        state = await self._store.get_worker(worker_id)
        runs = await self._store.runs_of_worker(worker_id)
        running = [views.running_task(run) for run in runs if run.started_at is not None]
        return Json(views.worker(state, now_ms(), self._heartbeat_ms) | {"running_tasks": running})

    async def cluster(self, request: Request) -> Response:
        validation.query(NoQuery, request.query)
        workers = await self._store.list_workers()
        return Json(views.cluster(workers, await self._store.totals(), now_ms(), self._heartbeat_ms))
