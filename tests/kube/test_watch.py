"""How a collection is followed when the API server does not make it easy."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import Set
from pathlib import Path

import pytest
from aiohttp import web

from cloudai.store.kube import watch
from cloudai.store.kube.task_resource import Json
from cloudai.store.kube.watch import Key, follow
from tests.kube.stub import api_of

ROUNDS = 7


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


async def test_a_fault_of_who_keeps_what_is_told_is_made_good_by_a_list(tmp_path: Path) -> None:
    class Faulty(Names):
        faults = 0

        def only(self, keys: Set[Key], version: int) -> None:
            self.faults += 1
            if self.faults == 1:
                raise RuntimeError("a fault")
            super().only(keys, version)

    names, all_listed = Faulty(), asyncio.Event()

    async def serve(request: web.Request) -> web.Response:
        return listed("one") if "watch" not in request.query else web.json_response({}, status=500)

    async with api_of(serve, tmp_path) as api:
        following = asyncio.ensure_future(follow(api, "/things", names, all_listed.set))
        await all_listed.wait()
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)
    assert (names.known, names.faults) == ({"one"}, 2)


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


async def test_a_watch_that_falls_silent_is_taken_up_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "SILENCE", 0.1)
    asked: list[str] = []
    again = asyncio.Event()

    async def silent(request: web.Request) -> web.StreamResponse:
        if "watch" not in request.query:
            return listed()
        asked.append(request.query["resourceVersion"])
        stream = web.StreamResponse()
        await stream.prepare(request)
        if len(asked) == 1:
            event = {"type": "BOOKMARK", "object": {"metadata": {"resourceVersion": "9"}}}
            await stream.write(json.dumps(event).encode() + b"\n")
        else:
            again.set()
        await asyncio.Event().wait()
        return stream

    async with api_of(silent, tmp_path) as api:
        following = asyncio.ensure_future(follow(api, "/things", Names(), lambda: None))
        await again.wait()
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)
    assert asked[:2] == ["7", "9"]
