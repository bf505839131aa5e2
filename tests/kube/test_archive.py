"""What becomes of the logs of Pods that are taken down, when the API server does not make it easy."""

from __future__ import annotations

import asyncio
import zlib
from base64 import b64decode
from pathlib import Path

import pytest
from aiohttp import web

from cloudai.errors import CloudAIError
from cloudai.store.kube.api import ApiError
from cloudai.store.kube.task_resource import Json
from cloudai_controller.kube import archive as archives
from cloudai_controller.kube import tidy
from cloudai_controller.kube.archive import Archive
from cloudai_controller.kube.facts import Facts
from cloudai_controller.kube.state import SeenPod, seen_pod
from cloudai_controller.kube.tidy import Tidying
from tests.kube.stub import api_of, refused
from tests.kube.test_pods import pod

TASK = {"apiVersion": "cloudai.dev/v1alpha1", "kind": "Task", "name": "t", "uid": "task"}
PODS = "/api/v1/namespaces/here/pods"
GONE = b"unable to retrieve container logs for containerd://" + b"0" * 64
ENDED: Json = {"exitCode": 1, "startedAt": "2025-11-16T10:30:00Z", "finishedAt": "2025-11-16T10:31:00Z"}


def ending(number: int = 1, uid: str = "pod") -> Json:
    """The Pod of an attempt that has ended and is being deleted."""
    container = {"name": "task", "state": {"terminated": ENDED}}
    found = pod({"phase": "Failed", "containerStatuses": [container]}, name=f"t-{number}", uid=uid)
    deleted = {"deletionTimestamp": "2025-11-16T10:31:30Z", "deletionGracePeriodSeconds": 30}
    labels = {"cloudai.dev/task": "t", "cloudai.dev/attempt": str(number)}
    found["metadata"] |= deleted | {"finalizers": ["cloudai.dev/evidence"], "labels": labels}
    return found


class Server:
    """Gives `logs` by Pod, takes ConfigMaps unless it is to refuse them, and lets Pods go."""

    def __init__(self, **logs: bytes) -> None:
        self.logs = {name.replace("_", "-"): data for name, data in logs.items()}
        self.refusals: list[web.Response] = []
        self.kept: list[bytes] = []
        self.asked = asyncio.Event()
        self.silent: set[str] = set()  # Pods whose node does not answer
        self.breaks = 0  # answers with a log that break off in their midst

    async def handle(self, request: web.Request) -> web.StreamResponse:
        if request.method == "POST":
            if self.refusals:
                return self.refusals.pop()
            self.kept.append(zlib.decompress(b64decode((await request.json())["binaryData"]["log.zlib"])))
            return web.json_response({})
        if request.method == "PATCH":
            return web.json_response(pod({}, name=request.path.rpartition("/")[2], version=9))
        self.asked.set()
        if request.path.split("/")[-2] in self.silent:
            await asyncio.Event().wait()
        data = self.logs.get(request.path.removeprefix(f"{PODS}/").removesuffix("/log"))
        if data is not None and self.breaks:
            self.breaks -= 1
            answer = web.StreamResponse(headers={"Content-Length": str(len(data))})
            await answer.prepare(request)
            await answer.write(data[:3])
            assert request.transport is not None
            request.transport.close()
            return answer
        return refused(404, "NotFound") if data is None else web.Response(body=data)


async def followed(archive: Archive, found: SeenPod, server: Server) -> None:
    """What the log is now is what following it brings."""
    server.asked.clear()
    archive.follow(found)
    await server.asked.wait()


async def test_a_log_that_could_not_be_stored_is_stored_by_the_next_try(tmp_path: Path) -> None:
    server, found = Server(t_1=b"words"), seen_pod(ending())
    async with api_of(server.handle, tmp_path) as api:
        archive = Archive(api, "here", lambda _: True)
        await followed(archive, found, server)
        server.logs.clear()
        server.refusals = [refused(403, "Forbidden")]
        with pytest.raises(ApiError, match="Forbidden"):
            await archive.keep(found, TASK)
        await archive.keep(found, TASK)
    assert server.kept == [b"words"]


async def test_a_conflict_that_is_not_about_the_log_passes(tmp_path: Path) -> None:
    server = Server(t_1=b"words")
    server.refusals = [refused(409, "Conflict")]
    async with api_of(server.handle, tmp_path) as api:
        await Archive(api, "here", lambda _: True).keep(seen_pod(ending()), TASK)
    assert server.kept == [b"words"]


