"""What becomes of the logs of Pods that are taken down, when the API server does not make it easy."""

from __future__ import annotations

import asyncio
import contextlib
import zlib
from base64 import b64decode
from collections.abc import AsyncIterator, Callable
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
from tests.kube.stub import BEHIND, NO_LOG, api_of, refused
from tests.kube.test_pods import pod

TASK = {"apiVersion": "cloudai.dev/v1alpha1", "kind": "Task", "name": "t", "uid": "task"}
PODS = "/api/v1/namespaces/here/pods"
ENDED: Json = {"exitCode": 1, "startedAt": "2025-11-16T10:30:00Z", "finishedAt": "2025-11-16T10:31:00Z"}


def at_last(_: Exception) -> bool:
    return True


def ended(number: int = 1, uid: str = "pod") -> Json:
    """The Pod of an attempt that has ended."""
    container = {"name": "task", "state": {"terminated": ENDED}}
    found = pod({"phase": "Failed", "containerStatuses": [container]}, name=f"t-{number}", uid=uid)
    labels = {"cloudai.dev/task": "t", "cloudai.dev/attempt": str(number)}
    found["metadata"] |= {"finalizers": ["cloudai.dev/evidence"], "labels": labels}
    return found


def ending(number: int = 1, uid: str = "pod") -> Json:
    """One that is being deleted, too."""
    found = ended(number, uid)
    found["metadata"] |= {"deletionTimestamp": "2025-11-16T10:31:30Z", "deletionGracePeriodSeconds": 30}
    return found


class Server:
    """Gives `logs` by Pod, takes ConfigMaps unless it is to refuse them, and lets Pods go."""

    def __init__(self, **logs: bytes) -> None:
        self.logs = {name.replace("_", "-"): data for name, data in logs.items()}
        self.refusals: list[web.Response] = []
        self.kept: list[bytes] = []
        self.released: list[str] = []
        self.asked = asyncio.Event()
        self.reads = 0
        self.silent: dict[str, asyncio.Event] = {}  # Pods whose node does not answer before that
        self.breaks = 0  # answers with a log that break off in their midst
        self.stalls = 0  # and those that bring nothing more from there on
        self.unknown = 0  # and those of a node that does not know the Pod
        self.over = asyncio.Event()
        self._news = asyncio.Event()

    async def until(self, true: Callable[[], bool]) -> None:
        async with asyncio.timeout(3):
            while not true():
                self._news.clear()
                await self._news.wait()

    async def handle(self, request: web.Request) -> web.StreamResponse:
        if request.method == "POST":
            if self.refusals:
                return self.refusals.pop()
            self.kept.append(zlib.decompress(b64decode((await request.json())["binaryData"]["log.zlib"])))
            self._news.set()
            return web.json_response({})
        if request.method == "PATCH":
            self.released.append(request.path.rpartition("/")[2])
            self._news.set()
            return web.json_response(pod({}, name=self.released[-1], version=9))
        self.asked.set()
        self.reads += 1
        self._news.set()
        name = request.path.removeprefix(f"{PODS}/").removesuffix("/log")
        if name in self.silent:
            await self.silent[name].wait()
        if self.unknown:
            self.unknown -= 1
            return refused(404, "NotFound", "pods/log")
        data = self.logs.get(name)
        if data is not None and (self.breaks or self.stalls):
            answer = web.StreamResponse(headers={"Content-Length": str(len(data))})
            await answer.prepare(request)
            await answer.write(data[:3])
            if self.stalls:
                self.stalls -= 1
                await self.over.wait()
                return answer
            self.breaks -= 1
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
        await archive.keep(seen_pod(ending()), TASK, at_last)
        assert server.kept == [b"wor" + archives.BROKEN]
        await archive.keep(seen_pod(ending()), TASK)
    assert server.kept[1:] == [b"words"]


@pytest.mark.parametrize("fault", ["breaks", "stalls"])
async def test_what_was_followed_until_it_broke_off_or_hung_is_kept_at_last_of_a_dead_node(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    monkeypatch.setattr(archives, "END_SECONDS", 0.2)
    monkeypatch.setattr(archives, "READ_SECONDS", 0.2)
    server, found = Server(t_1=b"words"), seen_pod(ending())
    setattr(server, fault, 1)
    async with api_of(server.handle, tmp_path) as api:
        archive = Archive(api, "here", lambda _: True)
        await followed(archive, found, server)
        server.silent["t-1"] = asyncio.Event()
        with pytest.raises(CloudAIError):
            await archive.keep(found, TASK)
        assert server.kept == []
        await archive.keep(found, TASK, at_last)
        archive.forget(found)
        server.over.set()
    assert server.kept == [b"wor" + archives.BROKEN]


async def test_a_log_that_is_stored_already_is_well(tmp_path: Path) -> None:
    server = Server(t_1=b"words")
    server.refusals = [refused(409, "AlreadyExists")]
    async with api_of(server.handle, tmp_path) as api:
        await Archive(api, "here", lambda _: True).keep(seen_pod(ending()), TASK)
    assert not server.refusals


@pytest.mark.parametrize("words", NO_LOG)
@pytest.mark.parametrize("follows", [True, False])
async def test_what_the_kubelet_says_of_a_removed_log_is_no_log(tmp_path: Path, follows: bool, words: bytes) -> None:
    server, found = Server(t_1=words), seen_pod(ending())
    async with api_of(server.handle, tmp_path) as api:
        archive = Archive(api, "here", lambda _: True)
        if follows:
            await followed(archive, found, server)
        await archive.keep(found, TASK)
    assert server.kept == []


@pytest.mark.parametrize("end", [b"", *BEHIND])
@pytest.mark.parametrize(("again", "kept"), [(b"words", b"words"), (NO_LOG[0], b"wor")])
async def test_what_was_followed_is_read_again_since_it_may_have_ended_too_early(
    tmp_path: Path, end: bytes, again: bytes, kept: bytes
) -> None:
    server, found = Server(t_1=b"wor" + end), seen_pod(ending())
    async with api_of(server.handle, tmp_path) as api:
        archive = Archive(api, "here", lambda _: True)
        await followed(archive, found, server)
        server.logs["t-1"] = again
        await archive.keep(found, TASK)
    assert server.kept == [kept + (archives.BROKEN if end and again == NO_LOG[0] else b"")]


async def test_of_a_node_that_is_gone_what_was_followed_says_that_it_may_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archives, "READ_SECONDS", 0.2)
    server, found, silent = Server(t_1=b"words", t_2=b""), seen_pod(ending()), seen_pod(ending(2, "second"))
    async with api_of(server.handle, tmp_path) as api:
        archive = Archive(api, "here", lambda _: True)
        for one in (found, silent):
            await followed(archive, one, server)
        server.silent = {"t-1": asyncio.Event(), "t-2": asyncio.Event()}
        for one in (found, silent):
            with pytest.raises(CloudAIError):
                await archive.keep(one, TASK)
            await archive.keep(one, TASK, at_last)
    assert server.kept == [b"words" + archives.BROKEN]


