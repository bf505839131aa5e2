"""What the API remembers: what is gone stays away, whatever answer is still on its way; which nodes are silent."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from aiohttp import web

from cloudai.clock import now_ms
from cloudai.settings import Settings
from cloudai.store.kube import store as stores
from cloudai.store.kube.awaited import Awaited
from cloudai.store.kube.cache import SILENT_LOOKS, TaskCache
from cloudai.store.kube.revisions import Revisions
from cloudai.store.kube.store import KubernetesStore
from cloudai.store.kube.task_resource import Json, instant
from tests.kube.stub import api_of, refused
from tests.kube.test_pods import pod


def task(uid: str, version: int) -> Json:
    spec = {"image": "i", "userId": "ann", "resources": {"cpu": "1", "memory": "1Gi"}}
    meta = {"name": "t", "namespace": "here", "uid": uid, "resourceVersion": str(version), "generation": 1}
    return {"metadata": meta | {"creationTimestamp": "2025-11-16T10:30:00Z"}, "spec": spec}


def cache() -> TaskCache:
    return TaskCache(Revisions(), Awaited())


def test_a_late_answer_does_not_bring_back_what_was_deleted() -> None:
    tasks = cache()
    tasks.changed(task("one", 5))
    tasks.deleted(task("one", 7))
    tasks.changed(task("one", 6))
    assert tasks.get("t") is None
    assert sum(tasks.totals().values()) == 0


def test_nor_what_was_deleted_before_anything_else_was_told_of_it() -> None:
    tasks = cache()
    tasks.deleted(task("one", 7))
    tasks.changed(task("one", 5))
    assert tasks.get("t") is None


def test_nor_does_one_of_an_older_task_of_the_same_name_replace_the_new_one() -> None:
    tasks = cache()
    tasks.changed(task("two", 9))
    tasks.changed(task("one", 6))
    assert tasks.uid("t") == "two"


class Server:
    """Nothing but these, and one node that renews its Lease, by a clock that is an hour late, as often as somebody looks."""

    def __init__(self, **collections: Json) -> None:
        self._collections = collections
        self.renews, self.away, self.looks = True, False, 0
        self._clock = now_ms() - 3_600_000
        self._looked = asyncio.Event()

    async def handle(self, request: web.Request) -> web.StreamResponse:
        match request.path:
            case "/apis/coordination.k8s.io/v1/namespaces/kube-node-lease/leases":
                self.looks += 1
                self._clock += self.renews
                self._looked.set()
                lease = {"metadata": {"name": "node"}, "spec": {"renewTime": instant(self._clock)}}
                return refused(403, "Forbidden") if self.away else _listed(lease)
            case "/apis/metrics.k8s.io/v1beta1/nodes":
                return refused(404, "NotFound")
            case "/api/v1/namespaces/here":
                return web.json_response({"metadata": {"uid": "cluster"}})
        if "watch" in request.query:
            watch = web.StreamResponse()
            await watch.prepare(request)
            await asyncio.Event().wait()
        if request.path != "/api/v1/nodes":
            there = self._collections.get(request.path.rpartition("/")[2])
            return _listed(*([] if there is None else [there]))
        meta = {"name": "node", "uid": "n", "resourceVersion": "5", "creationTimestamp": "2025-11-16T10:30:00Z"}
        return _listed({"metadata": meta, "spec": {}, "status": {"conditions": [{"type": "Ready", "status": "True"}]}})

    async def looked_at(self, times: int) -> None:
        """So often, and what these looks told is known."""
        for _ in range(times + 1):
            self._looked.clear()
            await self._looked.wait()


def _listed(*items: Json) -> web.Response:
    return web.json_response({"metadata": {"resourceVersion": "7"}, "items": list(items)})


@pytest.mark.parametrize(("uid", "user"), [("task", "ann"), ("another", "")], ids=["its own", "a later one"])
async def test_whose_a_run_is_says_the_task_that_it_was_made_for(tmp_path: Path, uid: str, user: str) -> None:
    server = Server(tasks=task(uid, 5), pods=pod({"phase": "Running"}))
    async with api_of(server.handle, tmp_path) as api:
        store = KubernetesStore(api, Settings(namespace="here"))
        await store.start()
        assert [(run.run_id, run.user_id) for run in await store.runs_of_worker("node")] == [("t-1", user)]
        await store.close()


async def test_a_node_is_silent_when_looks_find_its_lease_as_before_and_not_by_clocks_or_when_looks_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stores, "POLL_SECONDS", 0.01)
    server = Server()
    async with api_of(server.handle, tmp_path) as api:
        store = KubernetesStore(api, Settings(namespace="here"))

        async def is_active() -> bool:
            return (await store.get_worker("node")).worker.active(now_ms(), heartbeat_ms=1000)

        await store.start()
        await server.looked_at(1)
        assert await is_active()
        server.away, server.renews = True, False  # the node cannot reach it either
        await server.looked_at(2 * SILENT_LOOKS)
        assert await is_active()
        server.away = False
        await server.looked_at(1)
        assert await is_active()
        await server.looked_at(SILENT_LOOKS)
        assert not await is_active()
        server.renews = True
        await server.looked_at(1)
        assert await is_active()
        await store.close()
