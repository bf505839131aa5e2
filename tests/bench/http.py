"""The HTTP rows: CloudAI's API and the bare application in turn, each under the same server settings and the same load."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from itertools import cycle
from pathlib import Path

import orjson

from tests.bench.load import load
from tests.bench.table import Row, rates
from tests.e2e.cluster import Cluster, eventually, free_port

CONNECTIONS = 64
ROUNDS = 7
READ = 500  # tasks
BODY = orjson.dumps(
    {
        "user_id": "user-123",
        "docker_image": "docker.io/library/ubuntu:latest",
        "command": "echo 'Hello World'",
        "req_cpu": 1.0,
        "req_memory": 2.0,
        "req_storage": 5.0,
        "req_gpu": 0.0,
    }
)


def post(path: str, body: bytes = BODY) -> bytes:
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


def get(path: str) -> bytes:
    return f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()


@contextlib.contextmanager
def bare() -> Iterator[int]:
    """The bare application in a process of its own; its port."""
    port = free_port()
    options = (
        "--port",
        str(port),
        "--loop",
        "uvloop",
        "--http",
        "httptools",
        "--no-access-log",
        "--log-level",
        "warning",
    )
    process = subprocess.Popen([sys.executable, "-m", "uvicorn", "tests.bench.bare:app", *options])
    try:
        eventually("the bare application answers", lambda: _listens(port))
        yield port
    finally:
        process.terminate()
        process.wait()


def _listens(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
        return True
    return False


@contextlib.contextmanager
def cloudai(
    *parts: str,
    runtime: str = "process",
    prepare: Callable[[Path], None] | None = None,
    start: bool = True,
    **environment: str,
) -> Iterator[Cluster]:
    """A running CloudAI with these parts beside the API, in a directory that goes away; `prepare` gets its database."""
    with tempfile.TemporaryDirectory(dir=os.environ.get("CLOUDAI_TEST_BENCH_DIR")) as directory:
        cluster = Cluster(Path(directory), runtime, {"CLOUDAI_LOG_LEVEL": "warning"} | environment)
        try:
            if prepare:
                (cluster.directory / "data").mkdir(mode=0o700)
                prepare(cluster.directory / "data" / "cloudai.db")
            if start:
                cluster.api()
            if "controller" in parts:
                cluster.controller()
            yield cluster
        finally:
            cluster.close()


def rate(port: int, requests: Sequence[bytes], count: int) -> float:
    """Answers per second to `count` of these requests, sent in turn."""
    return count / asyncio.run(load(port, cycle(requests), CONNECTIONS, count))


def posts() -> list[Row]:
    """Durable submits against a POST that only parses and answers."""
    ours, theirs = [], []
    with bare() as yardstick, cloudai() as cluster:
        for turn in range(ROUNDS + 1):
            rates_now = (rate(cluster.port, [post("/api/tasks")], 4000), rate(yardstick, [post("/api/tasks")], 4000))
            if turn:  # the first round warms both up
                ours.append(rates_now[0])
                theirs.append(rates_now[1])
    return [rates("durable POST /api/tasks, 64 connections", ours, theirs, 0.5, "make bench ARGS=post")]


def gets() -> list[Row]:
    """Reads of many queued tasks in turn against a GET that answers a constant."""
    ours, theirs = [], []
    with bare() as yardstick, cloudai("controller") as cluster:
        tasks = [cluster.submit("docker.io/library/ubuntu:latest", "echo 'Hello World'") for _ in range(READ)]
        requests = [get(f"/api/tasks/{task_id}") for task_id in tasks]
        for turn in range(ROUNDS + 1):
            rates_now = (rate(cluster.port, requests, 4000), rate(yardstick, requests, 4000))
            if turn:
                ours.append(rates_now[0])
                theirs.append(rates_now[1])
    return [rates("GET /api/tasks/{id}, 64 connections", ours, theirs, 0.6, "make bench ARGS=get")]
