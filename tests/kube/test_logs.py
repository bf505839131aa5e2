"""How the API reads logs, where the kubelet and the Pod do not say the same."""

from __future__ import annotations

import asyncio
import contextlib
import json
import tempfile
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import cast

import pytest
import yaml
from aiohttp import StreamReader, web

from cloudai.errors import CloudAIError, Code
from cloudai.settings import Settings
from cloudai.store.kube import api as requests
from cloudai.store.kube import logs as reads
from cloudai.store.kube import quantity, spool
from cloudai.store.kube.api import Api
from cloudai.store.kube.logs import Absent, Log, PodLogs, archive_body
from cloudai.store.kube.pods import run_of
from cloudai.store.kube.store import KubernetesStore
from cloudai.store.kube.task_resource import Json
from cloudai.store.protocol import LogSlice
from tests.api.conftest import client_of
from tests.kube.kube import ROOT
from tests.kube.stub import BEHIND, NO_LOG, api_of, refused
from tests.kube.test_pods import pod

BEGAN = "2025-11-16T10:30:00Z"
RUNNING: Json = {"running": {"startedAt": BEGAN}}
OVER: Json = {"terminated": {"exitCode": 0, "startedAt": BEGAN, "finishedAt": BEGAN}}
OF = Log("t-1", "task")


def task(uid: str = "task", phase: str = "Running", attempt: int = 1, version: int = 5) -> Json:
    meta = {"name": "t", "namespace": "here", "uid": uid, "resourceVersion": str(version), "creationTimestamp": BEGAN}
    status = {"phase": phase, "attempt": attempt, "startedAt": BEGAN} if attempt else {}
    spec = {"image": "i", "resources": {"cpu": "1", "memory": "1Gi"}}
    return {"apiVersion": "cloudai.dev/v1alpha1", "kind": "Task", "metadata": meta, "spec": spec, "status": status}


