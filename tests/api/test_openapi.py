"""The OpenAPI document against the running API, and a client generated from it."""

from __future__ import annotations

import asyncio
import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from cloudai.api.openapi import document
from cloudai.store.sql import SqlStore
from tests.api.conftest import BODY, Server, error_of, join, start, submit

SECONDS = 300
PATH = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # the generated code is formatted with the project's tools
# Data that breaks the document may be too large as well, which is said first. What is followed or waited for need not end.
CONFIG = """
[checks]
negative_data_rejection.expected-statuses = [400, 403, 404, 405, 413, 415, 429]

[parameters]
"query.follow" = "false"
"query.wait_seconds" = 0
"""


async def run(*command: str, directory: Path) -> str:
    """The output of a program that must succeed."""
    process = await asyncio.create_subprocess_exec(
        *command,
        cwd=directory,
        env=os.environ | {"PATH": PATH},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    async with asyncio.timeout(SECONDS):
        output, _ = await process.communicate()
    assert process.returncode == 0, output.decode()
    return output.decode()


@pytest.mark.timeout(SECONDS)
async def test_the_api_keeps_to_its_own_document(server: Server, store: SqlStore, tmp_path: Path) -> None:
    await join(store)
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{server.port}") as api:
        await start(store, await submit(api))
    await check_document(server.port, tmp_path)


async def check_document(port: int, tmp_path: Path, examples: int = 25) -> None:
    """No answer is a fault, or one that the document does not have."""
    (tmp_path / "schemathesis.toml").write_text(CONFIG)
    await run(
        sys.executable,
        *("-m", "schemathesis.cli", "run", f"http://127.0.0.1:{port}/openapi.json"),
        *("--checks", "all", "--seed", "1", "--max-examples", str(examples), "--no-color"),
        *("--exclude-path", "/metrics", "--request-timeout", "70"),
        directory=tmp_path,
    )


@pytest.mark.timeout(SECONDS)
async def test_a_generated_client_submits_and_reads(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "openapi.json").write_text(json.dumps(document()))
    await run(
        str(Path(sys.executable).parent / "openapi-python-client"),
        *(
            "generate",
            "--path",
            "openapi.json",
            "--meta",
            "none",
            "--output-path",
            "generated_client",
            "--fail-on-warning",
        ),
        directory=tmp_path,
    )
    monkeypatch.syspath_prepend(tmp_path)
    generated: Any = importlib.import_module("generated_client")
    models: Any = importlib.import_module("generated_client.models")
    submit_task: Any = importlib.import_module("generated_client.api.tasks.submit_task")
    get_task: Any = importlib.import_module("generated_client.api.tasks.get_task")
    async with generated.Client(base_url=f"http://127.0.0.1:{server.port}") as client:
        accepted = await submit_task.asyncio(client=client, body=models.TaskRequest.from_dict(BODY))
        task = await get_task.asyncio(accepted.task_id, client=client)
    assert (task.status, task.docker_image, task.req_cpu) == ("queued", BODY["docker_image"], 1.0)


async def test_the_served_document_is_the_generated_one(api: httpx.AsyncClient) -> None:
    assert (await api.get("/openapi.json")).json() == document()


async def test_the_page_needs_nothing_from_elsewhere(api: httpx.AsyncClient) -> None:
    answer = await api.get("/docs")
    assert answer.headers["content-type"].startswith("text/html")
    assert "://" not in answer.text
    assert answer.headers["content-security-policy"].startswith("default-src 'none'; connect-src 'self'")


async def test_health_says_what_is_not_ready(api: httpx.AsyncClient, store: SqlStore) -> None:
    assert (await api.get("/healthz")).json() == {"status": "ok"}
    ready = await api.get("/readyz")
    assert (ready.status_code, ready.json()["ready"]) == (200, True)
    assert "nobody leads" in ready.json()["checks"]["controller"]
    assert ready.headers["x-cloudai-cluster"] == store.cluster_id


async def test_metrics_count_requests_by_pattern(api: httpx.AsyncClient) -> None:
    await error_of(await api.get("/api/tasks/task-1"))
    text = (await api.get("/metrics")).text
    assert 'cloudai_http_requests_total{method="GET",path="/api/tasks/{task_id}",status="404"} 1.0' in text
    assert 'cloudai_tasks{status="queued"} 0.0' in text
