from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from tests.api.conftest import BODY, error_of, submit

JSON = {"Content-Type": "application/json"}
PYRAMID = "[" * 100_000

WRONG_FIELDS: list[tuple[str, Any, str]] = [
    ("req_cpu", 0, "must be greater than 0"),
    ("req_cpu", 0.0, "must be greater than 0"),
    ("req_cpu", -1.0, "must be greater than 0"),
    ("timeout_seconds", -(10**400), "must be greater than 0"),
    ("req_cpu", 0.0001, "must be at least 0.001"),
    ("req_cpu", 100_001, "must be at most 100000"),
    ("req_cpu", "1", "must be a number"),
    ("req_cpu", True, "must be a number"),
    ("req_cpu", None, "must be a number"),
    ("req_cpu", [1], "must be a number"),
    ("req_memory", 0, "must be greater than 0"),
    ("req_memory", -2, "must be greater than 0"),
    ("req_memory", 0.001, "must be at least 0.005859375"),
    ("req_memory", 1_048_577, "must be at most 1048576"),
    ("req_storage", -0.5, "must be at least 0"),
    ("req_storage", "5", "must be a number"),
    ("req_gpu", -1, "must be at least 0"),
    ("req_gpu", 1025, "must be at most 1024"),
    ("req_gpu", False, "must be a number"),
    ("user_id", "", "must not be empty"),
    ("user_id", "x" * 257, "must have at most 256 characters"),
    ("user_id", "a\0b", "must not have control characters, or blanks at its ends"),
    ("user_id", " a", "must not have control characters, or blanks at its ends"),
    ("user_id", 7, "must be a string"),
    ("docker_image", "", "must not be empty"),
    ("docker_image", "x" * 513, "must have at most 512 characters"),
    ("command", "x" * 32_001, "must have at most 32000 characters"),
    ("command", ["x" * 16_000, "y" * 16_001], "must have at most 32000 characters in all"),
    ("command", ["x"] * 1001, "must have at most 1000 items"),
    ("command", "a\0b", "must not contain NUL"),
    ("command", 5, "must be a string or a list of strings"),
    ("command", {"a": 1}, "must be a string or a list of strings"),
    ("timeout_seconds", 0, "must be greater than 0"),
    ("timeout_seconds", 1.5, "must be a whole number"),
    ("timeout_seconds", True, "must be a whole number"),
    ("max_retries", -1, "must be at least 0"),
    ("max_retries", 101, "must be at most 100"),
]


@pytest.mark.parametrize(("field", "value", "reason"), WRONG_FIELDS)
async def test_a_wrong_value_is_refused_with_field_and_reason(
    api: httpx.AsyncClient, field: str, value: Any, reason: str
) -> None:
    answer = await api.post("/api/tasks", json=BODY | {field: value})
    assert answer.status_code == 400
    assert await error_of(answer) == {
        "code": "INVALID_REQUEST",
        "message": "Invalid request parameters",
        "details": {"field": field, "reason": reason},
    }


@pytest.mark.parametrize("literal", ["NaN", "Infinity", "-Infinity", "1e400", "-1e400"])
@pytest.mark.parametrize("field", ["req_cpu", "req_memory", "req_storage", "req_gpu"])
async def test_a_number_that_is_not_finite_is_refused(api: httpx.AsyncClient, field: str, literal: str) -> None:
    body = json.dumps(BODY | {field: "HERE"}).replace('"HERE"', literal)
    error = await error_of(answer := await api.post("/api/tasks", content=body, headers=JSON))
    assert answer.status_code == 400
    assert error["details"] == {"field": field, "reason": "must be a finite number"}


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"nonsense",
        b'{"user_id": "\xff"}',
        b'{"user_id": "\\ud800"}',
        b'{"user_id": "\\udc00\\ud800"}',
        b'{"user_id": 1,}',
        b"\xef\xbb\xbf{}",
        PYRAMID.encode(),
        b'{"user_id": ' + PYRAMID.encode(),
    ],
    ids=["empty", "cut", "words", "latin1", "surrogate", "swapped", "comma", "bom", "deep", "deep field"],
)
async def test_bad_json_is_refused(api: httpx.AsyncClient, body: bytes) -> None:
    answer = await api.post("/api/tasks", content=body, headers=JSON)
    assert answer.status_code == 400
    error = await error_of(answer)
    assert error["details"]["field"] == "body"
    assert error["details"]["reason"].startswith("is not valid JSON")


@pytest.mark.parametrize("body", ["null", "[]", "7", '"text"', "true"])
async def test_a_body_that_is_no_object_is_refused(api: httpx.AsyncClient, body: str) -> None:
    answer = await api.post("/api/tasks", content=body, headers=JSON)
    assert (await error_of(answer))["details"] == {"field": "body", "reason": "must be a JSON object"}


@pytest.mark.parametrize("field", ["user_id", "docker_image", "req_cpu", "req_memory"])
async def test_what_is_required_is_named(api: httpx.AsyncClient, field: str) -> None:
    answer = await api.post("/api/tasks", json={name: value for name, value in BODY.items() if name != field})
    assert (await error_of(answer))["details"] == {"field": field, "reason": "is required"}