def attempt(state: Json, phase: str = "Running", version: int = 5, message: str = "") -> Json:
    found = pod({"phase": phase, "containerStatuses": [{"name": "task", "state": state}]}, version=version)
    found["status"]["conditions"] = [
        {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": message}
    ]
    return found


class Server:
    """Lists and watches, and logs by Pod: `whole` as they can be read, `followed` as they are followed until `closed`."""

    def __init__(self, *objects: Json) -> None:
        self.objects: dict[str, list[Json]] = defaultdict(list)
        for one in objects:
            self.objects["pods" if "spec" in one and "containers" in one["spec"] else "tasks"].append(one)
        self.news: dict[str, asyncio.Queue[Json]] = defaultdict(asyncio.Queue)
        self.whole: dict[str, bytes] = {}
        self.followed: dict[str, bytes] = {}
        self.kept: dict[str, Json] = {}
        self.closed = asyncio.Event()
        self.asked: Counter[str] = Counter()
        self.unreachable = False  # the nodes

    async def handle(self, request: web.Request) -> web.StreamResponse:
        kind = request.path.rpartition("/")[2]
        if kind == "log":
            return await self._log(request, request.path.split("/")[-2])
        if kind in self.kept:
            return web.json_response(self.kept[kind])
        if "watch" in request.query:
            return await self._watch(request, self.news[kind])
        if kind in ("tasks", "pods", "nodes", "leases"):
            return web.json_response({"metadata": {"resourceVersion": "7"}, "items": self.objects[kind]})
        if kind in ("here", "version"):
            return web.json_response({"metadata": {"uid": "place"}})
        return refused(404, "NotFound")

    async def _watch(self, request: web.Request, news: asyncio.Queue[Json]) -> web.StreamResponse:
        stream = web.StreamResponse()
        await stream.prepare(request)
        while True:
            await stream.write(json.dumps({"type": "MODIFIED", "object": await news.get()}).encode() + b"\n")

    async def _log(self, request: web.Request, name: str) -> web.StreamResponse:
        follows = "follow" in request.query
        self.asked["followed" if follows else "whole"] += 1
        if self.unreachable:
            return refused(500, "InternalError")
        data = (self.followed if follows else self.whole).get(name)
        if data is None:
            return refused(404, "NotFound")
        stream = web.StreamResponse()
        await stream.prepare(request)
        await stream.write(data)
        if follows:
            await self.closed.wait()
        return stream


class Pieces(Api):
    """Gives every log in these."""

    def __init__(self, pieces: list[bytes]) -> None:
        self._pieces = pieces

    @contextlib.asynccontextmanager
    async def stream(self, path: str, **query: str | int) -> AsyncIterator[StreamReader]:
        yield cast(StreamReader, self)

    async def iter_any(self) -> AsyncIterator[bytes]:
        for piece in self._pieces:
            yield piece


@contextlib.asynccontextmanager
async def store_of(server: Server, directory: Path) -> AsyncIterator[KubernetesStore]:
    async with api_of(server.handle, directory) as api:
        store = KubernetesStore(api, Settings(namespace="here"))
        try:
            await store.start()
            yield store
        finally:
            server.closed.set()
            await store.close()


@contextlib.asynccontextmanager
async def logs_of(server: Server, directory: Path) -> AsyncIterator[tuple[Api, PodLogs]]:
    async with api_of(server.handle, directory) as api:
        logs = PodLogs(api, "here")
        try:
            yield api, logs
        finally:
            server.closed.set()
            await logs.close()


def brief(followed: bytes, whole: bytes = b"") -> Server:
    """Its streams end at once."""
    server = Server()
    server.followed["t-1"], server.whole["t-1"] = followed, whole
    server.closed.set()
    return server


async def until(came_true: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(10):
        while not await came_true():  # noqa: ASYNC110 - it is tried out, and nothing tells
            await asyncio.sleep(0)


async def read_on(store: KubernetesStore, directory: Path) -> bytes:
    """What a follower gets, to its end."""
    async with client_of(store, Settings(data_dir=directory, rate_limit_enabled=False)) as api:
        return (await api.get("/api/tasks/t/logs?follow=true&attempt=1")).content


# -- followers


async def test_a_follower_whose_stream_ended_waits_for_news_of_its_pod(tmp_path: Path) -> None:
    server = Server(task(), attempt(RUNNING))
    server.whole["t-1"] = server.followed["t-1"] = b"words\n"
    server.closed.set()
    async with store_of(server, tmp_path) as store:
        following = asyncio.ensure_future(read_on(store, tmp_path))
        while not server.asked["followed"]:
            await store.ping()
        for _ in range(30):  # time enough for as many rounds
            await store.ping()
        assert server.asked == {"whole": 1, "followed": 1}
        server.news["pods"].put_nowait(attempt(OVER, "Succeeded", version=8))
        assert await following == b"words\n"
        assert (await store.read_log("t", 1, 0, 100)).complete
    assert server.asked["whole"] == 3


async def test_a_log_is_complete_when_its_container_has_ended_though_another_one_goes_on(tmp_path: Path) -> None:
    server = Server(task(), attempt(OVER))
    server.whole["t-1"] = b"words\n"
    async with store_of(server, tmp_path) as store:
        assert (await store.read_log("t", 1, 0, 100)).complete
        assert await read_on(store, tmp_path) == b"words\n"
    assert server.asked["whole"] == 2


async def test_a_stream_that_stays_open_after_the_end_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reads, "END_SECONDS", 0.05)
    server = Server(task(), attempt(RUNNING))
    server.whole["t-1"] = server.followed["t-1"] = b"words\n"
    async with store_of(server, tmp_path) as store:
        await store.read_log("t", 1, 0, 100)
        await store.wait_log("t", 1, 0, 30)
        server.news["pods"].put_nowait(attempt(OVER, "Succeeded", version=8))
        async for changes in store.watch(0):
            if "succeeded" in {change.event for change in changes}:
                break
        assert await read_on(store, tmp_path) == b"words\n"


async def test_a_stream_that_has_ended_too_early_is_opened_anew_however_many_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spool, "KEPT_SECONDS", 0.05)
    server = brief(b"one\n")

    async def opened_anew() -> bool:
        await logs.wait(OF, 4)
        return server.asked["followed"] == 2

    async with logs_of(server, tmp_path) as (_, logs):
        assert await logs.wait(OF, 0)
        await until(opened_anew)


