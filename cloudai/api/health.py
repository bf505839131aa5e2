"""`/healthz`, `/readyz`, `/metrics`: for those who look after the service; not rate limited."""

from __future__ import annotations

import asyncio

from starlette.responses import Response

from cloudai.api.answers import Json
from cloudai.api.crew import Crew
from cloudai.api.fresh import Fresh
from cloudai.api.lead import Lead
from cloudai.api.routing import Request
from cloudai.clock import now_ms
from cloudai.errors import CloudAIError
from cloudai.metrics import Metrics
from cloudai.store.protocol import FacadeStore

FRESH = 1.0  # seconds a verdict is kept, so that probing costs no more than that
ANSWER = 3.0  # seconds the store may take, or it counts as away: who probes does not wait long
UNKNOWN = "unknown without the store"


class Health:
    def __init__(self, store: FacadeStore, crew: Crew, lead: Lead, metrics: Metrics, heartbeat_ms: int) -> None:
        self._store = store
        self._lead = lead
        self._crew = crew
        self._metrics = metrics
        self._heartbeat_ms = heartbeat_ms
        self._checks = Fresh(self._judge, FRESH)

    async def healthz(self, _: Request) -> Response:
        return Json({"status": "ok"})

    async def readyz(self, _: Request) -> Response:
        """503 while the store cannot be written. Without a controller tasks are taken and wait, so that is only told."""
        checks = await self._checks.get()
        ready = checks["store"] == "ok"
        headers = [(b"x-cloudai-cluster", self._store.cluster_id.encode())]
        if not ready:
            headers.append((b"retry-after", b"%d" % FRESH))
        return Json({"ready": ready, "checks": checks}, 200 if ready else 503, headers)

    async def _judge(self) -> dict[str, str]:
        try:
            async with asyncio.timeout(ANSWER) as limit:
                await self._store.ping()
        except TimeoutError:
            return {"store": f"does not answer within {ANSWER:g} s", "controller": UNKNOWN}
        except CloudAIError as error:
            return {"store": str(error), "controller": UNKNOWN}
        try:
            async with asyncio.timeout_at(limit.when()):
                problem = await self._lead.problem()
        except TimeoutError:
            problem = "unknown: the store does not say in time"
        except CloudAIError as error:
            problem = f"unknown: {error}"
        return {"store": "ok", "controller": problem or "ok"}

    async def metrics(self, _: Request) -> Response:
        try:
            async with asyncio.timeout(ANSWER):
                workers = await self._crew.workers()
                self._metrics.observe_store(workers, await self._store.totals(), now_ms(), self._heartbeat_ms)
        except (CloudAIError, TimeoutError):
            self._metrics.store_up.set(0)
        return Response(self._metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")
