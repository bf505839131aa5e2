"""An API server on its worst day: a proxy on loopback that answers some requests wrongly or late, and breaks watches."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import ssl
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
from aiohttp import web

EXPIRED = {"type": "ERROR", "object": {"kind": "Status", "code": 410, "reason": "Expired", "message": "too old"}}


class Faulty:
    """In front of the cluster of `kubeconfig`; `badness` of the requests (0 to 1) go wrong, chosen by `seed`."""

    def __init__(self, kubeconfig: Path, seed: int, badness: float) -> None:
        config = json.loads(kubeconfig.read_text())
        cluster = config["clusters"][0]["cluster"]
        self._server = cluster["server"]
        self._tls = ssl.create_default_context(cafile=cluster["certificate-authority"])
        self._headers = {"Authorization": f"Bearer {config['users'][0]['user']['token']}"}
        self._random = random.Random(seed)
        self._badness = badness
        self.faults: Counter[str] = Counter()

    @contextlib.asynccontextmanager
    async def serving(self, directory: Path) -> AsyncIterator[Path]:
        """A kubeconfig that leads through it."""
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", self._handle)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        host, port = runner.addresses[0][:2]
        path = directory / "faulty.kubeconfig"
        cluster = {"name": "c", "cluster": {"server": f"http://{host}:{port}"}}
        context = {"name": "c", "context": {"cluster": "c", "user": "u"}}
        users = [{"name": "u", "user": {"token": "none"}}]
        head = {"apiVersion": "v1", "kind": "Config", "current-context": "c"}
        path.write_text(json.dumps(head | {"clusters": [cluster], "contexts": [context], "users": users}))
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=self._tls, limit=0)) as self._session:
            try:
                yield path
            finally:
                await self._session.close()  # first, so that what is still passed on is cut off and not waited for
                await runner.cleanup()

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        watching = "watch" in request.query
        fault = self._fault(watching)
        match fault:
            case "slow":
                await asyncio.sleep(0.5)
            case "busy":
                return web.json_response(
                    {"kind": "Status", "reason": "TooManyRequests"}, status=429, headers={"Retry-After": "1"}
                )
            case "broken":
                return web.Response(status=500, text="<html>oops</html>")
            case "gone":
                return web.json_response({"kind": "Status", "reason": "Expired", "code": 410}, status=410)
        return await self._pass(request, watching, fault)

    def _fault(self, watching: bool) -> str:
        if self._random.random() >= self._badness:
            return ""
        kinds = ["slow", "busy", "broken"] + (["gone", "expired", "dropped"] * 2 if watching else ["unanswered"])
        fault = self._random.choice(kinds)
        self.faults[fault] += 1
        return fault

    async def _pass(self, request: web.Request, watching: bool, fault: str) -> web.StreamResponse:
        headers = self._headers | {"Content-Type": request.headers.get("Content-Type", "application/json")}
        url = self._server + request.path_qs
        body = await request.read()
        async with self._session.request(request.method, url, data=body, headers=headers) as answer:
            if fault == "unanswered":  # done, but nobody is told
                await answer.read()
                assert request.transport is not None
                request.transport.abort()
                return web.Response()
            out = web.StreamResponse(status=answer.status, headers={"Content-Type": answer.content_type})
            await out.prepare(request)
            passed = 0
            with contextlib.suppress(ConnectionResetError, aiohttp.ClientError):
                async for piece in answer.content.iter_any():
                    passed += 1
                    if fault == "expired":
                        await out.write(json.dumps(EXPIRED).encode() + b"\n")
                        break
                    if fault == "dropped" and passed > 2:
                        assert request.transport is not None
                        request.transport.abort()
                        break
                    await out.write(piece)
            return out
