"""The OpenAPI document against the running API over every store, and a client generated from it."""

from __future__ import annotations

import asyncio
import importlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from cloudai.api.openapi import document
from tests.api.conftest import BODY, Facade, error_of

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
async def test_the_api_keeps_to_its_own_document(shared_facade: Facade, tmp_path: Path) -> None:
    """No answer is a fault, or one that the document does not have."""
    await shared_facade.running()
    (tmp_path / "schemathesis.toml").write_text(CONFIG)
    await run(
        sys.executable,
        *("-m", "schemathesis.cli", "run", f"http://127.0.0.1:{shared_facade.port}/openapi.json"),
        *("--checks", "all", "--seed", "1", "--max-examples", "25", "--no-color"),
        *("--request-timeout", "70"),
        directory=tmp_path,
    )


@pytest.fixture(scope="module")
def generated_client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The package `generated_client` can be imported."""
    directory = tmp_path_factory.mktemp("generated")
    (directory / "openapi.json").write_text(json.dumps(document()))
    wish = ("generate", "--path", "openapi.json", "--meta", "none", "--output-path", "generated_client")
    program = str(Path(sys.executable).parent / "openapi-python-client")
    asyncio.run(run(program, *wish, "--fail-on-warning", directory=directory))
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(directory)
        yield


@pytest.mark.timeout(SECONDS)
@pytest.mark.usefixtures("generated_client")
async def test_a_generated_client_submits_and_reads(facade: Facade) -> None:
    generated: Any = importlib.import_module("generated_client")
    models: Any = importlib.import_module("generated_client.models")
    submit_task: Any = importlib.import_module("generated_client.api.tasks.submit_task")
    get_task: Any = importlib.import_module("generated_client.api.tasks.get_task")
    async with generated.Client(base_url=f"http://127.0.0.1:{facade.port}") as client:
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


async def test_health_says_what_is_not_ready(facade: Facade) -> None:
    assert (await facade.http.get("/healthz")).json() == {"status": "ok"}
    ready = await facade.http.get("/readyz")
    assert (ready.status_code, ready.json()["ready"]) == (200, True)
    assert "nobody leads" in ready.json()["checks"]["controller"]
    assert ready.headers["x-cloudai-cluster"] == facade.world.store.cluster_id


async def test_metrics_count_tasks_and_requests_by_pattern(facade: Facade) -> None:
    await facade.submit()
    await error_of(await facade.http.get("/api/tasks/task-1"))
    text = (await facade.http.get("/metrics")).text
    assert 'cloudai_http_requests_total{method="GET",path="/api/tasks/{task_id}",status="404"} 1.0' in text
    assert 'cloudai_tasks{status="queued"} 1.0' in text
