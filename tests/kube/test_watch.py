"""How a collection is followed when the API server does not make it easy."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Set
from pathlib import Path

from aiohttp import web

from cloudai.settings import Settings
from cloudai.store.kube.api import Api, connect
from cloudai.store.kube.task_resource import Json
from cloudai.store.kube.watch import Key, follow

ROUNDS = 7
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Names:
    """A follower that keeps names, and does not understand those called odd."""

    def __init__(self) -> None:
        self.known: set[str] = set()
        self._more = asyncio.Event()

    def changed(self, resource: Json) -> None:
        if resource["metadata"]["name"].startswith("odd"):
            raise ValueError("odd")
        self.known.add(resource["metadata"]["name"])
        self._more.set()

    def deleted(self, resource: Json) -> None:
        self.known.discard(resource["metadata"]["name"])

    def only(self, keys: Set[Key], version: int) -> None:
        assert version == 7
        self.known &= {name for _, name in keys}

    async def until(self, known: Set[str]) -> None:
        while self.known != known:
            self._more.clear()
            await self._more.wait()


@contextlib.asynccontextmanager
async def api_of(handle: Handler, directory: Path) -> AsyncIterator[Api]:
    app = web.Application()
    app.router.add_get("/{path:.*}", handle)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    host, port = runner.addresses[0][:2]
    config = directory / "kubeconfig"
    cluster = {"name": "c", "cluster": {"server": f"http://{host}:{port}"}}
    context = {"name": "c", "context": {"cluster": "c", "user": "u"}}
    head = {"apiVersion": "v1", "kind": "Config", "current-context": "c", "users": [{"name": "u", "user": {}}]}
    config.write_text(json.dumps(head | {"clusters": [cluster], "contexts": [context]}))
    api = await connect(Settings(kubeconfig=config))
    try:
        yield api
    finally:
        await api.close()
        await runner.cleanup()


def listed(*names: str) -> web.Response:
    items = [{"metadata": {"name": name, "resourceVersion": "1"}} for name in names]
    return web.json_response({"metadata": {"resourceVersion": "7"}, "items": items})


async def test_a_server_that_ends_every_watch_is_asked_more_and_more_seldom(tmp_path: Path) -> None:
    asked: list[float] = []
    enough = asyncio.Event()

    async def expired(request: web.Request) -> web.Response:
        if "watch" not in request.query:
            return listed()
        asked.append(asyncio.get_running_loop().time())
        if len(asked) > ROUNDS:
            enough.set()
        return web.json_response({"reason": "Expired", "code": 410}, status=410)

    async with api_of(expired, tmp_path) as api:
        following = asyncio.ensure_future(follow(api, "/things", Names(), lambda: None))
        await enough.wait()
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)
    pauses = [later - earlier for earlier, later in itertools.pairwise(asked)]
    assert all(pause >= 0.01 * 2**failures for failures, pause in enumerate(pauses, start=1))


async def test_an_object_that_is_not_understood_keeps_nobody_from_the_others(tmp_path: Path) -> None:
    names, told = Names(), asyncio.Event()

    async def serve(request: web.Request) -> web.StreamResponse:
        if "watch" not in request.query:
            return listed("odd-1", "one")
        stream = web.StreamResponse()
        await stream.prepare(request)
        for name in ("odd-2", "two"):
            event = {"type": "ADDED", "object": {"metadata": {"name": name, "resourceVersion": "8"}}}
            await stream.write(json.dumps(event).encode() + b"\n")
        await told.wait()
        return stream

    async with api_of(serve, tmp_path) as api:
        following = asyncio.ensure_future(follow(api, "/things", names, lambda: None))
        async with asyncio.timeout(30):
            await names.until({"one", "two"})
        told.set()
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)
