"""Containers finished per second: CloudAI against a loop of threads that makes the same calls of the `docker` SDK.

Both work on one engine, with one image, the same limits and network, and as many containers at a time.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any

import docker

from cloudai.resources import GIB, Resources, Run
from cloudai.settings import Settings
from cloudai_agent.docker_config import Engine, container_config
from tests.bench.http import cloudai
from tests.bench.table import Row, rates
from tests.e2e.cluster import Cluster, eventually
from tests.engines.dockerd import PrivateDocker
from tests.engines.images import build_busybox

AT_ONCE = 8  # containers
COUNT = 80  # containers a round
ROUNDS = 5
LIMITS = Resources(1000, 64 * 1024 * 1024, 0, 0)
COMMAND = "echo done"


@contextmanager
def docker_cluster(host: str) -> Iterator[Cluster]:
    """`cloudai up` on this engine, whose worker has room for AT_ONCE containers."""
    with cloudai(start=False, runtime="docker", DOCKER_HOST=host, CLOUDAI_NETWORK="none") as cluster:
        flags = ("--cpu", str(AT_ONCE), "--memory", "64", "--storage", "10")
        part = cluster.start("up", "up", "--port", str(cluster.port), "--runtime", "docker", *flags)
        eventually("it is ready", lambda: cluster.answers(part) and cluster.http.get("/readyz").status_code == 200)
        yield cluster


def through_cloudai(cluster: Cluster, image: str) -> float:
    """Containers finished per second, from the first submit to the last task that is finished."""
    limits = {"req_cpu": LIMITS.cpu / 1000, "req_memory": LIMITS.memory / GIB}
    began = time.perf_counter()
    tasks = [cluster.submit(image, COMMAND, **limits) for _ in range(COUNT)]
    for task_id in reversed(tasks):  # the last is the first to be waited for, so that little is asked
        eventually("it ends", partial(_completed, cluster, task_id))
    return COUNT / (time.perf_counter() - began)


def _completed(cluster: Cluster, task_id: str) -> bool:
    task = cluster.http.get(f"/api/tasks/{task_id}", params={"wait_seconds": 30}).raise_for_status().json()
    assert task["status"] not in ("failed", "cancelled"), task
    return bool(task["status"] == "completed")


def bare(host: str, image: str) -> float:
    """The same containers from AT_ONCE threads that do nothing but the calls."""
    api: Any = docker.APIClient(base_url=host, version="auto", timeout=60, max_pool_size=4 * AT_ONCE)
    engine = Engine.of(api.info())
    settings = Settings(network="none")

    def one(_: int) -> None:
        run = Run(task_id=f"bare-{uuid.uuid4().hex}", attempt=1, worker_id="bare", user_id="bench", image=image,
                  command=COMMAND, resources=LIMITS)  # fmt: skip
        api.inspect_image(image)
        config = container_config(api, run, settings, {"cloudai.bench": "bare"}, engine)
        identity = api.create_container_from_config(config, name=run.run_id)["Id"]
        api.start(identity)
        assert b"".join(api.logs(identity, stream=True, follow=True)) == b"done\n"
        api.wait(identity)
        assert api.inspect_container(identity)["State"]["ExitCode"] == 0
        api.remove_container(identity, v=True)

    with ThreadPoolExecutor(AT_ONCE) as pool:
        began = time.perf_counter()
        list(pool.map(one, range(COUNT)))
        seconds = time.perf_counter() - began
    api.close()
    return COUNT / seconds


def finished() -> list[Row]:
    ours, theirs = [], []
    with PrivateDocker() as engine:
        image = build_busybox(engine.host)
        with docker_cluster(engine.host) as cluster:
            for turn in range(ROUNDS + 1):
                now = through_cloudai(cluster, image), bare(engine.host, image)
                if turn:  # the first round warms both up
                    ours.append(now[0])
                    theirs.append(now[1])
    what = f"containers finished, {AT_ONCE} at a time"
    return [rates(what, ours, theirs, 0.9, "make bench ARGS=containers")]
