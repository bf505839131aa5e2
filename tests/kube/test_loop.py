"""What the operator does where facts are against each other, which a real cluster shows seldom."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import cast

from aiohttp import web

from cloudai.clock import now_ms
from cloudai.settings import Settings
from cloudai.store.kube.task_resource import Json, instant
from cloudai_controller.kube.facts import Facts
from cloudai_controller.kube.lease import Leader
from cloudai_controller.kube.loop import Operator
from tests.kube.stub import api_of, refused
from tests.kube.test_pods import pod

AT = "2025-11-16T10:30:00Z"


class Server:
    """One Task, running, and the Pod of its first attempt; `told` has what is written, in that order; `deleted`: the Pod is to
    end.
    """

    def __init__(self, first: Json | None) -> None:
        meta = {"name": "t", "namespace": "here", "uid": "task", "resourceVersion": "6", "creationTimestamp": AT}
        spec = {"image": "i", "resources": {"cpu": "1", "memory": "1Gi"}}
        status = {"phase": "Running", "attempt": 1, "startedAt": AT, "node": "node"}
        head = {"apiVersion": "cloudai.dev/v1alpha1", "kind": "Task"}
        self.task: Json = head | {"metadata": meta, "spec": spec, "status": status}
        self.first: Json | None = first
        self.told: asyncio.Queue[tuple[str, Json]] = asyncio.Queue()
        self.deleted = asyncio.Event()

    async def handle(self, request: web.Request) -> web.StreamResponse:
        kind = request.path.rpartition("/")[2]
        body = await request.json() if request.can_read_body else {}
        match request.method, kind:
            case "GET", "tasks":
                return _listed(self.task)
            case "GET", "pods" if "watch" in request.query:
                watch = web.StreamResponse()
                await watch.prepare(request)
                await asyncio.Event().wait()
            case "GET", "pods":
                return _listed(*filter(None, [self.first]))
            case "GET", "t-1" if self.first is not None:
                return web.json_response(self.first)
            case "DELETE", "t-1" if self.first is not None:
                self.deleted.set()
                return web.json_response(self.first)
            case "PUT", "status":
                self.task["metadata"]["resourceVersion"] = str(int(self.task["metadata"]["resourceVersion"]) + 1)
                self.task["status"] = body["status"]
                self.told.put_nowait(("status", body["status"]))
                return web.json_response(self.task)
            case "POST", "pods":
                self.told.put_nowait(("pod", body))
                return web.json_response(pod({}, name=body["metadata"]["name"], version=20))
        return refused(404, "NotFound")


def _listed(*items: Json) -> web.Response:
    return web.json_response({"metadata": {"resourceVersion": "7"}, "items": list(items)})


async def no_events(facts: Facts) -> None:
    await asyncio.Event().wait()


@contextlib.asynccontextmanager
async def operating(server: Server, directory: Path) -> AsyncIterator[Operator]:
    """An operator that leads, and hears of Tasks and Pods only what it lists and what a test tells it."""
    leader = cast("Leader", SimpleNamespace(check=lambda: 30.0))
    async with api_of(server.handle, directory) as api:
        operator = Operator(api, Settings(namespace="here"), leader)
        running = asyncio.ensure_future(operator.run(no_events))
        try:
            yield operator
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)


async def test_a_pod_that_lost_its_owner_is_waited_for_before_the_next_one_is_made(tmp_path: Path) -> None:
    state = {"running": {"startedAt": AT}}
    first = pod({"phase": "Running", "containerStatuses": [{"name": "task", "state": state}]}, ownerReferences=[])
    server = Server(first)
    async with operating(server, tmp_path) as operator:
        what, status = await server.told.get()
        assert (what, status["phase"], status["reason"]) == ("status", "Running", "WaitingForAdmission")
        assert "t-1" in status["message"]
        server.first = None
        operator.facts.deleted(first)
        what, status = await server.told.get()
        assert (what, status["phase"]) == ("status", "Queued")
        what, made = await server.told.get()
        assert (what, made["metadata"]["name"]) == ("pod", "t-2")


LIVE = {"phase": "Running", "containerStatuses": [{"name": "task", "state": {"running": {"startedAt": AT}}}]}
OURS = [{"apiVersion": "cloudai.dev/v1alpha1", "kind": "Task", "name": "t", "uid": "task", "controller": True}]


async def test_a_pod_that_was_made_without_an_answer_is_ended_before_its_task_is_cancelled(tmp_path: Path) -> None:
    live = pod(LIVE, ownerReferences=OURS, version=20)

    class Silent(Server):
        async def handle(self, request: web.Request) -> web.StreamResponse:
            if request.method == "POST":
                self.first = live
                return refused(504, "Timeout")
            return await super().handle(request)

    server = Silent(None)
    server.task["status"] = {}
    async with operating(server, tmp_path) as operator:
        what, status = await server.told.get()
        assert (what, status["phase"], status["reason"]) == ("status", "Queued", "WaitingForAdmission")
        server.task["spec"]["cancelRequested"] = True
        server.task["metadata"]["resourceVersion"] = "30"
        operator.facts.task_told("MODIFIED", server.task)
        await server.deleted.wait()
        assert server.task["status"]["phase"] in ("Queued", "Running")


async def test_a_pod_that_is_heard_of_only_after_its_task_has_ended_is_ended_too(tmp_path: Path) -> None:
    server = Server(None)
    server.task["status"] = {"phase": "Cancelled", "attempt": 1, "finishedAt": instant(now_ms())}
    async with operating(server, tmp_path) as operator:
        server.first = pod(LIVE, ownerReferences=OURS, version=20)
        operator.facts.changed(server.first)
        await server.deleted.wait()