async def test_who_asks_for_the_same_place_again_gets_what_is_there_by_then(tmp_path: Path) -> None:
    server = Server()
    server.whole["t-1"] = b"0123456789"
    async with logs_of(server, tmp_path) as (_, logs):
        for place in (0, 5, 10):
            assert (await logs.read(OF, place, 100, ended=False)).data == server.whole["t-1"][place:]
        server.whole["t-1"] += b"and more"
        assert (await logs.read(OF, 0, 100, ended=False)).data == server.whole["t-1"]
        assert (await logs.read(OF, 5, 100, ended=False)).data == b"56789and more"
        last = await logs.read(OF, 10, 100, ended=True)
    assert (last.data, last.complete) == (b"and more", True)


async def test_who_reads_what_came_before_a_stream_ended_keeps_nobody_from_what_comes_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spool, "KEPT_SECONDS", 0.05)
    text = b"0123456789\n"
    server = brief(text, text)

    async def more_came() -> bool:
        for offset in range(10):
            assert (await logs.read(OF, offset, 1, ended=False)).data == text[offset : offset + 1]
        return await logs.wait(OF, 11)

    async with logs_of(server, tmp_path) as (_, logs):
        assert await logs.wait(OF, 0)
        server.followed["t-1"] = server.whole["t-1"] = text + b"and more\n"
        await until(more_came)
        assert (await logs.read(OF, 11, 100, ended=False)).data == b"and more\n"


async def test_a_stream_that_ended_and_that_nobody_follows_any_more_hides_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spool, "KEPT_SECONDS", 0.05)
    server = brief(b"0123456789\n", b"0123456789\nand more\n")

    async def more_is_read() -> bool:
        return (await logs.read(OF, 8, 100, ended=False)).data == b"89\nand more\n"

    async with logs_of(server, tmp_path) as (_, logs):
        assert await logs.wait(OF, 0)
        await until(more_is_read)


async def test_a_slow_follower_costs_one_download_after_the_end(tmp_path: Path) -> None:
    server = brief(b"0123456789", b"345")
    async with logs_of(server, tmp_path) as (_, logs):
        assert await logs.wait(OF, 0)
        pieces = [(await logs.read(OF, offset, 2, ended=True)).data for offset in range(2, 10, 2)]
    assert b"".join(pieces) == b"23456789"
    assert server.asked == {"followed": 1, "whole": 1}


async def test_a_slow_follower_gets_what_the_kubelet_has_no_more(tmp_path: Path) -> None:
    server = brief(b"0123456789", b"56789")
    async with logs_of(server, tmp_path) as (_, logs):
        assert await logs.wait(OF, 0)
        assert not await logs.wait(OF, 10)
        assert (await logs.read(OF, 2, 100, ended=True)).data == b"23456789"
        last = await logs.read(OF, 10, 100, ended=True)
        assert (last.data, last.complete) == (b"", True)


async def test_a_stream_that_is_only_just_opened_hides_nothing_from_others(tmp_path: Path) -> None:
    server = Server()
    server.whole["t-1"], server.followed["t-1"] = b"words\n", b"wo"
    async with logs_of(server, tmp_path) as (_, logs):
        following = asyncio.ensure_future(logs.wait(OF, 6))
        for _ in range(2):
            assert (await logs.read(OF, 0, 100, ended=False)).data == b"words\n"
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)


async def test_a_stream_that_breaks_off_is_opened_anew_after_a_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spool, "AGAIN_SECONDS", 0.05)
    server = Server()
    async with logs_of(server, tmp_path) as (_, logs):
        assert await logs.wait(OF, 0)  # there is no such Pod
        server.followed["t-1"] = b"words\n"
        assert await logs.wait(OF, 0)
        assert (await logs.read(OF, 0, 100, ended=False)).data == b"words\n"
    assert server.asked == {"followed": 2}


@pytest.mark.parametrize("words", NO_LOG)
async def test_what_the_kubelet_says_instead_of_a_log_is_no_part_of_one(tmp_path: Path, words: bytes) -> None:
    server = Server(task(), attempt(RUNNING))
    server.whole["t-1"] = b"words\n"
    server.followed["t-1"] = words  # it has removed it, and the Pod does not say yet that it has ended
    server.closed.set()
    async with store_of(server, tmp_path) as store:
        following = asyncio.ensure_future(read_on(store, tmp_path))
        while not server.asked["followed"]:
            await store.ping()
        server.whole["t-1"] = words
        reading = asyncio.ensure_future(store.read_log("t", 1, 0, 100))
        while server.asked["whole"] < 2:
            await store.ping()
        owner = {"apiVersion": "cloudai.dev/v1alpha1", "kind": "Task", "name": "t", "uid": "task"}
        body = archive_body(run_of(attempt(OVER)), owner, b"words\nand more\n")
        server.kept[body["metadata"]["name"]] = body
        server.news["pods"].put_nowait(attempt(OVER, "Succeeded", version=8))
        assert await following == b"words\nand more\n"
        assert (await reading).data == b"words\nand more\n"