async def test_a_log_that_breaks_off_is_read_again(tmp_path: Path) -> None:
    server = Server(t_1=b"words")
    server.breaks = 2
    async with api_of(server.handle, tmp_path) as api:
        archive = Archive(api, "here", lambda _: True)
        with pytest.raises(CloudAIError) as refusal:
            await archive.keep(seen_pod(ending()), TASK)
        assert "broke off after 3 bytes" in refusal.value.details["reason"]
        assert server.kept == []
        await archive.keep(seen_pod(ending()), TASK, at_last=True)
        assert server.kept == [b"wor" + archives.BROKEN]
        await archive.keep(seen_pod(ending()), TASK)
    assert server.kept[1:] == [b"words"]


async def test_a_log_that_is_stored_already_is_well(tmp_path: Path) -> None:
    server = Server(t_1=b"words")
    server.refusals = [refused(409, "AlreadyExists")]
    async with api_of(server.handle, tmp_path) as api:
        await Archive(api, "here", lambda _: True).keep(seen_pod(ending()), TASK)
    assert not server.refusals


@pytest.mark.parametrize("follows", [True, False])
async def test_what_the_kubelet_says_of_a_removed_log_is_no_log(tmp_path: Path, follows: bool) -> None:
    server, found = Server(t_1=GONE), seen_pod(ending())
    async with api_of(server.handle, tmp_path) as api:
        archive = Archive(api, "here", lambda _: True)
        if follows:
            await followed(archive, found, server)
        await archive.keep(found, TASK)
    assert server.kept == []


async def test_another_pod_of_the_same_name_has_a_log_of_its_own(tmp_path: Path) -> None:
    server = Server(t_1=b"old")
    async with api_of(server.handle, tmp_path) as api:
        archive = Archive(api, "here", lambda _: True)
        await followed(archive, seen_pod(ending(uid="before")), server)
        server.logs["t-1"] = b"new"
        await archive.keep(seen_pod(ending()), TASK)
    assert server.kept == [b"new"]


async def test_pods_that_vanish_make_room_for_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "MOST_FOLLOWED", 1)
    server, there = Server(t_1=b"one", t_2=b"two"), {"first"}
    async with api_of(server.handle, tmp_path) as api:
        archive = Archive(api, "here", lambda found: found.uid in there)
        await followed(archive, seen_pod(ending(1, "first")), server)
        there.clear()
        second = seen_pod(ending(2, "second"))
        await followed(archive, second, server)
        server.logs.clear()
        await archive.keep(second, TASK)
    assert server.kept == [b"two"]


@pytest.mark.parametrize("task", ["task", "another"], ids=["given up", "of another task"])
async def test_a_pod_that_is_let_go_makes_room_for_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task: str
) -> None:
    monkeypatch.setattr(archives, "MOST_FOLLOWED", 1)
    monkeypatch.setattr(tidy, "LOG_PATIENCE_MS", -1)
    server = Server(t_1=b"one", t_2=b"two")
    server.refusals = [refused(403, "Forbidden")] if task == "task" else []
    tidied = asyncio.Event()
    async with api_of(server.handle, tmp_path) as api:
        facts = Facts(api, "here", lambda _: None, lambda _: None)
        meta = {"name": "t", "uid": task, "resourceVersion": "5"}
        facts.memory.put_task({"metadata": meta, "spec": {}, "status": {"phase": "Cancelled"}})
        facts.memory.put_pod(ending(1))
        archive = Archive(api, "here", lambda _: True)
        tidying = Tidying(api, PODS, facts, archive, lambda: False, lambda _: tidied.set())
        await followed(archive, seen_pod(ending(1)), server)
        tidying.add("t", "t-1")
        running = asyncio.ensure_future(tidying.run())
        await tidied.wait()
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)

        second = seen_pod(ending(2, "second"))
        await followed(archive, second, server)
        server.logs.clear()
        await archive.keep(second, TASK)
    assert not server.refusals
    assert server.kept == [b"two"]


async def test_a_node_that_does_not_answer_does_not_hold_up_the_pods_of_others(tmp_path: Path) -> None:
    server, let_go = Server(t_20=b"words"), asyncio.Event()
    server.silent = {f"t-{number}" for number in range(1, 20)}
    async with api_of(server.handle, tmp_path) as api:
        facts = Facts(api, "here", lambda _: None, lambda _: None)
        meta = {"name": "t", "uid": "task", "resourceVersion": "5"}
        facts.memory.put_task({"metadata": meta, "spec": {}, "status": {"phase": "Failed"}})
        archive = Archive(api, "here", lambda _: True)
        tidying = Tidying(api, PODS, facts, archive, lambda: False, lambda _: let_go.set())
        for number in range(1, 21):
            found = ending(number, f"pod-{number}")
            found["spec"]["nodeName"] = "silent" if number < 20 else "answers"
            facts.memory.put_pod(found)
            tidying.add("t", f"t-{number}")
        running = asyncio.ensure_future(tidying.run())
        await let_go.wait()
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
    assert server.kept == [b"words"]
