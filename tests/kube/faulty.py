"""An API server on its worst day: a proxy on loopback that answers some requests wrongly or late, and breaks watches."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import itertools
import json
import random
import ssl
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
from aiohttp import web

# What goes wrong with a watch, with another request that reads, and with one that writes; all of it within few requests.
KINDS = {
    "watch": ("gone", "expired", "dropped", "slow", "busy", "broken"),
    "read": ("slow", "busy", "broken", "unanswered"),
    "write": ("slow", "busy", "broken", "unanswered", "conflict"),
}
EXPIRED = {"type": "ERROR", "object": {"kind": "Status", "code": 410, "reason": "Expired", "message": "too old"}}


class Faulty:
    """In front of the cluster of a `kubeconfig` with a token; `badness` of the requests (0 to 1) go wrong, in every way in
    turn, and so do the first watches. Without badness all is well.
    """

    def __init__(self, kubeconfig: Path, badness: float = 0.0) -> None:
        config = json.loads(kubeconfig.read_text())
        cluster = config["clusters"][0]["cluster"]
        self._server = cluster["server"]
        authority = base64.b64decode(cluster["certificate-authority-data"]).decode()
        self._tls = ssl.create_default_context(cadata=authority)
        self._headers = {"Authorization": f"Bearer {config['users'][0]['user']['token']}"}
        self._random = random.Random()
        self._badness = badness
        self._next = {what: itertools.cycle(kinds) for what, kinds in KINDS.items()}
        self.faults: Counter[tuple[str, str]] = Counter()
        self.absent: str | None = None  # the end of paths that are not there
        self.due: dict[str, str] = {}  # how the next watch of a path that ends so goes wrong: as in KINDS, or `silent`
        self.silenced = asyncio.Event()
        self.always = ""  # what is wrong with every request, as in KINDS or `hangs`; what is watched goes on
        self._over = asyncio.Event()

    @contextlib.asynccontextmanager
    async def serving(self, directory: Path) -> AsyncIterator[Path]:
        """A kubeconfig that leads through it."""
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", self._handle)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=1)
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
                self._over.set()
                await self._session.close()  # first, so that what is still passed on is cut off and not waited for
                await runner.cleanup()

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        if self.absent is not None and request.path.endswith(self.absent):
            return web.Response(status=404, text="404 page not found\n")
        fault = self.always if self.always and "watch" not in request.query else self._fault(request)
        match fault:
            case "hangs":
                await self._over.wait()
            case "slow":
                await asyncio.sleep(0.5)
            case "busy":
                return _refusal(429, "TooManyRequests", {"Retry-After": "1"})
            case "broken":
                return web.Response(status=500, text="<html>oops</html>")
            case "gone":
                return _refusal(410, "Expired")
            case "conflict":
                return _refusal(409, "Conflict")
        return await self._pass(request, fault)

    def _fault(self, request: web.Request) -> str:
        """How this request goes wrong, if it does."""
        what = "watch" if "watch" in request.query else "read" if request.method in ("GET", "HEAD") else "write"
        if what == "watch" and (collection := "/" + request.path.rpartition("/")[2]) in self.due:
            return self.due.pop(collection)
        if not self._badness:
            return ""
        untried = what == "watch" and len(self.faults.keys() & {(what, kind) for kind in KINDS[what]}) < len(
            KINDS[what]
        )
        if not untried and self._random.random() >= self._badness:
            return ""
        fault = next(self._next[what])
        self.faults[what, fault] += 1
        return fault

    async def _pass(self, request: web.Request, fault: str) -> web.StreamResponse:
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
            if fault == "silent":  # the connection is there, and nothing comes over it
                self.silenced.set()
                await self._over.wait()
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


def _refusal(status: int, reason: str, headers: dict[str, str] | None = None) -> web.Response:
    document = {"kind": "Status", "reason": reason, "code": status, "message": f"{reason}, for the sake of it"}
    return web.json_response(document, status=status, headers=headers)