@pytest.mark.parametrize("comes", [True, False])
async def test_a_kubelet_that_does_not_know_the_pod_yet_is_asked_again_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, comes: bool
) -> None:
    monkeypatch.setattr(tidy, "KUBELET_MS", 50)
    server = Server()
    server.unknown = 1 if comes else 2
    server.logs["t-1"] = b"words"
    async with tidied(server, tmp_path, ended()):
        await server.until(lambda: server.released == ["t-1"])
    assert (server.reads, server.kept) == (2, [b"words"] if comes else [])


async def test_a_node_that_does_not_answer_any_more_is_waited_for_though_it_did_not_know_the_pod_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tidy, "KUBELET_MS", 50)
    server = Server(t_1=b"words")
    server.unknown, server.breaks = 1, 2
    async with tidied(server, tmp_path, ended()):
        await server.until(lambda: server.released == ["t-1"])
    assert server.kept == [b"words"]


async def test_what_was_followed_of_a_pod_that_its_node_does_not_know_says_that_it_may_go_on(tmp_path: Path) -> None:
    server, found = Server(t_1=b"words"), seen_pod(ending())
    async with api_of(server.handle, tmp_path) as api:
        archive = Archive(api, "here", lambda _: True)
        await followed(archive, found, server)
        server.unknown = 1
        await archive.keep(found, TASK, at_last)
    assert server.kept == [b"words" + archives.BROKEN]


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


@contextlib.asynccontextmanager
async def tidied(server: Server, tmp_path: Path, *pods: Json) -> AsyncIterator[Facts]:
    """All these Pods of one Task that has ended are tidied up after, in that order."""
    async with api_of(server.handle, tmp_path) as api:
        facts = Facts(api, "here", lambda _: None, lambda _: None)
        meta = {"name": "t", "uid": "task", "resourceVersion": "5"}
        facts.memory.put_task({"metadata": meta, "spec": {}, "status": {"phase": "Failed"}})
        tidying = Tidying(api, PODS, facts, Archive(api, "here", lambda _: True), lambda: False, lambda _: None)
        for one in pods:
            facts.memory.put_pod(one)
            tidying.add("t", one["metadata"]["name"])
        running = asyncio.ensure_future(tidying.run())
        yield facts
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


async def test_a_node_that_does_not_answer_does_not_hold_up_the_pods_of_others(tmp_path: Path) -> None:
    server = Server(t_20=b"words")
    server.silent = {f"t-{number}": asyncio.Event() for number in range(1, 20)}
    other = ending(20, "pod-20")
    other["spec"]["nodeName"] = "answers"
    async with tidied(server, tmp_path, *(ending(number, f"pod-{number}") for number in range(1, 20)), other):
        await server.until(lambda: bool(server.kept))
    assert server.kept == [b"words"]


async def test_the_next_pod_of_a_node_has_its_turn_as_soon_as_one_is_over(tmp_path: Path) -> None:
    numbers = range(1, 41)
    server = Server(**{f"t_{number}": str(number).encode() for number in numbers})
    async with tidied(server, tmp_path, *(ended(number, f"pod-{number}") for number in numbers)):
        await server.until(lambda: len(server.kept) == len(numbers))
    assert {int(log) for log in server.kept} == set(numbers)


async def test_of_pods_that_wait_for_their_node_the_urgent_are_first_and_those_gone_keep_none_waiting(
    tmp_path: Path,
) -> None:
    server = Server(t_1=b"read", t_9=b"last", t_10=b"urgent")
    server.silent = {f"t-{number}": asyncio.Event() for number in range(1, 5)}
    pods = [ended(number, f"pod-{number}") for number in range(1, 10)]
    async with tidied(server, tmp_path, *pods, ending(10, "pod-10")) as facts:
        await server.until(lambda: server.reads == 4)
        for number in range(5, 9):
            facts.memory.drop_pod("t", f"t-{number}", f"pod-{number}")
        server.silent["t-1"].set()
        await server.until(lambda: len(server.kept) == 3)
    assert server.kept == [b"read", b"urgent", b"last"]