@pytest.mark.parametrize("words", BEHIND)
async def test_a_node_that_cannot_follow_a_log_is_asked_for_it_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: bytes
) -> None:
    monkeypatch.setattr(spool, "KEPT_SECONDS", 0.05)
    server = brief(b"one\n" + words)
    async with logs_of(server, tmp_path) as (_, logs):
        assert await logs.wait(OF, 0)
        assert (await logs.read(OF, 0, 100, ended=False)).data == b"one\n"
        assert not await logs.wait(OF, 4)
        assert server.asked == {"followed": 1}
        server.followed["t-1"] = b"one\ntwo\n"
        await until(lambda: logs.wait(OF, 4))
        assert (await logs.read(OF, 4, 100, ended=False)).data == b"two\n"
    assert server.asked == {"followed": 2}


@pytest.mark.parametrize("cut", range(1, 60, 7))
async def test_words_of_the_kubelet_that_come_in_pieces_are_known_too(cut: int) -> None:
    instead, behind = NO_LOG[1], b"one\n" + BEHIND[0]
    logs = PodLogs(Pieces([instead[:cut], instead[cut:]]), "here")
    with pytest.raises(Absent):
        await logs.read(OF, 0, 100, ended=False)
    await logs.close()
    logs = PodLogs(Pieces([behind[:cut], behind[cut:]]), "here")
    assert await logs.wait(OF, 0)
    assert (await logs.read(OF, 0, 100, ended=False)).data == b"one\n"
    await logs.close()


async def test_what_comes_in_pieces_is_put_together() -> None:
    text = b"one\n\ntwo three" + b"x" * 5000 + b"\nfour"
    for size in (1, 7, 1999, 2001, 4096):
        logs = PodLogs(Pieces([text[at : at + size] for at in range(0, len(text), size)]), "here")
        assert (await logs.read(OF, 0, 10_000, ended=True)).data == text
        await logs.close()


@pytest.mark.parametrize("follows", [True, False])
def test_what_a_task_says_is_not_taken_for_the_kubelets(follows: bool) -> None:
    for words in (*NO_LOG, *BEHIND):
        assert reads.kubelet_words(words + b"\n", "t-1", follows=follows) == b""
    for words in NO_LOG:
        assert reads.kubelet_words(words, "t-1", follows=follows) == words
        assert reads.kubelet_words(words, "t-2", follows=follows) == (b"" if b"/task/" in words else words)
    for words in {*NO_LOG, *BEHIND}:
        come_behind = words in BEHIND if follows else b"read log file" in words or b"parse function" in words
        come_behind = come_behind or (follows and b"open log file" in words)
        assert reads.kubelet_words(b"one\n" + words, "t-1", follows=follows) == (words if come_behind else b"")
        assert reads.kubelet_words(words, "t-1", follows=follows, goes_on=True) == (words if come_behind else b"")


async def test_a_node_that_does_not_answer_has_no_empty_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requests, "NO_LOG_SECONDS", 0.0)
    server = Server(task(), attempt(RUNNING))
    server.unreachable = True
    async with store_of(server, tmp_path) as store:
        with pytest.raises(CloudAIError) as told:
            await store.read_log("t", 1, 0, 100)
    assert told.value.code is Code.UNAVAILABLE


async def test_a_container_that_has_not_started_has_an_empty_log_that_goes_on(tmp_path: Path) -> None:
    server = Server(task(phase="Pending"), attempt({"waiting": {"reason": "ContainerCreating"}}, "Pending"))
    async with store_of(server, tmp_path) as store:
        assert await store.read_log("t", 1, 0, 100) == LogSlice(b"", 0, 0, False)


async def test_a_log_that_is_too_long_ends_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spool, "LONGEST", 10)
    server = Server(task(), attempt(RUNNING))
    server.whole["t-1"], server.followed["t-1"] = b"", b"0123456789" * 3 + b"\n"
    async with store_of(server, tmp_path) as store:
        assert await read_on(store, tmp_path) == b"0123456789\n[cloudai: the log was cut at 10 bytes]\n"


