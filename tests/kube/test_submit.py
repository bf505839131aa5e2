"""What a submit is answered where the cluster does not take the Task."""

from __future__ import annotations

from pathlib import Path

import pytest
from aiohttp import web

from cloudai.errors import CloudAIError, Code
from cloudai.resources import GIB, Resources, TaskSpec
from cloudai.settings import Settings
from cloudai.store.kube.store import KubernetesStore
from tests.kube.stub import api_of

SPEC = TaskSpec(user_id="ann", image="busybox", command=None, resources=Resources(1000, GIB, 0, 0))

DENIED = 'admission webhook "team-quota" denied the request: no'


def status(code: int, reason: str, words: str) -> web.Response:
    return web.json_response({"kind": "Status", "code": code, "reason": reason, "message": words}, status=code)


@pytest.mark.parametrize(
    ("code", "reason", "words", "answer"),
    [
        (403, "Forbidden", "ValidatingAdmissionPolicy 'p' with binding 'b' denied request: no", Code.INVALID_REQUEST),
        (413, "RequestEntityTooLarge", "limit is 3145728", Code.INVALID_REQUEST),
        (403, "Forbidden", 'User "x" cannot create resource "tasks"', Code.UNAVAILABLE),
        (403, "Forbidden", "exceeded quota: q", Code.UNAVAILABLE),
        (403, "Forbidden", "status unknown for quota: q", Code.UNAVAILABLE),
        (401, "Unauthorized", DENIED, Code.INVALID_REQUEST),
        (404, "NotFound", DENIED, Code.INVALID_REQUEST),
        (406, "NotAcceptable", DENIED, Code.INVALID_REQUEST),
        (409, "Conflict", DENIED, Code.INVALID_REQUEST),
        (409, "AlreadyExists", DENIED, Code.INVALID_REQUEST),
        (422, "Invalid", DENIED, Code.INVALID_REQUEST),
        (429, "TooManyRequests", DENIED, Code.UNAVAILABLE),
        (503, "ServiceUnavailable", DENIED, Code.UNAVAILABLE),
    ],
)
async def test_what_lasts_is_the_clients_and_what_passes_is_not(
    tmp_path: Path, code: int, reason: str, words: str, answer: Code
) -> None:
    asked: list[str] = []

    async def handle(request: web.Request) -> web.Response:
        asked.append(request.method)
        return status(code, reason, words)

    async with api_of(handle, tmp_path) as api:
        with pytest.raises(CloudAIError) as refusal:
            await KubernetesStore(api, Settings(namespace="here")).create_task(SPEC)
    assert refusal.value.code is answer
    assert words in str(refusal.value.details["reason"])
    assert asked == ["POST"]


async def test_a_cluster_without_the_task_resource_says_what_to_install(tmp_path: Path) -> None:
    async def handle(_: web.Request) -> web.Response:
        return web.Response(status=404, text="404 page not found")

    async with api_of(handle, tmp_path) as api:
        with pytest.raises(CloudAIError, match="manifests/crds") as refusal:
            await KubernetesStore(api, Settings(namespace="here")).create_task(SPEC)
    assert refusal.value.code is Code.UNAVAILABLE


async def test_a_conflict_about_something_else_passes(tmp_path: Path) -> None:
    asked: list[str] = []

    async def handle(request: web.Request) -> web.Response:
        asked.append(request.method)
        if len(asked) == 1:
            return status(409, "Conflict", "the count of a quota has changed")
        made = await request.json()
        made["metadata"] |= {"uid": "u", "resourceVersion": "5", "creationTimestamp": "2025-11-16T10:30:00Z"}
        return web.json_response(made, status=201)

    async with api_of(handle, tmp_path) as api:
        task = await KubernetesStore(api, Settings(namespace="here")).create_task(SPEC)
    assert task.spec.user_id == "ann"
    assert asked == ["POST", "POST"]