async def test_storage_gpu_and_command_may_be_left_out(api: httpx.AsyncClient) -> None:
    small = {name: BODY[name] for name in ("user_id", "docker_image", "req_cpu", "req_memory")}
    task_id = (await api.post("/api/tasks", json=small)).json()["task_id"]
    task = (await api.get(f"/api/tasks/{task_id}")).json()
    assert (task["req_storage"], task["req_gpu"], task["command"]) == (0.0, 0.0, None)


async def test_an_unknown_field_is_refused_with_the_nearest_known_name(api: httpx.AsyncClient) -> None:
    answer = await api.post("/api/tasks", json=BODY | {"req_mem": 1})
    details = {"field": "req_mem", "reason": "is not a known field; did you mean req_memory?"}
    assert (await error_of(answer))["details"] == details


async def test_an_endless_unknown_name_is_not_sent_back_whole(api: httpx.AsyncClient) -> None:
    answer = await api.post("/api/tasks", json=BODY | {"x" * 10_000: 1})
    assert answer.status_code == 400
    assert len(answer.content) < 500


async def test_an_item_of_a_command_is_named(api: httpx.AsyncClient) -> None:
    answer = await api.post("/api/tasks", json=BODY | {"command": ["echo", 1]})
    assert (await error_of(answer))["details"] == {"field": "command[1]", "reason": "must be a string"}


IMAGES = (
    "ubuntu",
    "ubuntu:latest",
    "docker.io/library/ubuntu:latest",
    "localhost:5000/a/b:1.0_x-y",
    "127.0.0.1:5000/busybox",
    "[::1]:5000/busybox",
    "ghcr.io/some-org/some__name.x@sha256:" + "a" * 64,
    "example.com/a:tag@sha256:" + "0" * 64,
)
NO_IMAGES = (
    "Ubuntu",
    "ubuntu latest",
    "ubuntu:",
    ":latest",
    "ubuntu:la test",
    "/ubuntu",
    "ubuntu/",
    "a//b",
    "http://docker.io/ubuntu",
    "ubuntu@sha256:abc",
    "-ubuntu",
    "ubuntu-",
    "ubuntu\n",
    "ubuntu\0",
    "übuntu",
    "ubuntu:" + "x" * 129,
    "a..b",
    "--privileged",
)


@pytest.mark.parametrize("image", IMAGES)
async def test_an_image_reference_of_dockers_grammar_is_taken(api: httpx.AsyncClient, image: str) -> None:
    task_id = await submit(api, docker_image=image)
    assert (await api.get(f"/api/tasks/{task_id}")).json()["docker_image"] == image


@pytest.mark.parametrize("image", NO_IMAGES)
async def test_a_malformed_image_reference_is_refused(api: httpx.AsyncClient, image: str) -> None:
    answer = await api.post("/api/tasks", json=BODY | {"docker_image": image})
    assert answer.status_code == 400
    assert (await error_of(answer))["details"]["field"] == "docker_image"


async def test_a_list_may_be_as_long_as_a_string(api: httpx.AsyncClient) -> None:
    command = ["x" * 16_000, "y" * 16_000]
    task_id = await submit(api, command=command)
    assert (await api.get(f"/api/tasks/{task_id}")).json()["command"] == command


@pytest.mark.parametrize(("command", "kept"), [("", None), ([], None), ([""], [""]), (["a", "b c"], ["a", "b c"])])
async def test_an_empty_command_leaves_the_images_own(api: httpx.AsyncClient, command: Any, kept: Any) -> None:
    task_id = await submit(api, command=command)
    assert (await api.get(f"/api/tasks/{task_id}")).json()["command"] == kept


@pytest.mark.parametrize(
    ("query", "field", "reason"),
    [
        ("limit=0", "limit", "must be greater than 0"),
        ("limit=1001", "limit", "must be at most 1000"),
        ("limit=ten", "limit", "must be a whole number"),
        ("limit=1.0", "limit", "must be a whole number"),
        ("limit=", "limit", "must be a whole number"),
        ("limit=1&limit=2", "limit", "is given more than once"),
        ("offset=-1", "offset", "must be at least 0"),
        ("offset=99999999999999999999999", "offset", "must be a whole number"),
        ("status=done", "status", "must be one of queued, pending, running, completed, failed, cancelled"),
        ("user_id=", "user_id", "must not be empty"),
        ("user_id=a%00b", "user_id", "must not have control characters, or blanks at its ends"),
        ("user_id=%ff", "query", "is not a proper UTF-8 query string"),
        ("view=all", "view", "must be one of summary, full"),
        ("lmit=1", "lmit", "is not a known parameter; did you mean limit?"),
    ],
)
async def test_a_wrong_query_is_refused(api: httpx.AsyncClient, query: str, field: str, reason: str) -> None:
    answer = await api.get(f"/api/tasks?{query}")
    assert answer.status_code == 400
    assert (await error_of(answer))["details"] == {"field": field, "reason": reason}
