"""How the API server is reached: with which words, and with whose."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

import pytest
from aiohttp import web

from cloudai.settings import Settings
from cloudai.store.kube import api as requests
from cloudai.store.kube.api import ApiError, NoCluster, connect
from tests.kube.stub import api_of, refused


class Server:
    """Lets in whoever brings `token`."""

    token = ""

    def __init__(self) -> None:
        self.refused = 0
        self.agents: set[str] = set()

    async def handle(self, request: web.Request) -> web.StreamResponse:
        self.agents.add(request.headers["User-Agent"].partition("/")[0])
        if request.headers.get("Authorization", "").removeprefix("Bearer ") != self.token:
            self.refused += 1
            return refused(401, "Unauthorized")
        return web.json_response({"path": request.path, "query": dict(request.query)})


def says(directory: Path, token: str) -> None:
    path = directory / "kubeconfig"
    config = json.loads(path.read_text())
    config["users"][0]["user"] = {"token": token}
    path.write_text(json.dumps(config))


async def test_a_start_that_waits_for_the_api_server_can_be_ended(tmp_path: Path) -> None:
    asked = asyncio.Event()

    async def hang(_: web.Request) -> web.StreamResponse:
        asked.set()
        await asyncio.Event().wait()
        raise AssertionError

    async with api_of(hang, tmp_path):
        command = [sys.executable, "-m", "cloudai", "api", "--store", "kubernetes", "--port", "0"]
        api = await asyncio.create_subprocess_exec(*command, "--kubeconfig", str(tmp_path / "kubeconfig"))
        await asked.wait()
        api.terminate()
        assert await api.wait() == 0


@pytest.mark.parametrize("text", ["", "[", "1"])
async def test_a_file_that_is_no_kubeconfig_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "odd"
    path.write_text(text)
    with pytest.raises(NoCluster, match=f"{path}"):
        await connect(Settings(kubeconfig=path))


async def test_where_there_is_no_kubeconfig_that_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requests, "KUBE_CONFIG_DEFAULT_LOCATION", str(tmp_path / "none"))
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    with pytest.raises(NoCluster, match="there is no kubeconfig"):
        await connect(Settings(kubeconfig=None))


async def test_a_credential_that_ran_out_is_read_anew(tmp_path: Path) -> None:
    server = Server()
    async with api_of(server.handle, tmp_path) as api:
        await api.get("/version")
        for token in ("one", "two"):
            server.token = token
            says(tmp_path, token)
            await api.get("/version")
            await api.get("/version")
        assert server.refused == 2
        server.token = "three"
        with pytest.raises(ApiError, match="401"):
            await api.get("/version")
    assert server.refused == 3


async def test_a_credential_that_is_another_one_each_time_is_not_tried_for_ever(tmp_path: Path) -> None:
    server = Server()
    server.token = "never"

    async def handle(request: web.Request) -> web.StreamResponse:
        says(tmp_path, f"token-{server.refused}")
        return await server.handle(request)

    async with api_of(handle, tmp_path) as api:
        with pytest.raises(ApiError, match="401"):
            await api.get("/version")
    assert server.refused == 2


async def test_what_is_asked_for_arrives_as_it_was_meant(tmp_path: Path) -> None:
    server = Server()
    async with api_of(server.handle, tmp_path) as api:
        answer = await api.get("/things", labelSelector="a/b=c,d!=e f", limit=5)
    assert answer == {"path": "/things", "query": {"labelSelector": "a/b=c,d!=e f", "limit": "5"}}
    assert server.agents == {"cloudai"}  # who wrote a field, to the API server
