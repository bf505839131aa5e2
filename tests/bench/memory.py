"""How much memory `cloudai up` takes with many tasks queued, and an agent alone."""

from __future__ import annotations

import asyncio
from pathlib import Path

import psutil

from cloudai.store.sql import open_store
from tests.bench.http import cloudai
from tests.bench.placements import queue
from tests.bench.table import Row, at_most
from tests.e2e.cluster import Cluster, Part, eventually
from tests.engines.dockerd import PrivateDocker
from tests.engines.images import build_busybox

QUEUED = 100_000
TASKS = 50  # that the agent has run before it is looked at


def _megabytes(part: Part) -> float:
    """The most that its processes have held at once: as of now for the children, ever for itself."""
    process = psutil.Process(part.process.pid)
    peak = next(
        int(line.split()[1]) * 1024
        for line in Path(f"/proc/{process.pid}/status").read_text().splitlines()
        if line.startswith("VmHWM")
    )
    return (peak + sum(child.memory_info().rss for child in process.children(recursive=True))) / 1e6


def _fill(database: Path) -> None:
    """More tasks than the machine has room for."""

    async def fill() -> None:
        store = await open_store(f"sqlite:///{database}")
        await queue(store, QUEUED, cores=10_000)
        await store.close()

    asyncio.run(fill())


def _up() -> Row:
    with cloudai(prepare=_fill, start=False) as cluster:
        part = cluster.start("up", "up", "--port", str(cluster.port), "--runtime", "process")
        eventually("everything is ready", lambda: cluster.answers(part) and _ready(cluster))
        assert cluster.http.get("/api/cluster/status").json()["queued_tasks"] == QUEUED
        for _ in range(10):
            cluster.http.get(
                "/api/tasks", params={"status": "queued", "limit": 1000, "view": "full"}
            ).raise_for_status()
        done = cluster.submit("busybox", "true")
        cluster.until(done, "completed")
        return at_most(f"`cloudai up`, {QUEUED:,} queued", _megabytes(part), 400, "MB", "make bench ARGS=memory")


def _ready(cluster: Cluster) -> bool:
    return cluster.http.get("/readyz").status_code == 200


def _agent() -> Row:
    with (
        PrivateDocker() as engine,
        cloudai("controller", runtime="docker", DOCKER_HOST=engine.host, CLOUDAI_NETWORK="none") as cluster,
    ):
        image = build_busybox(engine.host)
        agent = cluster.agent()
        cluster.finished([cluster.submit(image, "seq 1000") for _ in range(TASKS)])
        return at_most(f"agent, after {TASKS} containers", _megabytes(agent), 80, "MB", "make bench ARGS=memory")


def sizes() -> list[Row]:
    return [_up(), _agent()]