# -- whose log it is


async def test_the_pod_of_a_task_before_is_no_attempt_of_this_one(tmp_path: Path) -> None:
    before = attempt({}, "Pending", message="of the task before")
    del before["spec"]["nodeName"]
    server = Server(task("another", "Queued", 0), before)
    server.whole["t-1"] = b"old\n"
    async with store_of(server, tmp_path) as store:
        with pytest.raises(CloudAIError) as told:
            await store.read_log("t", 1, 0, 100)
        assert told.value.code is Code.ATTEMPT_NOT_FOUND
        assert "of the task before" not in ((await store.get_task("t")).message or "")
    server = Server(task("task", "Queued", 0), before)
    async with store_of(server, tmp_path) as store:
        assert "of the task before" in ((await store.get_task("t")).message or "")


async def test_a_log_that_another_task_of_that_name_left_behind_is_not_this_ones(tmp_path: Path) -> None:
    server = Server()
    owner = {"apiVersion": "cloudai.dev/v1alpha1", "kind": "Task", "name": "t", "uid": "before"}
    body = archive_body(run_of(attempt(OVER)), owner, b"old\n")
    server.kept[body["metadata"]["name"]] = body
    async with logs_of(server, tmp_path) as (_, logs):
        with pytest.raises(Absent):
            await logs.read(OF, 0, 100, ended=True)
        found = await logs.read(Log("t-1", "before"), 0, 100, ended=True)
    assert (found.data, found.complete) == (b"old\n", True)


@pytest.mark.parametrize("data", [{}, {"log.zlib": "bm9uZQ=="}, None])
async def test_what_somebody_else_kept_under_its_name_is_no_log(tmp_path: Path, data: Json | None) -> None:
    server = Server()
    server.kept[OF.kept_as] = {"kind": "ConfigMap", "binaryData": data}
    async with logs_of(server, tmp_path) as (_, logs):
        with pytest.raises(Absent):
            await logs.read(OF, 0, 100, ended=True)


# -- what reading costs


@pytest.mark.parametrize("ended", [True, False])
async def test_readers_in_turn_cost_a_download_each_at_most(tmp_path: Path, ended: bool) -> None:
    server = Server()
    server.whole["t-1"] = b"0123456789"
    async with logs_of(server, tmp_path) as (_, logs):
        for offset in range(0, 10, 2):
            for _ in range(2):
                assert (await logs.read(OF, offset, 2, ended=ended)).data == server.whole["t-1"][offset : offset + 2]
    assert server.asked == {"whole": 2}


async def test_logs_that_are_kept_for_their_readers_make_room_for_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reads, "MOST_BYTES", 10)
    server = Server()
    server.whole = {"t-1": b"one", "t-2": b"two-two", "t-3": b"far too long"}
    second, third = Log("t-2", "task"), Log("t-3", "task")
    async with logs_of(server, tmp_path) as (_, logs):
        for _ in range(2):
            assert (await logs.read(OF, 0, 100, ended=True)).data == b"one"
            assert (await logs.read(second, 0, 100, ended=True)).data == b"two-two"
            with pytest.raises(CloudAIError) as told:
                await logs.read(third, 0, 100, ended=True)
            assert "too much" in str(told.value.details)


async def test_a_full_disk_breaks_a_log_off(small_disk: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(small_disk))
    server = Server()
    server.whole["t-1"] = server.followed["t-1"] = bytes(3 * 1024 * 1024)
    async with logs_of(server, tmp_path) as (_, logs):
        with pytest.raises(CloudAIError) as told:
            await logs.read(OF, 0, 100, ended=False)
        assert "No space" in str(told.value.details)
        assert await logs.wait(OF, 3 * 1024 * 1024 - 1)  # it broke off, too


def test_all_logs_together_fit_where_the_chart_lets_them_be_written() -> None:
    parts = yaml.safe_load_all((ROOT / "manifests" / "cloudai.yaml").read_text())
    places = [one["spec"]["template"]["spec"]["volumes"] for one in parts if one["kind"] == "Deployment"]
    sizes = [volume["emptyDir"]["sizeLimit"] for volumes in places for volume in volumes]
    assert sizes
    assert all(quantity.whole(size) > reads.MOST_BYTES for size in sizes)
