"""docs/api-reference.md is the contract: its examples are run over every store, and every field and status in it is there."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import pytest
import websockets

from cloudai.api.openapi import document
from cloudai.settings import Settings
from tests.api.conftest import BODY, Facade, serving
from tests.engines import missing
from tests.store.worlds import World

REFERENCE = (Path(__file__).parents[2] / "docs" / "api-reference.md").read_text()
GUIDE = (Path(__file__).parents[2] / "docs" / "api.md").read_text()
API = document()
Endpoint = tuple[str, str, str]


def endpoints() -> Iterator[Endpoint]:
    """Method, path and text of each documented endpoint."""
    parts = re.split(r"\*\*Endpoint:\*\* `(GET|POST) (\S+)`", REFERENCE)
    for method, path, text in zip(parts[1::3], parts[2::3], parts[3::3], strict=True):
        yield method, path, re.split(r"^#{2,4} ", text, flags=re.MULTILINE)[0]


ENDPOINTS = list(endpoints())


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def resolved(schema: dict[str, Any]) -> dict[str, Any]:
    name = schema.get("$ref", "").rpartition("/")[2]
    return dict(API["components"]["schemas"][name]) if name else schema


def response_of(method: str, path: str) -> dict[str, Any]:
    operation = API["paths"][path][method.lower()]
    return resolved(operation["responses"]["200"]["content"]["application/json"]["schema"])


def test_every_documented_endpoint_is_found() -> None:
    assert len(ENDPOINTS) == 7


@pytest.mark.parametrize("endpoint", ENDPOINTS, ids=lambda endpoint: " ".join(endpoint[:2]))
def test_documented_statuses_and_fields_are_in_the_openapi_document(endpoint: Endpoint) -> None:
    method, path, text = endpoint
    operation = API["paths"][path][method.lower()]
    assert set(re.findall(r"^- `(\d{3})`", text, re.MULTILINE)) <= set(operation["responses"])
    examples = [json.loads(block) for block in blocks(text, "json")]
    assert set(examples[-1]) <= set(response_of(method, path)["properties"])
    if len(examples) == 2:
        body = resolved(operation["requestBody"]["content"]["application/json"]["schema"])
        assert set(examples[0]) <= set(body["properties"])


async def test_real_answers_have_the_documented_fields_and_types(shared_facade: Facade) -> None:
    running = await shared_facade.running()
    for method, path, text in sorted(ENDPOINTS):  # reads first
        path = path.format(task_id=running, worker_id=shared_facade.world.worker_id)
        body = BODY if (method, path) == ("POST", "/api/tasks") else None
        answer = await shared_facade.http.request(method, path, json=body)
        assert answer.status_code == 200, answer.text
        same_form(json.loads(blocks(text, "json")[-1]), answer.json())


def same_form(documented: Any, real: Any, place: str = "", nullable: Collection[str] = ()) -> None:
    """Every field of the documented value is in the real one, with the same type; or null, where docs/api.md says so."""
    if real is None and place.rpartition(".")[2] in nullable:
        return
    assert type(documented) is type(real), place
    if isinstance(documented, dict):
        for name, value in documented.items():
            assert name in real, f"{place}.{name}"
            same_form(value, real[name], f"{place}.{name}", nullable)
    elif isinstance(documented, list):
        assert real, place
        same_form(documented[0], real[0], f"{place}[0]", nullable)
    elif isinstance(documented, str) and documented.endswith("Z"):
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", real), place


async def test_a_telemetry_update_has_the_documented_form(shared_facade: Facade) -> None:
    documented = json.loads(blocks(REFERENCE.partition("**Message Format:**")[2], "json")[0])
    await shared_facade.running()
    async with websockets.connect(f"ws://127.0.0.1:{shared_facade.port}/ws/telemetry", proxy=None) as socket:
        message = json.loads(await socket.recv())
    assert message["type"] == documented["type"]
    same_form(documented, message, nullable=NOT_ALWAYS_KNOWN)


NOT_ALWAYS_KNOWN = ("progress", "cpu_usage", "memory_usage")


@pytest.mark.parametrize("name", NOT_ALWAYS_KNOWN)
def test_what_is_not_always_known_is_said_to_be_null(name: str) -> None:
    row = next(line for line in GUIDE.splitlines() if line.startswith("| telemetry") and f"`{name}`" in line)
    assert "null" in row


# ---- the examples, as a reader would run them; only the port is another one


@pytest.fixture
def default_settings(tmp_path: Path) -> Settings:
    return Settings(data_dir=tmp_path)


async def run(*command: str) -> str:
    process = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    output, errors = await process.communicate()
    assert process.returncode == 0, errors.decode()
    return output.decode()


async def test_the_curl_examples_work(facade: Facade, default_settings: Settings) -> None:
    submitting, listing = blocks(REFERENCE.partition("## Examples")[2], "bash")
    async with serving(facade.world.store, default_settings) as server:

        async def shell(example: str) -> Any:
            return json.loads(await run("sh", "-c", example.replace("localhost:8080", f"127.0.0.1:{server.port}")))

        answer = await shell(submitting)
        assert (answer["status"], answer["message"]) == ("queued", "Task submitted successfully")
        assert (await facade.task(answer["task_id"]))["command"] == "echo Hello World"
        assert await shell(listing) == {"tasks": [], "total": 0, "limit": 50, "offset": 0}
        running = await facade.running()
        assert [task["task_id"] for task in (await shell(listing))["tasks"]] == [running]


async def test_the_javascript_example_works(world: World, default_settings: Settings, tmp_path: Path) -> None:
    node = shutil.which("node")
    if node is None:
        missing("Node", "apt-get install nodejs")
    (example,) = blocks(REFERENCE, "javascript")
    script = tmp_path / "example.js"
    async with serving(world.store, default_settings) as server:
        ending = "\nws.addEventListener('message', () => ws.close());\nws.onerror = () => process.exit(1);\n"
        script.write_text(example.replace("localhost:8080", f"127.0.0.1:{server.port}") + ending)
        version = int((await run(node, "--version")).removeprefix("v").partition(".")[0])
        flags = [] if version >= 22 else ["--experimental-websocket"]
        output = await run(node, *flags, str(script))
    assert "Telemetry: {" in output
    assert "telemetry_update" in output
